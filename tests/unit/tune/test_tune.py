"""Tests launch/tune.py on a tiny model, from the command line to the file for pretraining, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.errors import ConfigError
from ijepa_scale.host_memory import host_bytes
from ijepa_scale.tune.machine import describe
from ijepa_scale.tune.overrides import as_arguments, overrides_of, write_overrides
from ijepa_scale.tune.report import found_text, head_text
from ijepa_scale.tune.run import Options, tune
from ijepa_scale.tune.search import Found
from launch.tune import main
from tests.unit.tune.tune_stubs import config, machine, measured, space

TINY = """
folder: {folder}
model: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 48, depth: 2, heads: 3, predictor_width: 24,
  predictor_depth: 1}}
masks: {{min_keep: 3, group_size: 8}}
data: {{reader: synthetic, synthetic_samples: 512, batch_size: 4, workers: 1}}
schedule: {{epochs: 2, warmup_epochs: 1}}
engine: {{device: cpu, precision: fp32}}
"""
QUICK = ("--steps", "3", "--warmup", "1")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(folder=tmp_path / "run"))
    return path


def test_from_the_command_line_to_a_file_that_pretraining_takes(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", str(tiny), *QUICK, "--limit", "2", "data.batch_size=8"]) == 0
    said = capsys.readouterr().out
    written = tiny.parent / "run" / "tuned.yaml"
    tuned = load_config(written)
    assert tuned.engine.strategy == "plain" and 8 // tuned.engine.accumulation in (4, 8)
    assert f"winner     plain, {8 // tuned.engine.accumulation} images x {tuned.engine.accumulation}" in said
    assert tuned.engine.compile is False  # what auto means on the CPU
    engine = tuned.engine.replace(strategy="auto", accumulation=1, compile="auto")
    base = load_config(tiny, ["data.batch_size=8"])
    assert tuned.replace(engine=engine, data=base.data) == base  # the training is the same
    assert tuned.data.workers in (1, 2, 4, 8, 16, 32, 64)
    assert "<- winner" in said and " ms  plain, " in said  # the data wait of the winner
    assert "written    " in said and "engine.compile=false" in said
    pasted = said[said.index("or paste   ") :].split()[2:]
    assert load_config(tiny, pasted) == tuned


def test_memory_of_the_worst_step_disqualifies_and_nothing_is_written(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    data = ["data.reader=shards", "data.train=nowhere"]  # only the measurement of workers would need data
    assert main(["--config", str(tiny), *QUICK, "--limit", "1", "--memory", "0.1", *data]) == 2
    said = capsys.readouterr()
    assert "failed: takes 0." in said.out and "GB with the longest masks" in said.out
    assert said.err.startswith("error: no candidate ran, so nothing is written; the reasons are listed above")
    assert not (tiny.parent / "run").exists()


def test_without_its_data_only_the_workers_are_not_measured(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = Options(to=str(tmp_path / "other.yaml"), limit=1, steps=3, warmup=1, logs=str(tmp_path / "logs"))
    path = tune(str(tiny), ["data.reader=imagefolder", "data.train=nowhere"], options, said.append)
    text = "\n".join(said)
    assert "workers not measured: " in text and "nowhere" in text.split("workers not measured: ")[1].splitlines()[0]
    assert "workers" not in path.read_text().replace("data.workers", "")
    assert load_config(path).data.train == "nowhere" and list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"processes": 0}, "--processes is 0; give at least 1"),
        ({"limit": 0}, "--limit is 0; give at least 1"),
        ({"steps": 2}, "--steps is 2; give at least 3"),
        ({"warmup": 0}, "--warmup is 0; give at least 1"),
        ({"minutes": 0.0}, "--minutes is 0; give a number above 0"),
        ({"candidate_minutes": -1.0}, "--candidate-minutes is -1; give a number above 0"),
        ({"memory": 0.0}, "--memory is 0; give a number above 0"),
        ({"worst": "mean"}, "--worst is 'mean'; choose one of possible, drawn"),
        ({"skip": ["compil"]}, "--skip is 'compil'; choose one of compile, attention, spreads, finals, workers"),
        ({"devices": ["cpu"], "processes": 2}, "--processes is 2 but --devices names 1; give one of them"),
        ({"devices": ["cuda:0", "cuda:0"]}, "--devices names cuda:0 twice; give each GPU to one process only"),
    ],
)
def test_flags_are_checked(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(**flags)
    assert str(caught.value) == message


def test_mistakes_end_with_code_2(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", str(tiny.parent / "none.yaml")]) == 2
    assert "no such configuration file" in capsys.readouterr().err
    assert main(["--config", str(tiny), "--processes", "3"]) == 2
    assert "batch 4 is not divisible by 3 processes x accumulation 1; try data.batch_size=3" in capsys.readouterr().err
    assert main(["--config", str(tiny), "--devices", "tpu"]) == 2
    assert "can't detect the machine: device 'tpu' is unknown" in capsys.readouterr().err


def test_a_launcher_that_has_started_processes_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match="tuning starts its own processes, but torchrun or deepspeed has started 2; st"
    ):
        tune(str(tiny), [], Options())


def test_ctrl_c_shows_what_was_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(search: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ijepa_scale.tune.search.Search.run", interrupt)
    assert main(["--config", str(tiny)]) == 130
    assert capsys.readouterr().err == "interrupted; no file was written\n"


def test_only_what_differs_is_written_over_the_base(tiny: Path, tmp_path: Path) -> None:
    before = load_config(tiny)
    engine = before.engine.replace(strategy="ddp", accumulation=2)
    tuned = before.replace(engine=engine, data=before.data.replace(batch_size=16))
    settings = overrides_of(tiny, tuned)
    assert settings == {
        "data.batch_size": 16,
        "engine.strategy": "ddp",
        "engine.accumulation": 2,
        "engine.checkpointing": "none",
        "engine.compile": "auto",
        "engine.attention": "auto",
    }
    write_overrides(tmp_path / "deep" / "er" / "tuned.yaml", tiny, settings, tuned, "why\nand where")
    text = (tmp_path / "deep" / "er" / "tuned.yaml").read_text()
    assert text.startswith("# why\n# and where\nbase: ../../tiny.yaml\n")
    assert load_config(tmp_path / "deep" / "er" / "tuned.yaml") == tuned
    assert as_arguments({"a": None, "b": True, "c": [1, 2]}) == "a=null b=true c=[1,2]"


def test_a_file_that_needs_its_overrides_gets_them(tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("data: {batch_size: 8}\nengine: {strategy: deepspeed}\n")
    tuned = load_config(tmp_path / "half.yaml", ["engine.ds_config=ds_configs/zero1.json"])
    settings = overrides_of(tmp_path / "half.yaml", tuned)
    write_overrides(tmp_path / "tuned.yaml", tmp_path / "half.yaml", settings, tuned, "")


def test_a_shipped_configuration_is_tuned_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = load_config("configs/demo.yaml", ["data.workers=3"])
    settings = overrides_of(Path("configs/demo.yaml"), tuned)
    write_overrides(tmp_path / "runs" / "demo" / "tuned.yaml", Path("configs/demo.yaml"), settings, tuned, "")
    assert load_config(tmp_path / "runs" / "demo" / "tuned.yaml") == tuned


def test_a_shipped_configuration_is_not_taken_for_one_beside_the_new_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "to" / "configs").mkdir(parents=True)
    (tmp_path / "to" / "configs" / "demo.yaml").write_text("model: {depth: 7}\n")
    tuned = load_config("configs/demo.yaml", ["data.workers=3"])
    settings = overrides_of(Path("configs/demo.yaml"), tuned)
    write_overrides(tmp_path / "to" / "tuned.yaml", Path("configs/demo.yaml"), settings, tuned, "")
    assert load_config(tmp_path / "to" / "tuned.yaml") == tuned


def test_a_path_that_cannot_be_written_is_reported(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written .*; give another file with --to"):
        write_overrides(tmp_path / "file" / "tuned.yaml", tiny, {}, load_config(tiny), "")


def test_this_machine_is_described() -> None:
    found = describe(config(device="cpu").engine, None, 2)
    assert found.kind == "cpu" and found.processes == 2 and found.peak_flops is None
    assert 0 < found.memory_bytes <= host_bytes() and found.room < found.memory_bytes
    assert "2 processes on" in found.text()


def test_the_table_names_rates_memory_and_mfu() -> None:
    where = space(config(), machine(kind="cuda", peak_flops=1e12))
    best = measured(where.candidate(where.engine, 64), [0.1, 0.1, 0.2])
    found = Found({best.candidate: best}, {"b": "out of memory"}, {"c": "needs 93.0 GB of 80.0 GB by the plan"})
    text = found_text(where, found, best, {best.candidate.label: 1.25})
    row = next(line for line in text.splitlines() if "<- winner" in line)
    assert row.split()[:9] == ["1", "640.0", "448.0", "to", "640.0", "100.0", "1.00", "2.00", "64.0%"]
    assert "1.2 ms" in row and "failed:\n  b: out of memory" in text
    assert "left out:\n  c: needs 93.0 GB of 80.0 GB by the plan" in text
    assert "contexts of 172 and targets of 42 of 196 patches" in head_text(where)
