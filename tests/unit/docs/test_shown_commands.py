"""Each command that the documentation shows is one that its script takes, with settings and files that exist.

Nothing is run here: a script is stopped when it has read its flags. test_shown_commands_run.py runs the commands.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, Command, blocks_of, commands_of, prose_of, shell_lines_of, text_of

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.manual import blocks
from ijepa_scale.config.schema import PretrainConfig

COMMANDS = {str(command): command for path in PAGES for command in commands_of(path)}
BENCHMARK = re.compile(r"python -m benchmarks\.(\w+)")
BENCHMARKS = sorted(
    {" ".join(words) for path in PAGES for words in shell_lines_of(path) if BENCHMARK.match(" ".join(words))}
)
PLACEHOLDERS = {"KIND": "pca", "N": "4", "SETTING": "data.workers=1"}
KEYS = {
    kind: {row.setting for block in blocks(kind) for row in block.rows} for kind in (PretrainConfig, FinetuneConfig)
}
EVERY_KEY = set.union(*KEYS.values())
SECTIONS = {key.partition(".")[0] for key in EVERY_KEY if "." in key}
SHOWN = re.compile(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})(?:\.\w+)+)=")


class Parsed(BaseException):
    """Stops a script when its flags are read."""


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        parse: Callable[..., Any] = getattr(argparse.ArgumentParser, name)

        def stopping(self: argparse.ArgumentParser, *words: Any, parse: Callable[..., Any] = parse) -> Any:
            raise Parsed(parse(self, *words))

        monkeypatch.setattr(argparse.ArgumentParser, name, stopping)


def read(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script until it has read its flags; it ends with `SystemExit` where it refuses them."""
    stop(ROOT / "launch" / f"{command.script}.py", command.arguments, monkeypatch)


def stop(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in arguments]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if "--plugin" not in command.arguments])
@pytest.mark.usefixtures("stops")
def test_a_command_is_taken(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        read(COMMANDS[name], monkeypatch)
    except SystemExit:
        pytest.fail(f"{name}: {capsys.readouterr().err}")


@pytest.mark.parametrize("line", BENCHMARKS)
@pytest.mark.usefixtures("stops")
def test_a_benchmark_takes_its_flags(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = line.split()[2], line.split()[3:]
    script = ROOT / f"{module.replace('.', '/')}.py"
    if arguments:  # else the page names the benchmark, which may need some
        try:
            stop(script, arguments, monkeypatch)
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")
    with pytest.raises(SystemExit) as ended:
        stop(script, ["--help"], monkeypatch)
    assert ended.value.code == 0 and module in capsys.readouterr().out


@pytest.mark.usefixtures("stops")
def test_a_flag_that_is_gone_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(Command("page", "embed", ["PHOTOS", "--model", "RUN", "--into", "features.npy"]), monkeypatch)
    assert "--to" in capsys.readouterr().err


def test_pages_show_commands_of_all_scripts() -> None:
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert {command.script for command in COMMANDS.values()} >= scripts - {"demo"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_exist(path: Any) -> None:
    """Of what the pages set, as `section.key=value`; a component of `--plugin` has its own."""
    lines = "\n".join([prose_of(text_of(path)), *blocks_of(text_of(path))]).splitlines()
    shown = {key for line in lines if "--plugin" not in line for key in SHOWN.findall(line)}
    assert not shown - EVERY_KEY


@pytest.mark.parametrize("script,kind", [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_overrides_belong_to_their_script(script: str, kind: type) -> None:
    for name, command in COMMANDS.items():
        if "--plugin" in command.arguments:
            continue
        given = [word.partition("=")[0] for word in command.arguments if re.match(r"[a-z_.]+=", word)]
        assert command.script != script or {*given} <= KEYS[kind], name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_and_benchmarks_exist(path: Any) -> None:
    text = text_of(path)
    for name in re.findall(r"(?<![\w/])(?:ds_configs|configs)/[\w/.-]+\.(?:yaml|json)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").exists() or (ROOT / "benchmarks" / name).is_dir(), name
