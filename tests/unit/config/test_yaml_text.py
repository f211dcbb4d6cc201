"""YAML by version 1.2, text as it is written, and one line for each file that isn't YAML."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import load_config, to_yaml
from ijepa_scale.config.yaml_text import parse_yaml, plain, write_yaml
from tests.unit.config.writing import refusal, write


def test_yaml_keeps_text_that_only_looks_like_a_number() -> None:
    assert parse_yaml("[1e-3, 1.5e3, e3, 1e, '1e3', 12, 1.0]", "x") == [1e-3, 1500.0, "e3", "1e", "1e3", 12, 1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[on, off, yes, no, On, y, n]", ["on", "off", "yes", "no", "On", "y", "n"]),
        ("[true, True, TRUE, false, False, tRUE]", [True, True, True, False, False, "tRUE"]),
        ("[0012, 0o14, 12, 1_000, 0x1f, 0b1, -08, +7]", [12, 12, 12, "1_000", 31, "0b1", -8, 7]),
        ("[1:30, 1.5.2, ~, null, Null, '']", ["1:30", "1.5.2", None, None, None, ""]),
        ("[1., .5, -1.25, 1_0.5, 0.5e+3]", [1.0, 0.5, -1.25, "1_0.5", 500.0]),
        ("[.inf, -.INF, inf, .nan]", [float("inf"), float("-inf"), "inf", pytest.approx(float("nan"), nan_ok=True)]),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
        ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("2024-01-31", "2024-01-31"),
        ("'2024-01-31'", "2024-01-31"),
        ("[!!str 12, !!int '12', !!float 1]", ["12", 12, 1.0]),
        ("{1: a}", {1: "a"}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_yaml_is_that_of_version_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "x")
    assert found == value and plain(found) == value and pickle.loads(pickle.dumps(found)) == value


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("0123456789_.eExobn+-:~ autrlsfy")))
def test_text_written_as_yaml_is_read_back(text: str) -> None:
    assert parse_yaml(write_yaml({"a": text, "b": [text]}), "x") == {"a": text, "b": [text]}


@pytest.mark.parametrize(
    "text",
    ["0012", "1.10", "2024_01", "1e5", "0x1F", "+7", "2024-01-31", "on", "no", "1:30", ".5", "1_000", ".inf", "9" * 30],
)
def test_settings_that_take_text_keep_it_as_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "c.yaml", f"folder: {text}\ndata: {{train: {text}}}")
    for config in (load_config(path), load_config(path, [f"folder={text}", f"data.train={text}"])):
        assert (config.folder, config.data.train) == (text, text)
        assert load_config(write(tmp_path, "again.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("/data/run #2/shards", "/data/run #2/shards"),
        ("#2", "#2"),
        (" a: b ", "a: b"),
        ("'it''s'", "it's"),
        ("'a' and 'b'", "'a' and 'b'"),
        ('"a\\tb"', "a\tb"),
        ("&a", "&a"),
        ("!!str x", "!!str x"),
        ("[a", "[a"),
        ("true", "true"),
        ("'null'", "null"),
        ("~", None),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_stands(empty: Path, raw: str, value: str | None) -> None:
    assert load_config(empty, [f"data.train={raw}"]).data.train == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n\tdepth: 1", "not readable as YAML in line 2: found character '\\t' that cannot start any token"),
        ("model:\n  depth: 1\n  depth: 2", "not readable as YAML in line 3: the key 'depth' appears twice"),
        ("b: {<<: *x}", "not readable as YAML in line 1: found undefined alias 'x'"),
        ("folder: true", "folder is True; give text"),
        ("engine: {compile: on}", "engine.compile is 'on'; give auto, true or false"),
        ("1: a", "1: unknown; there are"),
        ("0012: a", "0012: unknown; there are"),
        ("model: {on: 1}", "model.on: unknown; there are model.name"),
        ("seed: 1:30", "seed is '1:30'; give a whole number"),
        ("optimizer: {lr: 1_000}", "optimizer.lr is '1_000'; give a number"),
        ("seed: 1e3", "seed is 1000.0; give a whole number"),
        ("[1, 2]: a", "in line 1: a key is a list or a mapping"),
        ("{a: 1}: a", "in line 1: a key is a list or a mapping"),
        ("folder: {{ run }}", "in line 1: a key is a list or a mapping; fill in the template's {{ }} first"),
        ("seed: 1\nfolder: {{ a }}/b", "in line 2: expected <block end>, but found '<scalar>'; fill in the template's"),
        ("folder: {% if a %}", "in line 1: found character '%' that cannot start any token"),
        ("a: &a [*a]", "in line 1: the alias *a leads back to itself"),
        ("a: &a {b: {c: *a}}", "in line 1: the alias *a leads back to itself"),
        ("a: &a {<<: *a}", "in line 1: the alias *a leads back to itself"),
        ("[" * 2000, "in line 1: nested more than 50 levels deep"),
        ("a: {" * 2000, "in line 1: nested more than 50 levels deep"),
        ("- " * 2000, "in line 1: nested more than 50 levels deep"),
        (
            "a: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]\n" for n in range(1, 9)),
            "in line 5: aliases stand for more than 100000 values",
        ),
        ("folder: a\0b", "not readable as YAML: unacceptable character #x0000"),
        ("folder: a\x1b[0m", "not readable as YAML: unacceptable character #x001b"),
        ("seed: " + "9" * 5000, "in line 1: a number of 5000 digits"),
        ("seed: 9223372036854775808", "seed is 9223372036854775808; give a whole number of 64 bits"),
        ("seed: !!int x", "in line 1: 'x' doesn't fit its tag !!int"),
        ("folder: !!timestamp 2024-13-99", "in line 1: could not determine a constructor for the tag"),
        ("a: 1\n---\nb: 2", "in line 2: but found another document"),
        ("'", "in line 1: found unexpected end of stream"),
    ],
)  # fmt: skip
def test_what_yaml_makes_of_a_value_is_told(tmp_path: Path, text: str, message: str) -> None:
    (line,) = refusal(write(tmp_path, "c.yaml", text))
    assert message in line


def test_what_yaml_makes_of_a_value_can_be_meant(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "c.yaml",
        "engine: {compile: True}\nresume: no\n"
        "masks: &masks {min_keep: 0o3}\ndata: {batch_size: 0012}\nschedule: {epochs: 0300}\nevaluate: {every: 0}\n",
    )
    config = load_config(path, ["folder=2024-01-31", "data.train=on", "seed=010"])
    assert config.engine.compile is True and config.resume == "no" and config.masks.min_keep == 3
    assert (config.folder, config.data.train, config.data.batch_size) == ("2024-01-31", "on", 12)
    assert (config.seed, config.schedule.epochs) == (10, 300.0)
    assert (type(config.seed), type(config.schedule.epochs), type(config.data.batch_size)) == (int, float, int)


@pytest.mark.parametrize(
    ("encoding", "what"),
    [
        ("utf-16", "it is UTF-16 or UTF-32"), ("utf-32", "it is UTF-16 or UTF-32"), ("latin-1", "'utf-8' codec"),
        ("utf-16-le", "it is UTF-16, or no text"), ("utf-16-be", "it is UTF-16, or no text"),
    ],
)  # fmt: skip
def test_another_encoding_is_refused(tmp_path: Path, encoding: str, what: str) -> None:
    text = "folder: cafe" if encoding[-2:] in ("le", "be") else "folder: café"
    (tmp_path / "c.yaml").write_bytes(text.encode(encoding))
    (line,) = refusal(tmp_path / "c.yaml")
    assert f"can't be read as a text file ({what}" in line and line.endswith("; save it as UTF-8")
