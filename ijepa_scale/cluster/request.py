"""Reads the command line of a submission, and checks it as far as that goes before a job starts."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_scale import environment, terminal
from ijepa_scale.cluster.job_file import JobFile, Member
from ijepa_scale.cluster.sbatch_options import passed
from ijepa_scale.config import PretrainConfig, read_config
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.section import Section
from ijepa_scale.errors import ConfigError
from ijepa_scale.evaluate.command_line import add_flags as add_evaluation_flags
from ijepa_scale.train.setup import global_batch

KINDS: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_TIME = re.compile(r"(\d{1,9}-)?\d{1,9}(:\d{1,9}){0,2}", re.ASCII)  # Source: the sbatch manual
_NAME = re.compile(r"[^\w.+,-]+")
_LONGEST_NOTICE_S, _LEAST_RUN_S = 65535, 60  # Source: --signal in the sbatch manual; chosen
_LONGEST_ARRAY = 1000  # Slurm's default MaxArraySize is 1001


@dataclass(frozen=True, kw_only=True)
class Request:
    """A submission."""

    file: JobFile
    logs: Path  # folder of the job's output
    dry_run: bool


def request_of(kind: str, arguments: list[str], scripts: Path) -> Request:
    """Returns what a command line asks for. `kind` is pretrain, finetune or evaluate; `scripts` holds their scripts.

    Raises:
        ConfigError: the configuration, or a run of the sweep, can't be run as asked for.
    """
    script = f"python launch/{kind}.py"
    parser = terminal.Parser(
        description=f"Submits a Slurm job that runs {script}. Add the arguments of that script; "
        f"`{script} --help` lists them.",
        allow_abbrev=False,
    )
    parser.prog += f" {kind}"
    _add_flags(parser)
    if kind == "evaluate":
        flags, words = parser.parse_known_args(arguments)
        _check(parser, flags)
        own = terminal.Parser(prog=script, allow_abbrev=False)
        add_evaluation_flags(own)
        own.set_defaults(folder=None)
        evaluation = own.parse_args(words)
        if evaluation.processes is not None or flags.array:
            parser.error("--processes and --array are not for evaluations; give --tasks-per-node, or submit each one")
        workers, members = evaluation.workers, [_evaluation(evaluation, words)]
    else:
        parser.add_argument("--config", "--fname", required=True, type=terminal.path, help="YAML file")
        parser.add_plugins()
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
        flags = parser.parse_intermixed_args(arguments)
        _check(parser, flags)
        workers, members = _runs(kind, flags)
    return _request(kind, flags, scripts, workers, members)


def _add_flags(parser: terminal.Parser) -> None:
    add, whole = parser.add_argument, terminal.at_least_1
    add("--nodes", type=whole, default=1, help="number of nodes (default 1)")
    add("--gpus-per-node", type=terminal.at_least_0, help="GPUs of a node (default: --tasks-per-node; 0: none)")
    add("--tasks-per-node", type=whole, help="processes of a node (default: one per GPU)")
    add("--cpus-per-task", type=whole, help="cores of a process (default: data.workers + 1)")
    add("--partition", help="partition of the cluster (default: the cluster's)")
    add("--time", type=_time, help="time limit in minutes, or like 2-00:00:00 (default: the partition's)")
    add("--name", help="name of the job (default: the run folder's)")
    add("--array", action="append", default=[], metavar="key=value,value", help="one run per value; can be repeated")
    add("--dependency", help="as for sbatch, such as afterok:1234")
    add("--sbatch", action="append", default=[], metavar="option=value", help="any other of sbatch's long options")
    add("--folder", type=terminal.path, help="folder of the job's output (default: logs in the run folder)")
    add("--notice", type=_notice, default=120, help="seconds before the time limit to save and requeue (default 120)")
    add("--retries", type=terminal.at_least_0, default=3, help="restarts after failures without progress (default 3)")
    add("--dry-run", action="store_true", help="print the job file and submit nothing")


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"is {text!r}; give minutes, or days-hours:minutes:seconds")
    return text


def _notice(text: str) -> int:
    notice = terminal.at_least_1(text)
    if notice > _LONGEST_NOTICE_S:
        raise argparse.ArgumentTypeError(f"is {text!r}; sbatch takes at most {_LONGEST_NOTICE_S} seconds")
    return notice


def _check(parser: terminal.Parser, flags: argparse.Namespace) -> None:
    """Refuses flags that contradict each other."""
    gpus, tasks = flags.gpus_per_node, flags.tasks_per_node
    if gpus and tasks and gpus != tasks:
        parser.error(f"--gpus-per-node is {gpus} and --tasks-per-node {tasks}; one task trains on one GPU, so give one")
    limit = _seconds(flags.time) if flags.time else 0
    if limit and limit < flags.notice + _LEAST_RUN_S:
        parser.error(
            f"--notice {flags.notice} leaves less than a minute of --time {flags.time}, so the job would be requeued "
            "at once; give a longer --time or a shorter --notice"
        )


def _seconds(text: str) -> int:
    """Returns the seconds of a limit as Slurm writes it; 0 is no limit."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = 0, 0, 0
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        minutes, seconds = (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _evaluation(flags: argparse.Namespace, words: Sequence[str]) -> Member:
    """Returns an evaluation; without --to it gets a folder of its own by the name of what is evaluated."""
    if flags.folder is not None:
        return Member(folder=_absolute(flags.folder), arguments=tuple(words))
    name = _NAME.sub("-", flags.source).strip("-.")[-60:]  # bytes of a name are limited
    folder = Path("runs", "evaluation", name or "source")
    return Member(folder=_absolute(folder), arguments=("--to", str(folder), *words))


def _runs(kind: str, flags: argparse.Namespace) -> tuple[int, list[Member]]:
    """Returns the number of workers of a process, and the runs that a command line asks for."""
    plugins = (word for name in flags.plugin for word in ("--plugin", name))
    words = ("--config", environment.written_path(flags.config), *plugins)
    tasks = flags.nodes * _tasks(flags)
    config = _checked_run(kind, flags.config, flags.overrides, tasks)
    if not flags.array:
        return config.data.workers, [Member(folder=_absolute(config.folder), arguments=(*words, *flags.overrides))]
    members = []
    for name, settings in _points(kind, flags.array):
        folder = environment.written_path(Path(config.folder) / name)
        overrides = [*flags.overrides, *settings, f"folder={folder}"]
        member = _checked_run(kind, flags.config, overrides, tasks)
        members.append(Member(folder=_absolute(member.folder), arguments=(*words, *overrides)))
    return config.data.workers, members


def _checked_run(kind: str, path: str, overrides: Sequence[str], tasks: int) -> Any:
    """Returns a run's configuration; what a recipe chooses by the machine has its default in it.

    Raises:
        ConfigError: it can't be read, or the batch can't be divided over the tasks.
    """
    chosen: list[dict[str, Any]] = []

    def choose(_: Mapping[str, Any]) -> dict[str, Any]:
        chosen.append({})
        return chosen[-1]

    config = read_config(path, overrides, kind=KINDS[kind], choose=choose).config
    if not chosen:
        global_batch(config, tasks)
    return config


def _points(kind: str, arrays: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the name and the settings of each run of a sweep.

    Raises:
        ConfigError: a setting is unknown, is swept twice or has no values, or two runs would have one name.
    """
    axes, keys = [], []
    for text in arrays:
        short, equals, values = text.partition("=")
        if not equals or not all(split := _split(values)):
            raise ConfigError(f"--array is {text!r}; write key=value,value, such as optimizer.lr=1e-3,5e-4")
        keys.append(_full(kind, short))
        if keys[-1] == "folder":
            raise ConfigError("--array names folder, but settings name each run's folder; give folder= of the sweep")
        axes.append([(short, keys[-1], value) for value in split])
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"--array names {', '.join(twice)} twice; give all of its values at once")
    if math.prod(map(len, axes)) > _LONGEST_ARRAY:
        raise ConfigError(f"--array asks for more than {_LONGEST_ARRAY} runs; submit it in parts")
    names: set[str] = set()
    for point in itertools.product(*axes):
        name = "_".join(f"{short}-{_NAME.sub('-', value)}" for short, _, value in point)
        if name in names:
            raise ConfigError(f"--array asks for two runs named {name}; give values that differ in letters or digits")
        names.add(name)
        yield name, tuple(f"{key}={value}" for _, key, value in point)


def _split(text: str) -> list[str]:
    """Returns the parts between commas that aren't inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _full(kind: str, short: str) -> str:
    """Returns the dotted name of a setting, of which the last part will do where it is the only one."""
    keys = known_keys(KINDS[kind])
    found = [key for key in keys if key.endswith(f".{short}")]
    if short in keys or "." in short or not found:
        return short  # an unknown one is refused with the configuration
    if len(found) > 1:
        raise ConfigError(f"--array names {short}, which may be {' or '.join(found)}; write one of them")
    return found[0]


def _request(kind: str, flags: argparse.Namespace, scripts: Path, workers: int, members: Sequence[Member]) -> Request:
    is_array = len(members) > 1
    base = members[0].folder.parent if is_array else members[0].folder
    logs = _absolute(flags.folder) if flags.folder else base / "logs"
    if "\\" in str(logs):
        raise ConfigError(f"{logs} holds a backslash, which Slurm gives a meaning of its own; name another folder")
    tasks = _tasks(flags)
    gpus = tasks if flags.gpus_per_node is None else flags.gpus_per_node
    cpus = flags.cpus_per_task or workers + 1
    directives = {
        "job-name": flags.name or base.name, "chdir": str(Path.cwd()),
        "output": f"{str(logs).replace('%', '%%')}/slurm-{'%A_%a' if is_array else '%j'}.out", "open-mode": "append",
        "nodes": str(flags.nodes), "ntasks-per-node": str(tasks), "gpus-per-node": str(gpus) if gpus else "",
        "cpus-per-task": str(cpus), "partition": flags.partition or "", "time": flags.time or "",
        "array": f"0-{len(members) - 1}" if is_array else "", "dependency": flags.dependency or "",
        "signal": f"USR1@{flags.notice}",
    }  # fmt: skip
    lines: list[tuple[str, str | None]] = [(name, value) for name, value in directives.items() if value]
    more = [passed(text, tasks=tasks, nodes=flags.nodes, asks_for_gpus=bool(gpus)) for text in flags.sbatch]
    file = JobFile(
        directives=(*lines, ("requeue", None), *more),
        script=(sys.executable, str(scripts / f"{kind}.py")),
        ended=(sys.executable, str(scripts / "slurm.py"), "ended", "--retries", str(flags.retries)),
        cpus_per_task=cpus,
        members=tuple(members),
    )
    return Request(file=file, logs=logs, dry_run=flags.dry_run)


def _tasks(flags: argparse.Namespace) -> int:
    return flags.tasks_per_node or flags.gpus_per_node or 1


def _absolute(path: str | Path) -> Path:
    return Path.cwd() / path
