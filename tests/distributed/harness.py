"""Runs a function on several gloo processes and returns their results.

A fork server imports torch, deepspeed and the package once, and each case forks from it. It starts before this process
has threads of its own, which a plain fork would inherit in a broken state.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ijepa_scale import environment
from ijepa_scale.engine.start import start_world, stop_world
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch

TIMEOUT_S = 240


class ProcessFailed(AssertionError):
    """A process raised an error; the message has its traceback."""


def run(
    function: Callable[..., Any], processes: int, *args: Any, alone: bool = False, device: str = "cpu"
) -> list[Any]:
    """Returns [function(world, *args) of each process], in rank order."""
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")  # CUDA can't be forked
    if device == "cpu":
        context.set_forkserver_preload(["tests.distributed.preload"])
    port = environment.free_port()
    results: multiprocessing.Queue = context.Queue()
    workers = [
        context.Process(
            target=_work, args=(results, function, rank, processes, port, (alone, device), args), daemon=True
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        answers = [results.get(timeout=TIMEOUT_S) for _ in workers]
    finally:
        for worker in workers:
            worker.kill()  # all have answered, or the case has failed; a clean shutdown of DeepSpeed takes seconds
            worker.join()
    failed = [text for _, text, _ in answers if text]
    if failed:
        raise ProcessFailed("\n".join(failed))
    return [pickle.loads(value) for _, _, value in sorted(answers, key=lambda a: a[0])]


def _work(
    results: Any,
    function: Callable[..., Any],
    rank: int,
    processes: int,
    port: int,
    where: tuple[bool, str],
    args: Any,
) -> None:
    alone, device = where
    try:
        torch.set_num_threads(1)
        chosen = torch.device(f"cuda:{rank}" if device == "cuda" else device)  # "cuda" means one GPU per process
        launch = Launch(
            rank=rank, world_size=processes, local_rank=rank, local_world_size=processes, address="127.0.0.1", port=port
        )
        world: World = start_world(launch, chosen, alone=alone)
        value = function(world, *args)
        results.put((rank, "", pickle.dumps(value)))  # pickled here, since this process ends before the value is read
        stop_world()
    except BaseException:
        results.put((rank, f"process {rank}:\n{traceback.format_exc()}", None))
