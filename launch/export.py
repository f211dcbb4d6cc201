"""Exports a run's encoder or classifier for other programs.

python launch/export.py runs/in1k_vith14_ep300 --to encoder.safetensors
python launch/export.py runs/in1k_vith14_ep300 --to ijepa.safetensors --naming transformers
python launch/export.py RUN/checkpoints/step-00006250 --to jepa-ep10.pth.tar --steps-per-epoch 625 --processes 16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ijepa_scale.checkpoint.convert import NAMINGS
from ijepa_scale.checkpoint.export import export_published, export_safetensors
from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder, checkpoint, .pth.tar, .safetensors, timm:NAME or transformers:NAME")
    parser.add_argument("--to", type=Path, required=True, help="file to write: .safetensors, or .pth.tar as published")
    parser.add_argument("--weights", choices=["target", "context"], default="target", help="which encoder")
    parser.add_argument("--naming", choices=NAMINGS, default="published", help="naming scheme of the tensors")
    parser.add_argument("--steps-per-epoch", type=int, help=".pth.tar only: the run's steps per epoch")
    parser.add_argument(
        "--processes", type=int, default=1, help=".pth.tar only: processes that will resume (default 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    try:
        if options.to.exists() and not options.overwrite:
            raise UserError(f"{options.to} exists; name another file, or add --overwrite")
        if options.to.name.endswith(".pth.tar"):
            if not options.steps_per_epoch:
                raise UserError("a .pth.tar counts epochs; give --steps-per-epoch, the run's samples // batch")
            source = newest(Path(options.source) / "checkpoints") or Path(options.source)
            steps = {"steps_per_epoch": options.steps_per_epoch, "processes": options.processes}
            written = export_published(Checkpoint(source), options.to, **steps)
        else:
            written = export_safetensors(options.source, options.to, which=options.weights, naming=options.naming)
        print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
