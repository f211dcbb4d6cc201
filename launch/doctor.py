"""Checks a machine or a cluster before a run: software, GPUs, limits, folders, decoding and links between processes.

python launch/doctor.py --folder runs --data /path/to/shards
python launch/doctor.py --config C.yaml --processes 8 --json doctor.json
torchrun --nnodes 2 --nproc-per-node 8 launch/doctor.py --config C.yaml --folder /shared/runs/mine

Reference: docs/doctor.md
"""

from __future__ import annotations

import sys

from ijepa_scale import terminal
from ijepa_scale.doctor.doctor_flags import add_flags, options_of
from ijepa_scale.doctor.examination import examine_here
from ijepa_scale.train import processes


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if nothing is wrong, 1 if something is, 2 after a mistake in the flags or files."""
    parser = terminal.Parser(description=__doc__)
    add_flags(parser)
    flags = parser.parse_intermixed_args(arguments)
    options, engine, devices = options_of(flags)
    processes.run(examine_here, options, engine, devices=devices, processes=flags.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
