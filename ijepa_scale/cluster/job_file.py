"""The file that `sbatch` takes: directives, and the commands of a run with its arguments quoted. Starts nothing."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ijepa_scale.errors import ConfigError

_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_WAIT_S = 120  # that other tasks of a step may take once one has ended, before srun kills them


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of the job: the only one, or one of a job array."""

    folder: Path  # absolute
    arguments: tuple[str, ...]  # of the launch script


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What an sbatch file says."""

    directives: tuple[tuple[str, str | None], ...]  # names of sbatch's long options, and values
    script: tuple[str, ...]  # what each task runs, without a member's arguments
    ended: tuple[str, ...]  # what decides how the job goes on, without folder and exit code
    cpus_per_task: int
    members: tuple[Member, ...]

    def text(self) -> str:
        """Returns the file.

        Raises:
            ConfigError: a word can't stand in it.
        """
        lines = ["#!/bin/bash", *(_directive(name, value) for name, value in self.directives), ""]
        lines.append("# Slurm runs this again after each requeue, and the run goes on from its newest checkpoint.")
        if len(self.members) == 1:
            lines += _assignments(self.members[0])
        else:
            lines.append('case "$SLURM_ARRAY_TASK_ID" in')
            for number, member in enumerate(self.members):
                lines += [f"{number})", *(f"  {line}" for line in _assignments(member)), "  ;;"]
            lines += ["*) echo 'error: submit this file as a job array' >&2; exit 2 ;;", "esac"]
        lines.append("trap : TERM  # Slurm ends the job: wait for the tasks, which save their state")
        # srun of Slurm 22.05 and later doesn't take the job's --cpus-per-task. Source: its man page
        flags = f"--label --kill-on-bad-exit=0 --wait={_WAIT_S} --cpus-per-task={self.cpus_per_task}"
        lines.append(f"srun {flags} \\\n  {quoted(self.script)} " + '"${arguments[@]}"')
        lines.append(f'exec {quoted(self.ended)} --code $? "$folder"')
        return "\n".join(lines) + "\n"


def quoted(words: Sequence[str]) -> str:
    """Returns the words as a shell reads them: each one is one argument, exactly as it is.

    Raises:
        ConfigError: a word can't stand in the file.
    """
    return " ".join(shlex.quote(checked(word)) for word in words)


def checked(word: str) -> str:
    """Returns a word that can stand in the file.

    Raises:
        ConfigError: it holds a control character, such as a line break, or a password, or has no bytes.
    """
    if any(unicodedata.category(character) == "Cc" for character in word):
        raise ConfigError(f"{word!r} holds a line break or another control character; remove it")
    if _PASSWORD.search(word):
        raise ConfigError("an address holds a password, which the job's file would show; keep it in the environment")
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        raise ConfigError(f"{word!r} holds half a surrogate pair, which has no bytes; remove it") from None
    return word


def _directive(name: str, value: str | None) -> str:
    """Returns a line for sbatch, which reads quotes and backslashes as here.

    Source: `_get_argument` of `src/sbatch/opt.c` in Slurm 22.05.
    """
    if value is None:
        return f"#SBATCH --{checked(name)}"
    if re.fullmatch(r"[\w.,:@%/+=()-]+", value, re.ASCII):
        return f"#SBATCH --{name}={checked(value)}"
    escaped = checked(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{escaped}"'


def _assignments(member: Member) -> list[str]:
    return [f"folder={quoted([str(member.folder)])}", f"arguments=({quoted(member.arguments)})"]
