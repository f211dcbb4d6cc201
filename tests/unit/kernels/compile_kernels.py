"""Compiles the Triton kernels for GPUs that aren't there and prints the bytes of machine code of each."""

from __future__ import annotations

import json

from ijepa_kernels.fused_tail import triton as fused_tail
from ijepa_kernels.layer_norm import triton as layer_norm
from ijepa_kernels.rows import tile
from ijepa_kernels.target_loss import triton as target_loss
from ijepa_kernels.target_update import triton as target_update
from tests.unit.kernels.kernel_harness import CAPABILITIES, compiled_bytes


def losses() -> dict[str, list[int]]:
    """Returns the bytes of code of the loss and its scaling, for the widths of ViT-H, ViT-g and a small model."""
    found = {}
    for width, dtype, weighted, smooth in ((1280, "*bf16", 1, 1), (1408, "*fp32", 0, 0), (384, "*bf16", 1, 0)):
        options = tile(width)
        warps = options.pop("num_warps")
        signature = {"prediction": dtype, "tokens": "*fp32", "lookup": "*i64", "weights": "*fp32",
                     "gradient": dtype, "partials": "*fp32", "num_rows": "i32", "num_tokens": "i32", "width": "i32",
                     "prediction_stride": "i32", "token_stride": "i32", "beta": "fp32", "eps": "fp32",
                     "even_weight": "fp32"}  # fmt: skip
        constants = {"WEIGHTED": bool(weighted), "SMOOTH": bool(smooth), "GRADIENT": True, **options}
        found[f"target_loss {width}"] = compiled_bytes(target_loss._kernel, signature, constants, num_warps=warps)
    signature = {"gradient": "*bf16", "upstream": "*fp32", "count": "i32"}
    found["target_loss scale"] = compiled_bytes(target_loss._scale_kernel, signature, {"BLOCK": 4096}, num_warps=4)
    return found


def updates() -> dict[str, list[int]]:
    """Returns the bytes of code of the update, with all that it can and with the least."""
    signature = {"tensors": "*i64", "chunks": "*i64", "flag": "*fp32", "weight": "fp32"}
    found = {}
    for all_of_it in (True, False):
        constants = {**dict.fromkeys(("COPIES", "FLAG", "ALIGNED"), all_of_it),
                     "CHUNK": target_update.CHUNK, "BLOCK": target_update.BLOCK}  # fmt: skip
        name = f"target_update {'whole' if all_of_it else 'least'}"
        found[name] = compiled_bytes(target_update._kernel, signature, constants, num_warps=8)
    return found


def tails() -> dict[str, list[int]]:
    """Returns the bytes of code of the tail, with and without fp8, which sm_80 lacks, and of its counting of steps."""
    signature = {"tensors": "*i64", "rates": "*fp64", "factors": "*fp32", "flag": "*fp32", "num": "i32"}
    constants = {"FLAG": True, "BLOCK": fused_tail.COUNTED}
    found = {"fused_tail count": compiled_bytes(fused_tail._count_kernel, signature, constants, num_warps=4)}
    signature = {"tensors": "*i64", "chunks": "*i64", "gradients": "*i64", "factors": "*fp32", "flag": "*fp32",
                 "gradient_scale": "*fp32", "weight": "fp32"}  # fmt: skip
    for name, quantised, rest, options in (
        ("fp8", True, True, {"capabilities": CAPABILITIES[1:]}), ("least", False, False, {})
    ):  # fmt: skip
        constants = {**dict.fromkeys(("EMA", "FLAG", "SCALED", "ALIGNED"), rest), "QUANTISED": quantised,
                     "BLOCK": fused_tail.BLOCK}  # fmt: skip
        found[f"fused_tail {name}"] = compiled_bytes(
            fused_tail._kernel, signature, constants, num_warps=fused_tail.WARPS, **options
        )
    return found


def norms() -> dict[str, list[int]]:
    """Returns the bytes of code of the norm's two passes."""
    found = {}
    for width, dtype in ((1280, "*bf16"), (384, "*fp32")):
        options = tile(width)
        warps = options.pop("num_warps")
        common = {"weight": "*fp32", "mean": "*fp32", "inverse": "*fp32", "num_rows": "i32", "width": "i32"}
        signature = {**common, "x": "*fp32", "bias": "*fp32", "out": dtype, "stride": "i32", "eps": "fp32"}
        ordered = {name: signature[name] for name in layer_norm._forward_kernel.arg_names if name in signature}
        found[f"layer_norm {width}"] = compiled_bytes(layer_norm._forward_kernel, ordered, options, num_warps=warps)
        signature = {**common, "upstream": dtype, "x": "*fp32", "gradient": "*fp32", "partial_weight": "*fp32",
                     "partial_bias": "*fp32", "upstream_stride": "i32", "stride": "i32"}  # fmt: skip
        ordered = {name: signature[name] for name in layer_norm._backward_kernel.arg_names if name in signature}
        found[f"layer_norm backward {width}"] = compiled_bytes(
            layer_norm._backward_kernel, ordered, options, num_warps=warps
        )
    return found


def main() -> None:
    print(json.dumps({**losses(), **updates(), **tails(), **norms()}))


if __name__ == "__main__":
    main()
