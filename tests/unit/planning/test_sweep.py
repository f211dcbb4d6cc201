"""Sweeps over numbers of nodes: against the plan and arithmetic by hand, what is skipped, the plot and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.communication import LINK_SHARE
from ijepa_scale.planning.devices import Cluster, find_device
from ijepa_scale.planning.finetune_plan import plan_run
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.plan_text import WIDTH
from ijepa_scale.planning.reading import read_planned
from ijepa_scale.planning.sweep import NETWORKS, Assumptions, MeasuredSteps, parse_measured, parse_sweep, sweep
from ijepa_scale.planning.sweep_text import sweep_json, sweep_text
from launch.plan import main

ROOT = Path(__file__).parents[3]
H14 = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
H100 = find_device("h100")


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return load_config(H14, ["engine.accumulation=2"])


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 50), more=st.integers(0, 500))
def test_a_range_doubles_from_the_first_to_the_last(first: int, more: int) -> None:
    counts = parse_sweep(f"nodes={first}..{first + more}")
    assert counts[0] == first and counts[-1] == first + more and len(set(counts)) == len(counts)
    assert all(b == 2 * a for a, b in zip(counts, counts[1:-1], strict=False)) and counts[-1] <= 2 * max(
        counts[-2:-1], default=first
    )


def test_lists_are_taken_as_they_are_and_nonsense_is_refused() -> None:
    assert parse_sweep("nodes=1..128") == [1, 2, 4, 8, 16, 32, 64, 128]
    assert parse_sweep("nodes=6,1,2,2") == [1, 2, 6]
    for text in ("nodes=", "nodes=0..4", "nodes=8..4", "gpus=1..4", "nodes=0,1", "1..4", "nodes=1...4", "nodes=1, 2"):
        with pytest.raises(
            ConfigError, match=r"--sweep is .*; give nodes=1..128, which doubles, or up to 64 as nodes="
        ):
            parse_sweep(text)


@settings(max_examples=60, deadline=None)
@given(
    start=st.floats(0.1, 50),
    slopes=st.lists(st.floats(0.1, 3), min_size=1, max_size=4),
    at=st.floats(0.5, 400),
)
def test_measured_steps_are_lines_through_the_points(start: float, slopes: list[float], at: float) -> None:
    points, images, milliseconds = [], 8, start + 8 * max(slopes)
    for slope in sorted(slopes, reverse=True):
        points.append((images, milliseconds))
        images, milliseconds = 2 * images, milliseconds + images * slope
    measured = MeasuredSteps(tuple((count, each / 1e3) for count, each in points))
    for count, each in points:
        assert measured.seconds(count) == pytest.approx(each / 1e3)
    assert 0 < measured.seconds(at) < measured.seconds(at + 1)
    words = [f"{count}:{each:.6f}" for count, each in points]
    assert parse_measured(words[::-1]).seconds(at) == pytest.approx(measured.seconds(at), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["128"], "--measured is '128'; give images:milliseconds"),
        (["0:3"], "--measured is '0:3'"),
        (["128:-3"], "--measured is '128:-3'"),
        (["16:20", "128:19"], "--measured says 16:20 and 128:19; more images take longer"),
        (["16:20", "128:400"], "--measured says 16:20 and 128:400; more images take longer, and each of them less"),
        (["16:20", "16:20"], "--measured says 16:20 and 16:20"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_measured(words)
    assert str(caught.value).startswith(said)


def test_points_are_those_of_the_plan(config: PretrainConfig) -> None:
    found = sweep(config, H100, [1, 2, 16], Assumptions(), gpus_per_node=8)
    for nodes in (1, 2, 16):
        for network in NETWORKS:
            plan = plan_run(config, Cluster(H100, 8 * nodes, 8, network))
            points = found.at(nodes, network)
            assert [p.step_s for p in points] == pytest.approx([each.time.step_s for each in plan.strategies])
            assert [p.fits for p in points] == [each.fits for each in plan.strategies]
            assert points[0].configured and not any(p.configured for p in points[1:])
            assert points[0].gpu_hours == pytest.approx(plan.days * 24 * 8 * nodes)
    assert len(found.points) == len({(p.nodes, p.network, p.strategy) for p in found.points})
    best = max(p.efficiency for p in found.points if p.nodes == 1 and p.fits)
    assert best == 1.0 and found.baseline.nodes == 1
    assert "hsdp" in {p.strategy for p in found.at(16, 50e9)} and "hsdp" not in {p.strategy for p in found.at(1, 50e9)}


@settings(max_examples=20, deadline=None)
@given(nodes=st.sampled_from([2, 4, 8, 32]), gigabits=st.integers(10, 800), overlap=st.floats(0, 1))
def test_ddp_by_hand(nodes: int, gigabits: int, overlap: float) -> None:
    config = load_config(H14, ["engine.accumulation=1"])
    network = gigabits / 8 * 1e9
    found = sweep(config, H100, [nodes], Assumptions(networks=(network,), overlap=overlap, mfu=0.4), gpus_per_node=8)
    (point,) = [each for each in found.points if each.strategy == "ddp"]
    gpus = 8 * nodes
    sent = 8 * count_parameters(config.model).trainable * (gpus - 1) / gpus
    seconds = sent / (LINK_SHARE * min(H100.link_bandwidth, 8 * network))
    backward = point.compute_s * _backward_share(config)
    assert point.wire_bytes == pytest.approx(sent)
    exposed = seconds - overlap * (seconds - max(0.0, seconds - backward))
    assert point.step_s == pytest.approx(point.compute_s + exposed, rel=1e-6)
    assert point.images_per_s == pytest.approx(2048 / point.step_s)


def _backward_share(config: PretrainConfig) -> float:
    flops = plan_run(config, Cluster(H100, 8)).flops
    return 2 / 3 * (flops.context + flops.predictor) / flops.total


def test_measured_steps_replace_the_estimate(config: PretrainConfig) -> None:
    measured = parse_measured(["16:40", "128:250"])
    found = sweep(config, H100, [1, 2, 8, 16], Assumptions(measured=measured), gpus_per_node=8)
    for point in found.points:
        assert point.compute_s == pytest.approx(2 * measured.seconds(point.micro_batch))
    assert {p.micro_batch for p in found.points} == {128, 64, 16, 8}
    full = load_config(H14, ["engine.accumulation=2", "engine.checkpointing=full"])
    assert sweep(full, H100, [1], Assumptions(measured=measured), gpus_per_node=8).points[0].compute_s == pytest.approx(
        0.5
    )
    with pytest.raises(ConfigError, match=r"--measured says 1 ms for 128 images, \d+\.\d times the peak of h100"):
        sweep(config, H100, [1], Assumptions(measured=parse_measured(["128:1"])), gpus_per_node=8)


def test_more_nodes_and_slower_networks_are_never_more_efficient(config: PretrainConfig) -> None:
    found = sweep(config, H100, parse_sweep("nodes=1..128"), Assumptions(mfu=0.4), gpus_per_node=8)
    for nodes in found.plans:
        slow, middle, fast = (found.at(nodes, network) for network in NETWORKS)
        for a, b, c in zip(slow, middle, fast, strict=True):
            assert a.step_s >= b.step_s >= c.step_s and a.efficiency <= 1 + 1e-9
    ddp = [point.efficiency for point in found.points if (point.strategy, point.network) == ("ddp", 50e9)]
    assert all(b <= a + 1e-9 for a, b in zip(ddp, ddp[1:], strict=False))


def test_what_does_not_divide_is_skipped_by_name(config: PretrainConfig) -> None:
    found = sweep(config, H100, [1, 3, 256], Assumptions(), gpus_per_node=8)
    assert found.skipped == {
        3: "batch 2048 is not divisible by 24 GPUs x accumulation 2; try data.batch_size=2016",
        256: "batch 2048 is not divisible by 2048 GPUs x accumulation 2; try data.batch_size=4096",
    }
    text = sweep_text(found)
    assert "skipped    3 nodes: batch 2048 is not divisible by 24 GPUs" in text and list(found.plans) == [1]
    with pytest.raises(ConfigError, match="batch 2048 is not divisible by 24 GPUs"):
        sweep(config, H100, [3], Assumptions(), gpus_per_node=8)
    weak = load_config(H14, ["data.batch_size=null", "data.batch_size_per_process=64"])
    grown = sweep(weak, H100, [1, 3], Assumptions(mfu=0.4), gpus_per_node=8)
    assert {p.micro_batch for p in grown.points} == {64} and not grown.skipped


def test_what_fits_nowhere_is_refused_with_numbers() -> None:
    config = load_config(H14, ["engine.accumulation=1"])
    with pytest.raises(
        ConfigError, match=r"no strategy fits on 1 to 1 nodes: the least is \d+\.\d GB per GPU .* l4; raise"
    ):
        sweep(config, find_device("l4"), [1], Assumptions(), gpus_per_node=8)


def test_text_states_assumptions_and_json_has_every_point(config: PretrainConfig) -> None:
    found = sweep(config, H100, [1, 4], Assumptions(overlap=0.7, mfu=0.4), gpus_per_node=8)
    text = sweep_text(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    flat = " ".join(text.split())
    for said in (
        "networks of 100, 200, 400 Gb/s per GPU", "70% of the communication", "collectives reach 80% of a link",
        "at 40% of the peak (from --mfu)", "<- what the configuration would run", "relative to those of 1 node under",
    ):  # fmt: skip
        assert said in flat, said
    rows = [line for line in text.splitlines() if line[:5].strip() in ("1", "4")]
    assert len(rows) == len(found.at(1, 50e9)) + len(found.at(4, 50e9))
    assert sum("*" in row for row in rows) == 2
    values = json.loads(json.dumps(sweep_json(found)))
    assert len(values["points"]) == len(found.points) and values["assumptions"]["overlap"] == 0.7
    assert not any(math.isnan(point["efficiency"]) for point in values["points"])


def test_finetuning_is_swept_too() -> None:
    path = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))[0]
    config = read_planned(str(path), ["data.batch_size=1024"])
    assert isinstance(config, FinetuneConfig)
    found = sweep(config, find_device("h200"), [1, 2], Assumptions(), gpus_per_node=8)
    assert {point.nodes for point in found.points} == {1, 2} and "simulated" in sweep_text(found)


def test_the_command_sweeps_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "scaling.png"
    run = ["--config", H14, "--sweep", "nodes=1..2", "engine.accumulation=2"]
    assert main([*run, "--to", str(picture)]) == 0
    assert "of 8 h100: 80 GB" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 1000
    assert main([*run, "--gpus", "4x", "a100", "--network", "12.5", "--measured", "64:200", "128:390", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gpu"] == "a100-80gb" and values["gpus_per_node"] == 4
    assert {point["network"] for point in values["points"]} == {12.5e9}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "h100", "--to", "a.png"], "--to is part of a sweep; add --sweep nodes=1..128, or drop it"),
        (["--gpus", "h100", "--overlap", "0.5"], "--overlap is part of a sweep"),
        (["--gpus", "h100", "--measured", "1:2"], "--measured is part of a sweep"),
        (["--sweep", "nodes=1..2", "--overlap", "1.5"], "--overlap is 1.5; give a share from 0"),
        (["--sweep", "nodes=1..2", "--mfu", "0.4", "--measured", "128:171"], "--mfu is 0.4 and --measured says"),
        (["--sweep", "nodes=2", "--gpus", "4x", "h100", "--gpus-per-node", "8"], "--gpus names 4 GPUs of a node and"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", H14, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_gpus_are_required_without_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", H14])
    assert ended.value.code == 2 and "the following arguments are required: --gpus" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu", "milliseconds"), [("h200", 171), ("a100-80gb", 541)])
def test_figures_that_were_computed_by_others(gpu: str, milliseconds: float) -> None:
    # 128 images of ViT-H/14 at half of the peak; 2.6 GB of gradients in bf16, so twice that in fp32
    config = load_config(H14, ["data.batch_size=null", "data.batch_size_per_process=128"])
    found = sweep(config, find_device(gpu), [16], Assumptions(mfu=0.5), gpus_per_node=8)
    (ddp,) = [point for point in found.at(16, 50e9) if point.strategy == "ddp"]
    assert 1e3 * ddp.compute_s == pytest.approx(milliseconds, rel=0.05)
    assert ddp.wire_bytes == pytest.approx(2 * 2.6e9, rel=0.03)
