"""Makes a GPU repeat results bit for bit, as the CPU does anyway. Must not know engines."""

from __future__ import annotations

import logging

import torch

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig
from ijepa_scale.errors import ConfigError

logger = logging.getLogger(__name__)


def make_deterministic(config: EngineConfig, device: torch.device) -> None:
    """Switches PyTorch to deterministic operations if the config says so, until the process ends.

    Call it before the first matrix product.

    Backward passes of attention and of indexing add by atomics otherwise, in an order that changes. Flash and efficient
    attention then take a slower backward; an attention kernel that can't is refused when it is tried, and any other
    operation raises an error at its first call. Inductor stops measuring where a measurement would decide how to sum.

    Raises:
        ConfigError: a part of the config has no deterministic form, or the user's CUBLAS_WORKSPACE_CONFIG isn't one.

    Source: "Reproducibility" in PyTorch's notes; "Results reproducibility" in cuBLAS's documentation.
    """
    if not config.deterministic:
        return
    if device.type != "cuda":
        logger.info("engine.deterministic is true: the %s repeats results in any case", device.type.upper())
        return
    if config.layer_norm == "apex":
        raise ConfigError(
            "engine.deterministic is true but engine.layer_norm is apex, whose kernel doesn't promise to repeat "
            "results; set engine.layer_norm=torch"
        )
    if config.attention == "cudnn":
        raise ConfigError(
            "engine.deterministic is true but engine.attention is cudnn, whose backward PyTorch doesn't run "
            "deterministically; set engine.attention=auto, flash or efficient"
        )
    environment.export_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # nothing here reads memory before it is written, and filling every new tensor would cost a pass over it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of a module
    logger.info("engine.deterministic is true: steps repeat bit for bit on the same GPUs, and take longer")
