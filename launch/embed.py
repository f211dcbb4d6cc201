"""Computes the features of images with a trained encoder, and writes them to one file.

Skips and names images that can't be used, and then exits with code 2. If it was killed, run it again: it continues.

python launch/embed.py PHOTOS --model runs/mine --to features.npy
python launch/embed.py PHOTO.jpg OTHER.png --model encoder.safetensors --to features.safetensors --pool last4
torchrun --nproc-per-node 8 launch/embed.py '/data/{000..127}.tar' --model jepa.pth.tar --to features.parquet

Reference: docs/features.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.evaluate.embed import EmbedOptions, embed_here
from ijepa_scale.train import processes


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix or if an image was skipped."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=terminal.existing_path, help="image files, folders, a .txt list of paths, or shards")
    add(
        "--model",
        required=True,
        type=terminal.existing_path,
        help="run, checkpoint, .pth.tar, .safetensors, published:, timm: or transformers:NAME",
    )
    add("--to", type=terminal.path, required=True, help="file to write: .npy, .safetensors or .parquet")
    add("--which", choices=["target", "context"], default="target", help="which encoder (default target)")
    add("--pool", choices=["mean", "last4"], default="mean", help="mean of the tokens of the last block or last 4")
    add("--image-size", type=terminal.at_least_1, help="side of the images in pixels (default: as trained)")
    add("--reader", help="how the images are stored, as in data.reader (default: by their names)")
    add("--batch-size", type=terminal.at_least_1, default=64, help="images per process and forward pass (default 64)")
    add("--workers", type=terminal.at_least_0, default=2, help="decoding processes per process (default 2)")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    add("--processes", type=terminal.at_least_1, help="number of processes to start on this host")
    parser.add_plugins()
    parser.add_local_rank()
    flags = vars(parser.parse_args(arguments))
    started = {name: flags.pop(name) for name in ("devices", "processes")}
    del flags["plugin"], flags["local_rank"]
    processes.run(embed_here, EmbedOptions(**flags | {"to": Path(flags["to"])}), EngineConfig(), **started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
