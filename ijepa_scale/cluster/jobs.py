"""Submits jobs, asks Slurm about them, and decides how one goes on when its tasks have ended. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale import environment, terminal
from ijepa_scale.cluster import slurm_commands
from ijepa_scale.cluster.job_record import FILE, events, faults, keep_file, note, reached, submitted
from ijepa_scale.errors import UserError

if TYPE_CHECKING:
    from ijepa_scale.cluster.request import Request

# no further start would change these: done, a mistake, no space for the state, Ctrl-C
_FINAL = (0, terminal.USER_ERROR_CODE, terminal.UNSAVED_CODE, terminal.INTERRUPTED_CODE)
# dependencies that wait until the other job has ended, which `after` doesn't. Source: the sbatch manual
_WAITS = re.compile(r"after(?:any|ok|notok|corr|burstbuffer):([\d_:]+)", re.ASCII | re.IGNORECASE)


def submit(request: Request) -> str:
    """Submits a job, notes its number in the folders of its runs, and returns it.

    Raises:
        UserError: an earlier job of a folder waits or runs, there is no sbatch, or it refuses the job.
    """
    text, members = request.file.text(), request.file.members
    _check_free([member.folder for member in members], dict(request.file.directives).get("dependency") or "")
    with _made((request.logs, *((member.folder / FILE).parent for member in members))):
        job = slurm_commands.sbatch(text)
    for number, member in enumerate(members):
        own = f"{job}_{number}" if len(members) > 1 else job
        keep_file(member.folder, text)
        output = str(request.logs / f"slurm-{own}.out")
        note(member.folder, event="submitted", job=own, output=output, checkpoint=reached(member.folder))
    return job


def _check_free(folders: Iterable[Path], dependency: str) -> None:
    """Refuses folders of which an earlier job waits or runs, but for one that the new job waits for."""
    known = [(folder, event) for folder in folders for event in events(folder)]
    earlier = [(folder, event["job"]) for folder, event in known if event["event"] == "submitted"]
    if not earlier:
        return
    waits = [found[1] for part in dependency.split(",") if (found := _WAITS.fullmatch(part))]
    awaited = {number for numbers in waits for number in numbers.split(":")}
    live = slurm_commands.live()
    for folder, job in earlier:
        if job in live and not {job, job.split("_")[0]} & awaited:
            raise UserError(
                f"job {job} of {folder} is {live[job]}; cancel it (launch/slurm.py cancel {folder}), name another "
                f"folder (folder=, or --to of evaluations), or add --dependency afterany:{job}"
            )


@contextlib.contextmanager
def _made(folders: Iterable[Path]) -> Iterator[None]:
    """Makes folders, and removes those that weren't there and are empty if the job is refused."""
    new: list[Path] = []
    try:
        for folder in folders:
            new += reversed([path for path in (folder, *folder.parents) if not path.exists()])
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except slurm_commands.NoAnswerError:
        raise  # the job may be queued, and Slurm doesn't make the folder of its output
    except BaseException:
        for folder in reversed(new):
            with contextlib.suppress(OSError):  # it isn't empty
                folder.rmdir()
        raise


def ended(folder: Path, code: int, *, retries: int) -> str:
    """Notes how the tasks of this job have ended, requeues it if another start may go on, and returns what was done.

    Code 75 asks for another start. After a fault there are `retries` more, counted anew with each new checkpoint; code
    75 without one is a fault too. A job that Slurm is ending already isn't touched: it was cancelled, or Slurm requeues
    it itself.

    Raises:
        UserError: this is no job of Slurm, or Slurm refuses to requeue it.
    """
    job = environment.job()
    if job is None:
        raise UserError("`slurm.py ended` is for the file of a job, and no SLURM_JOB_ID is set; submit one instead")
    newest = reached(folder)
    note(folder, event="ended", job=job, code=code, checkpoint=newest)
    if code in _FINAL:
        return f"exit code {code}: job {job} isn't requeued"
    state = slurm_commands.state(job)[0]
    if state != "RUNNING":
        return f"exit code {code}: job {job} is {state}, so Slurm decides whether it starts again"
    if (count := faults(folder)) > retries:
        return f"exit code {code}: job {job} isn't requeued after {count} faults at {newest or 'no checkpoint'}"
    slurm_commands.call("scontrol", "requeue", job)
    return f"exit code {code}: job {job} requeued at {newest or 'no checkpoint'}"


def status(folder: Path) -> Iterator[str]:
    """Yields lines about the runs in a folder: what Slurm says of the newest job of each, and how far it is.

    Earlier jobs that still wait or run have a line too.

    Raises:
        UserError: no run in the folder was a job, or Slurm doesn't answer.
    """
    for run, number in _jobs(folder):
        state, nodes, elapsed, reason, restarts = slurm_commands.state(number)
        if state == "UNKNOWN":
            last: dict[str, Any] = next(reversed(events(run)), {})
            ending = f"; its tasks last ended with code {last['code']}" if "code" in last else ""
            line = f"job {number}: Slurm no longer knows it{ending}"
        else:
            where = f" on {nodes} for {elapsed}" if nodes else f" ({reason})"
            line = f"job {number}: {state}{where}, restarted {restarts} times"
        newest = reached(run)
        yield f"{run}: {line}; {'no checkpoint yet' if newest is None else f'newest checkpoint {newest}'}"


def cancel(folder: Path) -> Iterator[str]:
    """Cancels the newest job of each run in a folder and earlier ones that still wait or run; yields what was done.

    A running job saves its state.

    Raises:
        UserError: no run in the folder was a job, or Slurm refuses.
    """
    for run, number in _jobs(folder):
        slurm_commands.call("scancel", number)
        yield f"{run}: job {number} cancelled; a running one saves its state, which the next submission goes on from"


def _jobs(folder: Path) -> list[tuple[Path, str]]:
    """Returns the folder with its jobs if it is a run's, or else the runs of a sweep in it with theirs.

    The newest job of a run comes first; its others wait or run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} isn't a run folder; name one, or a sweep's")
    found = [(run, submitted(run)) for run in (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))]
    runs = [(run, jobs) for run, jobs in found if jobs]
    if not runs:
        raise UserError(f"{folder} holds no run that was a job of Slurm; name a run folder, or a sweep's")
    runs = runs[:1] if runs[0][0] == folder else runs
    live = slurm_commands.live() if any(len(jobs) > 1 for _, jobs in runs) else {}
    return [(run, job) for run, jobs in runs for job in dict.fromkeys(jobs[::-1]) if job in live or job == jobs[-1]]
