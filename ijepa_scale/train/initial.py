"""What a run takes from the source of its first weights: sizes, positions, normalisation. Must not know any step."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from ijepa_scale.checkpoint.geometry import Positions, positions_of, sizes_of_weights
from ijepa_scale.checkpoint.sources import RunSource, WeightsSource, open_source
from ijepa_scale.checkpoint.start import predictor_sizes
from ijepa_scale.checkpoint.store import Checkpoint, newest_readable
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.train.setup import encoder_of

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

logger = logging.getLogger(__name__)

STARTING = ("init", "init_positions", "init_state", "weights", "keep_head")  # settings that only a new run reads
_OVERRIDES = ("width", "depth", "heads", "mlp_ratio")  # of a named architecture
_NORMALISATION = ("mean", "std")
_RGB = 3


def with_init(config: Config) -> Config:
    """Returns the configuration with what it leaves open about the encoder and its images taken from `model.init`.

    That is every size that no file or override sets, `data.pixels`, `augment.mean` and `augment.std`. A run that goes
    on takes them from its newest checkpoint, and doesn't read the source again. Logs what is taken.

    Raises:
        UserError: the source can't be read, doesn't tell a size, or sizes don't fit.
    """
    init = config.model.init
    section = encoder_of(config)
    given, images_given = section.model_fields_set, config.augment.model_fields_set
    if init is None or (type(section).model_fields.keys() <= given and set(_NORMALISATION) <= images_given):
        return config
    newer = newest_readable(Path(config.folder) / "checkpoints")
    resume = newer if config.resume in ("auto", "none") else Path(config.resume)
    trained: Positions | None = None
    if resume is not None:
        found = _of_checkpoint(resume)
    else:
        found, trained = _of_source(open_source(init), config)
    if "name" in given:
        found = {name: value for name, value in found.items() if name not in _OVERRIDES}
    lacking = [name for name in ("image_size", "heads") if name not in found and name not in given]
    if lacking and not (lacking == ["heads"] and "name" in given):
        raise ConfigError(
            f"model.init={init} doesn't state the {lacking[0]} of its encoder; set {section.at}.{lacking[0]}"
        )
    taken = {n: v for n, v in found.items() if n in type(section).model_fields and n not in given}
    section = section.replace(**taken)
    channels = getattr(section, "channels", _RGB)
    images = {
        name: found[name]
        for name in _NORMALISATION
        if name not in images_given and len(found.get(name) or ()) == channels  # other channels have other statistics
    }
    interpolated = config.model.init_positions == "interpolated" and "position_grid" not in given
    if trained is not None and interpolated and trained.computed_for != section.grid:
        taken["position_grid"] = trained.computed_for
        section = section.replace(position_grid=trained.computed_for)
    is_open = "pixels" not in config.data.model_fields_set and found.get("pixels", config.data.pixels)
    pixels = {"pixels": found["pixels"]} if is_open and is_open != config.data.pixels else {}
    if taken or images or pixels:
        shown = ", ".join(f"{name} {value}" for name, value in {**taken, **images, **pixels}.items())
        logger.info("taken from %s: %s", resume or init, shown)
    model = section if isinstance(config, PretrainConfig) else config.model.replace(encoder=section)
    data, augment = config.data.replace(**pixels), config.augment.replace(**images)
    return config.replace(model=model, data=data, augment=augment)


def with_init_to_plan(config: Config) -> Config:
    """Returns the configuration as `with_init` does, but fetches nothing: planning needs no weights.

    Without them, sizes are those of the configuration, which is logged.

    Raises:
        UserError: see `with_init`; or the source isn't there, and the configuration doesn't name the architecture.
    """
    init, section = config.model.init, encoder_of(config)
    if init is None or os.path.exists(init) or newest_readable(Path(config.folder) / "checkpoints") is not None:
        return with_init(config)
    if "name" not in section.model_fields_set:
        raise ConfigError(f"model.init={init} isn't on this machine, and tells the sizes; set {section.at}.name")
    logger.warning("model.init=%s isn't on this machine: all sizes are taken from the configuration", init)
    return config


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the encoder's settings in a checkpoint's configuration, and the normalisation of its images."""
    stored = Checkpoint(path).extra["config"]
    encoder = stored["model"].get("encoder", stored["model"])
    settings = {name: value for name, value in encoder.items() if name not in STARTING}
    images = {name: stored["augment"][name] for name in _NORMALISATION}
    return settings | images | {"pixels": stored.get("data", {}).get("pixels", "uint8")}


def _of_source(
    source: WeightsSource, config: PretrainConfig | FinetuneConfig
) -> tuple[dict[str, Any], Positions | None]:
    """Returns the sizes in a source and the normalisation of its images, and what its positions are."""
    which = (
        config.model.weights if isinstance(config, FinetuneConfig) else source.roles[0] if source.roles else "target"
    )
    weights = source.encoder(which)
    found = sizes_of_weights(weights)
    if isinstance(source, RunSource):
        found["name"] = source.model_config().name  # of several with these sizes
    if isinstance(config, PretrainConfig) and (predictor := source.predictor()) is not None:
        found |= predictor_sizes(predictor)
    stated = {name: getattr(weights.facts, name) for name in (*_NORMALISATION, "pixels")}
    return found | {name: value for name, value in stated.items() if value is not None}, positions_of(weights)
