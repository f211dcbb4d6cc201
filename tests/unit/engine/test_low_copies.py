"""Layers that compute with bf16 copies: the results of autocast, and fp32 gradients, compiled and checkpointed too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale.engine.low_copies import CopiedLinear, CopiedPatchProjection, renew, use_low_copies
from ijepa_scale.engine.parallelize import checkpoint_blocks, compile_blocks, set_compile_limits
from ijepa_scale.models.layers import Block, Linear
from tests.unit.models.packing_by_hand import images_of, random_masks, small_jepa

AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def layers(inputs: int = 24, outputs: int = 40) -> tuple[Linear, CopiedLinear]:
    """Returns a linear layer and one with its weights that computes with copies."""
    torch.manual_seed(0)
    plain = Linear(inputs, outputs)
    copied = copy.deepcopy(plain)
    assert len(use_low_copies(copied)) == 2 and isinstance(copied, CopiedLinear)
    return plain, copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("rows", [None, (8, 24)])
def test_a_layer_gives_what_autocast_gives(shape, dtype, rows) -> None:
    results = []
    for layer in layers():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with AUTOCAST:
            out = layer(x) if rows is None else layer.rows(x, *rows)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), upstream)))
    plain, copied = results
    for found, expected in zip(copied[:3], plain[:3], strict=True):  # the CPU rounds weight gradients, as autocast does
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    whole = torch.zeros(40)
    whole[slice(None) if rows is None else slice(*rows)] = upstream.flatten(0, -2).float().sum(dim=0)
    torch.testing.assert_close(copied[3], whole)


def test_a_patch_projection_gives_what_autocast_gives() -> None:
    plain = small_jepa().encoder.patch_embed
    copied = copy.deepcopy(plain)
    use_low_copies(copied)
    assert isinstance(copied.proj, CopiedPatchProjection)
    gradients = []
    for part in (plain, copied):
        with AUTOCAST:
            out = part(images_of(2))
        gradients.append(torch.autograd.grad(out.float().square().sum(), part.proj.weight)[0])
        assert out.dtype == torch.bfloat16
    assert gradients[1].shape == plain.proj.weight.shape and torch.equal(*gradients)


class Products(TorchDispatchMode):
    """Records the matrix products and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.found.append((function.__name__, result.dtype))
        return result


def test_off_the_cpu_weight_gradients_come_from_the_product_in_fp32() -> None:
    """On meta tensors, which take the path of CUDA: three products, of which one returns fp32, and no casts of it."""
    layer = Linear(24, 40, device="meta")
    use_low_copies(layer)
    with Products() as products:
        layer(torch.empty(7, 24, device="meta", requires_grad=True)).sum().backward()
    assert [dtype for name, dtype in products.found if name == "mm.dtype"] == [torch.float32]
    assert len(products.found) == 3
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_copies_are_not_saved_and_names_stay() -> None:
    jepa = small_jepa()
    names, parameters = list(jepa.state_dict()), list(jepa.parameters())
    copies = use_low_copies(jepa)
    assert list(jepa.state_dict()) == names and all(map(torch.equal, jepa.parameters(), parameters))
    assert {value.dtype for value in copies.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.mul_(3.0)
    assert not any(torch.equal(value, parameter.bfloat16()) for parameter, value in copies.items() if parameter.any())
    renew(copies)
    assert all(torch.equal(value, parameter.bfloat16()) for parameter, value in copies.items())


def test_frozen_weights_get_no_gradient() -> None:
    jepa = small_jepa()
    use_low_copies(jepa)
    jepa.encoder.requires_grad_(False)
    with AUTOCAST:
        jepa(images_of(2), random_masks(1, 2, 2)).square().mean().backward()
    assert all(parameter.grad is None for parameter in jepa.encoder.parameters())
    assert all(parameter.grad is not None for parameter in jepa.predictor.parameters())


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_model_gives_what_autocast_gives_under_checkpointing(checkpointing) -> None:
    results = []
    for copied in (False, True):
        jepa = small_jepa()
        if copied:
            use_low_copies(jepa)
        checkpoint_blocks(jepa, checkpointing)
        with AUTOCAST:
            out = jepa(images_of(2), random_masks(1, 2, 2))
        out.square().mean().backward()
        results.append((out, {name: parameter.grad for name, parameter in jepa.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, expected in results[0][1].items():
        if "norm" in name or not name.endswith("bias"):
            assert torch.equal(results[1][1][name], expected), name
        else:  # autocast rounds these sums to bf16
            torch.testing.assert_close(results[1][1][name], expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_compiled_blocks_are_one_graph_for_any_length(checkpointing) -> None:
    torch._dynamo.reset()
    set_compile_limits()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.manual_seed(0)
    exact = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(16, 2, 32) for _ in range(2)])})
    compiled = copy.deepcopy(exact)
    for part in (exact, compiled):
        use_low_copies(part)
        checkpoint_blocks(part, checkpointing)
    compile_blocks(compiled, backend=backend)
    for length in (5, 9, 6, 12, 7):
        x = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))
        gradients = []
        for part in (exact, compiled):
            with AUTOCAST:
                y = x.clone().requires_grad_()
                for block in part["blocks"]:
                    y = block(y)
            y.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in part.parameters()])
            part.zero_grad()
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-4)
    assert len(graphs) <= 2, len(graphs)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_compiled_blocks_give_what_compiled_autocast_gives(checkpointing) -> None:
    torch._dynamo.reset()
    set_compile_limits()
    torch.manual_seed(0)
    casts = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(16, 2, 32) for _ in range(2)])})
    copies = copy.deepcopy(casts)
    use_low_copies(copies)
    for part in (casts, copies):
        checkpoint_blocks(part, checkpointing)
        compile_blocks(part, backend="aot_eager")
    for length in (5, 9, 6):
        results = []
        for part in (casts, copies):
            x = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length)).requires_grad_()
            y = x
            with AUTOCAST:
                for block in part["blocks"]:
                    y = block(y)
            y.square().mean().backward()
            results.append((y, x.grad, {name: parameter.grad for name, parameter in part.named_parameters()}))
            part.zero_grad()
        (y, d_x, expected), (found_y, found_d_x, found) = results
        assert torch.equal(found_y, y) and torch.equal(found_d_x, d_x)
        for name, gradient in expected.items():
            if "norm" in name or not name.endswith("bias"):
                assert torch.equal(found[name], gradient), name
            else:  # autocast rounds these sums to bf16
                torch.testing.assert_close(found[name], gradient, rtol=2**-8, atol=1e-6)
    torch._dynamo.reset()
