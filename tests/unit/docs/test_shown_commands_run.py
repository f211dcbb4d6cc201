"""Each command that the documentation shows runs, in a small copy of the world that it names (`shown_table.py`).

The short form runs a command of each script, README's first; the long form runs all.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_world
from pages import PAGES, ROOT, Command, commands_of, shell_lines_of
from shown_table import CPUS, ELSEWHERE, FAST, LONG, SHOWN, TWO, Never, Run
from started import Ended, Starter, launch, starter

from ijepa_scale import environment


def line_of(command: Command) -> str:
    return str(command).removeprefix(f"{command.page}: ")


COMMANDS = {line_of(command): command for path in PAGES for command in commands_of(path)}
RUN = {line: row for line, row in SHOWN.items() if isinstance(row, Run)}
LAUNCHERS = ("torchrun", "deepspeed", "mpirun")
VARIABLE = re.compile(r"[A-Z_]+=")
PROGRAM = re.compile(
    r"(git|cd|source|make|pip|python|\S*/bin/\S+|docker|apptainer|tensorboard|ijepa|torchrun|deepspeed|mpirun|srun) \S"
)
SLOW_SCRIPTS = {"demo", "tune"}  # run in the long form only: they start training processes of their own


class World(NamedTuple):
    """The tiny world's folder, and what starts commands."""

    folder: Path
    starter: Starter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with starter() as starts:
        folder = tiny_world.build(tmp_path_factory.mktemp("shown") / "world", starts)
        before = tiny_world.listed(folder)
        yield World(folder, starts)
        assert tiny_world.listed(folder) == before, "a command has written what later ones read; add it to WRITTEN"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "box"
    shutil.rmtree(tmp_path, ignore_errors=True)  # a hundred copies would fill a disk


def replaced(words: tuple[str, ...] | list[str], row: Run, port: int) -> list[str]:
    """Returns words in which those of the row's table, whole or after a `=`, are others."""

    def other(word: str) -> str:
        name, sign, value = word.partition("=")
        new = row.swap.get(word) or (f"{name}={row.swap[value]}" if sign and value in row.swap else word)
        return new.replace("{port}", str(port)) if new != word else word

    return [other(word) for word in words]


def run(line: str, row: Run, world: World, box: Path) -> Ended:
    """Runs a shown command in a copy of the world, as its row in the table says."""
    command, port = COMMANDS[line], environment.free_port()
    arguments = [*replaced(command.arguments, row, port), *row.add]
    named = {word.rpartition("=")[2] for word in arguments}
    tiny_world.copy(world.folder, box, named=named, without=row.without)
    own = [*itertools.takewhile(VARIABLE.match, command.before)]
    before = [*command.before[len(own) :]]
    variables = {**tiny_world.VARIABLES, **dict(word.split("=", 1) for word in own)}
    if before[0] in LAUNCHERS:
        words = [*replaced(before, row, port), str(ROOT / "launch" / f"{command.script}.py"), *arguments]
        return launch(words, box, variables=variables, port=port)
    assert before in (["python"], ["ijepa"]), before
    through = before == ["ijepa"]
    return world.starter.start(command.script, arguments, box, through_ijepa=through, variables=variables)


def check(line: str, row: Run, world: World, box: Path) -> None:
    ended = run(line, row, world, box)
    assert ended.code == row.code and row.says in ended.text, f"{line}\nended with {ended.code}:\n{ended.text[-4000:]}"


@pytest.mark.parametrize("line", [line for line, row in RUN.items() if row.form == FAST])
def test_a_command_runs_as_shown(line: str, world: World, box: Path) -> None:
    check(line, RUN[line], world, box)


@pytest.mark.long
@pytest.mark.parametrize("line", [line for line, row in RUN.items() if row.form == LONG])
def test_the_other_commands_run_as_shown_too(line: str, world: World, box: Path) -> None:
    if COMMANDS[line].before[-1] == "python" and (program := COMMANDS[line].before[0]) == "mpirun":
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    check(line, RUN[line], world, box)


def test_a_command_that_no_longer_works_is_found(world: World, box: Path) -> None:
    line = "python launch/export.py runs/mine --to encoder.safetensors"
    with pytest.raises(AssertionError, match=r"ended with 2:\n(?s:.*)runs/gone"):
        check(line, Run(swap={"runs/mine": "runs/gone"}), world, box)


def test_the_table_is_that_of_the_pages() -> None:
    """A command that a page begins to show gets a row in shown_table.py, and one that none shows any more has none."""
    assert SHOWN.keys() == COMMANDS.keys(), {
        "without a row": sorted(COMMANDS.keys() - SHOWN.keys()), "shown nowhere": sorted(SHOWN.keys() - COMMANDS.keys())
    }  # fmt: skip


def test_each_word_of_the_table_is_in_its_command() -> None:
    for line, row in RUN.items():
        words = [*COMMANDS[line].before, *COMMANDS[line].arguments]
        parts = {part for word in words for part in (word, word.partition("=")[2])}
        shared = {*CPUS, *TWO}  # sets of words that several rows have
        assert row.swap.keys() - shared <= parts and (not row.swap or row.swap.keys() & parts), line


def test_the_short_form_has_each_script() -> None:
    short = {COMMANDS[line].script for line, row in RUN.items() if row.form == FAST}
    assert short | SLOW_SCRIPTS == {path.stem for path in (ROOT / "launch").glob("*.py")}


def test_where_else_commands_are_run_is_known() -> None:
    """Of each line that begins with a program's name and starts none of our scripts."""
    unknown, unused = [], {*ELSEWHERE}
    for path in PAGES:
        for words in shell_lines_of(path):
            line = " ".join(word for word in words if not VARIABLE.match(word))
            known = [start for start in ELSEWHERE if f"{line} ".startswith(start)]
            unused -= {*known}
            ours = "launch/" in line or line.startswith("ijepa ")
            if PROGRAM.match(line) and not known and not ours:
                unknown.append(f"{path.name}: {line}")
    assert not unknown and not unused
    for reason in [*ELSEWHERE.values(), *(row.reason for row in SHOWN.values() if isinstance(row, Never))]:
        for name in re.findall(r"[\w/]+\.py|tests/[\w/]+", reason):
            assert [*ROOT.glob(f"tests/**/{Path(name).name}"), *ROOT.glob(name)], name
