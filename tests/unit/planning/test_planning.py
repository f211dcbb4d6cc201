"""Compares closed-form counts with the models themselves, on the meta device, and with published figures."""

from __future__ import annotations

import pytest
import torch

from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig
from ijepa_scale.config.architectures import ARCHITECTURES, resolve
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import DenseMasks, MaskSampler
from ijepa_scale.models import build_jepa
from ijepa_scale.optim.lars import LarsConfig
from ijepa_scale.planning.flops import encoder_forward_flops, mask_flops, train_flops
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.planning.memory import state_bytes
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.strategy import choose_strategy, resolve_compile, resolve_engine
from tests.unit.planning.nominal_flops import step_flops

HUGE14 = ModelConfig(name="vit_huge", patch_size=14)
HUGE16_448 = ModelConfig(name="vit_huge", image_size=448)
GIANT16 = ModelConfig(name="vit_giant")
SMALL = {
    "square": ModelConfig(name="vit_tiny", image_size=64, patch_size=16, depth=3, predictor_depth=2),
    "oblong": ModelConfig(
        name="vit_small", image_size=(64, 96), patch_size=8, width=96, heads=4, depth=2, predictor_depth=3,
        predictor_width=48, mlp_ratio=3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (ModelConfig(name="vit_tiny"), 5.5),
        (ModelConfig(name="vit_small"), 21.7),
        (ModelConfig(name="vit_base"), 85.8),
        (ModelConfig(name="vit_large"), 303.3),
        (HUGE14, 630.8),
        (HUGE16_448, 631.7),
        (GIANT16, 1011.4),
    ],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else str(value),
)
def test_encoder_parameters_are_the_published_ones(model: ModelConfig, millions: float) -> None:
    assert round(count_parameters(model).encoder_total / 1e6, 1) == millions


@pytest.mark.parametrize("model", [*SMALL.values(), HUGE14, GIANT16])
def test_parameter_counts_equal_the_built_model(model: ModelConfig) -> None:
    jepa = build_jepa(model, seed=0, device="meta")
    counts = count_parameters(model)
    trained = {name: sum(p.numel() for p in part.parameters()) for name, part in jepa.named_children()}
    states = {name: sum(t.numel() for t in part.state_dict().values()) for name, part in jepa.named_children()}
    assert trained == {"encoder": counts.encoder, "predictor": counts.predictor}
    assert states == {"encoder": counts.encoder_total, "predictor": counts.predictor_total}
    assert counts.trainable == sum(trained.values())
    assert counts.target == trained["encoder"]


def _measure(model: ModelConfig, num_images: int, kept: int, predicted: int, num_context: int) -> dict[str, int]:
    """Returns the FLOPs that torch counts in target, context and predictor for a whole batch."""
    context = torch.zeros(num_context, num_images, kept, dtype=torch.int64)
    targets = torch.zeros(4, num_images, predicted, dtype=torch.int64)
    return step_flops(model, DenseMasks(context, targets), num_images=num_images)


