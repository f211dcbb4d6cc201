"""Submits jobs, asks Slurm about them, and decides how one goes on when its tasks have ended. Imports no torch.

Each run folder has a record of its jobs: who was submitted when, and how each start ended.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale import environment, terminal
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import UserError

if TYPE_CHECKING:
    from ijepa_scale.cluster.request import Request

RECORD, FILE = Path("slurm", "jobs.jsonl"), Path("slurm", "job.sh")  # in a run folder
# no further start would change these: done, a mistake, no space for the state, Ctrl-C
_FINAL = (0, terminal.USER_ERROR_CODE, terminal.UNSAVED_CODE, terminal.INTERRUPTED_CODE)
_TIMEOUT_S = 60
_STEP = re.compile(r"step-\d{8,18}", re.ASCII)
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def submit(request: Request) -> str:
    """Submits a job, notes its number in the folders of its runs, and returns it.

    Raises:
        UserError: there is no sbatch, or it refuses the job.
    """
    text, members = request.file.text(), request.file.members
    for folder in (request.logs, *((member.folder / FILE).parent for member in members)):
        folder.mkdir(parents=True, exist_ok=True)
    job = _slurm("sbatch", "--parsable", given=text).split(";")[0].strip()
    for number, member in enumerate(members):
        own = f"{job}_{number}" if len(members) > 1 else job
        _write(member.folder / FILE, text, os.O_TRUNC)
        _note(member.folder, event="submitted", job=own, output=str(request.logs / f"slurm-{own}.out"))
    return job


def ended(folder: Path, code: int, *, retries: int) -> str:
    """Notes how the tasks of this job have ended, requeues it if another start may go on, and returns what was done.

    Code 75 always asks for another start. After a fault there are `retries` more, counted anew with each new
    checkpoint. A job that Slurm is ending already isn't touched: it was cancelled, or Slurm requeues it itself.

    Raises:
        UserError: this is no job of Slurm, or Slurm refuses to requeue it.
    """
    job = environment.job()
    if job is None:
        raise UserError("`slurm.py ended` is for the file of a job, and no SLURM_JOB_ID is set; submit one instead")
    reached = _reached(folder)
    faults = _faults(folder, reached)
    _note(folder, event="ended", job=job, code=code, checkpoint=reached)
    if code in _FINAL:
        return f"exit code {code}: job {job} isn't requeued"
    state = _state(job)[0]
    if state != "RUNNING":
        return f"exit code {code}: job {job} is {state}, so Slurm decides whether it starts again"
    if code != terminal.RESUBMIT_CODE and faults >= retries:
        return f"exit code {code}: job {job} isn't requeued after {faults + 1} faults at {reached or 'no checkpoint'}"
    _slurm("scontrol", "requeue", job)
    return f"exit code {code}: job {job} requeued at {reached or 'no checkpoint'}"


def status(folder: Path) -> Iterator[str]:
    """Yields lines about the runs in a folder: what Slurm says of the newest job of each, and how far it is.

    Raises:
        UserError: no run in the folder was a job, or Slurm doesn't answer.
    """
    for run, number in _jobs(folder):
        state, nodes, elapsed, reason, restarts = _state(number)
        if state == "UNKNOWN":
            last: dict[str, Any] = next(reversed(_record(run)), {})
            ending = f"; its tasks last ended with code {last['code']}" if "code" in last else ""
            line = f"job {number}: Slurm no longer knows it{ending}"
        else:
            where = f" on {nodes} for {elapsed}" if nodes else f" ({reason})"
            line = f"job {number}: {state}{where}, restarted {restarts} times"
        reached = _reached(run)
        yield f"{run}: {line}; {'no checkpoint yet' if reached is None else f'newest checkpoint {reached}'}"


def cancel(folder: Path) -> Iterator[str]:
    """Cancels the newest job of each run in a folder, which saves its state, and yields what was done.

    Raises:
        UserError: no run in the folder was a job, or Slurm refuses.
    """
    for run, number in _jobs(folder):
        _slurm("scancel", number)
        yield f"{run}: job {number} cancelled; a running one saves its state, which the next submission goes on from"


def _jobs(folder: Path) -> list[tuple[Path, str]]:
    """Returns the folder with its newest job if it is a run's, or else the runs of a sweep in it with theirs."""
    found = [(run, _job(run)) for run in (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))]
    jobs = [(run, job) for run, job in found if job is not None]
    if not jobs:
        raise UserError(f"{folder} holds no run that was a job of Slurm; name a run folder, or a sweep's")
    return jobs[:1] if jobs[0][0] == folder else jobs


def _job(run: Path) -> str | None:
    """Returns the number of a run's newest job: as it was submitted here, or else as the run says where it ran."""
    submitted = [event["job"] for event in _record(run) if event["event"] == "submitted"]
    if submitted:
        return submitted[-1]
    try:
        return parse_json((run / "run.json").read_bytes()).get("job")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{run / 'run.json'} isn't JSON ({error}); remove it") from None


def _faults(folder: Path, reached: str | None) -> int:
    """Returns how often in a row the newest job's tasks have ended in a fault at the same checkpoint."""
    count = 0
    for event in reversed(_record(folder)):
        if event["event"] != "ended" or event["code"] == terminal.RESUBMIT_CODE or event["checkpoint"] != reached:
            break
        count += 1
    return count


def _reached(folder: Path) -> str | None:
    """Returns the name of a run's newest checkpoint, by its folder alone: what knows checkpoints imports torch."""
    found = [path.parent.name for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(filter(_STEP.fullmatch, found), key=lambda name: int(name.removeprefix("step-")), default=None)


def _record(folder: Path) -> list[dict[str, Any]]:
    path = folder / RECORD
    if not path.exists():
        return []
    try:
        return [parse_json(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} has a line that isn't JSON ({error}); remove the line") from None


def _note(folder: Path, **event: Any) -> None:
    event["at"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    (folder / RECORD).parent.mkdir(parents=True, exist_ok=True)
    _write(folder / RECORD, json.dumps(event) + "\n", os.O_APPEND)


def _write(path: Path, text: str, mode: int) -> None:
    """Writes a file that no one else may read, since arguments may name private places."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600), "wb") as file:
        file.write(os.fsencode(text))


def _state(job: str) -> tuple[str, str, str, str, str]:
    """Returns a job's state, such as RUNNING or UNKNOWN, its nodes, time, reason to wait, and number of restarts."""
    form = "State:32,NodeList:400,TimeUsed:20,Reason:60,RestartCnt:10"
    try:
        text = _slurm("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", f"--Format={form}")
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        text = ""
    if not text.strip():
        return "UNKNOWN", "", "", "", "0"
    line = text.splitlines()[0]
    return line[:32].strip(), line[32:432].strip(), line[432:452].strip(), line[452:512].strip(), line[512:].strip()


def _slurm(*command: str, given: str | None = None) -> str:
    """Returns the output of a command of Slurm's, with the variables of other launchers taken away.

    Raises:
        UserError: it isn't installed, fails or doesn't answer.
    """
    variables = {name: value for name, value in environment.child_environment().items() if name not in _LAUNCHERS}
    try:
        found = subprocess.run(
            command, input=None if given is None else os.fsencode(given), env=variables, capture_output=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{command[0]} isn't installed here; use a host of the cluster, or add --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} hasn't answered for {_TIMEOUT_S} s; see whether Slurm is well") from None
    if found.returncode:
        said = os.fsdecode(found.stderr or found.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(command)} failed: {'; '.join(said)}")
    return os.fsdecode(found.stdout)
