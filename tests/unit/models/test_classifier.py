"""The classifier: drop path that drops, both places of the norm, frozen blocks, and what engines do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_scale.config import EncoderConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.engine.parallelize import blocks, checkpoint_blocks
from ijepa_scale.errors import ConfigError
from ijepa_scale.models import build_encoder
from ijepa_scale.models.classifier import build_classifier, drop_factors, drop_rates

CONFIG = ClassifierConfig(
    encoder=EncoderConfig(name="vit_tiny", image_size=(16, 32), patch_size=8, width=24, depth=4, heads=3),
    num_classes=5,
    drop_path=0.6,
)
SIZES = {"width": 24, "depth": 4, "heads": 3}


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 16, 32, generator=torch.Generator().manual_seed(0))


def changed(**changes):
    return CONFIG.replace(**changes)


def lively(config: ClassifierConfig = CONFIG):
    """A classifier whose head and norms do something."""
    model = build_classifier(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def factors(model, step: int = 0, samples: np.ndarray | None = None) -> torch.Tensor:
    return drop_factors(model.drop_rates, seed=3, step=step, samples=np.arange(6) if samples is None else samples)


def test_rates_are_linear_in_depth() -> None:
    assert drop_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_rates(0.3, 1) == [0.0] and drop_rates(0.0, 3) == [0.0] * 3
    assert build_classifier(CONFIG).drop_rates == pytest.approx([0.0, 0.2, 0.4, 0.6])


def test_branches_drop_at_their_rates_and_keep_their_mean() -> None:
    rates = [0.0, 0.2, 0.4, 0.6]
    drop = drop_factors(rates, seed=0, step=0, samples=np.arange(20_000))
    assert drop.shape == (20_000, 4, 2) and drop.dtype == torch.float32
    for block, rate in enumerate(rates):
        assert sorted(set(drop[:, block].flatten().tolist())) == pytest.approx(
            sorted({1 / (1 - rate)} | ({0.0} if rate else set()))
        )
        assert (drop[:, block] == 0).float().mean(0).tolist() == pytest.approx([rate] * 2, abs=0.015)
    assert drop.mean(0).flatten().tolist() == pytest.approx([1.0] * 8, abs=0.03)
    dropped = (drop[:, 1:] == 0).flatten(1).double()
    assert (
        torch.corrcoef(dropped.T) - torch.eye(6)
    ).abs().max() < 0.03  # attention and MLP of each block by themselves


def test_a_draw_belongs_to_its_sample_and_step() -> None:
    rates, samples = drop_rates(0.5, 12), np.arange(32)
    whole = drop_factors(rates, seed=0, step=7, samples=samples)
    parts = [drop_factors(rates, seed=0, step=7, samples=samples[first : first + 8]) for first in range(0, 32, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drop_factors(rates, seed=0, step=7, samples=samples[::-1].copy()), whole.flip(0))
    for other in (dict(seed=1, step=7), dict(seed=0, step=8)):
        assert not torch.equal(drop_factors(rates, samples=samples, **other), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 32


def test_accumulation_gives_the_gradients_of_the_whole_batch() -> None:
    model = lively()

    def gradients(parts: int) -> list[torch.Tensor]:
        model.zero_grad()
        for rows in torch.arange(6).chunk(parts):
            drop = factors(model, samples=rows.numpy())
            (model(images()[rows], drop).square().mean() / parts).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole, accumulated = gradients(1), gradients(3)
    assert (
        max(float((a - b).abs().max() / (b.abs().max() + 1e-6)) for a, b in zip(accumulated, whole, strict=True)) < 1e-5
    )


def test_a_dropped_branch_leaves_the_image_as_it_is() -> None:
    model = lively()
    ones = torch.ones(6, 4, 2)
    with torch.no_grad():
        whole = model(images(), ones)
        assert torch.equal(model.eval()(images()), whole)  # off in evaluation
        model.train()
        one = ones.clone()
        one[2, 3, 0] = 0.0  # one image, the last block's attention
        different = (model(images(), one) != whole).any(dim=1)
        assert different.tolist() == [False, False, True, False, False, False]
        tokens, block = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)), model.encoder.blocks[0]
        assert torch.equal(block(tokens, None, torch.zeros(2, 2)), tokens)
        attention, mlp = (block(tokens, None, torch.tensor([pair] * 2)) for pair in ([1.0, 0.0], [0.0, 1.0]))
        torch.testing.assert_close(attention - tokens, block.attn(block.norm1(tokens)))
        torch.testing.assert_close(mlp - tokens, block.mlp(block.norm2(tokens)))
        doubled = block(tokens, None, torch.tensor([[2.0, 0.0]] * 2))
        torch.testing.assert_close(doubled - tokens, 2 * (attention - tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("kind, layers", [("last", 1), ("last4", 4)])
def test_logits_are_those_of_the_definition(place: str, kind: str, layers: int) -> None:
    model = lively(changed(pool_norm=place, representation=kind)).eval()
    twin = build_encoder("vit_tiny", image_size=(16, 32), patch_size=8, **SIZES)
    norm = model.fc_norm if place == "after" else model.encoder.norm
    twin.load_state_dict({**model.encoder.state_dict(), **{f"norm.{n}": v for n, v in norm.state_dict().items()}})
    with torch.no_grad():
        tokens, means = twin._embed(images(), None, None), []
        for block in twin.blocks:
            tokens = block(tokens)
            means.append(twin.norm(tokens.mean(1)) if place == "after" else twin.norm(tokens).mean(1))
        expected = torch.cat(means[-layers:], dim=1) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)
    assert {n for n, _ in model.named_parameters() if "blocks" not in n} == {
        "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "head.weight", "head.bias",
        *(f"{'fc_norm' if place == 'after' else 'encoder.norm'}.{part}" for part in ("weight", "bias")),
    }  # fmt: skip


def test_weights_of_a_seed() -> None:
    first, again, other = (build_classifier(changed(num_classes=400), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)
    encoder = build_encoder("vit_tiny", image_size=(16, 32), patch_size=8, seed=1, **SIZES).state_dict()
    own = first.encoder.state_dict()
    assert own.keys() == {n for n in encoder if not n.startswith("norm.")}
    assert all(torch.equal(own[n], encoder[n]) for n in own)
    assert first.head.weight.std().item() == pytest.approx(2e-5, rel=0.03) and not first.head.bias.any()
    assert (first.fc_norm.weight == 1).all() and not first.fc_norm.bias.any()
    assert build_classifier(CONFIG, device="meta").head.weight.is_meta


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    build_classifier(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_blocks_get_no_gradient() -> None:
    model = lively(changed(frozen_blocks=2))
    model(images(), factors(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("encoder.patch_embed.", "encoder.blocks.0.", "encoder.blocks.1."))
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name
    assert all(parameter.requires_grad for parameter in build_classifier(CONFIG).parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_checkpointing_changes_nothing(mode: str, frozen: int) -> None:
    found = []
    for each in ("none", mode):
        model = lively(changed(frozen_blocks=frozen))
        checkpoint_blocks(model, each)
        assert len(blocks(model)) == 4
        model(images(), factors(model)).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_blocks_share_one_graph() -> None:
    model, graphs = lively(), []

    def counter(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = model(images(), factors(model))
    torch._dynamo.reset()
    for block in blocks(model):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=counter)
    torch.testing.assert_close(model(images(), factors(model)), expected)
    model(images(4), factors(model, samples=np.arange(4)))
    assert len(graphs) == 1


def test_what_cannot_be_run_is_refused() -> None:
    model = build_classifier(CONFIG)
    with pytest.raises(ValueError, match=r"trains with drop path 0\.6\d* but was given no factors; pass drop_factors"):
        model(images())
    with pytest.raises(ValueError, match="is in evaluation mode, which drops nothing; pass no factors, or call train"):
        model.eval()(images(), factors(model))
    with pytest.raises(ValueError, match=r"drop is \(6, 3, 2\) with last 1; give \(B, depth, 2\), here \(6, 4, 2\)"):
        model.train()(images(), torch.ones(6, 3, 2))
    with pytest.raises(ValueError, match=r"drop is \(6, 4, 2\) with last None; give"):
        model.encoder(images(), drop=torch.ones(6, 4, 2))
    assert build_classifier(changed(drop_path=0.0))(images()).shape == (6, 5)
    with pytest.raises(ConfigError, match="model.frozen_blocks is 5 of 4 blocks; give at most 4"):
        build_classifier(changed(frozen_blocks=5))
    with pytest.raises(ConfigError, match="model.representation is last4 but there are 3 blocks; choose last, or more"):
        build_classifier(changed(encoder=CONFIG.encoder.replace(depth=3), representation="last4"))
