"""Makes, indexes and describes tar shards: `make`, `index`, `info`. Floor 5: parses and calls."""

from __future__ import annotations

import argparse
import logging
import sys

from ijepa_scale.data.index import expand, index_tar
from ijepa_scale.data.source import ImageFolderSource, ShardSource
from ijepa_scale.data.write import source_samples, write_shards
from ijepa_scale.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write shards from labelled images")
    make.add_argument("--from", dest="reader", choices=["imagefolder"], default="imagefolder", help="what ROOT is")
    make.add_argument("--root", required=True, help="folder with CLASS/*.jpg, or with train/CLASS/*.jpg")
    make.add_argument("--to", required=True, help="folder for the shards; must not hold any yet")
    make.add_argument("--shard-mb", type=float, default=256, help="size of a shard, MB (default 256)")
    make.add_argument("--prefix", default="shard", help="beginning of the shards' names")
    make.add_argument("--seed", type=int, default=0, help="of the order in which samples are written")
    for name, text in (("index", "write the indices beside the shards"), ("info", "count samples and labels")):
        commands.add_parser(name, help=text).add_argument("pattern", help="folder, glob or {000..127} pattern")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "make":
            source = ImageFolderSource(options.root)
            samples = source_samples(source, seed=options.seed)
            shard_bytes = int(options.shard_mb * 1e6)
            shards = write_shards(
                samples, options.to, shard_bytes=shard_bytes, prefix=options.prefix, classes=source.classes
            )
            print(f"{source.num_samples} samples in {len(shards)} shards in {options.to}")
        elif options.command == "index":
            for path in expand(options.pattern):
                print(f"{path}: {len(index_tar(path))} samples")
        else:
            shards_read = ShardSource(expand(options.pattern))
            labels = {shards_read.label(sample) for sample in range(shards_read.num_samples)} - {-1}
            print(f"{shards_read.num_samples} samples in {len(shards_read.shard_sizes)} shards, {len(labels)} labels")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
