"""Sections: strict types, one message, sections that a component brings, and what a plugin registers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from ijepa_scale.config import (
    AdamWConfig,
    BlockMaskConfig,
    EngineConfig,
    KnnConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    RegressionConfig,
    load_config,
    to_yaml,
)
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.health import HealthConfig
from ijepa_scale.config.manual import blocks, help_text
from ijepa_scale.config.schema import SinkConfig
from ijepa_scale.config.section import Section
from ijepa_scale.errors import ConfigError
from ijepa_scale.registry import OBJECTIVES, SAMPLERS, SINKS, Registry

ROOT = Path(__file__).parents[3]


class CosineConfig(ObjectiveConfig):
    """The angle between predicted and target features."""

    temperature: float = Field(0.1, gt=0, description="Temperature.")
    path: str | None = Field(None, description="A file.")


class BoardConfig(SinkConfig):
    """A board on the web."""

    project: str = Field("ijepa", description="Project that the rows go to.")
    every: int = Field(1, ge=1, description="Rows between uploads.")


class Cosine:
    Config = CosineConfig


class Board:
    Config = BoardConfig


class Plain:
    """A component without settings of its own."""


class Wrong:
    Config = BoardConfig


@pytest.fixture
def added() -> Iterator[None]:
    members: list[tuple[Registry, str, type]] = [
        (OBJECTIVES, "turn", Cosine), (SINKS, "board", Board), (SAMPLERS, "plain", Plain)
    ]  # fmt: skip
    for registry, name, member in members:
        registry.register(name)(member)
    yield
    for registry, name, _ in members:
        del registry._added[name]


def refusal(make: Any, *arguments: Any, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*arguments, **values)
    return str(caught.value)


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_setting_says_what_it_is(kind: type[Section]) -> None:
    rows = [row for block in blocks(kind) for row in block.rows]
    assert {row.setting for row in rows} >= set(known_keys(kind))  # and those of other choices
    for row in rows:
        assert row.meaning.endswith(".") and row.meaning[:1] != " " and row.takes and row.default, row


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("accumulation", True, "a whole number"),
        ("accumulation", 1.0, "a whole number"),
        ("accumulation", "1", "a whole number"),
        ("compile", 1, "auto, true or false"),
        ("compile", "true", "auto, true or false"),
        ("ds_config", 3, "text or null"),
    ],
)
def test_values_are_taken_as_they_are(name: str, value: Any, wanted: str) -> None:
    assert refusal(EngineConfig, **{name: value}) == f"engine.{name} is {value!r}; give {wanted}"


def test_numbers_are_numbers() -> None:
    assert AdamWConfig(lr=1).lr == 1.0 and type(AdamWConfig(lr=1).lr) is float
    for value in ("1", True, None):
        assert refusal(AdamWConfig, lr=value) == f"optimizer.lr is {value!r}; give a number"
    assert refusal(AdamWConfig, lr=float("inf")) == "optimizer.lr is inf; give a finite number"
    assert refusal(AdamWConfig, lr=-1) == "optimizer.lr is -1; give at least 0"
    assert refusal(AdamWConfig, betas=[0.9, "x"]) == (
        "optimizer.betas is [0.9, 'x']; give 2 numbers, each from 0 to below 1"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([0.5, 0.2], "[0.5, 0.2]"),
        ([0.5, 1.2], "[0.5, 1.2]"),
        ([0.5], "[0.5]"),
        (["a", 1], "['a', 1]"),
        (3, "3"),
    ],
)
def test_pairs_ascend(value: Any, said: str) -> None:
    text = f"masks.context_scale is {said}; give two numbers [from, to], 0 <= from <= to <= 1"
    assert refusal(BlockMaskConfig, context_scale=value) == text


def test_one_message_names_everything() -> None:
    text = refusal(
        PretrainConfig,
        seed=-1,
        model={"patch_size": 0, "name": 3},
        engine={"strategy": "deepspeed"},
        logging={"evry": 3},
        optimizer=5,
    )
    assert text.splitlines() == [
        "seed is -1; give at least 0",
        "model.name is 3; give text",
        "model.patch_size is 0; give at least 1",
        "optimizer is 5; it is a section, set optimizer.<name> instead",
        "engine.strategy is deepspeed but ds_config is null; name a file, e.g. ds_configs/zero3.json",
        "logging.evry: unknown; did you mean logging.every?",
    ]


@pytest.mark.parametrize(
    "values,said",
    [
        ({"on_collapse": "stop"}, "on_collapse is stop but every is 0, which raises no alarm; set every, e.g. 100, or"),
        ({"keep_best": "lidar"}, "keep_best is lidar but every is 0, which never measures it; set every, or keep_best"),
        ({"keep_best": "rank_me"}, "keep_best is rank_me but every is 0, which never measures it; set every, or keep_"),
    ],
)
def test_health_that_is_never_measured_decides_nothing(values: dict[str, str], said: str) -> None:
    assert refusal(HealthConfig, every=0, **values).startswith(f"health.{said}")
    HealthConfig(every=1, **values)  # type: ignore[arg-type]
    HealthConfig(every=0, keep_best="linear")


def test_a_change_is_checked() -> None:
    config = EngineConfig(accumulation=4)
    assert config.replace(compile=True) == EngineConfig(accumulation=4, compile=True)
    assert refusal(config.replace, accumulation=0) == "engine.accumulation is 0; give at least 1"
    assert refusal(config.replace, acumulation=1) == "engine.acumulation: unknown; did you mean engine.accumulation?"
    with pytest.raises(ValueError, match="frozen"):
        config.accumulation = 3  # type: ignore[misc]
    assert config.accumulation == 4 and pickle.loads(pickle.dumps(config)) == config and hash(config) is not None


def test_values_are_plain() -> None:
    values = PretrainConfig(model=ModelConfig(image_size=(32, 64), patch_size=8)).values()
    assert values["model"]["image_size"] == [32, 64] and values["engine"]["triton"] == []
    assert values["objective"] == {"loss": "smooth_l1", "beta": 1.0} and values["logging"]["sinks"] == {}
    assert PretrainConfig(**values) == PretrainConfig.model_validate(values)
    assert PretrainConfig(**values).model.image_size == (32, 64)


def test_a_part_of_a_section_leaves_the_rest_at_the_defaults_of_the_run() -> None:
    for kind, batch in ((PretrainConfig, 2048), (FinetuneConfig, 1024)):
        assert kind(data={"workers": 0}).data.batch_size == batch
        data = kind(data={"batch_size_per_process": 8}).data
        assert (data.batch_size, data.batch_size_per_process) == (None, 8)


def test_optimizers_name_their_states() -> None:
    assert AdamWConfig.state_names == ("exp_avg", "exp_avg_sq") and OptimizerConfig.state_names == ()


def test_components_bring_their_sections(added: None, tmp_path: Path, empty: Path) -> None:
    config = load_config(empty, ["objective.path=007", "objective.loss=turn", "objective.temperature=1"])
    assert config.objective == CosineConfig(loss="turn", temperature=1.0, path="007")
    assert "objective.temperature" in known_keys(config) and "objective.beta" not in known_keys(config)
    assert config == PretrainConfig.model_validate(config.values()) == pickle.loads(pickle.dumps(config))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert "temperature: 1.0" in again.read_text() and load_config(again) == config
    lines = refusal(load_config, again, ["objective.temprature=2", "objective.temperature=0"]).splitlines()
    assert lines == [
        "command line: objective.temprature: unknown; did you mean objective.temperature?",
        "command line: objective.temperature is 0; give a number above 0",
    ]
    assert refusal(load_config, again, ["objective.beta=2"]).startswith(
        "command line: objective.beta is a setting of objective.loss=smooth_l1 or objective.loss=l2, but "
    )
    assert "objective, loss turn: The angle between" in help_text(PretrainConfig, "objective")


def test_a_component_may_have_no_section_of_its_own(added: None, empty: Path) -> None:
    config = load_config(empty, ["masks.sampler=plain", "masks.min_keep=3"])
    assert not isinstance(config.masks, BlockMaskConfig) and config.masks.min_keep == 3
    assert "masks.context_scale is a setting of masks.sampler=multiblock" in refusal(
        load_config, empty, ["masks={sampler: plain, context_scale: 1}"]
    )


def test_a_component_that_is_unknown_is_named_alone(empty: Path) -> None:
    said = "or name the module that registers it with --plugin"
    text = refusal(load_config, empty, ["objective.loss=turn", "objective.temperature=1"])
    assert text == f"command line: objective.loss is 'turn'; choose one of smooth_l1, l2, cosine, {said}"
    assert (
        refusal(RegressionConfig, loss="l3") == f"objective.loss is 'l3'; choose one of smooth_l1, l2, cosine, {said}"
    )
    assert refusal(KnnConfig, evaluator="probe") == f"evaluate.evaluator is 'probe'; choose one of knn, {said}"
    assert refusal(load_config, empty, ["data.reader=tape"]) == (
        f"command line: data.reader is 'tape'; choose one of shards, stream, imagefolder, list, synthetic, {said}"
    )
    assert refusal(load_config, empty, ["optimizer.name=3"]).startswith("command line: optimizer.name is '3'; choose")


def test_a_section_that_does_not_fit_is_refused() -> None:
    OBJECTIVES.register("wrong")(Wrong)
    text = refusal(PretrainConfig, objective={"loss": "wrong"})
    del OBJECTIVES._added["wrong"]
    assert text == "objective.loss is 'wrong', whose Config must be a subclass of ObjectiveConfig"


def test_a_name_has_one_class() -> None:
    registry = Registry("objective", {"l2": "ijepa_scale.objectives.regression:Regression"})
    assert registry.register("turn")(Cosine) is registry.register("turn")(Cosine) is registry.get("turn")
    for name in ("l2", "turn"):
        with pytest.raises(ConfigError, match=f"objective '{name}' is already registered; give Board another name"):
            registry.register(name)(Board)
    assert registry.names() == ("l2", "turn") and registry.get("turn") is Cosine


def test_sinks_have_sections_by_name(added: None, empty: Path, tmp_path: Path) -> None:
    config = load_config(empty, ["logging.sinks.board.project=007", "logging.every=3"])
    assert config.logging == LoggingConfig(every=3, sinks={"board": BoardConfig(project="007")})
    assert "logging.sinks.board.project" in known_keys(config)
    path = tmp_path / "sinks.yaml"
    path.write_text("logging:\n  sinks:\n    board:\n")
    assert load_config(path).logging.sinks == {"board": BoardConfig()}
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert refusal(load_config, path, ["logging.sinks.board.evry=1", "logging.sinks.board.every=0"]).splitlines() == [
        "command line: logging.sinks.board.evry: unknown; did you mean logging.sinks.board.every?",
        "command line: logging.sinks.board.every is 0; give at least 1",
    ]
    assert "choose one of wandb, mlflow, board, or name the module that registers it with --plugin" in refusal(
        load_config, path, ["logging.sinks.bord.project=x"]
    )
    assert "logging.sinks.board.project" in help_text(PretrainConfig, "logging")


@pytest.mark.parametrize("given", ["wandb", "[wandb]", "3"])
def test_sinks_that_are_no_mapping_are_refused(given: str, empty: Path) -> None:
    text = refusal(load_config, empty, [f"logging.sinks={given}"])
    assert text.startswith("command line: logging.sinks is ") and "give a mapping" in text


def test_a_sink_can_be_removed(empty: Path) -> None:
    empty.write_text("logging: {sinks: {wandb: {project: x}, mlflow: }}")
    assert set(load_config(empty).logging.sinks) == {"wandb", "mlflow"}
    assert set(load_config(empty, ["logging.sinks.wandb=false"]).logging.sinks) == {"mlflow"}
    assert "choose one of wandb, mlflow" in refusal(load_config, empty, ["logging.sinks.wnadb=false"])


def test_an_unknown_sink_is_refused(empty: Path) -> None:
    said = (
        "command line: logging.sinks is {'board': {}}; choose one of wandb, mlflow, or name the module that registers "
        "it with --plugin"
    )
    assert refusal(load_config, empty, ["logging.sinks.board={}"]) == said


PLUGIN = """
from pydantic import Field
from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.registry import OBJECTIVES

