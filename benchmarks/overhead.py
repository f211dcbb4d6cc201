"""Question: what do watching and checking a run cost in each step: less than 0.5% of it?

python -m benchmarks.overhead [--model vit_small] [--batch 8] [--steps N] [--to FILE] [section.key=value ...]
torchrun --standalone --nproc-per-node 2 -m benchmarks.overhead ...

Each part is measured alone, in the CPU time of this process, as the difference between many calls with it and as many
without, which take turns: in whole steps it would be lost in the noise. What isn't done in each step is divided by the
steps between (`logging.every`, `checkpoint.every`), and the watchdog's threads by the time. The baseline is a training
step in the same run. Exits with 1 if the parts are 0.5% of it or more.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, append, in_turns, percentiles, table
from benchmarks.synthetic import Ours, add_model_flags, batch_of, configured, images_for, settings_of, start
from ijepa_scale import environment
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.spikes import SpikesConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.replicas import check_replicas
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.start import start_world, stop_world
from ijepa_scale.engine.world import World
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.train.link_watch import LinkWatch
from ijepa_scale.train.watchdog import Watchdog

MOST = 0.005  # of a step
_ROUNDS, _CALLS = 15, 200
_TICKS_S, _BEATS_S = 5.0, 10.0
Work = Callable[[], Any]


def cost_of(with_it: Work, without: Work, *, rounds: int = _ROUNDS, calls: int = _CALLS) -> dict[str, float]:
    """Returns the percentiles of what a call with it takes more, in ms of CPU time, round by round."""

    def repeated(work: Work) -> Callable[[int], None]:
        def run(_: int) -> None:
            for _ in range(calls):
                work()

        return run

    seconds = in_turns({"with": repeated(with_it), "without": repeated(without)}, rounds)
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    return percentiles([1e3 * (more - less) / calls for more, less in pairs])


def heartbeat(world: World) -> dict[str, float]:
    """Returns the cost of saying what the main thread does and of timing it, over a bare loop, per step."""
    meters, batch = Meters(world.device), batch_of(0, 1)
    dog = Watchdog(Path(), world, 600.0)

    def watched() -> None:
        for _ in meters.timed(dog.batches(_repeated(batch))):
            meters.own_time.end()

    def bare() -> None:
        for _ in _repeated(batch):
            pass

    found = cost_of(watched, bare, calls=1)
    return {name: value / _CALLS for name, value in found.items()}


def _repeated(batch: Batch) -> Iterator[Batch]:
    return iter([batch] * _CALLS)


def threads(world: World, timeout_s: float) -> dict[str, float]:
    """Returns the cost of the watchdog's threads in ms per second: as often as they look at `timeout_s`."""
    world = dataclasses.replace(world, rank=0, size=1)  # otherwise the processes would look for each other
    with tempfile.TemporaryDirectory() as folder:
        seldom, often = Watchdog(Path(folder), world, timeout_s), Watchdog(Path(folder), world, 1.0)
        seconds = _seconds_of(often, _TICKS_S)
    looks = _TICKS_S / often.tick_s
    return dict.fromkeys(("p20", "p50", "p80"), 1e3 * seconds / looks / seldom.tick_s)


def _seconds_of(watch: Watchdog | LinkWatch, duration_s: float) -> float:
    """Returns the CPU seconds that the threads of a watch take in this time."""
    begin = time.process_time()
    time.sleep(duration_s)
    idle_s = time.process_time() - begin
    with watch.watching():
        begin = time.process_time()
        time.sleep(duration_s)
        busy_s = time.process_time() - begin
    return max(0.0, busy_s - idle_s)


def links(world: World, timeout_s: float) -> dict[str, float]:
    """Returns the cost of the threads that say and hear that processes are there, in ms per second.

    It is that of the process with the most. All they do is done once per beat, so it is measured with more beats.
    """
    watch, often = LinkWatch(world, timeout_s), LinkWatch(world, 5.0)
    world.barrier()
    most_s = max(map(float, world.gather_objects(_seconds_of(often, _BEATS_S))))
    return dict.fromkeys(("p20", "p50", "p80"), 1e3 * most_s / _BEATS_S * often.interval_s / watch.interval_s)


