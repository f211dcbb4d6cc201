"""The record of a run's jobs in its folder: who was submitted when, and how each start ended. Doesn't call Slurm."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from ijepa_scale import terminal
from ijepa_scale.cluster.slurm_commands import is_number
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import UserError

RECORD, FILE = Path("slurm", "jobs.jsonl"), Path("slurm", "job.sh")  # in a run folder
_STEP = re.compile(r"step-\d{8,18}", re.ASCII)


def events(folder: Path) -> list[dict[str, Any]]:
    """Returns what has happened to a run's jobs, in order.

    Raises:
        UserError: a line of the record isn't one that was written here.
    """
    path = folder / RECORD
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"{path} has a line that isn't JSON ({error}); remove the line") from None
        if not _is_event(found[-1]):
            raise UserError(f"{path} has a line that is no event of a job: {os.fsdecode(line)}; remove the line")
    return found


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or not is_number(event.get("job")):
        return False
    reached = event.get("checkpoint")
    if reached is not None and not (isinstance(reached, str) and _STEP.fullmatch(reached)):
        return False
    return event.get("event") == "submitted" or (event.get("event") == "ended" and type(event.get("code")) is int)


def submitted(run: Path) -> list[str]:
    """Returns the numbers of a run's jobs, the newest last: as they were submitted here, or else as the run says.

    Raises:
        UserError: the record or run.json is damaged.
    """
    found = [event["job"] for event in events(run) if event["event"] == "submitted"]
    path = run / "run.json"
    if found:
        return found
    try:
        content = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except ValueError as error:
        raise UserError(f"{path} isn't JSON ({error}); remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r} instead of an object; remove it")
    job = content.get("job")
    if job is not None and not is_number(job):
        raise UserError(f"{path} says that the job is {job!r}, which isn't a job number; correct or remove it")
    return [] if job is None else [job]


def faults(folder: Path) -> int:
    """Returns how often in a row the newest job's tasks have ended in a fault at the newest checkpoint.

    Code 75 is one if there is no newer checkpoint than before: the time limit leaves too little time.
    """
    count, last = 0, -1
    for event in events(folder):
        step = _step(event.get("checkpoint"))
        if event["event"] == "submitted":
            count, last = 0, step
            continue
        is_newer = step > last
        is_fault = event["code"] != terminal.RESUBMIT_CODE or not is_newer
        count, last = (0 if is_newer else count) + is_fault, max(last, step)
    return count


def reached(folder: Path) -> str | None:
    """Returns the name of a run's newest checkpoint, by its folder alone: what knows checkpoints imports torch."""
    found = [path.parent.name for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(filter(_STEP.fullmatch, found), key=_step, default=None)


def _step(name: str | None) -> int:
    return -1 if name is None else int(name.removeprefix("step-"))


def note(folder: Path, **event: Any) -> None:
    """Adds an event to the record."""
    event["at"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    (folder / RECORD).parent.mkdir(parents=True, exist_ok=True)
    _write(folder / RECORD, json.dumps(event) + "\n", os.O_APPEND)


def keep_file(folder: Path, text: str) -> None:
    """Writes the file of the newest job."""
    _write(folder / FILE, text, os.O_TRUNC)


def _write(path: Path, text: str, mode: int) -> None:
    """Writes a file that no one else may read, since arguments may name private places."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600), "wb") as file:
        file.write(os.fsencode(text))
