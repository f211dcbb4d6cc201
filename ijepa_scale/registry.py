"""Registries of the components that a configuration can name. Must not import any component by itself.

To add a component to the package, write its file and add one line to a table below. A component from outside registers
itself when its module is imported. That happens only if a person names the module on the command line (`--plugin`):
configurations and checkpoints hold names, and can't run code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ijepa_scale.errors import ConfigError


class Registry:
    """Classes of one kind by name. A class may have `Config`, the class of its section in the configuration."""

    def __init__(self, kind: str, built_in: dict[str, str]) -> None:
        """`built_in` maps names to "module:Class". `get` imports the module."""
        self.kind = kind
        self._built_in = built_in
        self._added: dict[str, type] = {}

    def names(self) -> tuple[str, ...]:
        """Returns the registered names, those of the package first."""
        return *self._built_in, *self._added

    def register(self, name: str) -> Callable[[type], type]:
        """Returns a decorator that adds a class under `name`.

        Raises:
            ConfigError: another class has this name.
        """

        def add(member: type) -> type:
            known = self._added.get(name)
            same = known is not None and (known.__module__, known.__qualname__) == (
                member.__module__,
                member.__qualname__,
            )
            if name in self._built_in or (known is not None and not same):
                raise ConfigError(f"{self.kind} {name!r} is already registered; give {member.__name__} another name")
            self._added[name] = member
            return member

        return add

    def get(self, name: str) -> Any:
        """Returns the class registered under `name`.

        Raises:
            ConfigError: the name is unknown.
        """
        if name in self._added:
            return self._added[name]
        if name not in self._built_in:
            raise ConfigError(
                f"{self.kind} {name!r} is unknown; choose one of {', '.join(self.names())}, or name the module that "
                "registers it with --plugin"
            )
        module, _, member = self._built_in[name].partition(":")
        return getattr(importlib.import_module(module), member)


OBJECTIVES = Registry(
    "objective",
    {
        "smooth_l1": "ijepa_scale.objectives.regression:Regression",
        "l2": "ijepa_scale.objectives.regression:Regression",
        "cosine": "ijepa_scale.objectives.cosine:Cosine",
    },
)
SAMPLERS = Registry(
    "mask sampler",
    {
        "multiblock": "ijepa_scale.masks.multiblock:MultiblockDraw",
        "reference": "ijepa_scale.masks.reference:ReferenceDraw",
        "random": "ijepa_scale.masks.random_patches:RandomDraw",
    },
)
OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "ijepa_scale.optim.adamw:AdamW",
        "lars": "ijepa_scale.optim.lars:Lars",
    },
)
SOURCES = Registry(
    "reader",
    {
        "shards": "ijepa_scale.data.sources.readers:read_shards",
        "stream": "ijepa_scale.data.sources.readers:read_stream",
        "imagefolder": "ijepa_scale.data.sources.readers:read_folder",
        "list": "ijepa_scale.data.sources.readers:read_list",
        "synthetic": "ijepa_scale.data.sources.readers:read_synthetic",
    },
)
SINKS = Registry(
    "metrics sink",
    {
        "wandb": "ijepa_scale.metrics.wandb_sink:WandbSink",
        "mlflow": "ijepa_scale.metrics.mlflow_sink:MlflowSink",
    },
)
EVALUATORS = Registry("evaluator", {"knn": "ijepa_scale.evaluate.online:OnlineKnn"})
PLUGINS: list[str] = []  # modules named with --plugin, in order; run.json records them


def load_plugin(module: str) -> None:
    """Imports a module of the user, which registers its components.

    Raises:
        ConfigError: there is no such module.
    """
    try:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ModuleNotFoundError(name=module)
        importlib.import_module(module)
        PLUGINS.extend({module} - {*PLUGINS})
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise ConfigError(
            f"--plugin {module}: no such module; give a name that Python can import, e.g. with its folder in PYTHONPATH"
        ) from None
