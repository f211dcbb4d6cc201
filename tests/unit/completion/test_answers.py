"""What may stand next on the command line of `ijepa`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale import commands
from ijepa_scale.completion.answers import TABLE, answer, joined
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.finetune_run import FinetuneConfig

ROOT = Path(__file__).parents[3]
KNOWN = json.loads(TABLE.read_text())


def offered(*words: str) -> list[str]:
    return sorted(answer(words, KNOWN).words)


def test_commands_are_offered_first() -> None:
    assert offered("") == offered() == sorted(commands.scripts())
    assert offered("pre") == ["predict", "pretrain"] and offered("-") == ["--help", "--version"]
    assert offered("--local_rank=1", "pretr") == ["pretrain"]
    assert offered("nothing", "") == [] and not answer(("nothing", "")).files


@pytest.mark.parametrize(
    ("line", "expected", "files"),
    [
        ("pretrain --proc", ["--processes"], False),
        ("pretrain --config ", None, True),
        ("pretrain --config=configs/de", ["--config=configs/demo.yaml"], True),
        ("finetune --config configs/finetune/demo", ["configs/finetune/demo_finetune.yaml"], True),
        ("pretrain --config C.yaml --conf", [], False),  # it was given
        ("pretrain --config C.yaml optimizer.l", ["optimizer.lr="], False),
        ("pretrain --config C.yaml optimizer.tr", ["optimizer.trust_coefficient="], False),  # of lars
        ("finetune --config C.yaml optimizer.layer", ["optimizer.layer_decay="], False),
        ("pretrain --config C.yaml optimizer.layer", [], False),
        ("plan --config C.yaml --gpus 8x h100 optimizer.layer", ["optimizer.layer_decay="], False),  # of either kind
        ("pretrain mas", ["masks."], False),
        ("pretrain data.exif=", ["data.exif=apply", "data.exif=ignore"], False),
        ("pretrain engine.compile=", [f"engine.compile={each}" for each in ("auto", "false", "true")], False),
        ("pretrain data.train=da", [], True),
        ("pretrain engine.ds_config=ds_configs/zero3_s", ["engine.ds_config=ds_configs/zero3_small.json"], True),
        ("pretrain optimizer.lr=1", [], False),
        ("pretrain nothing=", [], False),
        ("pretrain --devices cuda:0 cuda:1 sched", ["schedule."], False),
        ("pretrain --help-config mode", ["model", "model."], False),
        ("demo --folder x schedule.ep", ["schedule.epochs="], False),
        ("replay RUN --step 3 --set engine.dev", ["engine.device="], False),
        ("checkpoint ", ["convert", "diff", "ls", "rm", "verify"], False),
        ("checkpoint rm ", [], True),
        ("checkpoint convert RUN --f", ["--files"], False),
        ("shards make --from par", ["parquet"], False),
        ("evaluate RUN --data ", [], True),
        ("evaluate RUN --data TRAIN ", [], True),
        ("evaluate RUN --data TRAIN VAL --weights ", ["context", "target"], False),
        ("evaluate RUN --protocol knn log", ["logistic"], True),  # a further protocol, or the source
        ("slurm sta", ["status"], False),
        ("slurm finetune --partition P --array lr=1e-3 optimizer.layer", ["optimizer.layer_decay="], False),
        ("slurm evaluate --node", ["--nodes"], False),
        ("slurm evaluate --attentive", ["--attentive-epochs"], False),
        ("pretrain --plugin a --plug", ["--plugin"], False),  # it may be repeated
        ("completion ", ["bash", "fish", "zsh"], False),
        ("pretrain --processes ", [], False),  # a number, and no flag
        ("slurm pretrain --array ", [], False),
    ],
)
def test_a_line_is_answered(line: str, expected: list[str] | None, files: bool) -> None:
    found = answer(line.split(" "), KNOWN)
    assert found.files == files
    if expected is not None:
        assert sorted(found.words) == expected


def test_shipped_configurations_are_offered_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = [f"configs/finetune/{path.name}" for path in (ROOT / "configs" / "finetune").glob("*.yaml")]
    assert offered("finetune", "--config", "") == sorted(shipped)


def test_every_setting_is_reached_through_its_sections() -> None:
    for key in known_keys(FinetuneConfig):
        for end in (len(key), *(place + 1 for place, char in enumerate(key) if char == ".")):
            word = f"{key}=" if end == len(key) else key[:end]
            assert word in offered("finetune", word[:-1] if end == len(key) else word[: max(0, end - 2)]), (key, word)


@given(st.lists(st.sampled_from([*KNOWN["commands"], "--config", "x", "a=b", "=", "", "-", "--", "rm", "make"])))
def test_any_line_has_an_answer_that_goes_on_from_its_last_word(words: list[str]) -> None:
    found = answer(words, KNOWN)
    assert all(word.startswith(words[-1] if words else "") for word in found.words)
    assert found.before == "" or words[-1].startswith(found.before)


def split_by_bash(words: list[str]) -> list[str]:
    """Returns words as bash has them in COMP_WORDS, where it splits at `=` and `:`."""
    found = []
    for word in words:
        parts = [""]
        for char in word:
            if (char in "=:") != (parts[-1][-1:] in ("=", ":")) and parts[-1]:
                parts.append("")
            parts[-1] += char
        found += parts
    return found


@given(st.lists(st.text("ab=:", min_size=1).filter(lambda word: word[0] in "ab"), min_size=1))
def test_words_that_bash_has_split_are_joined(words: list[str]) -> None:
    # a `=` at the end of a word can't be told from one in it, but for that of the word to complete
    words = [*(f"{word}a" for word in words[:-1]), words[-1]]
    whole, done = joined(split_by_bash(words))
    assert whole == words
    assert words[-1] == done + ("" if words[-1][-1] in "=:" else split_by_bash(words)[-1])
    assert joined([*split_by_bash(words), ""]) == ([*words, ""], "")


def test_an_answer_needs_no_torch() -> None:
    code = (
        "import sys; from ijepa_scale.commands import main; "
        "sys.argv = ['ijepa', 'completion', '--words', 'bash', 'pretrain', 'optimizer.i']\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'numpy', 'yaml', 'pydantic', 'ijepa_kernels'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "words\t" and done.stdout.splitlines()[-1] == "set()"
    assert done.stdout.splitlines()[1].startswith("optimizer.impl=\tImplementation")
