"""Writes one HTML page about runs: summary, curves, health, pictures, evaluations, throughput and settings.

The page needs no network and no other file. Pictures come from each run's newest checkpoint.

python launch/report.py runs/mine --to report.html
python launch/report.py runs/first runs/second --to report.html --images photos/val
python launch/report.py runs/mine --to report.html --evaluation runs/evaluation/evaluation.json

Reference: docs/pictures.md#the-report
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.visualize.report_page import ReportOptions, write_report


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=terminal.existing_path, help="run folders")
    add("--to", type=terminal.path, default="report.html", help="page to write (default report.html)")
    images = "files, folders or shards for the pictures (default: those that each run was evaluated or trained on)"
    add("--images", nargs="+", default=(), type=terminal.existing_path, help=images)
    evaluation = "evaluation.json files that are outside the run folders, shown with the first run"
    add("--evaluation", dest="evaluations", nargs="+", default=(), type=terminal.existing_path, help=evaluation)
    add("--no-pictures", dest="pictures", action="store_false", help="leave out pictures, which need a checkpoint")
    add("--overwrite", action="store_true", help="replace the page if it exists")
    parser.add_plugins()
    flags = vars(parser.parse_args(arguments))
    del flags["plugin"]
    terminal.log_to_terminal()
    runs, to = flags.pop("runs"), Path(flags.pop("to"))
    terminal.say(write_report(runs, to, ReportOptions(**flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
