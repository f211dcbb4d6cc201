import pytest
import torch

from ijepa_kernels.target_loss import target_loss
from ijepa_scale.config.schema import RegressionConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import Wanted
from ijepa_scale.masks.types import target_index
from ijepa_scale.objectives import regression
from ijepa_scale.objectives.cosine import Cosine, CosineConfig
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.objectives.regression import Regression
from ijepa_scale.objectives.targets import normalise_targets, select_targets
from tests.unit.models.packing_by_hand import NUM_PATCHES, UNEVEN_CONTEXT, UNEVEN_TARGETS, pack_by_hand, random_masks


def loss_of(prediction, target, masks, config):
    return Regression(config).compare(prediction, target, masks)


def tokens_of(num_images, width=8):
    return 3.0 + 2.0 * torch.randn(num_images, NUM_PATCHES, width, generator=torch.Generator().manual_seed(0))


def targets_of(tokens, masks):
    """Returns the targets selected from all patches, and checks that selecting them with `Wanted` gives the same."""
    features = normalise_targets(tokens)
    found = select_targets(features, target_index(masks, NUM_PATCHES), masks)
    wanted = Wanted.of(masks, len(tokens), NUM_PATCHES)
    some = normalise_targets(tokens.gather(1, wanted.patches[..., None].expand(-1, -1, tokens.shape[-1])))
    assert torch.equal(select_targets(some, wanted.rows, masks), found)
    return found


def normalised(token):
    token = token.double()
    return ((token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()).float()


def test_dense_targets_are_normalised_patches_in_the_predictors_order():
    tokens, masks = tokens_of(3), random_masks(2, 4, 3)
    got = targets_of(tokens, masks)
    assert got.shape == (4 * 2 * 3, 3, 8) and got.dtype == torch.float32
    rows = [
        torch.stack([normalised(tokens[b, patch]) for patch in masks.targets[i, b]])
        for i in range(4)
        for _ in range(2)
        for b in range(3)
    ]
    torch.testing.assert_close(got, torch.stack(rows), atol=2e-6, rtol=2e-6)


def test_packed_targets_are_the_same_patches():
    tokens = tokens_of(3)
    got = targets_of(tokens, pack_by_hand(UNEVEN_CONTEXT, UNEVEN_TARGETS))
    rows = [normalised(tokens[b, patch]) for block in UNEVEN_TARGETS for b in range(3) for patch in block[b]]
    torch.testing.assert_close(got, torch.stack(rows), atol=2e-6, rtol=2e-6)


def test_the_norm_has_eps_1e_5_and_no_affine():
    tokens = torch.zeros(1, NUM_PATCHES, 2)
    tokens[..., 0] = 0.01  # the variance is 2.5e-5, so eps matters: 0.005 / sqrt(3.5e-5)
    got = targets_of(tokens, random_masks(1, 1, 1))
    torch.testing.assert_close(got[0, 0], torch.tensor([0.8451543, -0.8451543]), atol=1e-6, rtol=0)


def test_targets_carry_no_gradient_and_are_fp32_under_autocast():
    tokens = tokens_of(2).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = targets_of(tokens, random_masks(1, 2, 2))
    assert not got.requires_grad and got.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # errors 0.5, 2, 0, 1
        (RegressionConfig(), (0.125 + 1.5 + 0.0 + 0.5) / 4),
        (RegressionConfig(beta=2.0), (0.0625 + 1.0 + 0.0 + 0.25) / 4),
        (RegressionConfig(loss="l2"), (0.25 + 4.0 + 0.0 + 1.0) / 4),
    ],
)
def test_dense_loss_by_hand(config, expected):
    prediction, target = torch.tensor([[[0.5, 1.0]], [[3.0, 0.0]]]), torch.tensor([[[0.0, -1.0]], [[3.0, 1.0]]])
    assert loss_of(prediction, target, random_masks(1, 1, 2), config).item() == pytest.approx(expected, rel=1e-6)


def test_packed_loss_gives_images_equal_weight():
    masks = pack_by_hand(UNEVEN_CONTEXT, UNEVEN_TARGETS)
    generator = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(15, 8, generator=generator) for _ in range(2))
    means, start = [], 0
    for block in UNEVEN_TARGETS:
        for patches in block:
            rows = slice(start, start + len(patches))
            means.append((prediction[rows] - target[rows]).square().mean())
            start += len(patches)
    got = loss_of(prediction, target, masks, RegressionConfig(loss="l2"))
    torch.testing.assert_close(got, torch.stack(means).mean())


