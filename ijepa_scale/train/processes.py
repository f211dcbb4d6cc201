"""Runs a launch script's function in this process, in child processes or in those of a launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from ijepa_scale import environment, stopping, terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.start import START_TIMEOUT_S, start_world, stop_world, tells_early, tells_first
from ijepa_scale.engine.world import World, choose_device
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError, UserError
from ijepa_scale.no_answer import NoAnswer
from ijepa_scale.provenance import code_facts
from ijepa_scale.registry import PLUGINS, load_plugin
from ijepa_scale.stopping import Stopped

Main = Callable[[Any, Launch, torch.device], object]


def run(main: Main, options: Any, engine: EngineConfig, *, devices: list[str] | None, processes: int | None) -> None:
    """Runs `main(options, launch, device)` in each process of the run, and exits with code 2 on a user's error.

    `devices` starts one child process per device, and `processes` the given number. Without both, this process was
    started by torchrun, deepspeed or srun, or is the only one. `main` must be importable by name.
    """
    count = len(devices) if devices else processes
    with user_errors(0):
        launch = environment.detect_launch(starts_others=count is not None)
    with user_errors(launch.rank, launch):
        if count is None:
            set_threads(launch)
            if launch.launcher != "python":
                stopping.watch_launcher()
            main(options, launch, choose_device(engine, launch))
            return
        if launch.world_size > 1:
            raise ConfigError(
                f"--devices and --processes start processes, but {launch.launcher} has started {launch.world_size} "
                "already; drop the flag or the launcher"
            )
        if devices and processes not in (None, len(devices)):
            raise ConfigError(f"--processes is {processes} but --devices names {len(devices)}; give one of the flags")
        twice = sorted({name for name in devices or () if name.startswith("cuda") and (devices or []).count(name) > 1})
        if twice:
            raise ConfigError(f"--devices names {', '.join(twice)} twice; give each process its own GPU")
        if count < 1:
            raise ConfigError(f"--processes is {count}; give at least 1")
    port = environment.free_port()
    environment.default_threads(count)
    named: list[str | None] = [*devices] if devices else [None] * count
    children: list[Any] = []
    try:
        with stopping.passing_on(lambda: [child.pid for child in children if child.is_alive()]) as pass_early:
            started = multiprocessing.spawn(
                _child, (PLUGINS, main, options, engine, named, port), nprocs=count, join=False
            )
            children += started.processes
            pass_early()
            while not started.join():
                pass
    except multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)  # as a shell reports a signal


def _child(
    rank: int, plugins: list[str], main: Main, options: Any, engine: EngineConfig, devices: list[str | None], port: int
) -> None:
    count = len(devices)
    launch = Launch(
        rank=rank, world_size=count, local_rank=rank, local_world_size=count, address="127.0.0.1", port=port
    )
    stopping.watch_launcher()
    with terminal.printing(), user_errors(rank, launch):
        for module in plugins:
            load_plugin(module)
        set_threads(launch)
        main(options, launch, choose_device(engine, launch, devices[rank]))


def set_threads(launch: Launch) -> None:
    """Gives each process its share of the cores, since PyTorch would use all cores in each."""
    if launch.local_world_size > 1 and environment.threads() is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // launch.local_world_size))


@contextlib.contextmanager
def world_of(
    launch: Launch,
    device: torch.device,
    *,
    alone: bool,
    timeout_s: float = START_TIMEOUT_S,
    facts: Mapping[str, str] | None = None,
) -> Iterator[World]:
    """Yields the world and stops it at the end. Not after an error, since others may wait in a collective.

    A process group that another program has made is left to it.

    `timeout_s` and `facts` are those of `start_world`. An error of the user that several processes raise is told once.
    """
    facts = {**code_facts(), **(facts or {})} if launch.world_size > 1 else None
    try:
        world = start_world(launch, device, alone=alone, timeout_s=timeout_s, facts=facts)
    except UserError as error:
        error.is_told = bool(error.is_told)  # each process tells what only it can know, such as that it meets nobody
        raise
    try:
        yield world
    except UserError as error:
        error.is_told = not tells_first(world, error)
        raise
    stop_world()


@contextlib.contextmanager
def user_errors(rank: int, launch: Launch | None = None) -> Iterator[None]:
    """Prints a `UserError`, or an error of the file system, without a traceback, and exits with its code.

    A run that was asked to stop exits with 75, which says that it is to be started again, and after Ctrl-C before it
    listens to signals with 130. With `launch`, an error that several processes raise before they meet is told once.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it, and the process that started this one too
        if rank == 0:
            terminal.report("interrupted", "")
        sys.exit(terminal.INTERRUPTED_CODE)
    except Stopped as stopped:
        if rank == 0:
            terminal.report(stopped, "stopped")
        sys.exit(terminal.RESUBMIT_CODE)
    except UserError as error:
        if error.is_told is None and launch is not None:
            error.is_told = not tells_early(launch, error)
        if not error.is_told:
            terminal.report(error, f"error (process {rank})")
        if isinstance(error.__cause__, NoAnswer):  # Python aborts at its end if the thread that waits wakes up then
            sys.stdout.flush()
            os._exit(terminal.code_of(error))
        sys.exit(terminal.code_of(error))
    except OSError as error:
        if (problem := terminal.file_problem(error)) is None:
            raise
        terminal.report(f"{problem}; earlier checkpoints are intact", f"error (process {rank})")
        sys.exit(terminal.USER_ERROR_CODE)
