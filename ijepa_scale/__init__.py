"""I-JEPA pretraining at scale: the same training under one process, DDP, FSDP2 and DeepSpeed ZeRO.

From a trained run to features:

    encoder, transform = ijepa_scale.load("runs/mine")
    features = ijepa_scale.features(encoder, transform(["a.jpg", "b.jpg"]))  # (2, D)

A run in this process, or in each of a launcher's:

    result = ijepa_scale.run("configs/demo.yaml", ["optimizer.lr=1e-3"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa_scale.evaluate.frozen import features, load
    from ijepa_scale.models.registry import build_encoder, build_predictor
    from ijepa_scale.train.in_process import run

__version__ = "0.1.0"
__all__ = ["__version__", "build_encoder", "build_predictor", "features", "load", "run"]


def __getattr__(name: str) -> Any:
    """Returns a public function, importing torch and the models only when one is asked for."""
    if name in ("build_encoder", "build_predictor"):
        from ijepa_scale.models import registry

        return getattr(registry, name)
    if name in ("features", "load"):
        from ijepa_scale.evaluate import frozen

        return getattr(frozen, name)
    if name == "run":
        from ijepa_scale.train.in_process import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
