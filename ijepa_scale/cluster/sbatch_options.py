"""Options of sbatch that are passed through, but for those that the job relies on. Starts nothing.

sbatch takes each unambiguous beginning of a name for the name. Source: `sbatch(1)` of Slurm 22.05.
"""

from __future__ import annotations

import re

from ijepa_scale.cluster.job_file import checked
from ijepa_scale.errors import ConfigError

_GPUS = "give --gpus-per-node, or --gpus-per-node 0 with --tasks-per-node and one GPU for each task"
_TASKS = "give --nodes and --tasks-per-node"
_NO_JOB = "give --dry-run to see the file, or run sbatch yourself"
_OUTPUT = "give --folder for the folder of the output"
_REQUEUE = "the job requeues itself; --retries says how often after faults"
_ANSWER = "leave it out: the job's number is read from what sbatch prints"
INSTEAD = {  # long option of sbatch's: what to do instead
    "job-name": "give --name", "chdir": "submit from that folder", "output": _OUTPUT, "error": _OUTPUT,
    "open-mode": "leave it out: each start appends", "nodes": "give --nodes", "ntasks": _TASKS,
    "ntasks-per-node": _TASKS, "tasks-per-node": _TASKS, "ntasks-per-core": _TASKS, "ntasks-per-socket": _TASKS,
    "ntasks-per-gpu": _TASKS, "gpus-per-node": _GPUS, "gpus-per-socket": _GPUS, "gpus": _GPUS, "gpus-per-task": _GPUS,
    "gres": _GPUS, "cpus-per-task": "give --cpus-per-task", "cpus-per-gpu": "give --cpus-per-task",
    "partition": "give --partition", "time": "give --time", "requeue": _REQUEUE, "no-requeue": _REQUEUE,
    "signal": "give --notice", "array": "give --array key=value,value", "dependency": "give --dependency",
    "wrap": "leave it out: the job has a file", "wait": "leave it out: status tells how the job is",
    "test-only": _NO_JOB, "help": _NO_JOB, "usage": _NO_JOB, "version": _NO_JOB, "parsable": _ANSWER, "quiet": _ANSWER,
}  # fmt: skip
_COUNT = re.compile(r"(?:gres/)?(?:[\w.-]+:)*(\d{1,9})(?:\([^)]*\))?", re.ASCII)


def passed(text: str, *, tasks: int, nodes: int, asks_for_gpus: bool) -> tuple[str, str | None]:
    """Returns the name and the value of an option. `tasks` are those of a node.

    Raises:
        ConfigError: it isn't a long option, or the job relies on another value.
    """
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ConfigError(f"--sbatch is {text!r}; write a long option of sbatch's, such as --sbatch account=physics")
    own = [option for option in INSTEAD if option.startswith(name)]
    if own and not _is_one_gpu_per_task(name, value, tasks, nodes, asks_for_gpus):
        full = name if name in own else own[0]
        short = "" if name == full else f", which sbatch may take for {full}"
        raise ConfigError(f"--sbatch names {name}{short}, which this command sets or relies on; {INSTEAD[full]}")
    return name, checked(value) if equals else None


def _is_one_gpu_per_task(name: str, value: str, tasks: int, nodes: int, asks_for_gpus: bool) -> bool:
    """Returns whether an option about GPUs gives each task one, or asks for resources other than GPUs."""
    if name == "gres":
        asked = [part for part in value.split(",") if re.match(r"(gres[/:])?gpu\b", part)]
        others = any(part.strip() in ("", "none", "help") for part in value.split(","))
        return not others and (not asked or (not asks_for_gpus and sum(map(_count, asked)) == tasks))
    expected = {"gpus": tasks * nodes, "gpus-per-task": 1}.get(name)
    return not asks_for_gpus and expected is not None and sum(map(_count, value.split(","))) == expected


def _count(text: str) -> int:
    """Returns how many an item such as gpu:a100:4 asks for; 0 if it isn't of that form."""
    found = _COUNT.fullmatch(text)
    return int(found[1]) if found else int(text == "gpu")
