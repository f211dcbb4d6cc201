"""The file of a job: a shell gets exactly the arguments that were given, whatever is in them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.cluster.job_file import JobFile, Member
from ijepa_scale.errors import ConfigError

WORDS = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")))
    | st.text("ab '\"$`\\#!*?[]{}()<>|&;~=%-é")
    | st.sampled_from(["$HOME", "$(id)", "`id`", "", "-n", "--", "*", "~", "a=b c", "\\", "'", '"', "!!", "%j"]),
    max_size=6,
)
STUB = '#!/bin/bash\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\n\\0"; } >> "$TO"\nexit "$CODE"\n'


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with an srun, and a command `ended`, that write down their arguments."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("srun", "ended"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


def job_file(*members: Member, script: tuple[str, ...] = ("python", "pretrain.py"), **directives: str) -> JobFile:
    names = tuple((name, value) for name, value in directives.items())
    return JobFile(directives=names, script=script, ended=("ended",), cpus_per_task=3, members=members)


def heard(text: str, stubs: Path, task: str | None, code: int = 7) -> list[list[str]]:
    """Returns the words of each command that bash runs of a file."""
    said = stubs / "said"
    said.unlink(missing_ok=True)
    variables = {"PATH": f"{stubs}:/usr/bin:/bin", "TO": str(said), "CODE": str(code), "HOME": "/nowhere"}
    if task is not None:
        variables["SLURM_ARRAY_TASK_ID"] = task
    found = subprocess.run(["bash"], input=text.encode(), env=variables, capture_output=True, timeout=30)
    if not said.exists():
        return [[str(found.returncode), found.stderr.decode()]]
    assert found.returncode == code and not found.stderr, found.stderr
    commands = said.read_bytes().decode().split("\n\0")[:-1]
    return [command.split("\0")[:-1] for command in commands]


@settings(max_examples=60, deadline=None)
@given(words=WORDS, script=WORDS.filter(bool), folder=st.text("ab '\"$`\\é%").map(lambda name: f"/runs/{name}"))
def test_a_shell_gets_exactly_the_words(stubs: Path, words: list[str], script: list[str], folder: str) -> None:
    file = job_file(Member(folder=Path(folder), arguments=tuple(words)), script=tuple(script), comment=folder)
    srun, ended = heard(file.text(), stubs, None)
    flags = ["--label", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=3"]
    assert srun == ["srun", *flags, *script, *words]
    assert ended == ["ended", "--code", "7", str(Path(folder))]


@settings(max_examples=15, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=4))
def test_each_task_of_an_array_has_its_own_words(stubs: Path, runs: list[list[str]]) -> None:
    members = [Member(folder=Path(f"/runs/a {number}"), arguments=tuple(words)) for number, words in enumerate(runs)]
    text = job_file(*members).text()
    for number, words in enumerate(runs):
        srun, ended = heard(text, stubs, str(number), code=number)
        assert srun[5:] == ["python", "pretrain.py", *words]
        assert ended[1:] == ["--code", str(number), f"/runs/a {number}"]
    for task in (None, str(len(runs))):
        assert heard(text, stubs, task) == [["2", "error: submit this file as a job array\n"]]


@given(st.text("ab '\"$`\\#é%;=-"))
def test_a_directive_is_one_line_that_holds_the_value(value: str) -> None:
    """Read here as a shell would, which sbatch does alike but for `$`; tests/cluster asks a real one."""
    _, line, *_ = job_file(Member(folder=Path("/r"), arguments=()), comment=value).text().splitlines()
    assert line.startswith("#SBATCH --comment=")
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--comment={value}"]


@pytest.mark.parametrize("break_", ["\n", "\r", "\0", "\x1b", "\x85"])
def test_line_breaks_and_control_characters_are_refused(break_: str) -> None:
    good, bad = Member(folder=Path("/r"), arguments=("a",)), f"a{break_}b"
    files = [
        job_file(Member(folder=Path("/r"), arguments=(bad,))),
        job_file(Member(folder=Path(bad), arguments=())),
        job_file(good, script=(bad,)),
        job_file(good, comment=bad),
    ]
    for file in files:
        with pytest.raises(ConfigError, match="holds a line break or another control character; remove it"):
            file.text()


def test_passwords_and_words_without_bytes_are_refused() -> None:
    for word, text in (
        ("data.train=https://me:secret@host/shards", "an address holds a password, which the job's file would show"),
        ("a\ud800", "half a surrogate pair"),
    ):
        with pytest.raises(ConfigError, match=text) as error:
            job_file(Member(folder=Path("/r"), arguments=(word,))).text()
        assert "secret" not in str(error.value)
    undecodable = job_file(Member(folder=Path("/r"), arguments=("a\udce9",))).text()
    assert "a\udce9" in undecodable
