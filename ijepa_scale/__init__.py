"""I-JEPA pretraining at scale: the same training under one process, DDP, FSDP2 and DeepSpeed ZeRO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa_scale.models.registry import build_encoder, build_predictor

__version__ = "0.1.0"
__all__ = ["__version__", "build_encoder", "build_predictor"]


def __getattr__(name: str) -> Any:
    """Returns a builder, importing torch and the models only when one is asked for."""
    if name in ("build_encoder", "build_predictor"):
        from ijepa_scale.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
