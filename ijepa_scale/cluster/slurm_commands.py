"""Calls the commands of Slurm and reads their answers. Knows nothing of runs and their records."""

from __future__ import annotations

import os
import re
import subprocess

from ijepa_scale import environment
from ijepa_scale.errors import UserError

_TIMEOUT_S = 60
_NUMBER = re.compile(r"\d+(_\d+)?", re.ASCII)
_ANSWER = re.compile(r"(\d+(?:_\d+)?)(?:;[\w.-]+)?", re.ASCII)  # of `sbatch --parsable`, which may name the cluster
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class NoAnswerError(UserError):
    """A command of Slurm's that hasn't answered in time, but may have been carried out."""


def is_number(value: object) -> bool:
    """Returns whether this is a text that names one job: its number, or that of a task of a job array."""
    return isinstance(value, str) and _NUMBER.fullmatch(value) is not None


def sbatch(text: str) -> str:
    """Submits the text of a job's file and returns the job's number. A site may print lines before it.

    Raises:
        NoAnswerError: sbatch hasn't answered with a number, so the job may be queued.
        UserError: there is no sbatch, or it refuses the job.
    """
    look = "the job may be queued all the same: `squeue --me` shows it"
    try:
        said = call("sbatch", "--parsable", given=text).strip()
    except NoAnswerError as error:
        raise NoAnswerError(f"{error}; {look}") from None
    found = _ANSWER.fullmatch(said.splitlines()[-1].strip()) if said else None
    if found is None:
        raise NoAnswerError(f"sbatch printed {said!r} where a job's number was expected; {look}")
    return found[1]


def state(job: str) -> tuple[str, str, str, str, str]:
    """Returns a job's state, such as RUNNING or UNKNOWN, its nodes, time, reason to wait, and number of restarts."""
    form = "State:32,NodeList:400,TimeUsed:20,Reason:60,RestartCnt:10"
    try:
        text = call("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", f"--Format={form}")
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        text = ""
    if not text.strip():
        return "UNKNOWN", "", "", "", "0"
    line = text.splitlines()[0]
    return line[:32].strip(), line[32:432].strip(), line[432:452].strip(), line[452:512].strip(), line[512:].strip()


def live() -> dict[str, str]:
    """Returns the states of the user's jobs that wait or run, by their numbers, without those that are ending."""
    lines = call("squeue", "--noheader", "--array", "--me", "--format=%i %T").splitlines()
    found = [line.split() for line in lines]
    return {words[0]: words[1] for words in found if len(words) == 2 and words[1] != "COMPLETING"}


def call(*command: str, given: str | None = None) -> str:
    """Returns the output of a command of Slurm's, with the variables of other launchers taken away.

    Raises:
        NoAnswerError: it doesn't answer.
        UserError: it isn't installed or fails.
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
        raise NoAnswerError(f"{command[0]} hasn't answered for {_TIMEOUT_S} s; check that Slurm is running") from None
    if found.returncode:
        said = os.fsdecode(found.stderr or found.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(command)} failed: {'; '.join(said)}")
    return os.fsdecode(found.stdout)
