"""The order in which the published program numbers the parameters of its optimiser.

Source: the project's specification of the file, section 5.
"""

from __future__ import annotations

from collections.abc import Iterable

from ijepa_scale.config import ModelConfig
from ijepa_scale.models.registry import build_jepa


def published_names(model: ModelConfig) -> list[str]:
    """Returns the names of encoder and predictor in the order of the published modules, with fixed embeddings."""
    names = [name for name, _ in build_jepa(model, seed=0, device="meta").named_parameters()]
    index = names.index("predictor.mask_token") + 1
    return ["encoder.pos_embed", *names[:index], "predictor.predictor_pos_embed", *names[index:]]


def published_groups(names: Iterable[str]) -> list[list[str]]:
    """Returns the names in the four parameter groups of the published code; fixed embeddings count as weights."""
    names = list(names)
    # names suffice: norms and biases are the 1-D parameters of both modules
    small = {name for name in names if name.endswith(".bias") or "norm" in name}
    return [
        [name for name in names if name.startswith(f"{part}.") and (name in small) == one_dimensional]
        for one_dimensional in (False, True)
        for part in ("encoder", "predictor")
    ]


def published_numbers(model: ModelConfig) -> list[str]:
    """Returns the names of the parameters by their number in the published optimiser."""
    return [name for group in published_groups(published_names(model)) for name in group]
