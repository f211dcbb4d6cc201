"""Makes, verifies, describes and indexes tar shards, and measures their pixels.

python launch/shards.py make --root /data/imagenet/train --to /data/shards
python launch/shards.py verify /data/shards
python launch/shards.py stats /data/photos --channels 13 --pixels uint16

Reference: docs/data.md
"""

from __future__ import annotations

import sys

from ijepa_scale import terminal
from ijepa_scale.data.shards.command_line import add_arguments, run_command


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix or for faulty shards, 130 after Ctrl-C."""
    parser = terminal.Parser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    terminal.log_to_terminal()
    try:
        return run_command(options)
    except KeyboardInterrupt:
        terminal.report("interrupted; run make again with the same arguments to continue", "")
        return terminal.INTERRUPTED_CODE


if __name__ == "__main__":
    sys.exit(main())
