"""Converts the names of an encoder's tensors from and to those of other programs. Knows nothing of files.

This package uses the published names, like timm: pos_embed, patch_embed.proj, blocks.N.{norm1, attn.qkv, attn.proj,
norm2, mlp.fc1, mlp.fc2}, norm; a classifier adds fc_norm and head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ijepa_scale.errors import CheckpointError

NAMINGS = ("published", "transformers")
_WRAPPER = "module."  # prefix of data parallelism
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # anywhere in a name

# Source: transformers.IJepaModel and IJepaForImageClassification (4.47 to 4.57); files on the hub use the same names.
_OUTER = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}
_INNER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_SPLIT = ("query", "key", "value")  # the parts of attn.qkv, in this order
# The names of modules in memory since transformers 5; its files keep those above.
_LATER = {
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    **{f"attention.{part[0]}_proj": f"attention.attention.{part}" for part in _SPLIT},
}  # fmt: skip
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")


def to_ours(tensors: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors under the names of this package, and the naming of the source, one of NAMINGS.

    Tensors that this package doesn't know keep their names, so that nothing gets lost silently. `origin` is for
    messages.

    Raises:
        CheckpointError: no known encoder has tensors with these names, or q, k and v are incomplete.
    """
    plain = unwrapped(tensors, origin)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in plain):
        return _from_transformers({name.removeprefix("ijepa."): t for name, t in plain.items()}, origin), "transformers"
    if "encoder.patch_embed.proj.weight" in plain:
        plain = {name.removeprefix("encoder."): tensor for name, tensor in plain.items()}
    if "patch_embed.proj.weight" not in plain:
        shown = ", ".join(list(plain)[:3]) or "nothing"
        raise CheckpointError(
            f"{origin} holds {shown}{' ...' if len(plain) > 3 else ''}, which isn't a known encoder; give one with "
            "the published names (patch_embed.proj.weight ...), timm's, or those of transformers' IJepaModel"
        )
    return plain, "published"


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an encoder's tensors under the names of transformers' IJepaModel.

    Raises:
        CheckpointError: a tensor has no name there.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if name in _OUTER:
            named[_OUTER[name]] = tensor
        elif stem in _OUTER:
            named[f"{_OUTER[stem]}.{kind}"] = tensor
        elif block and block[2] == "attn.qkv":
            for part, third in zip(_SPLIT, tensor.chunk(3), strict=True):
                named[f"encoder.layer.{block[1]}.attention.attention.{part}.{kind}"] = third.contiguous()
        elif block and block[2] in _INNER:
            named[f"encoder.layer.{block[1]}.{_INNER[block[2]]}.{kind}"] = tensor
        else:
            raise CheckpointError(
                f"{name} has no name in transformers' IJepaModel, whose only norm comes before pooling; use the "
                "published naming, or a run with model.pool_norm=before"
            )
    return named


def _from_transformers(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    named: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(name)
        part = _LATER.get(block[2], block[2]).removeprefix("attention.attention.") if block else ""
        if name in outer:
            named[outer[name]] = tensor
        elif stem in outer:
            named[f"{outer[stem]}.{kind}"] = tensor
        elif block and part in _SPLIT:
            thirds.setdefault(f"blocks.{block[1]}.attn.qkv.{kind}", {})[part] = tensor
        elif block and part in inner:
            named[f"blocks.{block[1]}.{inner[part]}.{kind}"] = tensor
        else:
            named[name] = tensor
    for name, parts in thirds.items():
        if len(parts) < len(_SPLIT):
            lacking = ", ".join(part for part in _SPLIT if part not in parts)
            raise CheckpointError(f"{origin} lacks {lacking} of {name}; the file is incomplete: copy it again")
        named[name] = torch.cat([parts[part] for part in _SPLIT])
    return named


def unwrapped(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Returns the tensors without the parts of their names that wrappers add: data parallelism, torch.compile, FSDP.

    Raises:
        CheckpointError: two tensors have the same name then.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        for infix in _INFIXES:
            short = short.replace(infix, "")
        while short.startswith(_WRAPPER):
            short = short.removeprefix(_WRAPPER)
        if short in plain:
            raise CheckpointError(f"{origin} holds {short} twice, once in a wrapper ({name}); save one model only")
        plain[short] = tensor
    return plain