def test_packed_loss_of_equal_lengths_is_the_dense_one():
    masks = random_masks(2, 2, 3)
    packed = pack_by_hand(masks.context.tolist(), masks.targets.tolist())
    generator = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(12, 3, 8, generator=generator) for _ in range(2))
    dense = loss_of(prediction, target, masks, RegressionConfig())
    torch.testing.assert_close(
        loss_of(prediction.flatten(0, 1), target.flatten(0, 1), packed, RegressionConfig()), dense
    )


def test_the_loss_is_fp32_whatever_the_prediction():
    prediction = torch.full((2, 1, 4), 1.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(prediction, torch.full((2, 1, 4), 1.001), random_masks(1, 1, 2), RegressionConfig(loss="l2"))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("config", [RegressionConfig(beta=0.5), RegressionConfig(loss="l2")])
def test_the_loss_of_low_precision_inputs_is_that_of_their_fp32_values(config):
    generator = torch.Generator().manual_seed(2)
    both = [torch.randn(2, 3, 8, generator=generator).bfloat16() for _ in range(2)]
    masks = random_masks(1, 1, 2)
    assert torch.equal(loss_of(*both, masks, config), loss_of(*(x.float() for x in both), masks, config))


def test_targets_pass_on_no_gradients():
    tokens, masks = tokens_of(2).requires_grad_(), random_masks(1, 2, 2)
    assert not normalise_targets(tokens).requires_grad
    assert not select_targets(tokens, target_index(masks, NUM_PATCHES), masks).requires_grad


@pytest.mark.parametrize("masks", [random_masks(2, 4, 3), pack_by_hand(UNEVEN_CONTEXT, UNEVEN_TARGETS)], ids=type)
@pytest.mark.parametrize("config", [RegressionConfig(), RegressionConfig(beta=0.5), RegressionConfig(loss="l2")])
def test_the_fused_loss_is_called_with_the_same_inputs(masks, config, monkeypatch):
    """The kernel needs CUDA, so its reference replaces it here: this tests the arguments of the call."""

    called = []

    def on_the_cpu(*given, implementation, **options):
        called.append(implementation)
        return target_loss(*given, implementation="reference", **options)

    monkeypatch.setattr(regression, "target_loss", on_the_cpu)
    tokens = tokens_of(3)
    target = targets_of(tokens, masks)
    prediction = torch.randn(target.shape, generator=torch.Generator().manual_seed(4), requires_grad=True)
    wanted = Wanted(torch.arange(NUM_PATCHES).expand(3, -1), target_index(masks, NUM_PATCHES))
    found = build_objective(config, triton=("target_loss",))(prediction, tokens, masks, wanted)
    assert called == ["triton"]
    expected = loss_of(prediction, target, masks, config)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in (found, expected)))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(2, 4\) and target \(3, 4\) differ in shape; compute both"):
        loss_of(torch.zeros(2, 4), torch.zeros(3, 4), random_masks(1, 1, 2), RegressionConfig())


@pytest.mark.parametrize("masks", [random_masks(2, 4, 3), pack_by_hand(UNEVEN_CONTEXT, UNEVEN_TARGETS)], ids=type)
def test_cosine_is_one_minus_the_cosine_with_the_normalised_target(masks):
    tokens = tokens_of(3)
    wanted = Wanted(torch.arange(NUM_PATCHES).expand(3, -1), target_index(masks, NUM_PATCHES))
    target = targets_of(tokens, masks)
    prediction = torch.randn(target.shape, generator=torch.Generator().manual_seed(4), requires_grad=True)
    found = Cosine(CosineConfig())(prediction, tokens, masks, wanted)
    products = (prediction * target).sum(-1) / (prediction.norm(dim=-1) * target.norm(dim=-1))
    expected = (1 - products).mean() if prediction.ndim == 3 else ((1 - products) * masks.weights).sum()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert prediction.grad.abs().max() > 0
    assert Cosine(CosineConfig())(3 * target, tokens, masks, wanted) < 1e-6  # only the direction matters


def test_an_objective_without_a_fused_kernel_refuses_it():
    with pytest.raises(ConfigError, match="engine.triton names target_loss but objective.loss is cosine"):
        build_objective(CosineConfig(), triton=("target_update", "target_loss"))
    build_objective(CosineConfig(), triton=("target_update",))  # not a part of the objective


def test_cosine_refuses_shapes_that_differ():
    tokens, masks = tokens_of(2), random_masks(1, 1, 2)
    wanted = Wanted(torch.arange(NUM_PATCHES).expand(2, -1), target_index(masks, NUM_PATCHES))
    with pytest.raises(ValueError, match=r"prediction \(1, 3, 8\) and target \(2, 3, 8\) differ in shape"):
        Cosine(CosineConfig())(torch.zeros(1, 3, 8), tokens, masks, wanted)
