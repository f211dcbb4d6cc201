"""Makes, verifies, describes and indexes tar shards, and measures their pixels."""

from __future__ import annotations

import argparse
import logging
import sys

from ijepa_scale.data.shards.command_line import add_arguments, run_command
from ijepa_scale.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix or for faulty shards, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run_command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run make again with the same arguments to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