def agreement(world: World) -> dict[str, float]:
    """Returns the cost of agreeing on whether to stop, by one more number in a gather, and of judging spikes."""
    watch, values = FiniteWatch(world), [torch.tensor(0.5), torch.tensor(1.0)]
    watch.judge = SpikeJudge(SpikesConfig())

    def without() -> None:
        rows = world.gather(torch.stack(values)).tolist()
        assert all(value - value == 0.0 for row in rows for value in row)

    return cost_of(lambda: watch.check(0, *values), without)


def row(world: World) -> dict[str, float]:
    """Returns the cost of a row's columns of the slowest process."""
    meters = Meters(world.device)

    def flush(*gather: Any) -> None:
        meters.count_step(loss=0.5, grad_norm=1.0)
        meters.flush(world.mean, *gather)

    return cost_of(lambda: flush(world.gather), flush)


def replicas(ours: Ours, world: World) -> dict[str, float]:
    """Returns the cost of comparing the copies of the state, once."""
    return cost_of(lambda: check_replicas(ours.engine.pieces(working=True), world), lambda: None, rounds=5, calls=1)


def measure(config: PretrainConfig, world: World, steps: int) -> list[tuple[str, dict[str, float], float]]:
    """Returns for the step and for each part its name, the ms of one time, and the times per step."""
    count = (config.data.batch_size or 0) // world.size
    ours = Ours(config, start(config), images_for(config, count, world.device, first=world.rank * count), world=world)
    step = percentiles([1e3 * seconds for seconds in in_turns({"step": ours}, steps)["step"]])
    timeout_s = config.engine.hang_timeout
    return [
        ("step", step, 1.0),
        ("heartbeat and own time", heartbeat(world), 1.0),
        ("the watchdog's threads, per second", threads(world, timeout_s), step["p50"] / 1e3),
        ("the threads that watch links, per second", links(world, config.engine.link_timeout), step["p50"] / 1e3),
        ("agreement on stopping, and spikes", agreement(world), 1.0),
        ("slowest process in a row", row(world), 1 / config.logging.every),
        ("comparing copies of the state", replicas(ours, world), 1 / config.checkpoint.every),
    ]


def main() -> None:
    """Prints a row for each part and their sum as shares of a step, and exits with 1 if that is too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--steps", type=int, default=10, help="steps of the baseline")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    launch = environment.detect_launch()
    device = torch.device("cpu")
    world = start_world(launch, device, alone=True)
    options.batch *= world.size
    strategy = [] if world.size == 1 else ["engine.strategy=ddp"]
    options.overrides = [*strategy, *options.overrides]
    config = configured(settings_of(options, "fp32"))
    (_, step, _), *parts = found = measure(config, world, options.steps)
    shares = [cost["p50"] * times / step["p50"] for _, cost, times in parts]
    about = {"benchmark": "overhead", "model": options.model, "batch": options.batch, "processes": world.size}
    if world.is_main:
        for (name, cost, times), share in zip(found, [1.0, *shares], strict=True):
            line: Row = {**about, "what": name, "unit": "CPU ms", **cost, "times_per_step": times, "share": share}
            append(options.to, line)
        lines = [
            [name, f"{cost['p50']:.4f} ({cost['p20']:.4f} to {cost['p80']:.4f})", f"{times:.4g}", f"{share:.4%}"]
            for (name, cost, times), share in zip(found, [1.0, *shares], strict=True)
        ]
        print(table(["what", "CPU ms", "times per step", "share of a step"], lines))
        print(f"in all {sum(shares):.3%} of a step of {world.size} x {options.batch // world.size} images")
    world.barrier()
    stop_world()
    sys.exit(0 if sum(shares) < MOST else 1)


if __name__ == "__main__":
    main()
