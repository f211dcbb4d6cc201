"""The cases of the kernel benchmark: each kernel as implemented by us, by plain PyTorch and by torch.compile.

Each implementation ("way") is a call without arguments on tensors made beforehand. If a kernel has a backward pass, the
call includes it. Inputs that only the compiled version needs (padded canvases, masks) are made beforehand too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_kernels import crop_resize as crops
from ijepa_kernels import fp8_linear as fp8
from ijepa_kernels import fused_tail as tail
from ijepa_kernels import target_loss as loss
from ijepa_kernels import target_update as update
from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.attention.reference import attention_reference
from ijepa_kernels.crop_resize.reference import filter_matrix, padded
from ijepa_scale.config.architectures import Sizes, sizes_of

Work = Callable[[], Any]
NEEDS_CUDA = "Triton needs a CUDA device"
TARGETS = 4  # target blocks per image


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of a published run on one device: `predicted` tokens per target block, `crop` pixels a side."""

    name: str
    sizes: Sizes
    images: int
    tokens: int
    predicted: int
    crop: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of matrix products and activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns normally distributed values on the device."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one size. `cost` holds bytes and FLOPs; `missing` says why an implementation can't run."""

    kernel: str
    shape: str
    ways: dict[str, Work]
    ours: str
    cost: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    fp8: bool = False


