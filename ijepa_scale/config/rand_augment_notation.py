"""timm's notation of RandAugment. Knows no component."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ijepa_scale.errors import ConfigError

LEVELS = 10.0  # the magnitude at which operations are at the end of their range
_UNIFORM_STD = 100.0  # above it, magnitudes are uniform
_FIELD = re.compile(r"(mstd|mmax|m|n|p|inc)(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class RandAugmentSettings:
    """What timm's notation says."""

    magnitude: float = LEVELS
    num_layers: int = 2
    probability: float = 0.5  # that a layer does something
    magnitude_std: float = 0.0  # of normal noise on the magnitude; inf: uniform from 0 to `magnitude`
    magnitude_max: float = LEVELS  # where it is cut


def parse(text: str) -> RandAugmentSettings:
    """Returns the settings of timm's notation, such as rand-m9-mstd0.5-inc1 (fields m, n, p, mstd, mmax, inc1).

    Raises:
        ConfigError: another notation, numbers out of range, or another set of operations than the increasing one.
    """
    first, *fields = text.split("-")
    found: dict[str, float] = {}
    for field in fields:
        match = _FIELD.fullmatch(field)
        if match is None or match[1] in found:
            problem = "isn't known" if match is None else "comes twice"
            raise ConfigError(
                f"augment.rand_augment is {text!r}, of which {field!r} {problem}; give fields m, n, p, mstd, mmax "
                "and inc1, each once, e.g. rand-m9-mstd0.5-inc1"
            )
        found[match[1]] = float(match[2])
    if first != "rand" or found.get("inc") != 1:
        raise ConfigError(
            f"augment.rand_augment is {text!r}; give rand-...-inc1: only the operations that grow with the magnitude "
            "are there, e.g. rand-m9-mstd0.5-inc1"
        )
    layers, probability, highest = found.get("n", 2.0), found.get("p", 0.5), found.get("mmax", LEVELS)
    if probability > 1:
        raise ConfigError(
            f"augment.rand_augment is {text!r}, of which p{probability:g} isn't a probability; give p0 to p1"
        )
    if layers < 1 or layers % 1 or not highest:
        raise ConfigError(f"augment.rand_augment is {text!r}; give layers n1, n2, ... and an mmax above 0")
    std = found.get("mstd", 0.0)
    return RandAugmentSettings(
        magnitude=found.get("m", LEVELS),
        num_layers=int(layers),
        probability=probability,
        magnitude_std=math.inf if std > _UNIFORM_STD else std,
        magnitude_max=highest,
    )
