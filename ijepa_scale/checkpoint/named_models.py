"""Fetches encoders by name through the loaders of timm and transformers, where these are installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ijepa_scale.checkpoint.facts import Facts, facts_of_timm, facts_of_transformers
from ijepa_scale.errors import CheckpointError

TIMM, TRANSFORMERS = "timm:", "transformers:"


def as_named(source: str | Path) -> str | None:
    """Returns a source that is no path as `timm:NAME` or `transformers:NAME`; None if it is to be read from disk.

    Without a prefix, a name that timm knows is timm's, and `OWNER/NAME` is on the hub, unless there is a folder OWNER.
    """
    text = str(source)
    if text.startswith((TIMM, TRANSFORMERS)):
        return text
    path = Path(source)
    if os.path.lexists(source) or path.suffix in (".pth", ".tar", ".pt", ".bin", ".ckpt", ".safetensors", ".json"):
        return None
    if len(path.parts) == 2 and path.parts[0] not in ("/", "..", "~") and not os.path.lexists(path.parent):
        return f"{TRANSFORMERS}{text}"
    if len(path.parts) == 1 and text.startswith("vit_"):
        import timm  # takes seconds, and is only needed here

        return f"{TIMM}{text}" if timm.is_model(text.partition(".")[0]) else None
    return None


def fetch(name: str) -> tuple[dict[str, Tensor], Facts]:
    """Returns the tensors and facts of `timm:NAME` or `transformers:NAME`, downloaded unless they are in its cache.

    Raises:
        CheckpointError: the name is unknown, or the weights can't be fetched.
    """
    return _from_timm(name.removeprefix(TIMM)) if name.startswith(TIMM) else _from_transformers(name)


def _from_timm(name: str) -> tuple[dict[str, Tensor], Facts]:
    import timm  # takes seconds, and is only needed here

    on_hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    known = timm.is_model(name.partition(".")[0])
    if not on_hub and (not known or not getattr(timm.get_pretrained_cfg(name), "has_weights", False)):
        available = ", ".join(timm.list_models("*ijepa*", pretrained=True))
        alone = f"; it is a folder here: give it without {TIMM}" if os.path.isdir(name) else ""
        raise CheckpointError(
            f"timm {timm.__version__} has no weights of {name!r}; those of I-JEPA are {available}{alone}"
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError) as error:  # no network, no such weights
        raise CheckpointError(
            f"timm can't download the weights of {name} ({error}); download them on another machine and give the file"
        ) from error
    return dict(model.state_dict()), facts_of_timm(model)


def _from_transformers(name: str) -> tuple[dict[str, Tensor], Facts]:
    place = name.removeprefix(TRANSFORMERS)
    remedy = f"give a local file or folder if {place} is one; or download it on another machine and give the folder"
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(f"{place} isn't there, and transformers, which could fetch it, isn't installed; {remedy}")
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        model = AutoModel.from_pretrained(place)
        found: Any = ImageProcessingMixin.get_image_processor_dict(place)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers can't load {place} ({reason}); {remedy}") from None
    return dict(model.state_dict()), facts_of_transformers(model.config.to_dict(), found[0], place)
