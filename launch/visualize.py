"""Draws what an encoder has learned, and the curves of runs, as PNG files.

python launch/visualize.py pca runs/mine --images photos/val --to pca.png
python launch/visualize.py masks IN1K-vit.h.14-300e.pth.tar --images photos
python launch/visualize.py attention runs/mine --images photos/val --query 0.5 0.4
python launch/visualize.py prediction-error runs/mine --images photos/val
python launch/visualize.py retrieval timm:vit_huge_patch14_gap_224.in1k_ijepa --images photos
python launch/visualize.py curves runs/first runs/second IN1K-vit.h.14-logs-rank.0.csv

Reference: docs/pictures.md
"""

from __future__ import annotations

import sys

from ijepa_scale import terminal
from ijepa_scale.visualize.pictures import add_kinds, draw


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    parser.add_plugins()
    add_kinds(parser)
    flags = vars(parser.parse_args(arguments))
    del flags["plugin"]
    terminal.log_to_terminal()
    terminal.say(draw(flags.pop("kind"), **flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
