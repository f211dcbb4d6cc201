"""Lists, verifies, compares, removes and converts the checkpoints of a run.

python launch/checkpoint.py ls runs/mine                    # steps and sizes; finds damage that changed a size
python launch/checkpoint.py verify runs/mine                # reads every byte; code 2 if something is damaged
python launch/checkpoint.py diff RUN/checkpoints/step-00001000 RUN/checkpoints/step-00002000
python launch/checkpoint.py rm runs/mine 1000 2000
python launch/checkpoint.py convert runs/mine --to kept/step-00002000    # of many processes: one file

Reference: docs/reliability.md#checkpoints
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.checkpoint.consolidate import consolidate
from ijepa_scale.checkpoint.inspect import checkpoints_of, differences, listed, remove


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if something is damaged or after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, parser_class=terminal.Parser, metavar="ls|verify|...")
    for name, text in (("ls", "list them"), ("verify", "read every byte and compare hashes")):
        kinds.add_parser(name, help=text).add_argument("run", type=terminal.path, help="run or checkpoint folder")
    diff = kinds.add_parser("diff", help="what differs between two")
    diff.add_argument("two", nargs=2, type=terminal.path, metavar="CHECKPOINT")
    removed = kinds.add_parser("rm", help="remove the checkpoints of these steps")
    removed.add_argument("run", type=terminal.path, help="folder of a run")
    removed.add_argument("steps", nargs="+", type=int, metavar="STEP")
    convert = kinds.add_parser("convert", help="merge one into one file, or a few, for any engine")
    convert.add_argument("run", type=terminal.path, help="folder of a run, for its newest one, or a checkpoint")
    convert.add_argument("--to", type=terminal.path, required=True, help="new folder")
    convert.add_argument("--files", type=terminal.at_least_1, default=1, help="number of files (default 1)")
    flags = parser.parse_args(arguments)
    if flags.what == "diff":
        lines = list(differences(*map(Path, flags.two)))
        terminal.say(*(lines or ["no difference"]))
        return 0
    if flags.what == "rm":
        terminal.say(*(f"removed {path}" for path in remove(Path(flags.run), flags.steps)))
        return 0
    if flags.what == "convert":
        written = consolidate(Path(flags.run), Path(flags.to), files=flags.files)
        terminal.say(f"{written}: complete; resume from it with resume={written}")
        return 0
    damaged = 0
    for line in listed(checkpoints_of(Path(flags.run)), hashed=flags.what == "verify"):
        damaged += line.problem is not None
        state = "damaged: " + line.problem if line.problem else "whole" if flags.what == "verify" else "complete"
        terminal.say(f"{line.path}  {line.bytes / 1e6:10.1f} MB  {line.files} files  {line.written}  {state}")
    return terminal.USER_ERROR_CODE if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
