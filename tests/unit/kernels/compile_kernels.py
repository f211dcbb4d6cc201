"""Compiles the Triton kernels for GPUs that aren't there and prints the registers, spills and shared memory of each."""

from __future__ import annotations

import json
import sys

from ijepa_kernels.crop_resize import triton as crop_resize
from ijepa_kernels.fused_tail import triton as fused_tail
from ijepa_kernels.rows import tile
from ijepa_kernels.target_loss import triton as target_loss
from ijepa_kernels.target_update import triton as target_update
from tests.unit.kernels.kernel_harness import CAPABILITIES, compiled


def losses() -> dict[str, dict[str, list[int]]]:
    """Returns what is taken by the loss and its scaling, for the widths of ViT-H, ViT-g and a small model."""
    found = {}
    for width, dtype, weighted, smooth in ((1280, "*bf16", 1, 1), (1408, "*fp32", 0, 0), (384, "*bf16", 1, 0)):
        options = tile(width)
        warps = options.pop("num_warps")
        constants = {"WEIGHTED": bool(weighted), "SMOOTH": bool(smooth), "GRADIENT": True, **options}
        found[f"target_loss {width}"] = _loss(dtype, constants, num_warps=warps)
    signature = {"gradient": "*bf16", "upstream": "*fp32", "count": "i32"}
    found["target_loss scale"] = compiled(target_loss._scale_kernel, signature, {"BLOCK": 4096}, num_warps=4)
    return found


def _loss(dtype: str, constants: dict[str, object], *, num_warps: int) -> dict[str, list[int]]:
    signature = {"prediction": dtype, "tokens": "*fp32", "lookup": "*i64", "weights": "*fp32",
                 "gradient": dtype, "partials": "*fp32", "num_rows": "i32", "num_tokens": "i32", "width": "i32",
                 "prediction_stride": "i32", "token_stride": "i32", "beta": "fp32", "eps": "fp32",
                 "even_weight": "fp32"}  # fmt: skip
    return compiled(target_loss._kernel, signature, constants, num_warps=num_warps)


def too_large() -> dict[str, list[int]]:
    """Returns what is taken by the loss with a tile whose values can't stay in the registers of one warp."""
    tiles = {"ROWS": 4, "BLOCK": tile(1280)["BLOCK"]}
    return _loss("*bf16", {"WEIGHTED": True, "SMOOTH": True, "GRADIENT": True, **tiles}, num_warps=1)


def updates() -> dict[str, dict[str, list[int]]]:
    """Returns what is taken by the update, with all that it can and with the least."""
    signature = {"tensors": "*i64", "chunks": "*i64", "flag": "*fp32", "weight": "fp32"}
    found = {}
    for all_of_it in (True, False):
        constants = {**dict.fromkeys(("COPIES", "FLAG", "ALIGNED"), all_of_it),
                     "CHUNK": target_update.CHUNK, "BLOCK": target_update.BLOCK}  # fmt: skip
        name = f"target_update {'whole' if all_of_it else 'least'}"
        found[name] = compiled(target_update._kernel, signature, constants, num_warps=8)
    return found


def crops() -> dict[str, dict[str, list[int]]]:
    """Returns what is taken by the crop, for each type of pixels that it writes."""
    factors = [f"{kind}_{colour}" for kind in ("scale", "shift") for colour in "rgb"]
    found = {}
    for out, cubic in (("*bf16", False), ("*fp32", True), ("*u8", False)):
        signature = {"pixels": "*u8", "crops": "*i64", "out": out, "out_height": "i32", "out_width": "i32",
                     **dict.fromkeys(factors, "fp32")}  # fmt: skip
        constants = {"TAPS": 8, "CUBIC": cubic, "TILE": 32, "ROWS": 16}
        found[f"crop_resize to {out[1:]}"] = compiled(crop_resize._kernel, signature, constants, num_warps=4)
    return found


def tails() -> dict[str, dict[str, list[int]]]:
    """Returns what is taken by the tail, with and without fp8, which sm_80 lacks, and of its counting of steps."""
    signature = {"tensors": "*i64", "rates": "*fp64", "factors": "*fp32", "flag": "*fp32", "num": "i32"}
    constants = {"FLAG": True, "BLOCK": fused_tail.COUNTED}
    found = {"fused_tail count": compiled(fused_tail._count_kernel, signature, constants, num_warps=4)}
    signature = {"tensors": "*i64", "chunks": "*i64", "gradients": "*i64", "factors": "*fp32", "flag": "*fp32",
                 "gradient_scale": "*fp32", "weight": "fp32"}  # fmt: skip
    for name, quantised, rest, options in (
        ("fp8", True, True, {"capabilities": CAPABILITIES[1:]}), ("least", False, False, {})
    ):  # fmt: skip
        constants = {**dict.fromkeys(("EMA", "FLAG", "SCALED", "ALIGNED", "EVEN"), rest), "QUANTISED": quantised,
                     "BLOCK": fused_tail.BLOCK}  # fmt: skip
        found[f"fused_tail {name}"] = compiled(
            fused_tail._kernel, signature, constants, num_warps=fused_tail.WARPS, **options
        )
    return found


def main() -> None:
    shown = {**losses(), **updates(), **crops(), **tails()}
    print(json.dumps(too_large() if "too_large" in sys.argv else shown))


if __name__ == "__main__":
    main()