class AngleConfig(ObjectiveConfig):
    degrees: float = Field(90.0, gt=0, description="Where it ends.")

@OBJECTIVES.register("angle")
class Angle:
    Config = AngleConfig
"""


def launch(folder: Path, *arguments: str, script: str = "pretrain.py") -> subprocess.CompletedProcess:
    (folder / "angle_plugin.py").write_text(PLUGIN)
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=with_path(folder))


def with_path(folder: Path) -> dict[str, str]:
    from ijepa_scale import environment

    inherited = environment.child_environment()
    return {**inherited, "PYTHONPATH": f"{folder}:{inherited.get('PYTHONPATH', ROOT)}"}


def test_a_plugin_is_named_on_the_command_line_only(empty: Path, tmp_path: Path) -> None:
    chosen = ("--config", str(empty), "--print-config", "objective.loss=angle", "objective.degrees=45")
    found = launch(tmp_path, "--plugin", "angle_plugin", *chosen)
    assert found.returncode == 0 and "  loss: angle\n  degrees: 45.0\n" in found.stdout, found.stderr
    assert "choose one of smooth_l1, l2, cosine, or name the module" in launch(tmp_path, *chosen).stderr
    missing = launch(tmp_path, "--plugin", "no_such_module", *chosen)
    assert missing.returncode == 2 and "--plugin no_such_module: no such module" in missing.stderr
    (tmp_path / "broken_plugin.py").write_text("import no_such_package\n")
    broken = launch(tmp_path, "--plugin", "broken_plugin", *chosen)
    assert "No module named 'no_such_package'" in broken.stderr and "no such module" not in broken.stderr
    empty.write_text("plugin: angle_plugin")
    assert "c.yaml: plugin: unknown; " in refusal(load_config, empty)


def test_the_settings_are_explained_on_a_terminal(tmp_path: Path) -> None:
    found = launch(tmp_path, "--plugin", "angle_plugin", "--help-config", "objective")
    assert found.returncode == 0 and "objective.degrees  (a number, above 0, default 90)" in found.stdout
    assert "masks.min_keep" not in found.stdout and max(map(len, found.stdout.splitlines())) <= 80
    unknown = launch(tmp_path, "--help-config", "modell", script="finetune.py")
    assert unknown.returncode == 2 and "--help-config modell: no such section; did you mean model?" in unknown.stderr
    nothing = launch(tmp_path)
    assert nothing.returncode == 2 and "--config is missing; name a YAML file" in nothing.stderr
