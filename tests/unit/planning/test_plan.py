"""The plan of a run: GPUs by name, bytes sent, advice, refusals and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ijepa_scale.config import EngineConfig, ModelConfig, PretrainConfig, load_config
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.schema import BlockMaskConfig, ScheduleConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.lars import LarsConfig
from ijepa_scale.planning.communication import LINK_SHARE, buffers, transfers
from ijepa_scale.planning.devices import Cluster, devices, find_device, parse_gpus
from ijepa_scale.planning.flops import FlopCount
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.plan import IMAGENET_22K, plan
from ijepa_scale.planning.plan_text import WIDTH, plan_json, plan_text
from ijepa_scale.planning.spread import Spread, ZeroBuckets
from ijepa_scale.planning.step_time import step_time
from launch.plan import main

ROOT = Path(__file__).parents[3]
A100, HUGE = find_device("a100-80gb"), ModelConfig(name="vit_huge", patch_size=14)


def published(name: str = "in1k_vith14_ep300", *overrides: str) -> PretrainConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8x a100-80gb", 8, "a100-80gb"),
        ("16x h100", 16, "h100"),
        ("h200", 1, "h200"),
        ("8 x H100-PCIe", 8, "h100-pcie"),
        ("4 rtx-4090", 4, "rtx-4090"),
        ("8xA100", 8, "a100-80gb"),
        ("2 NVIDIA A100-SXM4-40GB", 2, "a100-40gb"),
        ("8x A100 80 GB PCIe", 8, "a100-80gb-pcie"),
        ("8x h100 80gb hbm3", 8, "h100"),
        ("8x a100-80g", 8, "a100-80gb"),
        ("2xRTX4090", 2, "rtx-4090"),
        ("rtx4090 x2", 2, "rtx-4090"),
        ("h100x8", 8, "h100"),
        ("mi300x", 1, "mi300x"),
    ],
)
def test_gpus_are_read(text: str, count: int, name: str) -> None:
    assert parse_gpus(text) == (count, devices()[name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x h10O", "--gpus names 'h10O', which isn't known; did you mean h100\\? choose one of a100-40gb, a100-80gb"),
        ("8x h100-40gb", "--gpus names 'h100-40gb', which isn't known"),
        ("8x", "--gpus is '8x'; give a number and a name, such as 8x a100-80gb"),
        ("0x a100", "--gpus is '0x a100', a number of 0; give at least 1 GPU"),
        ("-8x a100", "--gpus is '-8x a100', a number of -8; give at least 1 GPU"),
    ],
)
def test_invalid_gpus_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_gpus(text)


def test_every_device_has_a_peak_and_sane_sizes() -> None:
    for device in devices().values():
        assert device.peak_flops > 5e13 and device.memory_bytes >= 24e9
        assert device.link_bandwidth >= 32e9 and device.network_bandwidth <= device.link_bandwidth


def test_invalid_clusters_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Cluster(A100, 0, 0, 0.0)
    assert str(caught.value).splitlines() == [
        "--gpus is 0 GPUs; give at least 1",
        "--gpus-per-node is 0 GPUs; give at least 1",
        "--network is 0 GB/s; give a number above 0, such as 50",
    ]
    with pytest.raises(ConfigError, match="12 GPUs don't fill nodes of 8; take 8 or 16, or give --gpus-per-node"):
        Cluster(A100, 12)


def test_the_network_is_the_typical_one_of_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert Cluster(A100, 16).network_bandwidth == 25e9 and Cluster(find_device("h200"), 16).network_bandwidth == 50e9
    assert Cluster(A100, 16, network_bandwidth=10e9).network_bandwidth == 10e9
    run = ["--config", str(ROOT / "configs" / "in1k_vitb16_ep600.yaml"), "--gpus", "16x"]
    for flags, stated in (
        (["a100"], "network 25 GB/s per GPU (typical for it; --network changes it)"),
        (["h100"], "network 50 GB/s per GPU (typical for it; --network changes it)"),
        (["a100", "--network", "12.5"], "network 12.5 GB/s per GPU\n"),
    ):
        assert main([*run, *flags]) == 0
        assert stated in capsys.readouterr().out.replace("\n" + 11 * " ", " ")


def test_bytes_on_the_wire() -> None:
    trained, target = count_parameters(HUGE).trainable, count_parameters(HUGE).target

    def sent(strategy: str, **changes: object) -> float:
        return sum(each.bytes for each in transfers(HUGE, Spread(strategy=strategy, **{"world": 8, **changes})))

    ring = 7 / 8
    assert sent("plain", world=1) == 0
    assert sent("ddp") == sent("ddp", accumulation=4) == 2 * ring * 4 * trained
    assert sent("fsdp2") == pytest.approx(ring * (2 * target + 2 * trained + 4 * trained))
    assert sent("fsdp2", precision="fp32") == pytest.approx(ring * (4 * target + 4 * trained + 4 * trained))
    assert sent("fsdp2", reshard_after_forward=True) - sent("fsdp2") == pytest.approx(ring * 2 * trained)
    assert sent("fsdp2", accumulation=2) - sent("fsdp2") == pytest.approx(ring * 2 * (target + trained))
    hybrid = sent("fsdp2", world=16, replicas=2)
    assert hybrid == pytest.approx(sent("fsdp2") + 4 * trained / 8)
    assert sent("zero1") == sent("zero1", accumulation=3) == pytest.approx(ring * (8 + 4) * trained)
    assert sent("zero1", zero=ZeroBuckets(all_reduce=False)) == pytest.approx(ring * (4 + 4) * trained)
    assert sent("zero2", accumulation=2) - sent("zero2") == pytest.approx(ring * 8 * trained)
    assert sent("zero3") == pytest.approx(ring * (2 * target + 4 * 2 * trained))
    assert sent("zero3", precision="fp32") == pytest.approx(ring * 4 * (target + 2 * trained))
    assert sent("zero3", communication="bf16") == pytest.approx(ring * 2 * (target + 2 * trained))
    assert sent("zero1", communication="bf16") == pytest.approx(ring * (4 + 4) * trained)
    assert sent("zero3", zero=ZeroBuckets(held=0)) == pytest.approx(ring * (2 * target + 4 * 3 * trained))


def test_buffers_follow_the_deepspeed_files() -> None:
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        zero = json.loads(path.read_text())["zero_optimization"]
        found = ZeroBuckets.of(zero)
        assert found.reduce == zero["reduce_bucket_size"] and found.offload_optimizer == ("offload" in path.name)
        if path.name in ("zero1.json", "zero2.json", "zero3.json"):
            assert found == ZeroBuckets()
    assert buffers(HUGE, Spread(strategy="zero1", world=8)).largest == 2 * 4 * 200_000_000
    trained = count_parameters(HUGE).trainable
    held = buffers(HUGE, Spread(strategy="zero3", world=8))
    assert held.gathered == 4 * trained and held.permanent == 4 * 200_000_000
    small = buffers(HUGE, Spread(strategy="zero3", world=8, zero=ZeroBuckets(held=0)))
    assert small.gathered == 0 and small.forward > 0
    kept, freed = (buffers(HUGE, Spread(strategy="fsdp2", world=8, reshard_after_forward=r)) for r in (False, True))
    assert kept.gathered == 2 * trained and freed.gathered == 0
    assert buffers(HUGE, Spread(strategy="ddp", world=8)).largest == 0
    assert buffers(HUGE, Spread(strategy="fsdp2", precision="fp32")).largest == 0  # a single process gathers nothing


def test_steps_take_computation_and_what_it_cannot_hide() -> None:
    flops = FlopCount(target=3e11, context=3e11, predictor=0.6e11)
    given = {"flops": flops, "micro_batch": 128, "checkpointing": "none", "mfu": 0.5}
    cluster = Cluster(A100, 8)
    ddp = step_time(HUGE, cluster, Spread(strategy="ddp", world=8), **given)
    assert ddp.compute_s == pytest.approx(128 * 6.6e11 / 1.56e14) and ddp.exposed_s == 0
    assert ddp.communication_s == pytest.approx(ddp.wire_bytes / (LINK_SHARE * 300e9))
    assert ddp.images_per_s == pytest.approx(8 * 128 / ddp.compute_s)
    slow = step_time(
        HUGE, Cluster(find_device("l40s"), 8), Spread(strategy="ddp", world=8), **{**given, "micro_batch": 8}
    )
    assert slow.exposed_s == pytest.approx(slow.communication_s - slow.compute_s * 2.4 / 6.6)  # minus backward
    zero = step_time(HUGE, cluster, Spread(strategy="zero1", world=8), **given)
    assert zero.exposed_s == pytest.approx(zero.transfers[1].bytes / (LINK_SHARE * 300e9))
    full = step_time(HUGE, cluster, Spread(strategy="ddp", world=8), **{**given, "checkpointing": "full"})
    assert full.compute_s == pytest.approx(ddp.compute_s * (6.6 + 1.2) / 6.6)
    nodes = step_time(HUGE, Cluster(A100, 16), Spread(strategy="ddp", world=16), **given)
    assert nodes.communication_s == pytest.approx(nodes.wire_bytes / (LINK_SHARE * 200e9))  # 8 x 25, less than links
    thin = step_time(HUGE, Cluster(A100, 16, 8, 10e9), Spread(strategy="ddp", world=16), **given)
    assert thin.communication_s == pytest.approx(thin.wire_bytes / (LINK_SHARE * 80e9))


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("8x a100-80gb", "ddp"), ("8x rtx-4090", "fsdp2"), ("16x rtx-4090", "hsdp 2x8"), ("h200", "plain")],
)
def test_the_advice_is_what_auto_takes(gpus: str, expected: str) -> None:
    found = plan(published(), Cluster(parse_gpus(gpus)[1], parse_gpus(gpus)[0]))
    assert found.chosen.spread.label == expected and found.chosen is found.strategies[0]


def test_a_plan_holds_the_published_figures() -> None:
    found = plan(published(), Cluster(A100, 16), mfu=0.5)
    assert found.micro_batch == 128 and found.steps == 300 * 625
    assert found.flops.total == pytest.approx(655e9, rel=0.01)
    assert found.tokens.context / 128 == pytest.approx(68, rel=0.03)
    assert found.chosen.time.images_per_s / 16 == pytest.approx(238, rel=0.01)  # all communication is hidden
    assert found.days == pytest.approx(187500 * 2048 / found.chosen.time.images_per_s / 86400)
    giant = plan(published("in22k_vitg16_ep44"), Cluster(A100, 16))
    assert giant.num_images == IMAGENET_22K and giant.steps == 44 * (IMAGENET_22K // 2048)


def test_a_plan_with_the_fused_tail_names_no_zero_and_counts_copies_of_weights() -> None:
    config, cluster = published(), Cluster(A100, 8)
    fused = config.replace(optimizer=config.optimizer.replace(impl="fused_tail"))
    plain, found = (
        {each.spread.strategy: each.footprint for each in plan(one, cluster).strategies} for one in (config, fused)
    )
    assert plain.keys() - found.keys() == {"zero1", "zero2", "zero3"} and "ddp" in found
    assert found["ddp"].weights > plain["ddp"].weights and found["fsdp2"].weights == plain["fsdp2"].weights


def test_a_plan_names_only_what_the_optimizer_can_run_under() -> None:
    config, cluster = published(), Cluster(A100, 8)
    lars = config.replace(optimizer=LarsConfig())
    by_adamw, by_lars = (
        {each.spread.strategy: each.footprint.optimizer for each in plan(each_config, cluster).strategies}
        for each_config in (config, lars)
    )
    assert {"zero1", "zero2", "zero3"} == by_adamw.keys() - by_lars.keys() and by_lars
    assert all(2 * by_lars[name] == by_adamw[name] for name in by_lars)
    zero = lars.replace(engine=lars.engine.replace(strategy="deepspeed", ds_config="ds_configs/zero1.json"))
    with pytest.raises(
        ConfigError, match="optimizer.name is lars but the ZeRO stage is 1: LARS needs the norm of each"
    ):
        plan(zero, cluster, zero={"stage": 1})


def test_where_the_number_of_images_comes_from() -> None:
    config, cluster = published(), Cluster(A100, 8)
    assert plan(config, cluster, num_images=20480).steps == 3000
    steps = config.replace(schedule=ScheduleConfig(steps_per_epoch=7, epochs=50))
    assert (plan(steps, cluster).steps, plan(steps, cluster).num_images) == (350, 7 * 2048)
    with pytest.raises(ConfigError, match="--images is 20480 but schedule.steps_per_epoch is 7, .*; drop --images"):
        plan(steps, cluster, num_images=20480)
    stopped = config.replace(schedule=ScheduleConfig(stop_after=5))
    assert plan(stopped, cluster).steps == 5
    synthetic = config.replace(data=DataConfig(reader="synthetic", batch_size=64, synthetic_samples=6400))
    assert plan(synthetic, cluster).steps == 30000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=2050"], "batch 2050 is not divisible by 8 GPUs x accumulation 1; try data.batch_size=2048"),
        (["masks.min_keep=300"], "masks.min_keep is 300, but target blocks on a grid of 16x16"),
        (["engine.device=cpu"], "engine.device is cpu but --gpus names 8 a100-80gb; set engine.device=auto or cuda"),
        (["engine.strategy=plain"], "engine.strategy is plain but --gpus names 8; use auto"),
        (["engine.strategy=fsdp2", "engine.replicas=3"], "8 GPUs don't split into engine.replicas 3; choose a divisor"),
    ],
)
def test_impossible_runs_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(published("in1k_vith14_ep300", *overrides), Cluster(A100, 8))


@pytest.mark.parametrize(
    ("gigabytes", "message"),
    [
        (
            1,
            "weights, gradients, optimiser and target of vit_huge take at least 1.6 GB per GPU (fsdp2 reshard over 8) "
            "of the 0.9 GB that tensors may take on one a100-80gb; use more GPUs, GPUs with more memory, or a smaller",
        ),
        (
            1.9,
            "one image at a time with engine.checkpointing=full takes at least 2.0 GB per GPU (fsdp2 reshard over 8, "
            "1.6 GB for states) of the 1.7 GB that tensors may take",
        ),
    ],
)
def test_runs_that_fit_nowhere_are_refused(gigabytes: float, message: str) -> None:
    small = dataclasses.replace(A100, memory_bytes=gigabytes * 1e9)
    with pytest.raises(ConfigError) as caught:
        plan(published(), Cluster(small, 8))
    assert message in str(caught.value)


def test_bad_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="--mfu is 50; give a share of the peak above 0 and at most 1, such as 0.4"):
        plan(published(), Cluster(A100, 8), mfu=50)
    with pytest.raises(ConfigError, match="--images is 0; give the number of training images, such as 1281167"):
        plan(published(), Cluster(A100, 8), num_images=0)
    with pytest.raises(ConfigError, match="batch 2048 is larger than the 100 training images; lower data.batch_size"):
        plan(published(), Cluster(A100, 8), num_images=100)


def test_a_graphs_pool_is_in_the_plan() -> None:
    without, graphed = (
        plan(published("in1k_vith14_ep300", f"engine={{strategy: ddp, cuda_graphs: {on}}}"), Cluster(A100, 8))
        for on in ("false", "true")
    )
    pool = graphed.by_checkpointing["none"].target_work
    assert graphed.chosen.footprint.peak - without.chosen.footprint.peak > pool > 1e9
    assert graphed.chosen.largest_micro_batch < without.chosen.largest_micro_batch
    sharded = [{s.footprint for s in f.strategies if s.spread.strategy == "fsdp2"} for f in (without, graphed)]
    assert sharded[0] == sharded[1]
    assert any(line.endswith("as configured, with engine.cuda_graphs=false") for line in graphed.advice)


def test_advice_names_slower_checkpointing_only_if_it_saves_micro_batches() -> None:
    fitting = plan(published("in1k_vith14_ep300", "engine.checkpointing=none"), Cluster(find_device("a100-40gb"), 8))
    assert [line.partition(":")[0] for line in fitting.advice[:3]] == [
        "engine.accumulation=4",
        "engine.accumulation=2 engine.checkpointing=selective",
        "engine.checkpointing=full",
    ]
    wide = plan(published("in1k_vith14_ep300"), Cluster(dataclasses.replace(A100, memory_bytes=60e9), 8))
    assert [line.partition(":")[0] for line in wide.advice if line.startswith("engine.")] == [
        "engine.accumulation=2",
        "engine.checkpointing=selective",
    ]


def test_one_page_states_one_size_of_the_states() -> None:
    found = plan(published(), Cluster(A100, 8))
    assert found.reason.startswith(f"{found.chosen.footprint.states / 1e9:.1f} GB of replicated states are within")
    exact = plan(published("in1k_vith14_ep300", "engine.precision=fp32"), Cluster(A100, 8))
    assert exact.reason.startswith(f"{exact.chosen.footprint.states / 1e9:.1f} GB of replicated states are within")
    assert "653 G per image, nominal (whole last blocks, as in published figures)" in plan_text(found)


def test_a_run_that_does_not_fit_gets_remedies_that_do() -> None:
    config = published("in1k_vith16-448_ep300")
    found = plan(config, Cluster(A100, 8))
    assert not found.chosen.fits and found.advice[0].startswith("engine.accumulation=")
    parts = int(found.advice[0].split("=")[1].split(":")[0])
    again = plan(published("in1k_vith16-448_ep300", f"engine.accumulation={parts}"), Cluster(A100, 8))
    assert again.chosen.fits and not again.advice and again.chosen.largest_micro_batch >= again.micro_batch
    small = config.replace(
        model=ModelConfig(),
        masks=BlockMaskConfig(),
        data=DataConfig(batch_size=8),
        engine=EngineConfig(strategy="ddp"),
    )
    assert plan(small, Cluster(A100, 8)).chosen.fits


EAGER, FP32 = ["engine.compile=false"], ["engine.precision=fp32", "engine.accumulation=4"]  # by default blocks compile


@pytest.mark.parametrize("changes", [EAGER, FP32])
def test_the_command_prints_everything(changes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "in1k_vitb16_ep600.yaml")
    assert main(["--config", path, "--gpus", "8x", "a100-80gb", *changes]) == 0
    printed = capsys.readouterr().out
    words = "model GPUs batch masks FLOPs memory weights optimizer selective strategies zero3 images/s days advice"
    assert [word for word in (*words.split(), "all-reduce gradients") if word not in printed] == []
    assert max(map(len, printed.splitlines())) <= WIDTH
    assert ("upper bounds" in printed) == ("no peak is known" in printed) == (changes is FP32)


def test_the_command_speaks_json_and_refuses_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "in1k_vitb16_ep600.yaml")
    assert main(["--config", path, "--gpus", "h200", "--json", "data.batch_size=64"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["chosen"]["label"] == "plain" and values["chosen"]["time"]["wire_bytes"] == 0 and values["days"] > 0
    assert main(["--config", path, "--gpus", "8x", "v100"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpus names 'v100', which isn't known")


def test_other_mistakes_in_a_configuration_are_reported_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("engine: {accumulation: 1}")  # valid for both kinds
    (tmp_path / "d.yaml").write_text("engine: {acumulation: 1}")  # valid for neither
    for name, override in (("c.yaml", "mask.x=1"), ("d.yaml", "seed=1")):
        assert main(["--config", str(tmp_path / name), "--gpus", "8x", "a100", override]) == 2
        assert "unknown; " in capsys.readouterr().err


def test_a_deepspeed_file_sets_stage_and_buckets(capsys: pytest.CaptureFixture[str]) -> None:
    config = published(
        "in1k_vith14_ep300",
        "engine={strategy: deepspeed, ds_config: ds_configs/zero2_offload.json, zero_communication: bf16}",
    )
    zero = json.loads((ROOT / "ds_configs" / "zero2_offload.json").read_text())["zero_optimization"]
    found = plan(config, Cluster(A100, 8), zero=zero)
    assert found.chosen.spread.label == "zero2" and found.chosen.footprint.optimizer == 0
    assert "zero2" in plan_text(found) and plan_json(found)["chosen"]["spread"]["zero"]["offload_optimizer"]
    sent = {each.spread.label: each.spread.communication for each in found.strategies}
    assert sent["ddp"] == sent["fsdp2"] == "fp32" and sent["zero1"] == sent["zero3"] == "bf16"


COSTS = {  # configuration -> overrides, whether the paper states its cost
    "in1k_vith14_ep300": ((), True),
    "in1k_vith14_ep300, shorter": (("schedule.epochs=100",), False),
    "in1k_vitl16_ep600": ((), False),
    "in22k_vith14_ep66": ((), False),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_is_a_range_of_gpu_hours_next_to_the_published_one(name: str) -> None:
    overrides, is_published = COSTS[name]
    found = plan(published(name.partition(",")[0], *overrides), Cluster(A100, 16))
    text = plan_text(found).replace("\n" + 11 * " ", " ")
    middle = found.days * 24 * 16
    fast, slow = (found.steps * step_s * 16 / 3600 for step_s in found.chosen.range_s)
    assert fast < middle < slow
    assert f"cost       {middle:,.0f} GPU-hours ({fast:,.0f} to {slow:,.0f} over that range of the peak)" in text
    said = "published: under 72 hours on 16 A100s, so below 1,152 GPU-hours (arXiv 2301.08243, abstract)"
    assert (said in text) == is_published
    values = plan_json(found)
    assert values["gpu_hours"] == pytest.approx(middle) and values["gpu_hours_range"] == pytest.approx([fast, slow])


def test_with_a_given_share_of_the_peak_the_cost_is_one_number() -> None:
    found = plan(published(), Cluster(A100, 16), mfu=0.4)
    assert found.chosen.range_s == (found.chosen.time.step_s,) * 2
    assert f"cost       {found.days * 24 * 16:,.0f} GPU-hours\n" in plan_text(found)
