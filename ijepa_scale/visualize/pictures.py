"""What `launch/visualize.py` draws: the kinds of pictures, each with its flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_scale import terminal
from ijepa_scale.errors import ConfigError
from ijepa_scale.visualize.curves import draw_runs, read_runs
from ijepa_scale.visualize.sheet import Sheet, draw_sheet
from ijepa_scale.visualize.sheets import attention_sheet, error_sheet, mask_sheet, pca_sheet, retrieval_sheet
from ijepa_scale.visualize.source import PictureSource


class Kind(NamedTuple):
    """A kind of picture: its sheet, what it shows in a few words, and its number of images by default."""

    sheet: Callable[..., Sheet]
    help: str
    images: int = 6


KINDS = {
    "masks": Kind(mask_sheet, "context and targets on images"),
    "pca": Kind(pca_sheet, "patch features as colours"),
    "attention": Kind(attention_sheet, "attention of the last block, by head", images=3),
    "prediction-error": Kind(error_sheet, "where the predictor errs"),
    "retrieval": Kind(retrieval_sheet, "nearest neighbours of images", images=5),
}
_FLAGS: dict[str, dict[str, dict[str, Any]]] = {  # kind -> flag -> what argparse takes
    "masks": {"--step": {"type": int, "default": 0, "help": "of training (default 0)"}},
    "pca": {
        "--times": {"type": terminal.at_least_1, "default": 2, "help": "the trained image size is taken (default 2)"}
    },
    "attention": {
        "--query": {"type": float, "nargs": 2, "metavar": ("X", "Y"), "help": "patch, as shares of width and height"}
    },
    "prediction-error": {
        "--draws": {"type": terminal.at_least_1, "default": 64, "help": "masks of each image (default 64)"}
    },
    "retrieval": {
        "--queries": {"nargs": "+", "default": (), "type": terminal.existing_path, "help": "(default: of the set)"},
        "--neighbors": {"type": terminal.at_least_1, "default": 6, "help": "of each query (default 6)"},
    },
}  # fmt: skip


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Adds a command with its flags for each kind of picture."""
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        command = commands.add_parser(name, help=kind.help, description=kind.help)
        add = command.add_argument
        add("source", type=terminal.existing_path, help="run folder, checkpoint, .pth.tar, .safetensors, or timm:NAME")
        images = "files, folders or shards (default: the run's)"
        add("--images", nargs="+", default=(), type=terminal.existing_path, help=images)
        add("--reader", help="how the images are stored (default: by what they are)")
        if name != "prediction-error":  # which takes both encoders, at the size that the predictor knows
            add("--weights", dest="which", choices=["target", "context"], default="target", help="which encoder")
            add("--image-size", type=terminal.at_least_1, help="side of the encoder's input (default: as trained)")
        add("--heads", type=terminal.at_least_1, help="attention heads, if the source doesn't say")
        add("--count", type=terminal.at_least_1, default=kind.images, help=f"images (default {kind.images})")
        for flag, options in _FLAGS[name].items():
            add(flag, **options)
        _add_file(command, name)
    curves = commands.add_parser("curves", help="curves of several runs", description="curves of several runs")
    runs = "run folders, metrics.jsonl files, or published .csv logs"
    curves.add_argument("runs", nargs="+", type=terminal.existing_path, help=runs)
    fields = "fields of the rows (default: loss, accuracy, spread, rate)"
    curves.add_argument("--fields", nargs="+", default=(), help=fields)
    _add_file(curves, "curves")


def _add_file(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--to", type=terminal.path, default=f"{name}.png", help=f"PNG to write (default {name}.png)")
    command.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def draw(kind: str, *, to: str, overwrite: bool, **options: Any) -> Path:
    """Draws the picture and returns the path of its PNG. `options` are the flags that `add_kinds` declares.

    Raises:
        UserError: the source, the images or the file can't be used.
    """
    path = Path(to)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} ends in {path.suffix!r}; pictures are written as .png")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; name another file with --to, or add --overwrite")
    if kind == "curves":
        return draw_runs(read_runs(options["runs"]), path, options["fields"])
    source = PictureSource(
        **{name: options.pop(name) for name in PictureSource.__dataclass_fields__ if name in options}
    )
    return draw_sheet(KINDS[kind].sheet(source, **options), path)
