"""Settings that hold a path: what is replaced in it, and what is refused."""

from __future__ import annotations

import json
import pickle
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig, load_config, to_yaml
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.form import Form
from ijepa_scale.config.section import settings
from ijepa_scale.environment import expand_path
from ijepa_scale.errors import ConfigError
from tests.unit.config.writing import refusal, write

PATHS = [
    "folder", "resume", "data.train", "data.cache", "engine.ds_config", "engine.compile_cache", "evaluate.train",
    "evaluate.test",
]  # fmt: skip
FINETUNING_PATHS = ["folder", "resume", "data.train", "data.cache", "model.init", "evaluate.test", "engine.ds_config"]


@pytest.mark.parametrize(
    ("kind", "key"),
    [*((PretrainConfig, key) for key in PATHS), *((FinetuneConfig, key) for key in FINETUNING_PATHS)],
)
def test_every_path_expands(monkeypatch, empty: Path, kind: type, key: str) -> None:  # noqa: ANN001
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs/of me")

    def read(text: str) -> str:
        config = load_config(empty, [f"{key}={text}"], kind=kind)
        return reduce(getattr, key.split("."), config)

    given = ("'~'", "~/a b", "$HOME/a", "${RUNS}/x$RUNS", "a~b/$1/$", "./~", "s3://b/~a/$HOME")
    assert [read(text) for text in given] == [
        "/home/me", "/home/me/a b", "/home/me/a", "/runs/of me/x/runs/of me", "a~b/$1/$", "./~", "s3://b/~a/$HOME",
    ]  # fmt: skip
    again = kind(**{**dict(load_config(empty, ["folder=$RUNS"], kind=kind))})
    assert again.folder == "/runs/of me"
    for text, problem in {
        "''": "is ''; give a path; . is the working directory",
        "' '": "is ' '; give a path; . is the working directory",
        "a" * 256: f"is '{'a' * 256}'; it has 256 bytes and a name of 256 in it; Linux takes 4095 and 255: shorten it",
        "$XY/a": "is '$XY/a'; the variable XY isn't set; set it, or write $$XY for $XY in a name",
        "~nobody-here/a": "is '~nobody-here/a'; there is no home folder of ~nobody-here; write the path itself",
        "${oc.env:HOME}": "is '${oc.env:HOME}'; interpolations aren't read, write the value itself",
        "s3://${HOME}/": "is 's3://${HOME}/'; interpolations aren't read, write the value itself",
        '"a\\0b"': r"is 'a\x00b'; a path can't hold the character NUL or half a surrogate pair; remove it",
        '"a\\uD800b"': r"is 'a\ud800b'; a path can't hold the character NUL or half a surrogate pair; remove it",
    }.items():
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert f"command line: {key} {problem}" in str(caught.value)


@given(st.text(alphabet="ab$~{}/_1 ", max_size=12))
def test_a_path_is_the_same_when_it_is_read_or_written_again(text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"a": "v", "b": "$1/$$x", "HOME": "/home/me"}.items():
            monkeypatch.setenv(name, value)
        try:
            found = expand_path(text)
        except ConfigError:
            return
        assert expand_path(found) == found
        config = PretrainConfig(folder=text)
        assert config.folder == found == config.replace(seed=3).folder == pickle.loads(pickle.dumps(config)).folder
        assert PretrainConfig(**config.values()).folder == found


def test_a_dollar_sign_can_be_written(monkeypatch, tmp_path: Path) -> None:  # noqa: ANN001
    monkeypatch.setenv("EUR", "/e")
    monkeypatch.delenv("USD", raising=False)
    path = write(tmp_path, "c.yaml", "folder: $$USD/$EUR$$")
    config = load_config(path, ["data.train=/rates/$$EUR"])
    assert (config.folder, config.data.train) == ("$USD//e$", "/rates/$EUR")
    again = load_config(write(tmp_path, "d.yaml", to_yaml(config)))
    assert again == config and (again.folder, again.data.train) == ("$USD//e$", "/rates/$EUR")
    assert PretrainConfig(**json.loads(json.dumps(config.values()))) == config  # as a checkpoint stores it


def test_a_lone_tilde_is_null_and_says_so(tmp_path: Path, empty: Path) -> None:
    said = 'folder is null; give a path (in YAML, a lone ~ is null: write "~" or $HOME)'
    path = write(tmp_path, "c.yaml", "folder: ~")
    assert refusal(path) == [f"{path}: {said}"]
    assert refusal(empty, "folder=~") == [f"command line: {said}"]


def test_a_template_is_refused_also_in_quotes(empty: Path) -> None:
    for text in ('"{{ x }}/a"', "a/{{x}}", "{{ x }}"):
        for key in ("folder", "data.train", "data.image_member", "logging.sinks.wandb.project"):
            if key.startswith("logging"):
                text = text.strip('"')
            assert "a template's {{ }} aren't read, write the value itself" in refusal(empty, f"{key}={text}")[0]
    assert load_config(empty, ["data.train=a-{000..127}.tar"]).data.train == "a-{000..127}.tar"


def test_a_variable_that_stands_for_another_is_refused(monkeypatch, empty: Path) -> None:  # noqa: ANN001
    monkeypatch.setenv("A", "/x/$B")
    monkeypatch.setenv("B", "  ")
    assert refusal(empty, "folder=$A") == [
        "command line: folder is '$A'; it stands for '/x/$B', which holds the variable B; write the path itself"
    ]
    assert "its variables are empty; set them" in refusal(empty, "folder=$B")[0]


def test_the_base_of_a_file_is_a_path(monkeypatch, tmp_path: Path) -> None:  # noqa: ANN001
    monkeypatch.setenv("CONFIGS", str(tmp_path / "x"))
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", "a.yaml", "seed: 3")
    assert load_config(write(tmp_path, "b.yaml", "base: $CONFIGS/a.yaml")).seed == 3
    assert (
        "base is '$NOT/a.yaml'; the variable NOT isn't set"
        in refusal(write(tmp_path, "c.yaml", "base: $NOT/a.yaml"))[0]
    )


def test_no_text_setting_that_holds_a_path_is_left_unmarked() -> None:
    """A setting that takes free text is a path, or is listed here as something else."""
    names = {
        "name", "sampler", "loss", "reader", "evaluator", "rand_augment", "entity", "project", "experiment",
        "image_member", "label_member",
    }  # fmt: skip
    for kind in (PretrainConfig, FinetuneConfig):
        for key, field in settings(kind, kind()):
            form = Form(field)
            if form.takes_text and not form.choices:
                assert form.is_path or key.rpartition(".")[2] in names, f"{key}: declare it form.PathText, or list it"
