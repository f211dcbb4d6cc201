"""Layers of YAML files and overrides: what they make, and the text of every refusal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig, load_config, read_config, to_yaml
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.section import Section, nested
from ijepa_scale.config.yaml_text import write_yaml
from ijepa_scale.masks import MaskSampler
from ijepa_scale.models import build_jepa
from ijepa_scale.nearest import nearest, nearest_dotted
from ijepa_scale.planning.parameters import count_parameters
from tests.unit.config.writing import load_shipped, refusal, write

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
ENCODER_MILLIONS = {
    "in1k_vith14_ep300": 630.8,
    "in1k_vith16-448_ep300": 631.7,
    "in22k_vith14_ep66": 630.8,
    "in22k_vitg16_ep44": 1011.4,
    "in1k_vits16_ep300": 21.7,
    "in1k_vitb16_ep600": 85.8,
    "in1k_vitl16_ep600": 303.3,
    "base": 85.8,
}


def is_a_path(text: str) -> bool:
    return bool(text.strip()) and not {"$", "\0"} & {*text} and text[0] != "~"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_loads_and_builds(path: Path) -> None:
    config = load_shipped(path)
    model = build_jepa(config.model, seed=0, device="meta")
    total = sum(tensor.numel() for tensor in model.encoder.state_dict().values())
    assert total == count_parameters(config.model).encoder_total
    if path.stem in ENCODER_MILLIONS:
        assert round(total / 1e6, 1) == ENCODER_MILLIONS[path.stem]
    sampler = MaskSampler(config.masks, config.model.grid, seed=0)
    assert sampler.draw.sizes.target_tokens[0] > config.masks.min_keep
    assert config.data.batch_size % config.masks.group_size == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_begins_with_what_it_is_and_its_command(path: Path) -> None:
    header = path.read_text().split("\n\n", 1)[0]
    assert header.startswith("# ") and "launch/pretrain.py --config configs/" + path.name in header


@pytest.mark.parametrize(
    ("name", "group", "image", "patch", "depth", "epochs", "warmup"),
    [
        ("in1k_vith14_ep300", 128, 224, 14, 12, 300, 40),
        ("in1k_vith16-448_ep300", 16, 448, 16, 12, 300, 40),
        ("in22k_vith14_ep66", 32, 224, 14, 12, 66, 3),
        ("in22k_vitg16_ep44", 16, 224, 16, 16, 44, 3),
    ],
)
def test_published_names_are_the_published_runs(
    name: str, group: int, image: int, patch: int, depth: int, epochs: int, warmup: int
) -> None:
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    assert config.model.image_size == (image, image) and config.model.patch_size == patch
    assert (config.model.predictor_depth, config.model.predictor_width) == (depth, 384)
    assert (config.schedule.epochs, config.schedule.warmup_epochs, config.schedule.ipe_scale) == (epochs, warmup, 1.0)
    assert config.schedule.momentum == (0.996, 1.0)
    optimizer = config.optimizer
    assert (optimizer.start_lr, optimizer.lr, optimizer.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (optimizer.weight_decay, optimizer.final_weight_decay, optimizer.clip_norm) == (0.04, 0.4, None)
    masks = config.masks
    assert (masks.sampler, masks.context, masks.group_size) == ("reference", "truncate", group)
    assert (masks.num_context_blocks, masks.num_target_blocks, masks.min_keep) == (1, 4, 10)
    assert (masks.context_scale, masks.target_scale, masks.target_aspect) == ((0.85, 1.0), (0.15, 0.2), (0.75, 1.5))
    assert not masks.allow_overlap and not config.model.rescale_residual
    augment = config.augment
    assert (augment.flip, augment.color_jitter, augment.grayscale, augment.blur) == (0, 0, 0, 0)
    assert augment.crop_scale == (0.3, 1.0) and config.engine.precision == "bf16"
    assert config.data.batch_size == 2048


def test_the_demo_runs_500_steps() -> None:
    config = load_config(CONFIGS[0].parent / "demo.yaml")
    assert config.schedule.epochs * config.schedule.steps_per_epoch == 500
    assert config.model.grid == (7, 7) and config.data.batch_size == 64


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_yaml_of_a_config_loads_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    config = load_shipped(path, ["optimizer.clip_norm=3.5", "optimizer.eps=1e-12", "folder=a: b # c"])
    assert load_config(write(tmp_path, "again.yaml", to_yaml(config))) == config


@settings(max_examples=30, deadline=None)
@given(lr=st.floats(0, 10), folder=st.text(min_size=1, max_size=20).filter(is_a_path))
def test_any_number_and_text_survives_the_round_trip(tmp_path_factory, lr: float, folder: str) -> None:  # noqa: ANN001
    config = PretrainConfig(folder=folder)
    config = config.replace(optimizer=config.optimizer.replace(lr=lr))
    path = tmp_path_factory.mktemp("round") / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_layers_lie_over_one_another(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "a.yaml", "seed: 1\nmodel: {depth: 1, heads: 2}\n")
    write(tmp_path / "deep", "b.yaml", "base: ../a.yaml\nmodel: {depth: 2}\n")
    config = load_config(tmp_path / "deep" / "b.yaml", ["model.width=64"])
    assert (config.seed, config.model.depth, config.model.heads, config.model.width) == (1, 2, 2, 64)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.lr=2E+0", "optimizer.lr", 2.0),
        ("optimizer.eps=.5e-8", "optimizer.eps", 5e-9),
        ("schedule.epochs=1e2", "schedule.epochs", 100.0),
        ("augment.crop_scale=[2e-1, 1]", "augment.crop_scale", (0.2, 1.0)),
        ("model.image_size=112", "model.image_size", (112, 112)),
        ("model.image_size=[64,96]", "model.image_size", (64, 96)),
        ("model={depth: 3}", "model.depth", 3),
        ("engine.compile=true", "engine.compile", True),
        ("engine.compile=auto", "engine.compile", "auto"),
        ("optimizer.clip_norm=null", "optimizer.clip_norm", None),
        ("data.train={000..127}.tar", "data.train", "{000..127}.tar"),
        ("data.train=a/{000..127}.tar", "data.train", "a/{000..127}.tar"),
        ("data.train=a=b", "data.train", "a=b"),
        ("folder=007", "folder", "007"),
        ("folder='x y'", "folder", "x y"),
        ("data.train=", "data.train", None),
        ("resume=none", "resume", "none"),
    ],
)
def test_overrides_are_read_as_yaml(empty: Path, text: str, key: str, value: object) -> None:
    config = load_config(empty, [text])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_numbers_in_files_may_lack_the_point(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "c.yaml", "optimizer: {lr: 1e-3, start_lr: 1E-5}\naugment: {mean: [1e-1, 0, 1]}")
    )
    assert (config.optimizer.lr, config.optimizer.start_lr, config.augment.mean) == (1e-3, 1e-5, (0.1, 0.0, 1.0))


def test_one_batch_size_clears_the_other_from_below(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "data: {batch_size_per_process: 8}")
    assert load_config(a).data.batch_size is None
    config = load_config(write(tmp_path, "b.yaml", "base: a.yaml\ndata: {batch_size: 16}"))
    assert (config.data.batch_size, config.data.batch_size_per_process) == (16, None)
    config = load_config(a, ["data.batch_size=4"])
    assert (config.data.batch_size, config.data.batch_size_per_process) == (4, None)
    lines = refusal(a, "data.batch_size=4", "data.batch_size_per_process=4")
    assert lines == ["command line: data.batch_size is 4 and batch_size_per_process 4; give exactly one of them"]


def test_all_unknown_keys_come_in_one_message(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "optimizer: {learning_rate: 1}\nmask: {}\n")
    path = write(tmp_path, "c.yaml", "base: base.yaml\ndata: {batch_sise: 3}\nmodel: {qwertzuiop: 3}\nxyzzyx: 3")
    lines = refusal(path, "optimizer.wd=3", "epochs=3")
    base = tmp_path / "base.yaml"
    assert lines[:3] == [
        f"{base}: optimizer.learning_rate: unknown; did you mean optimizer.lr?",
        f"{base}: mask: unknown; did you mean masks?",
        f"{path}: data.batch_sise: unknown; did you mean data.batch_size?",
    ]
    assert lines[3].startswith(f"{path}: model.qwertzuiop: unknown; there are model.name, model.image_size")
    assert lines[4].startswith(f"{path}: xyzzyx: unknown; there are ")
    assert lines[5:] == [
        "command line: optimizer.wd: unknown; did you mean optimizer.weight_decay?",
        "command line: epochs: unknown; did you mean schedule.epochs?",
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; give a number"),
        ("optimizer.lr=true", "optimizer.lr is True; give a number"),
        ("optimizer.lr=[1]", "optimizer.lr is [1]; give a number"),
        ("optimizer.lr=null", "optimizer.lr is None; give a number"),
        ("data.workers=2.5", "data.workers is 2.5; give a whole number"),
        ("optimizer.clip_norm=x", "optimizer.clip_norm is 'x'; give a number or null"),
        ("engine.compile=maybe", "engine.compile is 'maybe'; give auto, true or false"),
        ("engine.compile=1", "engine.compile is 1; give auto, true or false"),
        ("folder=null", 'folder is null; give a path (in YAML, a lone ~ is null: write "~" or $HOME)'),
        ("model=3", "model is 3; it is a section, set model.<name> instead"),
        ("folder=${oc.env:HOME}", "folder is '${oc.env:HOME}'; interpolations aren't read, write the value itself"),
        ("optimizer.betas=3", "optimizer.betas is 3; give 2 numbers, each from 0 to below 1"),
        ("augment.mean=null", "augment.mean is None and std is (0.229, 0.224, 0.225); give both, or neither"),
        ("augment.std=[0.2,0,0.2]", "augment.std is [0.2, 0, 0.2]; give a number above 0 for each channel or null"),
        ("engine.strategy=horovod", "engine.strategy is 'horovod'; choose one of auto, plain, ddp, fsdp2, deepspeed"),
        ("engine.target_precision='null'", "engine.target_precision is 'null'; choose fp8, or null"),
        ("engine.target_precision=''", "engine.target_precision is ''; choose fp8, or null"),
        ("engine.triton=5", "engine.triton is 5; give a list of target_loss, target_update"),
        (
            "engine.zero_communication=bf16",
            "engine.zero_communication is bf16 but strategy is auto without a ds_config: only ZeRO reads it; "
            "set it to fp32",
        ),
        (
            "engine={strategy: ddp, zero_communication: bf16}",
            "engine.zero_communication is bf16 but strategy is ddp: only ZeRO reads it; set it to fp32",
        ),
        (
            "engine={ds_config: a.json, precision: fp32, zero_communication: bf16}",
            "engine.zero_communication is bf16 but precision is fp32; set one to the other's",
        ),
        (
            "engine={compile: false, compile_cache: kernels}",
            "engine.compile_cache is 'kernels' but compile is false; set compile=auto or compile_cache=null",
        ),
    ],
)
def test_wrong_values_say_what_is_wanted(empty: Path, override: str, text: str) -> None:
    assert refusal(empty, override) == [f"command line: {text}"]


def test_settings_that_take_effect_are_taken(empty: Path) -> None:
    assert load_config(empty, ["engine.triton=null"]).engine.triton == ()
    zero = ["engine.zero_communication=bf16", "engine.ds_config=ds_configs/zero3.json"]
    for overrides in (zero, [*zero, "engine.strategy=deepspeed"]):
        assert load_config(empty, overrides).engine.zero_communication == "bf16"
    for overrides in ([], ["engine.compile=true"]):
        assert load_config(empty, [*overrides, "engine.compile_cache=kernels"]).engine.compile_cache == "kernels"


def test_problems_of_several_sections_come_together(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", "model: {patch_size: 0}\noptimizer: {eps: -1, betas: [2, 0]}\nseed: -1")
    lines = refusal(path, "data.workers=-1")
    assert f"{path}: model.patch_size is 0; give at least 1" in lines
    assert f"{path}: optimizer.eps is -1; give at least 0" in lines
    assert f"{path}: optimizer.betas is [2, 0]; give 2 numbers, each from 0 to below 1" in lines
    assert "command line: data.workers is -1; give at least 0" in lines
    assert refusal(write(tmp_path, "d.yaml", "seed: -1"))[0].endswith("seed is -1; give at least 0")


def test_a_setting_of_another_component_names_it(tmp_path: Path) -> None:
    """As when a file sets it and the command line chooses another component."""
    tried = 0
    for section, declared in ((name, nested(field)[0]) for name, field in PretrainConfig.model_fields.items()):
        if declared is None or not declared.selector:
            continue
        selector = f"{section}.{declared.selector}"
        for chosen in declared.names():
            theirs = {name: declared.member(name).model_fields for name in declared.names()}
            own = {(name, key): field for name, fields in theirs.items() for key, field in fields.items()}
            for (owner, key), field in own.items():
                if key in theirs[chosen]:
                    continue
                path = write(tmp_path, "c.yaml", write_yaml({section: {key: field.get_default()}}))
                lines = refusal(path, f"{selector}={chosen}")
                (line,) = (line for line in lines if f"{section}.{key} " in line)
                assert line.startswith(f"{path}: {section}.{key} is a setting of ") and f"{selector}={owner}" in line
                assert f", but {selector} is {chosen}; remove it, or choose " in line
                tried += 1
    assert tried > 3


def test_an_override_without_value_is_refused(empty: Path) -> None:
    assert refusal(empty, "optimizer.lr") == [
        "override 'optimizer.lr' has no `=`; write section.key=value, e.g. optimizer.lr=1e-3"
    ]
    assert refusal(empty, "optimizer.lr=[1")[0].startswith("override 'optimizer.lr=[1': not readable as YAML in line 1")


def test_circles_of_bases_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml")
    write(tmp_path, "b.yaml", "base: a.yaml")
    assert "its base leads back to itself (a.yaml -> b.yaml -> a.yaml); remove one `base`" in refusal(a)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [a, b]", "base is ['a', 'b']; name one file, relative to this one"),
        ("- 1", "holds a list; a configuration is a mapping of sections"),
        ("seed: 1\nseed: 2", "not readable as YAML in line 2: the key 'seed' appears twice"),
        ("model: {depth: 1", "not readable as YAML in line 1"),
        ("a: !!python/object/apply:os.system ['true']", "not readable as YAML in line 1: could not determine a"),
        ("base: none.yaml", "none.yaml: no such configuration file (the base of"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path, "c.yaml", text))[0]


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml") == [
        f"{tmp_path / 'no.yaml'}: no such configuration file; configs/ holds ready ones"
    ]
    assert refusal(tmp_path) == [f"{tmp_path}: can't be read (Is a directory); name a YAML file"]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert refusal(tmp_path / "pipe.yaml")[0].endswith("can't be read (not a regular file); name a YAML file")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "can't be read as a text file" in refusal(tmp_path / "b.yaml")[0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("3", "a number"), ("1.5", "a number"), ("- a", "a list"), ("text", "text"), ("true", "true or false")],
)
def test_a_file_that_holds_something_else(tmp_path: Path, text: str, kind: str) -> None:
    path = write(tmp_path, "c.yaml", text)
    assert refusal(path) == [f"{path}: holds {kind}; a configuration is a mapping of sections"]


def test_an_override_without_a_key_is_refused(empty: Path) -> None:
    said = "override '=3' has no key; write section.key=value, e.g. optimizer.lr=1e-3"
    assert refusal(empty, "=3") == [said] and refusal(empty, " =3") == [said.replace("'=3'", "' =3'")]


def test_an_empty_section_sets_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "c.yaml", "model:\nmasks: {}\n")) == PretrainConfig()


def test_another_kind_of_configuration_can_be_read(empty: Path) -> None:
    class Probe(Section):
        lr: float = 1.0
        name: str | None = None

    config = read_config(empty, ["lr=2", "name=3"], kind=Probe).config
    assert config == Probe(lr=2.0, name="3")


def test_nearest_names() -> None:
    keys = list(known_keys(PretrainConfig))
    assert len(keys) == len(set(keys)) > 60
    assert nearest_dotted("optimiser.lr", keys) == "optimizer.lr"
    assert nearest_dotted("optimizer.epochs", keys) == "schedule.epochs"
    assert nearest_dotted("zzzzzz.qqqq", keys) is None
    assert nearest("LR", ["lr"]) == "lr"
    assert nearest("wd", ["warmup", "weight_decay"]) == "weight_decay"
