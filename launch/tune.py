"""Measures which settings pretrain fastest on this machine, and writes them to a configuration file.

python launch/tune.py --config configs/demo.yaml
python launch/tune.py --config C.yaml --devices cuda:0 cuda:1 --minutes 30 --to tuned.yaml
python launch/tune.py --config C.yaml --processes 2 data.train=/path/to/shards

Reference: docs/tuning.md
"""

from __future__ import annotations

import sys

from ijepa_scale import terminal
from ijepa_scale.tune.run import STAGES, Options, tune
from ijepa_scale.tune.worst import KINDS


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix or if nothing ran, 130 after Ctrl-C."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    config_help = "YAML file of this package or in the published layout"
    add("--config", "--fname", type=terminal.path, required=True, help=config_help)
    add("--to", type=terminal.path, help="file to write (default: tuned.yaml in the run's folder)")
    add("--devices", nargs="+", help="one process per device, e.g. cuda:0 cuda:1")
    add("--processes", type=int, help="number of processes on this host (default 1)")
    add("--minutes", type=float, default=Options.minutes, help="start no candidate after so many (default %(default)g)")
    candidate_minutes = Options.candidate_minutes
    add("--candidate-minutes", type=float, default=candidate_minutes, help="limit per candidate (default %(default)g)")
    add("--limit", type=int, default=Options.limit, help="largest number of candidates (default %(default)s)")
    add("--steps", type=int, default=Options.steps, help="timed steps per candidate (default %(default)s)")
    add("--warmup", type=int, default=Options.warmup, help="steps before the timed ones (default %(default)s)")
    add("--memory", type=float, help="GB that one process may use (default: the device's, or the host's free memory)")
    add("--worst", choices=KINDS, default=Options.worst, help="masks of the worst step: longest possible or drawn")
    add("--skip", action="append", choices=STAGES, help="stage to skip; may be repeated")
    add("--logs", type=terminal.path, help="folder for the output of each candidate")
    parser.add_plugins()
    add("overrides", nargs="*", help="dotted settings, e.g. data.batch_size=1024")
    flags = vars(parser.parse_intermixed_args(arguments))
    named, config, overrides = flags["devices"] or [], flags.pop("config"), flags.pop("overrides")
    overrides += [word for word in named if "=" in word]  # --devices also collects the words after it
    flags["devices"] = [word for word in named if "=" not in word] or None
    del flags["plugin"]  # imported already
    try:
        tune(config, overrides, Options(**flags))
    except KeyboardInterrupt:
        terminal.report("interrupted; no file was written", "")
        return terminal.INTERRUPTED_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
