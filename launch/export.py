"""Exports an encoder, classifier or predictor for other programs, in the format that the suffix of the file says.

python launch/export.py runs/in1k_vith14_ep300 --to encoder.safetensors
python launch/export.py runs/in1k_vith14_ep300 --as transformers --to ijepa-vith14
python launch/export.py published:in1k_vith14_ep300 --as timm --to ijepa-vith14-timm
python launch/export.py runs/in1k_vith14_ep300 --to encoder.onnx
python launch/export.py RUN/checkpoints/step-00006250 --to jepa-ep10.pth.tar --steps-per-epoch 625 --processes 16

Reference: docs/weights.md#export
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.checkpoint.convert import NAMINGS
from ijepa_scale.checkpoint.export import FORMATS, PARTS, export
from ijepa_scale.checkpoint.sources import SOURCE_KINDS
from ijepa_scale.errors import UserError


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=terminal.path, help=SOURCE_KINDS)
    to = "file to write: .safetensors, .onnx, .pt2 (torch), .pth.tar (reference); or the folder for --as"
    add("--to", type=terminal.path, required=True, help=to)
    add("--as", dest="kind", choices=FORMATS, help="timm or transformers: write a folder in that format")
    add("--weights", choices=PARTS, default="target", help="which encoder, or the predictor (default target)")
    add("--naming", choices=NAMINGS, default="published", help=".safetensors only: naming scheme of the tensors")
    add("--steps-per-epoch", type=terminal.at_least_1, help=".pth.tar only: the run's steps per epoch")
    processes = ".pth.tar only: processes that will resume from it (default 1)"
    add("--processes", type=terminal.at_least_1, default=1, help=processes)
    add("--heads", type=terminal.at_least_1, help="attention heads, if the source doesn't say")
    add("--overwrite", action="store_true", help="replace the file or folder if it exists")
    parser.add_plugins()
    options = parser.parse_args(arguments)
    to = Path(options.to)
    if to.exists() and not options.overwrite:
        raise UserError(f"{to} exists; give another name, or add --overwrite")
    written = export(
        options.source,
        to,
        kind=options.kind,
        which=options.weights,
        naming=options.naming,
        steps_per_epoch=options.steps_per_epoch,
        processes=options.processes,
        heads=options.heads,
    )
    terminal.say(f"{written.path}: {written.bytes / 1e6:.1f} MB", f"open it with {written.opens}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
