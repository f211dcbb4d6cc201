"""The encoder, the predictor, and both as one module. Plain nn.Modules, independent of processes and optimisers."""

from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.layers import Block
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.registry import build_encoder, build_jepa, build_predictor, build_target
from ijepa_scale.models.vit import VisionTransformer

__all__ = [
    "JEPA", "Block", "Predictor", "VisionTransformer", "build_encoder", "build_jepa", "build_predictor", "build_target",
]  # fmt: skip
