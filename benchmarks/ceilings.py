"""Question: how fast are this device's matrix products and attention at the shapes of a step, and so the step at best?

python -m benchmarks.ceilings [--device cuda] [--quick] [--only products|attention] [--to FILE]

Products: those of target, context and predictor of ViT-H/14 at 224 with 128 images, forward, with respect to the input
(dgrad) and to the weights (wgrad), in bf16 and, with operands quantised beforehand, in row-wise fp8 with and without
fast accumulation. Attention: each role with its heads and lengths, forward and where it is trained backward, with each
backend that the device has. Lengths are those of drawn masks. Each case is timed alone, with a cold L2 cache. The share
of the peak refers to the data sheet (bf16; twice that in fp8). A table adds up the products of all blocks: the least
time of a step, up to the rows that the last blocks leave out. With --quick the model is tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, percentiles, record, report_skip, require_device, table
from benchmarks.kernels import Clock
from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.attention.backend import ON_CPU, activate
from ijepa_kernels.fp8_linear import FP8, Fp8UnavailableError, check_capability
from ijepa_scale.config import BlockMaskConfig, ModelConfig
from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.planning.tokens import draw_masks, mean_tokens, micro_batches

IMAGES = {"cuda": 128, "cpu": 2}
ROUNDS = {"cuda": 20, "cpu": 3}
BACKENDS = ("flash", "cudnn", "efficient", "fa3", "fa4")
VARLEN = "varlen"
PASSES = ("forward", "dgrad", "wgrad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A linear layer of a network: (rows, inputs) -> (rows, outputs), `count` times in a step."""

    role: str
    layer: str
    rows: int
    inputs: int
    outputs: int
    count: int
    passes: tuple[str, ...] = PASSES

    def operands(self, which: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shapes of both operands of a pass, whose product is the first times the second."""
        return {
            "forward": ((self.rows, self.inputs), (self.inputs, self.outputs)),
            "dgrad": ((self.rows, self.outputs), (self.outputs, self.inputs)),
            "wgrad": ((self.outputs, self.rows), (self.rows, self.inputs)),
        }[which]

    @property
    def flops(self) -> float:
        """The FLOPs of one pass."""
        return 2.0 * self.rows * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention of a role: sequences of these lengths, equal if dense."""

    role: str
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    dense: bool
    trained: bool

    @property
    def flops(self) -> float:
        """The FLOPs of forward and, where it is trained, backward, which has twice as many."""
        forward = 4.0 * self.heads * self.head_dim * sum(length**2 for length in self.lengths)
        return 3 * forward if self.trained else forward


def model_for(device: torch.device, quick: bool) -> ModelConfig:
    """Returns ViT-H/14, or on the CPU and with `quick` a tiny model."""
    if device.type == "cpu" or quick:
        return ModelConfig(name="vit_tiny", image_size=96, patch_size=8)
    return ModelConfig(name="vit_huge", image_size=224, patch_size=14)


def masks_for(model: ModelConfig, images: int, context: str) -> tuple[BlockMaskConfig, Any]:
    """Returns the configuration of masks in one group, and those of a step."""
    config = BlockMaskConfig(context=context, group_size=images)
    return config, MaskSampler(config, model.grid, seed=0)(0, 0, images, images)


def products(model: ModelConfig, images: int) -> Iterator[Product]:
    """Yields the linear layers of a step with truncated masks; numbers of tokens are means over drawn masks."""
    sizes, (config, _) = resolve(model), masks_for(model, images, "truncate")
    tokens = mean_tokens(micro_batches(config, draw_masks(config, model.grid, batch_size=images), model.grid, images))
    patches, context, predictor = images * sizes.num_patches, _rows(tokens.context), _rows(tokens.predictor)
    pixels = sizes.channels * sizes.patch_size**2
    first = Product(
        role="target", layer="patches", rows=patches, inputs=pixels, outputs=sizes.width, count=1, passes=("forward",)
    )
    yield first
    yield from _block("target", patches, sizes, narrow=False, passes=("forward",))
    first = dataclasses.replace(first, role="context", passes=("forward", "wgrad"))
    yield first
    if pixels % 16:
        yield dataclasses.replace(first, layer="padded patches", inputs=-(-pixels // 16) * 16, count=0)
    yield from _block("context", context, sizes, narrow=False)
    yield Product(
        role="predictor", layer="embed", rows=context, inputs=sizes.width, outputs=sizes.predictor_width, count=1
    )
    yield from _block("predictor", predictor, sizes, narrow=True)
    yield Product(role="predictor", layer="output", rows=_rows(tokens.predicted), inputs=sizes.predictor_width,
                  outputs=sizes.width, count=1)  # fmt: skip


def _rows(tokens: float) -> int:
    """Returns the number of rows rounded to a multiple of 16, which fp8 products need."""
    return max(16, round(tokens / 16) * 16)


def _block(
    role: str, rows: int, sizes: Architecture, *, narrow: bool, passes: tuple[str, ...] = PASSES
) -> Iterator[Product]:
    """Yields the linear layers of a block of the encoder, or of the predictor if `narrow`."""
    width, mlp = (sizes.predictor_width, sizes.predictor_mlp_width) if narrow else (sizes.width, sizes.mlp_width)
    depth = sizes.predictor_depth if narrow else sizes.depth
    for layer, inputs, outputs in (
        ("qkv", width, 3 * width), ("proj", width, width), ("fc1", width, mlp), ("fc2", mlp, width),
    ):  # fmt: skip
        yield Product(role=role, layer=layer, rows=rows, inputs=inputs, outputs=outputs, count=depth, passes=passes)


def heads_of(model: ModelConfig, images: int) -> Iterator[Heads]:
    """Yields the attention of each role, dense for truncated masks and packed for packed ones."""
    sizes = resolve(model)
    wide = {"heads": sizes.heads, "head_dim": sizes.width // sizes.heads}
    narrow = {"heads": sizes.heads, "head_dim": sizes.predictor_width // sizes.heads}
    _, truncated = masks_for(model, images, "truncate")
    _, packed = masks_for(model, images, "packed")
    assert isinstance(truncated, DenseMasks) and isinstance(packed, PackedMasks)
    kept, predicted = truncated.context.shape[2], truncated.targets.shape[2]
    sequences = truncated.targets.shape[0] * images
    yield Heads(role="target", **wide, lengths=(sizes.num_patches,) * images, dense=True, trained=False)
    yield Heads(role="context", **wide, lengths=(kept,) * images, dense=True, trained=True)
    yield Heads(role="predictor", **narrow, lengths=(kept + predicted,) * sequences, dense=True, trained=True)
    yield Heads(role="context, packed", **wide, lengths=packed.context_layout.lengths, dense=False, trained=True)
    yield Heads(role="predictor, packed", **narrow, lengths=packed.predictor_layout.lengths, dense=False, trained=True)


def measure_products(model: ModelConfig, clock: Clock, device: torch.device, peak: float | None) -> Iterator[Row]:
    """Yields a row for each product, pass and precision."""
    kinds = ["bf16", *fp8_kinds(device)]
    for product in products(model, IMAGES[device.type]):
        for which in product.passes:
            shapes = product.operands(which)
            for kind in kinds:
                if kind != "bf16" and any(side % 16 for shape in shapes for side in shape):
                    continue  # the unpadded patches
                spent = timed(matmul(shapes, which, kind, device), clock, ROUNDS[device.type])
                yield {
                    "benchmark": "ceilings", "what": "product", "role": product.role, "layer": product.layer,
                    "pass": which, "precision": kind, "shape": [*shapes[0], shapes[1][1]], "count": product.count,
                    **rates(spent, product.flops, peak, fp8=kind != "bf16"),
                }  # fmt: skip


def fp8_kinds(device: torch.device) -> tuple[str, ...]:
    """Returns the ways to multiply in row-wise fp8; none, with the reason printed, if the device can't."""
    if device.type == "cpu":
        report_skip("products in fp8", "row-wise fp8 products need a CUDA device")
        return ()
    try:
        check_capability(device)
    except Fp8UnavailableError as error:
        report_skip("products in fp8", str(error))
        return ()
    return "fp8", "fp8, fast accumulation"


def matmul(
    shapes: tuple[tuple[int, int], tuple[int, int]], which: str, kind: str, device: torch.device
) -> Callable[[], Any]:
    """Returns a call that multiplies two operands, laid out in memory as in a training step."""
    generator = torch.Generator(device).manual_seed(0)
    (rows, inner), (_, columns) = shapes

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    if kind != "bf16":  # fp8 products take a row-major left side and a column-major right side
        left, right = values(rows, inner).to(FP8), values(columns, inner).to(FP8).t()
        scales = [torch.ones(shape, dtype=torch.float32, device=device) for shape in ((rows, 1), (1, columns))]
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": kind != "fp8"}
        return lambda: torch._scaled_mm(left, right, scale_a=scales[0], scale_b=scales[1], **options)
    left = values(inner, rows).t() if which == "wgrad" else values(rows, inner)
    right = values(columns, inner).t() if which == "forward" else values(inner, columns)
    return lambda: left @ right


def measure_attention(model: ModelConfig, clock: Clock, device: torch.device, peak: float | None) -> Iterator[Row]:
    """Yields a row for each role and backend; a backend that refuses a shape has the reason instead of a time."""
    names = [name for name in BACKENDS if device.type == "cuda" or name in ON_CPU]
    installed = [name for name in names if _installed(name, device)]
    for heads in heads_of(model, IMAGES[device.type]):
        replaced = [name for name in installed if name.startswith("fa")]  # these replace varlen's kernel too
        dense = installed if heads.dense else []
        for backend in (*dense, VARLEN, *([] if heads.dense else replaced)):
            row: Row = {
                "benchmark": "ceilings", "what": "attention", "role": heads.role, "backend": backend,
                "shape": [len(heads.lengths), sum(heads.lengths), heads.heads, heads.head_dim],
            }  # fmt: skip
            try:
                activate("auto" if backend == VARLEN else backend, device)
                kernel = None if backend in (VARLEN, "auto") else backend
                spent = timed(
                    attend(heads, backend == VARLEN or not heads.dense, kernel, device), clock, ROUNDS[device.type]
                )
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except RuntimeError as error:  # the backend doesn't take this shape
                yield {**row, "refused": str(error).partition("\n")[0][:300]}
                continue
            finally:
                activate("auto", device)
            yield {**row, **rates(spent, heads.flops, peak)}


def _installed(name: str, device: torch.device) -> bool:
    """Returns whether SDPA has this kernel, and prints why if not."""
    try:
        activate(name, device)
    except ValueError as error:
        report_skip(f"attention {name}", str(error))
        return False
    finally:
        activate("auto", device)
    return True


def attend(heads: Heads, packed: bool, kernel: str | None, device: torch.device) -> Callable[[], Any]:
    """Returns a call of attention, with backward where it is trained, on views of one tensor as in a block."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (sum(heads.lengths),) if packed else (len(heads.lengths), heads.lengths[0])
    qkv = torch.randn(*shape, 3, heads.heads, heads.head_dim, generator=generator, device=device, dtype=dtype)
    layout = SequenceLayout.of(heads.lengths, device)
    qkv.requires_grad_(heads.trained)

    def forward() -> Tensor:
        q, k, v = qkv.unbind(-3)
        if packed:
            return attention(q, k, v, layout)
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), kernel=kernel).transpose(1, 2)

    upstream = torch.ones(*shape, heads.heads, heads.head_dim, device=device, dtype=dtype)
    return (lambda: torch.autograd.grad(forward(), qkv, upstream)) if heads.trained else forward


def timed(work: Callable[[], Any], clock: Clock, rounds: int) -> list[float]:
    """Returns the milliseconds of `rounds` calls, after three that warm up."""
    return [clock(work) for _ in range(rounds + 3)][3:]


def rates(spent: list[float], flops: float, peak: float | None, *, fp8: bool = False) -> Row:
    """Returns milliseconds, TFLOP/s of the median, and their share of the peak if that is known."""
    values = percentiles(spent)
    rate = 1e3 * flops / values["p50"]
    share = None if peak is None else rate / (2 * peak if fp8 else peak)
    return {"unit": "ms", **values, "flops": flops, "tflops": rate / 1e12, "share_of_peak": share}


def report(rows: list[Row]) -> str:
    """Returns tables of the products, of the attention, and of all products of a step."""
    lines: dict[str, list[list[str]]] = {"product": [], "attention": []}
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        what = f"{row['role']} {row['layer']}, {row['pass']}" if row["what"] == "product" else row["role"]
        cells = [what, shape, row.get("precision") or row["backend"]]
        if "refused" in row:
            lines[row["what"]].append([*cells, f"refused: {row['refused']}", "", ""])
            continue
        spread = " - ".join(f"{row[p]:.3g}" for p in ("p20", "p50", "p80"))
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        lines[row["what"]].append([*cells, spread, f"{row['tflops']:.3g}", share])
    tail = ["ms, 20-50-80 %", "TFLOP/s", "share of peak"]
    parts = []
    if lines["product"]:
        parts += [table(["product", "shape", "precision", *tail], lines["product"]), whole_step(rows)]
    if lines["attention"]:
        header = ["attention", "sequences x tokens x heads x head dim", "backend", *tail]
        parts.append(table(header, lines["attention"]))
    return "\n\n".join(parts)


def whole_step(rows: list[Row]) -> str:
    """Returns a table of the milliseconds that all products of a step take, by role and precision."""
    found: dict[str, dict[str, float]] = {}
    for row in (row for row in rows if row["what"] == "product" and row["count"]):
        by_kind = found.setdefault(row["role"], {})
        by_kind[row["precision"]] = by_kind.get(row["precision"], 0.0) + row["count"] * row["p50"]
    kinds = list(dict.fromkeys(row["precision"] for row in rows if row["what"] == "product"))
    lines = [[role, *(f"{each[kind]:.2f}" if kind in each else "" for kind in kinds)] for role, each in found.items()]
    return table(["all products of a step, ms", *kinds], lines)


def main() -> None:
    """Runs the benchmark, prints its tables and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--only", choices=("products", "attention"), help="one of both parts")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    options = parser.parse_args()
    require_device(parser, options.device)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model, clock = model_for(device, options.quick), Clock(device)
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    parts = {"products": measure_products, "attention": measure_attention}
    rows = [
        row
        for name, part in parts.items()
        if options.only in (None, name)
        for row in record(options.to, part(model, clock, device, peak))
    ]
    print(report(rows))


if __name__ == "__main__":
    main()
