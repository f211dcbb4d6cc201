"""Compiles the Triton kernels for GPUs that aren't there and prints the bytes of machine code of each."""

from __future__ import annotations

import json

from ijepa_kernels.rows import tile
from ijepa_kernels.target_loss import triton as target_loss
from ijepa_kernels.target_update import triton as target_update
from tests.unit.kernels.kernel_harness import compiled_bytes


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


def main() -> None:
    print(json.dumps({**losses(), **updates()}))


if __name__ == "__main__":
    main()
