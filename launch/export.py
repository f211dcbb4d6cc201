"""Exports a run's encoder or classifier for other programs.

python launch/export.py runs/in1k_vith14_ep300 --to encoder.safetensors
python launch/export.py runs/in1k_vith14_ep300 --to ijepa.safetensors --naming transformers
python launch/export.py RUN/checkpoints/step-00006250 --to jepa-ep10.pth.tar --steps-per-epoch 625 --processes 16
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.checkpoint.convert import NAMINGS
from ijepa_scale.checkpoint.export import export_published, export_safetensors
from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.errors import UserError


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=terminal.path, help="run, checkpoint, .pth.tar, .safetensors, timm:NAME or transformers:NAME")
    add("--to", type=terminal.path, required=True, help="file to write: .safetensors, or .pth.tar as published")
    add("--weights", choices=["target", "context"], default="target", help="which encoder")
    add("--naming", choices=NAMINGS, default="published", help="naming scheme of the tensors")
    add("--steps-per-epoch", type=terminal.at_least_1, help=".pth.tar only: the run's steps per epoch")
    processes = ".pth.tar only: processes that will resume (default 1)"
    add("--processes", type=terminal.at_least_1, default=1, help=processes)
    add("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_plugins()
    options = parser.parse_args(arguments)
    to = Path(options.to)
    if to.exists() and not options.overwrite:
        raise UserError(f"{to} exists; name another file, or add --overwrite")
    if to.name.endswith(".pth.tar"):
        if not options.steps_per_epoch:
            raise UserError("a .pth.tar counts epochs; give --steps-per-epoch, the run's samples // batch")
        source = newest(Path(options.source) / "checkpoints") or Path(options.source)
        steps = {"steps_per_epoch": options.steps_per_epoch, "processes": options.processes}
        written = export_published(Checkpoint(source), to, **steps)
    else:
        written = export_safetensors(options.source, to, which=options.weights, naming=options.naming)
    terminal.say(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
