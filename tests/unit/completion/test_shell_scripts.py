"""Real shells complete `ijepa` by the scripts that `ijepa completion` prints."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ijepa_scale.completion.shells import SCRIPTS
from ijepa_scale.environment import child_environment
from launch import completion

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the command `ijepa`, its scripts of completion, and files to complete."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ijepa"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ijepa_scale "$@"\n')
    program.chmod(0o755)
    for shell, text in SCRIPTS.items():
        (tmp_path / f"ijepa.{shell}").write_text(text)
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.yaml").touch()
    (tmp_path / "photos").mkdir()
    return tmp_path


def ask(place: Path, *command: str) -> list[str]:
    """Returns the sorted lines that a shell prints."""
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=place, env=child_environment(PATH=path, HOME=str(place)), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(filter(None, done.stdout.splitlines()))


@pytest.mark.parametrize("shell", list(SCRIPTS))
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main([shell]) == 0
    assert capsys.readouterr().out == SCRIPTS[shell]


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        completion.main(["tcsh"])
    assert end.value.code == 2
    assert "invalid choice: 'tcsh' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], ["predict", "pretrain"]),
        (["pretrain", "--proc"], ["--processes"]),
        (["pretrain", "optimizer.l"], ["optimizer.lr="]),
        (["pretrain", "data.exif", "="], ["apply", "ignore"]),  # bash has split the word, and replaces its last part
        (["pretrain", "data.exif", "=", "a"], ["apply"]),
        (["pretrain", "data.train", "=", "ph"], ["photos"]),
        (["pretrain", "--config", "configs/demo.y"], ["configs/demo.yaml"]),
        (["predict", "--model", "my"], ["my run"]),
    ],
)
def test_bash_completes(place: Path, words: list[str], expected: list[str]) -> None:
    line = f"source ijepa.bash; COMP_WORDS=(ijepa {shlex.join(words)}); COMP_CWORD={len(words)}; _ijepa ijepa"
    assert ask(place, "bash", "--norc", "-c", f'{line}; printf "%s\\n" "${{COMPREPLY[@]}}"') == expected


@pytest.mark.parametrize("name", ["./ijepa", "../evil/ijepa"])
def test_bash_runs_no_program_of_the_folder(name: str, place: Path) -> None:
    evil = place / "evil"
    evil.mkdir()
    (evil / "ijepa").write_text("#!/bin/sh\ntouch ran\n")
    (evil / "ijepa").chmod(0o755)
    line = f"source {place}/ijepa.bash; COMP_WORDS=({name} pre); COMP_CWORD=1; _ijepa {name}"
    shown = f'PATH={place}/bin:$PATH; {line}; printf "%s\n" "${{COMPREPLY[@]}}"'
    assert ask(evil, "bash", "--norc", "-c", shown) == ["predict", "pretrain"]
    assert not (evil / "ran").exists()


def typed(place: Path, shell: list[str], keys: list[str], expected: str) -> str:
    """Returns what an interactive shell shows once it has been given these keys, each after some output."""
    process, terminal = pty.fork()
    if not process:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 300, 0, 0))  # no line is broken
        os.chdir(place)
        os.environ |= {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOME": str(place), "TERM": "dumb"}
        os.execvp(shell[0], shell)
    shown, keys, end = "", list(keys), time.monotonic() + 60
    try:
        while expected not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.5)[0]:
                shown += os.read(terminal, 1 << 16).decode(errors="replace")
            elif keys:
                os.write(terminal, keys.pop(0).encode())
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x07", "", shown)


def test_an_interactive_bash_completes_at_tab(place: Path) -> None:
    keys = ["source ijepa.bash; echo ready\n", "ijepa finet\toptimizer.layer\t0.5 data.exif=a\tmodel.init=my\t"]
    end = r"ijepa finetune optimizer.layer_decay=0.5 data.exif=apply model.init=my\ run/"
    assert end in typed(place, ["bash", "--norc", "-i"], keys, end)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh isn't installed")
def test_an_interactive_zsh_completes_at_tab(place: Path) -> None:
    start = "autoload -Uz compinit; compinit -u; source ijepa.zsh; echo ready\n"
    keys = [start, "ijepa finet\toptimizer.layer\t0.5 data.exif=a\tmodel.init=my\t"]
    end = r"model.init=my\ run/"
    found = typed(place, ["zsh", "-f", "-i"], keys, end)
    assert end in found and "optimizer.layer_decay=0.5" in found and "data.exif=apply" in found


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish isn't installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ijepa pre", ["predict", "pretrain"]),
        ("ijepa pretrain optimizer.l", ["optimizer.lr="]),
        ("ijepa pretrain data.exif=", ["data.exif=apply", "data.exif=ignore"]),
        ("ijepa pretrain data.train=ph", ["data.train=photos/"]),
        ("ijepa pretrain --config configs/demo.y", ["configs/demo.yaml"]),
    ],
)
def test_fish_completes(place: Path, line: str, expected: list[str]) -> None:
    lines = ask(place, "fish", "--no-config", "-c", f"source ijepa.fish; complete -C '{line}'")
    assert [each.partition("\t")[0] for each in lines] == expected
