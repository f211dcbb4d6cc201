"""Runs the command line of the training scripts. Must not know any kind of training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ijepa_scale import environment, terminal
from ijepa_scale.config import read_config, to_yaml
from ijepa_scale.config.manual import help_text
from ijepa_scale.environment import Launch
from ijepa_scale.train import processes
from ijepa_scale.train.demo_files import check_made
from ijepa_scale.train.facts import facts_of
from ijepa_scale.train.initial import with_init
from ijepa_scale.train.loop import run_task
from ijepa_scale.train.own_images import choose_settings
from ijepa_scale.train.setup import with_strategy
from ijepa_scale.train.task import Result, Task

logger = logging.getLogger(__name__)


def launch(description: str, kind: type[Task]) -> None:
    """Reads flags and configuration, and trains in each process of the run. Print flags print and exit."""
    with terminal.printing():
        _launch(_parse(description), kind)


def _launch(flags: argparse.Namespace, kind: type[Task]) -> None:
    only_prints = flags.print_config or flags.help_config is not None
    started_here = flags.devices is not None or flags.processes is not None
    with processes.user_errors(0):
        launch = environment.detect_launch(starts_others=started_here or only_prints)
    with processes.user_errors(launch.rank, launch):
        if flags.help_config is not None:
            print(help_text(kind.config_kind, flags.help_config))
            return
        choose = partial(choose_for_processes, flags)
        loaded = read_config(flags.config, flags.overrides, kind=kind.config_kind, choose=choose)
    if flags.print_config:
        terminal.say(*(f"# {note}" for note in loaded.notes))
        print(to_yaml(loaded.config))
        return
    with processes.user_errors(0):
        check_made(loaded.config)
    main = partial(train_here, kind, loaded.notes)
    processes.run(main, loaded.config, loaded.config.engine, devices=flags.devices, processes=flags.processes)


def train_here(kind: type[Task], notes: list[str], config: Any, launch: Launch, device: torch.device) -> Result:
    """Trains in this process, of the run, and returns the result, which the main process prints."""
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    terminal.log_to_terminal(level, f"[{launch.rank}] %(name)s: %(message)s")
    for note in notes:  # what was renamed, or left out of a published file
        logger.info("%s", note)
    for line in getattr(config, "chosen_by_recipe", ()):
        logger.info("chosen: %s", line)
    config = with_strategy(with_init(config), launch, device)
    with processes.world_of(
        launch,
        device,
        alone=config.engine.strategy == "plain",
        timeout_s=config.engine.start_timeout,
        facts=facts_of(config),
    ) as world:
        if getattr(config, "chosen_by_recipe", ()):
            config = world.broadcast_object(config)  # hosts may differ, and process 0 decides
        result = run_task(kind, config, world)
        if world.is_main:
            terminal.say(result.text(), *(f"  {command}" for command in result.next_commands()))
    return result


def choose_for_processes(flags: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the recipe of a configuration chooses for the processes of this run."""
    count = len(flags.devices) if flags.devices else flags.processes
    launch = environment.detect_launch(starts_others=count is not None)
    if count is not None:
        launch = Launch(world_size=count, local_world_size=count)
    engine = given.get("engine")
    named = engine.get("device", "auto") if isinstance(engine, Mapping) else "auto"
    device = flags.devices[0] if flags.devices else named
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_settings(given, launch, device)


def _parse(description: str) -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = terminal.Parser(description=description)
    config_help = "YAML file of this package, or one of the published code"
    parser.add_argument("--config", "--fname", type=terminal.path, help=config_help)
    parser.add_argument("--help-config", nargs="?", const="", metavar="SECTION", help="explain the settings and exit")
    parser.add_plugins()
    parser.add_argument("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    parser.add_argument("--processes", type=int, help="number of processes to start on this host")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_local_rank()
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. optimizer.lr=1e-3 data.workers=8")
    flags = parser.parse_intermixed_args()
    if flags.config is None and flags.help_config is None:
        parser.error("--config is missing; name a YAML file, such as configs/demo.yaml")
    flags.overrides += [
        word for word in flags.devices or () if "=" in word
    ]  # --devices also takes the settings after it
    flags.devices = [word for word in flags.devices or () if "=" not in word] or None
    return flags