@pytest.mark.parametrize("num_context", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_flops_agree_with_torchs_counter(name: str, num_context: int) -> None:
    model, num_images, kept, predicted = SMALL[name], 3, 9, 4
    measured = _measure(model, num_images, kept, predicted, num_context)
    counted = train_flops(
        model, context_tokens=kept, target_tokens_per_block=predicted, num_targets=4, num_context=num_context
    )
    for part, flops in measured.items():
        assert getattr(counted, part) * num_images == pytest.approx(flops, rel=1e-3), part
    assert counted.total == pytest.approx(sum(measured.values()) / num_images, rel=1e-3)
    assert encoder_forward_flops(model) == counted.target


def test_huge_flops_agree_with_torchs_counter() -> None:
    measured = _measure(HUGE14, 1, 68, 44, 1)
    counted = train_flops(HUGE14, context_tokens=68, target_tokens_per_block=44)
    assert counted.total == pytest.approx(sum(measured.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("model", "truncated", "packed", "tokens", "published"),
    [
        (HUGE14, 68, 110, 44, (333, 261, 61, 655, 842)),
        (HUGE16_448, 271, 359, 131, (1089, 1066, 247, 2402, 2821)),
        (GIANT16, 51, 82, 34, (405, 308, 59, 772, 989)),
    ],
)
def test_flops_are_the_published_ones(
    model: ModelConfig, truncated: int, packed: int, tokens: int, published: tuple[int, ...]
) -> None:
    """The counts use mean numbers of tokens instead of drawn ones, so the parts agree only within 2 to 4%."""
    dense = train_flops(model, context_tokens=truncated, target_tokens_per_block=tokens)
    whole = train_flops(model, context_tokens=[packed] * 2, target_tokens_per_block=[tokens] * 2)
    target, context, predictor, total, packed_total = (figure * 1e9 for figure in published)
    assert dense.target == pytest.approx(target, rel=2e-3)
    assert dense.context == pytest.approx(context, rel=0.02)
    assert dense.predictor == pytest.approx(predictor, rel=0.04)
    assert dense.total == pytest.approx(total, rel=0.01)
    assert whole.total == pytest.approx(packed_total, rel=0.01)


def test_packed_flops_are_the_mean_over_images() -> None:
    model = SMALL["square"]
    single = [
        train_flops(model, context_tokens=n, target_tokens_per_block=t).total for n, t in ((5, 3), (9, 4), (12, 3))
    ]
    packed = train_flops(model, context_tokens=[5, 9, 12], target_tokens_per_block=[3, 4, 3])
    assert packed.total == pytest.approx(sum(single) / 3)


def test_two_context_blocks_are_paired_with_their_images() -> None:
    model = SMALL["square"]
    images = [
        train_flops(model, context_tokens=list(n), target_tokens_per_block=[t], num_context=2).total
        for n, t in (((5, 7), 3), ((9, 6), 4))
    ]
    both = train_flops(model, context_tokens=[5, 9, 7, 6], target_tokens_per_block=[3, 4], num_context=2)
    assert both.total == pytest.approx(sum(images) / 2)


def test_flops_of_masks_are_those_of_their_lengths() -> None:
    masks = DenseMasks(torch.zeros(2, 3, 9, dtype=torch.int64), torch.zeros(4, 3, 5, dtype=torch.int64))
    model = SMALL["oblong"]
    assert mask_flops(model, masks, num_images=3) == train_flops(
        model, context_tokens=9, target_tokens_per_block=5, num_targets=4, num_context=2
    )


def test_packed_masks_cost_what_their_dense_equals_do() -> None:
    model = ModelConfig(name="vit_tiny")
    sampler = MaskSampler(BlockMaskConfig(context="packed", group_size=4), model.grid, seed=0)
    masks = sampler(0, 0, 4, 4)
    targets = len(masks.target_rows) // 16
    counted = mask_flops(model, masks, num_images=4)
    expected = train_flops(
        model, context_tokens=masks.context_layout.lengths, target_tokens_per_block=[targets] * 4, num_targets=4
    )
    assert counted.total == pytest.approx(expected.total)


def test_lengths_that_dont_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 context lengths and 2 target lengths don't match 1 context blocks per im"):
        train_flops(HUGE14, context_tokens=[1, 2, 3], target_tokens_per_block=[1, 2])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_by_device_name(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["cpu", "AMD EPYC 9R14", "", "Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
             "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"],
)  # fmt: skip
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_states_are_the_published_sizes() -> None:
    assert state_bytes(HUGE14, "ddp").total / 1e9 == pytest.approx(13.0, abs=0.1)
    assert state_bytes(GIANT16, "plain").total / 1e9 == pytest.approx(20.7, abs=0.1)


def test_sharded_states_shrink() -> None:
    total = {name: state_bytes(HUGE14, name, world=8).total for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    resharded = state_bytes(HUGE14, "fsdp2", world=8, reshard_after_forward=True)
    assert resharded.total == pytest.approx(total["ddp"] / 8)
    assert resharded.total < total["fsdp2"] < total["ddp"]
    assert total["zero3"] < total["zero2"] < total["zero1"] < total["ddp"]
    offloaded = state_bytes(HUGE14, "zero2", world=8, offload_optimizer=True)
    assert offloaded.optimizer == 0 and offloaded.weights == state_bytes(HUGE14, "zero2", world=8).weights
    node = state_bytes(HUGE14, "fsdp2", world=16, replicas=2)
    assert node == state_bytes(HUGE14, "fsdp2", world=8)


def test_the_optimizers_states_are_counted() -> None:
    trained = 4 * count_parameters(HUGE14).trainable
    for strategy, masters in (("ddp", 0), ("fsdp2", 0), ("zero1", 1), ("zero3", 1)):
        lars, adamw = (
            state_bytes(HUGE14, strategy, world=8, optimizer_states=config.state_names)
            for config in (LarsConfig, AdamWConfig)
        )
        shards = 1 if strategy == "ddp" else 8
        assert lars.optimizer == (1 + masters) * trained / shards
        assert adamw.optimizer == (2 + masters) * trained / shards == state_bytes(HUGE14, strategy, world=8).optimizer
        assert (lars.weights, lars.gradients, lars.target) == (adamw.weights, adamw.gradients, adamw.target)


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy is 'zero4'; choose one of plain, ddp, fsdp2, zero1"):
        state_bytes(HUGE14, "zero4")


@pytest.mark.parametrize(
    ("world", "memory", "device", "expected"),
    [
        (1, 80e9, "cuda", ("plain", False, 1)),
        (2, None, "cpu", ("ddp", False, 1)),
        (8, 80e9, "cuda", ("ddp", False, 1)),  # 14.2 of 32 GB, with the target's bf16 copies
        (8, 24e9, "cuda", ("fsdp2", False, 1)),  # 4.2 of 9.6 GB
        (16, 24e9, "cuda", ("fsdp2", False, 2)),  # the same, within each node
        (16, 10e9, "cuda", ("fsdp2", False, 1)),  # 3.4 of 4 GB over all 16
        (8, 6e9, "cuda", ("fsdp2", True, 1)),  # 1.6 of 2.4 GB
        (8, 3e9, "cuda", ("fsdp2", True, 1)),  # doesn't fit, and the reason says so
    ],
)
def test_the_strategy_follows_the_memory(
    world: int, memory: float | None, device: str, expected: tuple[str, bool, int]
) -> None:
    choice = choose_strategy(HUGE14, world=world, processes_per_node=8, device=device, device_memory_bytes=memory)
    assert (choice.strategy, choice.reshard_after_forward, choice.replicas) == expected


def test_the_reason_carries_the_numbers() -> None:
    def reason(memory: float) -> str:
        return choose_strategy(HUGE14, world=8, processes_per_node=8, device="cuda", device_memory_bytes=memory).reason

    assert reason(80e9) == "14.2 GB of replicated states are within 40% of 80 GB"
    assert reason(24e9).endswith("sharded over 8 processes, weights kept after forward, 4.2 GB are within it")
    assert reason(3e9).endswith("1.6 GB are the least possible, but over it")


def test_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="device_memory_bytes is None; give the bytes of one cuda device"):
        choose_strategy(HUGE14, world=2, processes_per_node=2, device="cuda", device_memory_bytes=None)


def test_auto_is_replaced_in_the_engines_configuration() -> None:
    where = {"world": 16, "processes_per_node": 8, "device": "cuda", "device_memory_bytes": 24e9}
    resolved, reason = resolve_engine(EngineConfig(accumulation=2), HUGE14, **where)
    assert resolved == EngineConfig(strategy="fsdp2", replicas=2, accumulation=2)
    assert reason.startswith("14.2 GB of replicated states are over 40% of 24 GB")
    exact = EngineConfig(precision="fp32")  # without bf16 copies
    assert resolve_engine(exact, HUGE14, **where)[1].startswith("13.0 GB of replicated states are over 40% of 24 GB")
    named = EngineConfig(strategy="ddp")
    assert resolve_engine(named, HUGE14, **where) == (named, "strategy ddp as configured")
    resolved, reason = resolve_engine(EngineConfig(ds_config="z.json"), HUGE14, **where)
    assert resolved.strategy == "deepspeed" and reason == "ds_config names z.json"


def test_planned_gpus_compile_unless_the_configuration_says_otherwise() -> None:
    assert resolve_compile(EngineConfig(), device="cuda")[0].compile is True
    assert resolve_compile(EngineConfig(compile=False), device="cuda") == (EngineConfig(compile=False), "as configured")
    apex = EngineConfig(layer_norm="apex")
    assert resolve_compile(apex, device="cuda") == (
        apex.replace(compile=False),
        "torch.compile can't trace apex's layer norm",
    )
    found, reason = resolve_compile(EngineConfig(compile_cache="c"), device="cuda", problem="no compiler; install gcc")
    assert found == EngineConfig(compile=False) and reason == "no compiler; install gcc"


def test_resolve_applies_overrides() -> None:
    sizes = resolve(SMALL["oblong"])
    assert (sizes.grid, sizes.width, sizes.heads, sizes.depth, sizes.mlp_width) == ((8, 12), 96, 4, 2, 288)
    assert (sizes.predictor_width, sizes.predictor_depth, sizes.predictor_mlp_width) == (48, 3, 192)
    assert resolve(GIANT16).mlp_width == 6144
    assert resolve(ModelConfig(name="vit_giant", mlp_ratio=48 / 11)).mlp_width == 6144


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="model.name is 'vit_hug', which isn't known; did you mean vit_huge?"):
        resolve(ModelConfig(name="vit_hug"))
    with pytest.raises(ConfigError, match=f"choose one of {', '.join(ARCHITECTURES)}"):
        resolve(ModelConfig(name="resnet50"))


def test_widths_that_dont_divide_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ModelConfig(name="vit_tiny", width=200, predictor_width=100, mlp_ratio=0.001))
    lines = str(caught.value).splitlines()
    assert lines[0] == "model.width 200 isn't a multiple of 3 heads and of 4; try 204"
    assert lines[1] == "model.predictor_width 100 isn't a multiple of 3 heads and of 4; try 96"
    assert lines[2].startswith("model.mlp_ratio is 0.001: no MLP width is left of 200")
