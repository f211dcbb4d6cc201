"""Submits runs as Slurm jobs that restart after preemption, a lost node or the time limit, and watches them.

python launch/slurm.py pretrain --config C.yaml --nodes 2 --gpus-per-node 8 --partition P --time 1000
python launch/slurm.py finetune --config C.yaml --gpus-per-node 8 --dry-run             # prints the job file
python launch/slurm.py pretrain --config C.yaml --array lr=1e-3,5e-4 --sbatch account=A data.workers=8
python launch/slurm.py evaluate --gpus-per-node 8 runs/mine --data TRAIN VAL
python launch/slurm.py --fname C.yaml --folder logs --partition P --nodes 2 --tasks-per-node 8 --time 1000
python launch/slurm.py status RUN                                                       # or logs, or cancel

Reference: docs/slurm.md
"""

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.cluster import jobs
from ijepa_scale.train.process_log import merged

SUBMITTED = ("pretrain", "finetune", "evaluate")


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix, or that of the tasks when a job ends."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0].startswith("--") and words[0] != "--help":
        words = ["pretrain", *words]  # as the published code's main_distributed.py is called
    if words and words[0] in SUBMITTED:
        from ijepa_scale.cluster.request import request_of  # imports torch, which `ended` needn't wait for

        request = request_of(words[0], words[1:], Path(__file__).resolve().parent)
        if request.dry_run:
            print(request.file.text(), end="")
        else:
            job, runs = jobs.submit(request), [member.folder for member in request.file.members]
            terminal.say(*(f"job {job}: {run}; see `launch/slurm.py status|logs|cancel {run}`" for run in runs))
        return 0
    parser = terminal.Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, parser_class=terminal.Parser, metavar="pretrain|...")
    for name in SUBMITTED:
        kinds.add_parser(name, help="submit it; --help lists the flags")
    shown = {"status": "what Slurm says", "logs": "lines of all processes, by time", "cancel": "save and end",
             "ended": "requeue a job whose tasks have ended; used by the job file"}  # fmt: skip
    for kind in (kinds.add_parser(name, help=text) for name, text in shown.items()):
        kind.add_argument("run", type=terminal.existing_path, help="run folder, or that of an array of runs")
    kind.add_argument("--code", type=int, required=True, help="exit code of the tasks")
    kind.add_argument("--retries", type=terminal.at_least_0, default=3, help="restarts without progress (default 3)")
    flags = parser.parse_args(words)
    if flags.what == "ended":
        terminal.say(jobs.ended(Path(flags.run), flags.code, retries=flags.retries))
        return flags.code
    for line in {"status": jobs.status, "logs": merged, "cancel": jobs.cancel}[flags.what](Path(flags.run)):
        terminal.say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
