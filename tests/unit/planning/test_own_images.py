"""What the recipe `own_images` chooses: always a run that can start, and never over what the user set."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.yaml_text import flat, nest
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import MaskSampler
from ijepa_scale.planning.own_images import Facts, choose
from ijepa_scale.train.pretrain import build_schedule
from ijepa_scale.train.setup import global_batch

LAPTOP = Facts(images=500, shorter_side=400, processes=1, processes_per_host=1, cores=4, device="cpu")
H100 = Facts(
    images=5_000_000, shorter_side=375, processes=8, processes_per_host=8, cores=96, device="cuda",
    device_name="NVIDIA H100 80GB HBM3", memory_bytes=80e9, has_bf16=True,
)  # fmt: skip


def chosen(facts: Facts, **user) -> dict:
    return {choice.key: choice.value for choice in choose(facts, nest({"data.train": "x", **user}))}


def run(facts: Facts, **user) -> PretrainConfig:
    return PretrainConfig(**nest(chosen(facts, **user) | {"data.train": "x", **user}))


processes = st.sampled_from([(1, 1), (2, 2), (3, 3), (8, 8), (16, 8), (64, 8)])
facts = st.builds(
    lambda images, side, processes, cores, gpu: Facts(
        images=images, shorter_side=side, processes=processes[0], processes_per_host=processes[1], cores=cores,
        device="cpu" if gpu is None else "cuda", device_name="CPU" if gpu is None else "a GPU",
        memory_bytes=gpu or 0.0, has_bf16=gpu is not None and gpu > 16e9,
    ),
    st.integers(1, 50_000_000), st.integers(1, 5_000), processes, st.integers(1, 256),
    st.sampled_from([None, 11e9, 24e9, 80e9, 141e9]),
)  # fmt: skip
user = st.fixed_dictionaries(
    {},
    optional={
        "model.image_size": st.sampled_from([28, 32, 96, 224, 448, [64, 128]]),
        "model.name": st.sampled_from(["vit_tiny", "vit_small", "vit_large"]),
        "data.batch_size_per_process": st.integers(1, 300),
        "engine.precision": st.just("fp32"),
        "optimizer.lr": st.floats(1e-6, 1e-2),
        "schedule.epochs": st.floats(1.0, 1000.0),
        "schedule.steps_per_epoch": st.integers(1, 10_000),
        "masks.group_size": st.integers(1, 128),
    },
)


@settings(max_examples=60, deadline=None)
@given(facts, user)
def test_whatever_is_chosen_can_run_and_what_is_set_stays(facts, user):
    config = run(facts, **user)
    values = flat(config.values())
    for key, value in user.items():
        wanted = [value, value] if key == "model.image_size" and isinstance(value, int) else value
        assert values[key] == wanted
        assert key not in chosen(facts, **user)
    batch = global_batch(config, facts.processes)  # raises unless it divides
    assert batch <= max(facts.images, facts.processes * 300)
    MaskSampler(config.masks, config.model.grid, seed=0)  # raises where masks can't be drawn
    per_epoch = config.schedule.steps_per_epoch or max(1, facts.images // batch)
    assert build_schedule(config, per_epoch).total_steps >= 1


def test_every_choice_has_a_reason_and_is_made_once():
    for facts in (LAPTOP, H100):
        choices = choose(facts, {})
        assert len({choice.key for choice in choices}) == len(choices) > 10
        assert all(len(choice.reason) > 10 for choice in choices)


def test_a_laptop_and_a_node_of_gpus():
    laptop, node = run(LAPTOP), run(H100)
    assert (laptop.model.name, laptop.engine.precision, laptop.data.batch_size) == ("vit_tiny", "fp32", 32)
    assert (node.model.name, node.engine.precision, node.data.batch_size) == ("vit_huge", "bf16", 2048)
    assert (node.model.image_size, node.model.patch_size, node.masks.min_keep) == ((224, 224), 16, 10)
    assert node.optimizer.lr == 1e-3 and node.schedule.warmup_epochs <= 40


def test_choices_follow_what_the_user_sets():
    assert chosen(LAPTOP, **{"data.batch_size": 128})["optimizer.lr"] == pytest.approx(2.5e-4)
    assert chosen(LAPTOP, **{"optimizer.lr": 1e-2})["optimizer.start_lr"] == pytest.approx(2e-3)
    assert chosen(LAPTOP, **{"model.image_size": 28})["model.patch_size"] in (2, 4)
    assert chosen(LAPTOP, **{"model.patch_size": 14})["model.image_size"] % 14 == 0


def test_a_small_gpu_gets_a_smaller_model_and_more_micro_batches():
    large = dataclasses.replace(H100, processes=1, processes_per_host=1)
    small = dataclasses.replace(large, memory_bytes=11e9)
    assert (chosen(small)["model.name"], chosen(large)["model.name"]) == ("vit_large", "vit_huge")
    same = {"model.name": "vit_base"}
    assert chosen(small, **same)["engine.accumulation"] > chosen(large, **same)["engine.accumulation"]


def test_what_cant_be_used_is_refused():
    with pytest.raises(ConfigError, match="model.name"):
        choose(LAPTOP, {"model": {"name": "vit_bse"}})


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (1, "the least, for only 1 image"),
        (9, "the least, for only 9 images"),
        (10, "a power of two of which an epoch of 10 images has ten or more"),
        (500_000, "the most that is chosen on a CPU"),
    ],
)
def test_the_reason_for_the_batch_fits_small_sets(images: int, why: str) -> None:
    (choice,) = [c for c in choose(dataclasses.replace(LAPTOP, images=images), {"data": {"train": "x"}})
                 if c.key == "data.batch_size"]  # fmt: skip
    assert choice.reason == why and choice.value <= images
