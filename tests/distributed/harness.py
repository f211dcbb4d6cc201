"""Runs a function on several gloo processes and returns their results.

A fork server imports torch, deepspeed and the package once, and each case forks from it. It starts before this process
has threads of its own, which a plain fork would inherit in a broken state.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
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
    workers, links = [], []
    for rank in range(processes):
        link, their_end = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(their_end, function, rank, processes, port, (alone, device), args), daemon=True
        )
        worker.start()
        their_end.close()  # so that a process that dies ends the wait for its answer
        workers.append(worker)
        links.append(link)
    try:
        answers = _answers(workers, links)
    finally:
        for worker, link in zip(workers, links, strict=True):
            link.close()
            if worker.is_alive():
                worker.kill()  # all have answered, or the case has failed; a clean shutdown of DeepSpeed takes seconds
            worker.join()
    failed = [text for text, _ in answers if text]
    if failed:
        raise ProcessFailed("\n".join(failed))
    return [pickle.loads(value) for _, value in answers]


def _answers(workers: list[Any], links: list[Any]) -> list[tuple[str, bytes]]:
    """Returns the error and the value of each process."""
    found = {link: (f"process {rank} hasn't answered within {TIMEOUT_S} s", b"") for rank, link in enumerate(links)}
    pending, deadline = dict(zip(links, range(len(links)), strict=True)), time.monotonic() + TIMEOUT_S
    while pending and (ready := connection.wait([*pending], max(0.0, deadline - time.monotonic()))):
        for link in ready:
            rank = pending.pop(link)
            try:
                found[link] = link.recv()  # type: ignore[union-attr]
            except EOFError:
                workers[rank].join(10)
                found[link] = (f"process {rank} ended with code {workers[rank].exitcode} and without an answer", b"")
    return [found[link] for link in links]


def _work(
    answer: Any,
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
        answer.send(("", pickle.dumps(value)))  # pickled here, so that an error of pickling is told
        stop_world()
    except BaseException:
        answer.send((f"process {rank}:\n{traceback.format_exc()}", b""))
