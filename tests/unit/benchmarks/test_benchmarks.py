"""The benchmarks compare like with like: baseline and loop equal ours, and clocks start after the warm-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, pictures
from benchmarks.baseline_masks import LoopMasks
from benchmarks.common import in_turns, ratios, read_rows
from benchmarks.curves import distances
from benchmarks.scaling import WireBytes, engine_settings, planned_bytes
from benchmarks.step import Measured, disagrees, report, row_of
from benchmarks.synthetic import Baseline, Draws, Ours, configured, images_for, start
from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks.reference import sample_reference
from ijepa_scale.metrics.meters import Meters

TINY = [
    "model.image_size=32", "model.patch_size=4", "model.width=48", "model.depth=3", "model.heads=3",
    "model.predictor_width=24", "model.predictor_depth=2", "masks.min_keep=3", "masks.group_size=6",
    "data.batch_size=6", "data.reader=synthetic", "engine.strategy=plain", "engine.device=cpu",
    "engine.precision=fp32",
]  # fmt: skip


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_baseline_trains_as_our_step_does(num_contexts):
    quick = ["optimizer.start_lr=1e-3", "schedule.momentum=[0.5, 1.0]"]  # so that three steps move the target far
    config = configured([*TINY, *quick, f"masks.num_context_blocks={num_contexts}"])
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(5)
    module, images = start(config), images_for(config, 6, device)
    with torch.no_grad():
        for parameter in module.parameters():  # biases, norms and GELU's bend count too
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours, baseline = Ours(config, module, images), Baseline(config, module, images, Draws(config, device))
    for step in range(3):
        assert abs(float(ours(step)) - float(baseline(step))) < 1e-5
    mine, theirs = ours.engine.target_module.state_dict(), baseline.step.target.state_dict()
    assert mine.keys() == theirs.keys()
    first = module.encoder.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=0)
    assert all((value - first[name]).abs().max() > 1e-4 for name, value in mine.items() if name != "pos_embed")


def test_flops_of_a_step_follow_its_masks():
    config = configured(TINY)
    truncated, packed = (
        Draws(configured([*TINY, f"masks.context={kind}"]), torch.device("cpu")) for kind in ("truncate", "packed")
    )
    assert packed.flops(0) > truncated.flops(0) > 6 * 1e6
    assert len({truncated.flops(step) for step in range(4)}) > 1
    assert truncated.count == config.data.batch_size


CASES = {
    "published": (BlockMaskConfig(sampler="reference"), (16, 16)),
    "two contexts": (BlockMaskConfig(sampler="reference", num_context_blocks=2, context_scale=(0.3, 0.6)), (14, 14)),
    "overlap": (BlockMaskConfig(sampler="reference", allow_overlap=True), (14, 14)),
    "crowded": (
        BlockMaskConfig(sampler="reference", min_keep=11, context_scale=(0.4, 0.6), target_scale=(0.3, 0.4)),
        (8, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loop_draws_the_numbers_of_the_reference_sampler(name):
    config, grid = CASES[name]
    loop, generators = LoopMasks(config, grid), [torch.Generator().manual_seed(3) for _ in range(2)]
    for step in range(3):  # the generators go on
        found = loop(step, 16, generators[0])
        expected = sample_reference(config, grid, step=step, count=16, generator=generators[1]).dense()
        assert torch.equal(found.context, expected.context) and torch.equal(found.targets, expected.targets)


def test_loop_refuses_what_it_would_never_find():
    with pytest.raises(ConfigError, match="masks.min_keep is 10, but target blocks on a grid of 4x4"):
        LoopMasks(BlockMaskConfig(sampler="reference"), (4, 4))


def test_turns_alternate_and_the_first_round_warms_up():
    calls, now = [], [0.0]

    def work(name, seconds):
        def run(turn):
            calls.append((name, turn))
            now[0] += seconds

        return run

    found = in_turns({"a": work("a", 1.0), "b": work("b", 3.0)}, 2, clock=lambda: now[0])
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert found == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert ratios(found["b"], found["a"])["p50"] == 3.0


def test_collectives_are_counted_as_a_ring_sends_them():
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        whole, part = torch.zeros(8), torch.zeros(2)
        with WireBytes(4) as wire:
            dist.all_reduce(whole)
            dist.all_gather_into_tensor(whole, part)
            dist.reduce_scatter_tensor(part, whole)
    finally:
        dist.destroy_process_group()
    assert wire.bytes == {"allreduce": 48, "allgather": 24, "reduce_scatter": 24}
    assert set(wire.calls.values()) == {1}


def test_planned_bytes_know_every_engine_but_not_the_baseline():
    config = configured([setting for setting in TINY if "strategy" not in setting] + engine_settings("zero1"))
    assert planned_bytes("eager baseline, ddp", config, 2) is None
    assert planned_bytes("zero1", config, 2) > planned_bytes("ddp", config, 2) > 0


def test_distances_of_curves():
    fast, eager = ([torch.tensor([1.0, 2.0]).numpy(), torch.tensor([2.0, 3.0]).numpy()] for _ in range(2))
    assert distances({"fast": fast, "eager": eager}) == (0.0, 1.0)


def test_a_loss_that_is_not_finite_fails_its_side():
    config = configured(TINY)
    side = Measured("ours", config, Draws(config, torch.device("cpu")))
    side.seconds, side.steps, side.losses = [1.0, 1.0], [0, 1], [0.5, float("nan")]
    row = row_of(side, [side], 1e12)
    assert row["failed"] == "a loss isn't finite: [0.5, nan]"
    assert "| ours | a loss isn't finite" in report([row], "cpu")


def test_losses_that_leave_the_baselines_are_told_apart_from_the_fp8_targets():
    row = {"side": "ours", "precision": "fp32", "loss_difference_times_baseline": 2e-4}
    assert disagrees(row) and not disagrees({**row, "precision": "bf16"})
    assert not disagrees({**row, "side": "ours, engine.target_precision=fp8"}) and not disagrees({"side": "ours"})


def test_only_sides_with_the_baselines_masks_are_compared_with_it():
    config = configured(TINY)
    draws = Draws(config, torch.device("cpu"))
    sides = [Measured(name, config, draws) for name in ("eager baseline", "ours")]
    sides.append(Measured("ours, groups", config.replace(masks=config.masks.replace(group_size=3)), draws))
    for side in sides:
        side.seconds, side.steps, side.losses = [1.0, 1.0], [0, 1], [0.5, 0.4]
    rows = [row_of(side, sides, 1e12) for side in sides]
    assert ["times_baseline" in row for row in rows] == [False, True, False]
    assert rows[2]["times_ours"]["p50"] == 1.0 and [row["groups"] for row in rows] == [1, 1, 2]


def test_the_clock_starts_after_the_dropped_steps():
    now = [0.0]
    meters = Meters("cpu", clock=lambda: now[0])

    def work(batch):
        now[0] += 100.0 if batch < 3 else 1.0
        meters.count_step()

    found = end_to_end.windows(range(8), work, meters, first=3, window=2)
    assert [each["step_ms"] for each in found] == [1000.0, 1000.0]  # the eighth step fills no window


def test_held_ahead_counts_the_loaders_buffers(tmp_path, monkeypatch):
    from ijepa_scale.data import loader

    made = []

    class Counted(loader.Slots):
        def __init__(self, count, size):
            made.append(count)
            super().__init__(count, size)

    monkeypatch.setattr(loader, "Slots", Counted)
    config = configured([*TINY, "data.workers=3", "data.prefetch=4", "data.synthetic_samples=60"])
    iter(end_to_end.PretrainTask(config, end_to_end.alone(torch.device("cpu"))).loader(0))
    assert made == [end_to_end.held_ahead(config)] == [15]


def test_end_to_end_refuses_few_steps_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--device", "cuda", "--steps", "70"])
    with pytest.raises(SystemExit):
        end_to_end.main()
    assert "--steps is 70; on cuda give a multiple of 20, at least 80" in capsys.readouterr().err


def test_end_to_end_measures_a_whole_run(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    flags = ["--model", "vit_tiny", "--image-size", "32", "--patch-size", "4", "--batch", "6", "--device", "cpu"]
    tiny = [each for each in TINY if "model." in each or "keep" in each]
    monkeypatch.setattr(pictures, "SYNTHETIC", 24)
    monkeypatch.setattr(sys, "argv", ["end_to_end", *flags, "--steps", "8", "--workers", "0", "--to", str(rows), *tiny])
    end_to_end.main()
    found = {row["side"]: row for row in read_rows(rows)}
    assert list(found) == [end_to_end.SYNTHETIC, end_to_end.SHARDS, end_to_end.RUN, end_to_end.BASELINE]
    run = found[end_to_end.RUN]
    assert (run["steps"], run["checkpoint_every"], run["evaluate_every"]) == (3, 4, 2)  # not the first of four steps
    assert run["p50"] == pytest.approx(3 * 6 / run["wall_s"]) and 0 < run["outside_steps_s"] < run["wall_s"]
    assert found[end_to_end.SHARDS]["dropped_steps"] == 2 + 3
    assert "The whole run writes a checkpoint every 4 steps" in capsys.readouterr().out


def test_revisions_compares_a_checkout_with_itself(tmp_path):
    tiny = [
        "model.image_size=32",
        "model.patch_size=4",
        "model.width=24",
        "model.depth=1",
        "model.heads=2",
        "masks.min_keep=0",
    ]
    command = [sys.executable, "-m", "benchmarks.revisions", ".", "--model", "vit_tiny", "--batch", "2", "--steps", "2"]
    rows = tmp_path / "rows.jsonl"
    command += ["--to", str(rows), *(word for each in tiny for word in ("--set", each))]
    found = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert "losses that differ: 0 of 3" in found.stdout
    row = json.loads(rows.read_text())
    assert row["pairs"] == 2 and set(row["cpu_time_ratio"]) == {"p20", "p50", "p80"}
