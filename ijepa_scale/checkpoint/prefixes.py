"""Finds the encoder among the tensors of a file by the prefix of its names. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ijepa_scale.errors import CheckpointError

_MARKERS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")  # of each encoder's first layer
_PREDICTOR = "predictor_embed.weight"  # of a predictor's first layer
_PREDICTORS_OWN = ("predictor_", "mask_token")
_HEADS = ("head.", "fc_norm.", "classifier.")  # a classifier's own layers, which stand next to its encoder
_ROLES = {
    "target": ("target_encoder", "teacher", "target", "ema", "model_ema", "state_dict_ema"),
    "context": ("context_encoder", "student"),
}
_WEAK_CONTEXT = "encoder"  # the context encoder's name where there are several; otherwise anyone's


class Chosen(NamedTuple):
    """One encoder's tensors, without the prefix of their names."""

    tensors: dict[str, Tensor]
    which: str | None  # target or context, where the prefix says so
    left_out: tuple[str, ...]  # names of tensors outside the encoder


def roles_in(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns which encoders the names tell apart: target, context, both, or neither."""
    prefixes = _prefixes(tensors)
    found = {_role(prefix, alone=len(prefixes) == 1) for prefix in prefixes}
    return tuple(role for role in _ROLES if role in found)


def find_predictor(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns the predictor's tensors, without the prefix of their names; None if there is none."""
    first = next((name for name in tensors if f".{name}".endswith(f".{_PREDICTOR}")), None)
    if first is None:
        return None
    prefix = first.removesuffix(_PREDICTOR)
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.removeprefix(prefix).startswith(_PREDICTORS_OWN) and name.startswith(prefix)
    }


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(marker) for name in tensors for marker in _MARKERS if f".{name}".endswith(f".{marker}")]


def choose_encoder(tensors: Mapping[str, Tensor], which: str, origin: str) -> Chosen:
    """Returns the encoder that is asked for, target or context; all tensors if no prefix is known.

    Raises:
        CheckpointError: there are several encoders, and not exactly one of them is called what is asked for; or there
            is one, and it is called the other.
    """
    prefixes = _prefixes(tensors)
    if not prefixes:
        return Chosen(dict(tensors), None, ())
    roles = {prefix: _role(prefix, alone=len(prefixes) == 1) for prefix in prefixes}
    mine = [prefix for prefix, role in roles.items() if role == which or (role is None and len(prefixes) == 1)]
    if len(mine) != 1:
        if len(prefixes) == 1:
            other = roles[prefixes[0]]
            raise CheckpointError(
                f"{origin} holds only the {other} encoder, but {which} is requested; set model.weights={other}, in "
                f"Python which={other!r}"
            )
        named = ", ".join(prefix.rstrip(".") or "one without a prefix" for prefix in prefixes)
        raise CheckpointError(
            f"{origin} holds {len(prefixes)} encoders ({named}), and {len(mine)} of them are called {which}; save the "
            "one to load as a file of its own"
        )
    (prefix,) = mine
    parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
    found: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
        elif name.startswith(tuple(parent + head for head in _HEADS)):
            found[name.removeprefix(parent)] = tensor
        else:
            left_out.append(name)
    return Chosen(found, roles[prefix], tuple(left_out))


def _role(prefix: str, *, alone: bool) -> str | None:
    """Returns which encoder a prefix names; None if it doesn't say."""
    parts = prefix.split(".")
    for which, words in _ROLES.items():
        if any(word in parts for word in words):
            return which
    return "context" if _WEAK_CONTEXT in parts and not alone else None
