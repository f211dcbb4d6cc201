"""`ijepa` lists the launch scripts and runs them by name, with their own help, output and exit codes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_scale import __version__, commands, shipped
from ijepa_scale.environment import child_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Returns a function that runs `ijepa` in this process: the exit code, standard output and standard error."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # put back at the end

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/ijepa", *arguments])
        try:
            code = commands.main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return run


def test_the_list_has_every_script_with_a_sentence(call) -> None:
    code, listed, problems = call()
    assert (code, problems) == (0, "") and call("--help") == call("-h") == (0, listed, "")
    found = dict(re.findall(r"^  (\w+) +(\S.*)$", listed, flags=re.MULTILINE))
    assert sorted(found) == SCRIPTS
    assert all(re.fullmatch(r"[A-Z][^\n]{10,130}[^.]\.", text) for text in found.values()), found
    assert call("--version") == (0, f"ijepa_scale {__version__}\n", "")


def test_the_list_needs_neither_torch_nor_a_dependency() -> None:
    code = (
        "import sys; from ijepa_scale.commands import main; main(); "
        "print({'torch', 'numpy', 'yaml', 'pydantic', 'ijepa_kernels'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ijepa COMMAND") and done.stdout.endswith("set()\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_that_of_the_script_under_the_name_of_the_command(call, name: str) -> None:
    code, text, problems = call(name, "--help")
    assert (code, problems) == (0, "") and text.startswith(f"usage: ijepa {name} ")
    assert "launch/" not in text and f"ijepa {name} " in text.partition("\n\n")[2]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["preterain", "--config", "C"], "preterain: no such command; did you mean ijepa pretrain?"),
        (["xyz"], "xyz: no such command; ijepa --help lists them"),
        (["../demo"], "../demo: no such command; did you mean ijepa demo?"),
        (["--config", "C"], "--config: give a command before its flags; ijepa --help lists them"),
        (["--local_rank=1"], None),
        (["pretrain"], "--config is missing; name a YAML file, such as configs/demo.yaml (ijepa pretrain --help"),
    ],
)
def test_mistakes_are_one_line_and_code_2(call, arguments: list[str], message: str | None) -> None:
    code, _, problems = call(*arguments)
    assert (code, problems) == (0, "") if message is None else (code == 2 and problems.startswith(f"error: {message}"))
    assert problems.count("\n") <= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_a_sentence_with_three_examples_and_the_reference(name: str) -> None:
    """A paragraph with what else is to be known may stand after the sentence."""
    text = ast.get_docstring(ast.parse((ROOT / "launch" / f"{name}.py").read_text())) or ""
    sentence, *_, examples, reference = text.split("\n\n")
    assert re.fullmatch(r"[A-Z][^.\n]+\.", sentence)
    assert len(examples.splitlines()) >= 3 and all(f"launch/{name}.py " in f"{line} " for line in examples.splitlines())
    found = re.fullmatch(
        r"Reference: docs/([a-z-]+\.md)(?:#([a-z-]+))?(, and --help-config for the settings)?", reference
    )
    assert found, reference
    page = (ROOT / "docs" / found[1]).read_text()
    assert any(said in page for said in (f"launch/{name}.py", f"ijepa {name}", f"make {name}"))
    headings = [re.sub(r"[^\w]+", "-", line.lower()) for line in re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)]
    assert found[2] is None or found[2] in headings


def test_a_script_is_a_command_by_being_there(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "folder", lambda name: tmp_path / name)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "new_one.py").write_text(
        '"""Does it.\n\nMore."""\nimport sys\nif __name__ == "__main__":\n    print(sys.argv, __file__)\n    exit(7)\n'
    )
    (tmp_path / "launch" / "_part.py").write_text("")
    assert "  new_one  Does it.\n" in call()[1] and "_part" not in call()[1]
    argv = ["ijepa new_one", "--x", "a b"]
    assert call("new_one", "--x", "a b") == (7, f"{argv} {tmp_path}/launch/new_one.py\n", "")
    argv.insert(1, "--local_rank=3")  # where a launcher writes it
    assert call("--local_rank=3", "new_one", "--x", "a b")[:2] == (7, f"{argv} {tmp_path}/launch/new_one.py\n")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    path = child_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "ijepa_scale", "nothing"], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: nothing: no such command; ijepa --help lists them\n")
