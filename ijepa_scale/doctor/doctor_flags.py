"""The flags of `launch/doctor.py`, and what they ask for."""

from __future__ import annotations

import argparse

import torch

from ijepa_scale import terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.config.schema import RunConfig
from ijepa_scale.doctor.decoding import Config
from ijepa_scale.doctor.examination import DoctorOptions
from ijepa_scale.planning.reading import read_planned


def add_flags(parser: terminal.Parser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--config", "--fname", type=terminal.path, help="YAML file of the run to be started; tells folders and needs")
    add("--folder", type=terminal.path, help="folder of the run (default: the configuration's, or runs)")
    add("--data", type=terminal.path, help="training images, as in data.train (default: the configuration's)")
    add("--need", type=terminal.above_0, help="images/s that each process needs (default: by the plan, on known GPUs)")
    add("--json", type=terminal.path, help="file to write all findings to")
    add("--processes", type=terminal.at_least_1, help="number of processes to start on this host")
    add("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_plugins()
    add("overrides", nargs="*", help="dotted settings, e.g. data.workers=8")


def options_of(flags: argparse.Namespace) -> tuple[DoctorOptions, EngineConfig, list[str] | None]:
    """Returns what to check, the engine's settings, and the devices to start processes on.

    Raises:
        ConfigError: the configuration is wrong.
        SystemExit: overrides without a configuration.
    """
    named = flags.devices or []
    overrides = flags.overrides + [word for word in named if "=" in word]  # --devices also takes the settings after it
    devices = [word for word in named if "=" not in word] or None
    config: Config | None = None
    if flags.config is not None:
        config = read_planned(flags.config, overrides)
    elif overrides:
        terminal.Parser().error(f"{overrides[0]} changes a configuration, and none is named; give --config")
    folder = flags.folder or (config.folder if isinstance(config, RunConfig) else "runs")
    data = flags.data or (config.data.train if config is not None and config.data.reader != "synthetic" else None)
    options = DoctorOptions(folder=folder, data=data, config=config, need=flags.need, json=flags.json)
    engine = config.engine if config is not None else EngineConfig()
    if devices is None and not torch.cuda.is_available():
        engine = engine.replace(device="cpu")  # a GPU that can't be used is a line of the table, and ends nothing
    return options, engine, devices
