"""Every engine answers spikes alike, on every process, and a run that was killed goes on with the same bits."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.config.spikes import SpikesConfig
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from ijepa_scale.train.replay import ReplayOptions, options_of, replay
from tests.distributed.commands import write_data
from tests.distributed.harness import run
from tests.distributed.spiking import FACTOR, configured, final_state, left_out, rows, train
from tests.distributed.training import full_state, make, masks_config, part

ZERO = ("engine.strategy=deepspeed", "engine.accumulation=2")
ENGINES = {
    "ddp": ("engine.strategy=ddp",),
    "fsdp2": ("engine.strategy=fsdp2", "engine.accumulation=2"),
    "zero1": (*ZERO, "engine.ds_config=ds_configs/zero1.json"),
    "zero2": (*ZERO, "engine.ds_config=ds_configs/zero2.json"),
    "zero3": (*ZERO, "engine.ds_config=ds_configs/zero3_small.json"),
    "zero2_offload": (*ZERO, "engine.ds_config=ds_configs/zero2_offload.json"),
    "zero3_offload": (*ZERO, "engine.ds_config=ds_configs/zero3_offload.json"),
}
NAN = float("nan")
ACTIONS = {  # what is asked for, spikes (factor and process) by step, and steps left out
    "skip": (("spikes.action=skip",), {23: (FACTOR, None), 24: (FACTOR, 1), 30: (FACTOR, 0)}, 3),
    "rollback": (("spikes.action=rollback",), {27: (FACTOR, 1), 28: (FACTOR, None), 33: (FACTOR, 0)}, 7),
    "nan": (("spikes.skip_nonfinite=2",), {3: (NAN, 1), 22: (NAN, 0), 23: (NAN, None)}, 3),
}
SHORT = {("zero3", "rollback")}
CASES = [
    pytest.param(engine, action, marks=() if (engine, action) in SHORT else pytest.mark.long)
    for engine in ENGINES
    for action in ACTIONS
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Returns the folder of one process's run by action."""

    @functools.cache
    def folder(action: str) -> Path:
        place = tmp_path_factory.mktemp("plain")
        configured(place / "run.yaml", data, place / "run")
        settings, spikes, _ = ACTIONS[action]
        # a spike of one of two processes is half of one of all
        spikes = {step: (factor if process is None else factor / 2, None) for step, (factor, process) in spikes.items()}
        assert run(train, 1, place / "run.yaml", settings, spikes, alone=True) == [""]
        return place / "run"

    return folder


@pytest.mark.parametrize(("engine", "action"), CASES)
def test_engines_agree_and_resume_exactly(engine: str, action: str, data: Path, plain, tmp_path: Path) -> None:
    settings, spikes, skipped = ACTIONS[action]
    settings = (*settings, *ENGINES[engine])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        configured(folder.with_suffix(".yaml"), data, folder)
    assert run(train, 2, whole.with_suffix(".yaml"), settings, spikes) == ["", ""]
    kill = functools.partial(train, kill=29)
    assert run(kill, 2, broken.with_suffix(".yaml"), settings, spikes) == ["Killed: ", "Killed: "]
    assert run(train, 2, broken.with_suffix(".yaml"), settings, spikes) == ["", ""]
    assert rows(broken) == rows(whole)
    found, expected = final_state(broken), final_state(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    assert left_out(whole) == left_out(plain(action)) == skipped
    assert len(rows(whole)) == len(rows(plain(action)))
    for ours, theirs in zip(rows(whole), rows(plain(action)), strict=True):
        assert ours["step"] == theirs["step"] and ours.get("steps_skipped") == theirs.get("steps_skipped")
        for name in ("loss", "grad_norm"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5), (ours["step"], name)
    expected = final_state(plain(action))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


STEPS, SPIKED = 26, (22, 23)


def leaving_out(
    world: World, engine: dict, action: str, impl: str = "auto", late: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the losses and the final state where steps are judged, or, for "loop", where a loop leaves them out."""
    FusedTailAdamW.implementation = "eager"  # which needs no GPU
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(impl=impl), masks_config())
    built._watch = FiniteWatch(world, late=True) if late else built._watch  # type: ignore[attr-defined]
    if action != "loop":
        built.judged_by(SpikeJudge(SpikesConfig(action="skip", window=20, loss_factor=3.0)))
    losses = []
    for index in range(STEPS):
        if index in SPIKED and action == "loop":
            continue
        backward, spoils = built.backward, index in SPIKED
        built.backward = lambda loss, b=backward, s=spoils: b(loss * FACTOR if s else loss)  # type: ignore[method-assign]
        info = step(part(index, world))
        built.backward = backward  # type: ignore[method-assign]
        if index not in SPIKED:
            losses.append(float(world.mean(info.loss.clone())))
    return losses, full_state(world, built)


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "fsdp2", "zero1", "zero3"))]
)
def test_a_skipped_step_is_one_that_a_loop_leaves_out(name: str) -> None:
    """Here the loss leaps as well as the gradient norm. Weights, moments and target are the same bits."""
    settings = dict(word.removeprefix("engine.").split("=") for word in ENGINES.get(name, ("engine.strategy=plain",)))
    settings["accumulation"] = int(settings.get("accumulation", 1))
    for found, expected in zip(
        *(run(leaving_out, 1 if name == "plain" else 2, settings, action) for action in ("skip", "loop")), strict=True
    ):
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys()
        assert all(torch.equal(found[1][tensor], expected[1][tensor]) for tensor in expected[1])


@pytest.mark.parametrize(
    ("impl", "late"),
    [
        ("fused_tail", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("torch", True), ("fused_tail", False))),
    ],
)
def test_a_step_skipped_by_the_host_or_on_the_device_is_left_out(impl: str, late: bool) -> None:
    """With the optimiser that moves the target too, and with decisions on the device as on a GPU."""
    settings = {"strategy": "plain"}
    found, expected = (run(leaving_out, 1, settings, action, impl, late, alone=True)[0] for action in ("skip", "loop"))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][tensor], expected[1][tensor]) for tensor in expected[1])


def replaying(world: World, options: ReplayOptions) -> tuple[float, float, list[int], str]:
    found = replay(options, world)
    return found.loss, found.grad_norm, [sample.sample_id for sample in found.samples], "\n".join(found.lines())


@pytest.mark.long
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_a_replay_on_as_many_processes_gives_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    """And one process gives them with more accumulation, up to rounding."""
    folder = tmp_path / "run"
    configured(folder.with_suffix(".yaml"), data, folder)
    settings = (*ENGINES[name], "schedule.stop_after=12")
    assert run(train, 2, folder.with_suffix(".yaml"), settings, {}) == ["", ""]
    row = next(row for row in rows(folder) if row["step"] == 11)
    given = {count: options_of(folder, 10, exact=True, to=None, started=count, overrides=()) for count in (1, 2)}
    same, other = run(replaying, 2, given[2]), run(replaying, 1, given[1], alone=True)[0]
    assert same[0] == same[1] and same[0][:2] == (row["loss"], row["grad_norm"])
    assert "equal to the run's row, bit for bit" in same[0][3]
    assert other[:2] == pytest.approx(same[0][:2], abs=1e-5) and other[2] == same[0][2]
    assert (folder / "replay" / "step-00000010" / "batch.png").is_file()