def settings(device: torch.device, quick: bool) -> list[Setting]:
    """Returns the sizes of the published runs; on the CPU, or with `quick` on a GPU, one small size."""
    tiny = Setting(name="tiny", sizes=sizes_of("vit_tiny"), images=2, tokens=196, predicted=34, crop=224, device=device)
    if device.type == "cpu":
        return [tiny]
    huge = Setting(
        name="H/14", sizes=sizes_of("vit_huge"), images=128, tokens=256, predicted=45, crop=224, device=device
    )
    giant = Setting(
        name="g/16", sizes=sizes_of("vit_giant"), images=16, tokens=196, predicted=34, crop=224, device=device
    )
    return [tiny] if quick else [huge, giant]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled as a whole graph for static shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def with_backward(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None = None) -> Work:
    """Returns a call that runs the function and its backward to the inputs."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def dense_attention(at: Setting) -> Iterator[Case]:
    """Yields attention over whole images without gradients, as in the target encoder, with each of SDPA's backends."""
    heads, size = at.sizes.heads, at.sizes.width // at.sizes.heads
    qkv = [at.random(at.images, heads, at.tokens, size) for _ in range(3)]

    def forced(backend: SDPBackend) -> Work:
        def work() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv)

        return work

    written_out = compiled(attention_reference)
    ways: dict[str, Work] = {
        "ours": lambda: attention(*qkv),
        "eager": lambda: attention_reference(*qkv),
        "compiled": lambda: written_out(*qkv),
        "math": forced(SDPBackend.MATH),
        "flash": forced(SDPBackend.FLASH_ATTENTION),
    }
    missing = {}
    for name, backend in (("efficient", SDPBackend.EFFICIENT_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        if at.device.type == "cuda":
            ways[name] = forced(backend)
        else:
            missing[name] = "the backend needs a CUDA device"
    values = at.images * heads * at.tokens * size
    cost = moved(3 * values, values, qkv[0].element_size()) | {"flops": 4.0 * values * at.tokens}
    yield Case(
        kernel="attention dense", shape=str(tuple(qkv[0].shape)), ways=ways, ours="ours", cost=cost, missing=missing
    )


def packed_attention(at: Setting) -> Iterator[Case]:
    """Yields forward and backward over packed contexts of different lengths; the compiler gets padded, masked ones."""
    heads, size = at.sizes.heads, at.sizes.width // at.sizes.heads
    lengths = np.random.default_rng(0).integers(at.tokens // 3, at.tokens // 2, at.images).tolist()
    layout = SequenceLayout.of(lengths, at.device)
    packed = [at.random(layout.total, heads, size).requires_grad_() for _ in range(3)]
    dense = [at.random(at.images, heads, max(lengths), size).requires_grad_() for _ in range(3)]
    mask = torch.arange(max(lengths), device=at.device) < torch.tensor(lengths, device=at.device)[:, None]
    masked = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))
    upstream = [x[0].detach().clone() for x in (packed, dense)]
    values = layout.total * heads * size
    squares = sum(length**2 for length in lengths)
    yield Case(
        kernel="attention packed",
        shape=f"{at.images} sequences, {layout.total} tokens, {heads} heads of {size}",
        ways={
            "ours": with_backward(lambda q, k, v: attention(q, k, v, layout), packed, upstream[0]),
            "eager": with_backward(lambda q, k, v: attention_reference(q, k, v, layout), packed, upstream[0]),
            "compiled": with_backward(masked, dense, upstream[1]),
        },
        ours="ours",
        cost=moved(8 * values, 4 * values, packed[0].element_size()) | {"flops": 12.0 * squares * heads * size},
    )


def crop_resize(at: Setting) -> Iterator[Case]:
    """Yields resizing crops of photographs to normalised images; the compiler gets ready-made canvases and filters."""
    sizes = np.random.default_rng(0).integers(200, 420, (at.images, 2))
    pixels = torch.randint(0, 256, (3 * int(sizes.prod(axis=1).sum()),), dtype=torch.uint8).to(at.device)
    normalise, output = ((0.017,) * 3, (-2.0,) * 3), (at.crop, at.crop)
    canvas = padded(pixels, sizes)
    across = filter_matrix(sizes[:, 1], at.crop, canvas.shape[3], "bilinear", at.device)
    down = filter_matrix(sizes[:, 0], at.crop, canvas.shape[2], "bilinear", at.device)

    def products(canvas: Tensor, across: Tensor, down: Tensor) -> Tensor:
        narrow = (canvas.float() @ across.mT[:, None]).add(0.5).floor().clamp(0, 255)
        levels = (down[:, None] @ narrow).add(0.5).floor().clamp(0, 255)
        return (levels * normalise[0][0] + normalise[1][0]).to(at.dtype)

    whole = compiled(products)
    options = {"normalise": normalise, "dtype": at.dtype}
    bytes_per_value = torch.empty(0, dtype=at.dtype).element_size()
    yield Case(
        kernel="crop_resize",
        shape=f"{at.images} crops to {output}",
        ways={
            "ours": lambda: crops.crop_resize(pixels, sizes, output, **options),
            "eager": lambda: crops.crop_resize(pixels, sizes, output, implementation="reference", **options),
            "compiled": lambda: whole(canvas, across, down),
        },
        ours="ours",
        cost=crops.cost(sizes, output, interpolation="bilinear", bytes_per_value=bytes_per_value),
    )


def target_loss(at: Setting) -> Iterator[Case]:
    """Yields forward and backward of the loss, which gathers from all tokens of the target encoder."""
    rows, width = at.images * TARGETS * at.predicted, at.sizes.width
    prediction = at.random(rows, width).requires_grad_()
    tokens = at.random(at.images * at.tokens, width, dtype=torch.float32)
    lookup = torch.arange(rows, device=at.device) * 7 % len(tokens)
    weights = torch.full((rows,), 1 / rows, device=at.device)

    def way(run: Callable[..., Tensor], **options: str) -> Work:
        return with_backward(lambda prediction: run(prediction, tokens, lookup, weights, **options), [prediction])

    ways = {"eager": way(loss.target_loss_reference), "compiled": way(compiled(loss.target_loss_reference))}
    yield triton_case(
        "target_loss",
        f"({rows}, {width}) of {len(tokens)} tokens",
        {**ways, "triton": way(loss.target_loss, implementation="triton")},
        loss.cost(rows, width, prediction_bytes=prediction.element_size(), token_bytes=4),
        at,
    )


def target_update(at: Setting) -> Iterator[Case]:
    """Yields the update of a whole encoder, with bf16 copies and a flag that stays 0."""
    shapes = encoder_shapes(at)
    target, source = ([at.random(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    copies, flag = [x.bfloat16() for x in target], torch.zeros((), device=at.device)
    tensors, momentum = sum(x.numel() for x in target), 0.996

    def flagged(target: list[Tensor], source: list[Tensor], copies: list[Tensor]) -> None:
        moved = torch._foreach_lerp(target, source, 1.0 - momentum)
        torch._foreach_copy_(target, [torch.where(flag == 0, a, b) for a, b in zip(moved, target, strict=True)])
        torch._foreach_copy_(copies, target)

    whole = compiled(flagged)
    options: dict[str, Any] = {"copies": copies, "found_nonfinite": flag}
    table = update.prepare(target, source, copies) if at.device.type == "cuda" else None
    yield triton_case(
        "target_update",
        f"{len(shapes)} tensors, {tensors / 1e6:.0f} M values",
        {
            "eager": lambda: update.target_update(target, source, momentum, **options),
            "compiled": lambda: whole(target, source, copies),
            "eager, no flag": lambda: update.target_update(target, source, momentum, copies=copies),
            "triton": lambda: update.target_update(
                target, source, momentum, table=table, implementation="triton", **options
            ),
        },
        update.cost(tensors, copies=True),
        at,
    )


def fused_tail(at: Setting) -> Iterator[Case]:
    """Yields the tail of a step of a whole encoder: AdamW, target, bf16 copies of both, and a flag that stays 0."""
    shapes = encoder_shapes(at)
    value, gradient, target = ([at.random(*shape, dtype=torch.float32) for shape in shapes] for _ in range(3))
    weights = [
        tail.Weight(
            old, slope, torch.zeros_like(old), torch.zeros_like(old), torch.zeros((), device=at.device),
            copy=old.bfloat16(), target=behind, target_copy=behind.bfloat16(),
        )
        for old, slope, behind in zip(value, gradient, target, strict=True)
    ]  # fmt: skip
    rates, flag = [tail.Rates(1e-4, 0.04)], torch.zeros((), device=at.device)
    options: dict[str, Any] = {"momentum": 0.996, "stopped": flag}
    table = tail.prepare(weights) if at.device.type == "cuda" else None

    def written_out(weights: list[tail.Weight]) -> None:
        for weight in weights:
            old, g, m, v, step, _, copy, behind, behind_copy, _ = weight
            assert copy is not None and behind is not None and behind_copy is not None
            step_now = step + 1.0
            m_now, v_now = torch.lerp(m, g, 0.1), 0.999 * v + 0.001 * g * g
            root = (1.0 - 0.999**step_now).sqrt()
            moved = old * (1.0 - 4e-6) - 1e-4 / (1.0 - 0.9**step_now) * m_now / (v_now.sqrt() / root + 1e-8)
            follows = torch.lerp(behind, moved, 1.0 - 0.996)
            pairs = ((old, moved), (m, m_now), (v, v_now), (step, step_now), (behind, follows))
            for state, new in pairs:
                state.copy_(torch.where(flag == 0, new, state))
            copy.copy_(old)
            behind_copy.copy_(behind)

    each = len(weights) // at.sizes.depth
    blocks = [weights[first : first + each] for first in range(0, len(weights), each)]
    block = compiled(written_out)  # one graph for all blocks: one of the whole encoder would compile for long
    values = sum(x.numel() for x in value)
    yield triton_case(
        "fused_tail",
        f"{len(shapes)} tensors, {values / 1e6:.0f} M values",
        {
            "eager": lambda: tail.fused_tail(weights, rates, **options),
            "compiled": lambda: [block(part) for part in blocks],
            "triton": lambda: tail.fused_tail(weights, rates, table=table, implementation="triton", **options),
        },
        tail.cost(values, copy=True, target="bf16"),
        at,
    )


def fp8_linear(at: Setting) -> Iterator[Case]:
    """Yields the two layers of an MLP in fp8, eager and compiled together with quantisation, and in bf16."""
    for inputs, outputs in ((at.sizes.width, at.sizes.mlp_width), (at.sizes.mlp_width, at.sizes.width)):
        rows = at.images * at.tokens
        x, weight = at.random(rows, inputs, dtype=torch.bfloat16), at.random(outputs, inputs, dtype=torch.bfloat16)
        bias, quantised = at.random(outputs, dtype=torch.bfloat16), fp8.quantise_rows(weight)
        ways: dict[str, Work] = {}
        missing = {}
        try:
            fp8.check_capability(at.device)
        except fp8.Fp8UnavailableError as error:
            missing = dict.fromkeys(("ours", "ours, not compiled"), str(error))
        else:
            whole = compiled(fp8.fp8_linear)
            ways["ours"] = lambda run=whole, given=(x, *quantised, bias): run(*given)
            ways["ours, not compiled"] = lambda given=(x, *quantised, bias): fp8.fp8_linear(*given)
        plain = compiled(F.linear)
        ways["eager"] = lambda given=(x, weight, bias): F.linear(*given)
        ways["compiled"] = lambda run=plain, given=(x, weight, bias): run(*given)
        cost = fp8.cost(rows, inputs, outputs, input_bytes=2)
        shape = f"({rows}, {inputs}) to {outputs}"
        yield Case(kernel="fp8_linear", shape=shape, ways=ways, ours="ours", cost=cost, missing=missing, fp8=True)


def encoder_shapes(at: Setting) -> list[tuple[int, ...]]:
    """Returns the shapes of the weights of an encoder's blocks."""
    width, mlp = at.sizes.width, at.sizes.mlp_width
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (mlp, width), (mlp,), (width, mlp), (width,)]
    return [*block, *[(width,)] * 4] * at.sizes.depth


def triton_case(kernel: str, shape: str, ways: dict[str, Work], cost: dict[str, float], at: Setting) -> Case:
    """Returns the case of a kernel that we implement in Triton; without a CUDA device, Triton is listed as missing."""
    missing = {} if at.device.type == "cuda" else {"triton": NEEDS_CUDA}
    available = {name: work for name, work in ways.items() if name not in missing}
    return Case(kernel=kernel, shape=shape, ways=available, ours="triton", cost=cost, missing=missing)


def moved(read: int, written: int, bytes_per_value: int) -> dict[str, float]:
    """Returns the cost in bytes of reading and writing this many values."""
    return {"read_bytes": float(read * bytes_per_value), "written_bytes": float(written * bytes_per_value)}


KERNELS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "attention_dense": dense_attention,
    "attention_packed": packed_attention,
    "crop_resize": crop_resize,
    "target_loss": target_loss,
    "target_update": target_update,
    "fused_tail": fused_tail,
    "fp8_linear": fp8_linear,
}
