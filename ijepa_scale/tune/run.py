"""Tunes a configuration from beginning to end. The only module that knows both the processes and the search."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa_scale import environment
from ijepa_scale.config import PretrainConfig, read_config
from ijepa_scale.errors import ConfigError
from ijepa_scale.registry import PLUGINS
from ijepa_scale.shipped import folder as shipped_folder
from ijepa_scale.train.initial import with_init
from ijepa_scale.tune import worst
from ijepa_scale.tune.children import Children, Outcome
from ijepa_scale.tune.loader_workers import Workers, choose_workers, counts
from ijepa_scale.tune.machine import Machine
from ijepa_scale.tune.overrides import as_arguments, overrides_of, write_overrides
from ijepa_scale.tune.probe import LoaderJob, StepJob, describe_machine, machine_of, measure_loader, measure_steps
from ijepa_scale.tune.ranking import Measurement
from ijepa_scale.tune.report import found_text, head_text, workers_text
from ijepa_scale.tune.search import SKIPPABLE, Budget, Search
from ijepa_scale.tune.space import Candidate, Space

FILE = "tuned.yaml"
STAGES = (*SKIPPABLE, "workers")  # the stages that --skip accepts
_START_S = 120.0  # time limit for a child to describe the machine, and for a loader to deliver its first batch
_LOADER_S = 5.0  # time for measuring a loader


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to tune; the fields are launch/tune.py's flags."""

    to: str | None = None  # file to write; None means tuned.yaml in the run's folder
    devices: list[str] | None = None
    processes: int | None = None
    minutes: float = 20.0
    candidate_minutes: float = 5.0
    limit: int = 40
    steps: int = 8
    warmup: int = 3
    memory: float | None = None  # GB per process; None means the device's memory
    worst: str = "possible"
    skip: list[str] | None = None
    logs: str | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, low in {"processes": 1, "limit": 1, "warmup": 1, "steps": 3}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                problems.append(f"{name} is {value}; give at least {low}")
        words = [("worst", self.worst, worst.KINDS), *(("skip", stage, STAGES) for stage in self.skip or ())]
        for name, word, choices in words:
            if word not in choices:
                problems.append(f"{name} is {word!r}; choose one of {', '.join(choices)}")
        for name in ("minutes", "candidate_minutes", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} is {value:g}; give a number above 0")
        if self.devices and self.processes not in (None, len(self.devices)):
            problems.append(f"processes is {self.processes} but --devices names {len(self.devices)}; give one of them")
        twice = {
            name for name in self.devices or () if name.startswith("cuda") and (self.devices or []).count(name) > 1
        }
        if twice:
            problems.append(f"devices names {', '.join(sorted(twice))} twice; give each GPU to one process only")
        if problems:
            raise ConfigError(*(f"--{problem.replace('_', '-', 1)}" for problem in problems))

    @property
    def count(self) -> int:
        """The number of processes of each candidate."""
        return len(self.devices) if self.devices else self.processes or 1


def tune(path: str, overrides: Sequence[str], options: Options, say: Callable[[str], None] = print) -> Path:
    """Searches for the fastest settings and returns the file they were written to. Reports its progress with `say`.

    Raises:
        ConfigError: the configuration can't be run on this machine, or no candidate ran.
    """
    launch = environment.detect_launch(starts_others=True)
    if launch.world_size > 1:
        raise ConfigError(
            f"tuning starts its own processes, but {launch.launcher} has started {launch.world_size}; "
            "start it once with python, and give --processes or --devices"
        )
    config = with_init(read_config(path, overrides).config)
    children = Children(None if options.logs is None else Path(options.logs))
    tuning = _Tuning(config, options, children, say)
    try:
        tuning.search.run()
    except KeyboardInterrupt:
        say(found_text(tuning.space, tuning.search.found, tuning.search.winner, {}))
        raise
    return tuning.finish(Path(path))


class _Tuning:
    """One tuning run: the search, then the measurement of workers, then the file."""

    def __init__(
        self, config: PretrainConfig, options: Options, children: Children, say: Callable[[str], None]
    ) -> None:
        self._options, self._children, self._say = options, children, say
        machine = self._machine(config)
        size = config.data.batch_size or (config.data.batch_size_per_process or 1) * machine.processes
        lengths = worst.longest(options.worst, config.masks, config.model.grid, batch_size=size, seed=config.seed)
        self.space = Space(config, machine, lengths, _relative(shipped_folder("ds_configs")))
        say(head_text(self.space))
        budget = Budget(
            seconds=60 * options.minutes,
            candidate_seconds=60 * options.candidate_minutes,
            candidates=options.limit,
            skip=tuple(options.skip or ()),
        )
        self.search = Search(self.space, self._probe, budget, say=say)

    def _machine(self, config: PretrainConfig) -> Machine:
        asked = (config, self._options.devices, self._options.count)
        outcome = self._children.run(describe_machine, asked, limit_s=_START_S)
        if outcome.kind != "done":
            raise ConfigError(f"can't detect the machine: {outcome.reason}")
        machine = machine_of(outcome.values[0])
        memory = self._options.memory
        return machine if memory is None else dataclasses.replace(machine, memory_bytes=1e9 * memory)

    def _probe(self, candidate: Candidate, limit_s: float) -> Outcome:
        return self._steps(self.space.config_of(candidate), limit_s)

    def _steps(self, config: PretrainConfig, limit_s: float, *, loader: bool = False) -> Outcome:
        options = self._options
        job = StepJob(
            config=config,
            devices=tuple(options.devices) if options.devices else None,
            warmup=options.warmup,
            steps=options.steps,
            worst=self.space.worst,
            loader=loader,
        )
        return self._children.run(measure_steps, job, processes=options.count, limit_s=limit_s)

    def finish(self, path: Path) -> Path:
        """Measures workers for the winner, writes the file and returns it."""
        best, space, found = self.search.winner, self.space, self.search.found
        if best is None:
            self._say(found_text(space, found, None, {}))
            raise ConfigError(
                "no candidate ran, so nothing is written; the reasons are listed above, and --logs FOLDER keeps the "
                "output of each candidate"
            )
        workers = self._workers(best)
        tuned = space.config_of(best.candidate)
        wait: dict[str, float] = {}
        if workers.chosen is not None:
            tuned = tuned.replace(data=tuned.data.replace(workers=workers.chosen))
            self._with_loader(best, tuned, wait)
        self._say("\n" + found_text(space, found, best, wait) + "\n\n" + workers_text(workers))
        also = ("data.workers",) if workers.chosen is not None else ()
        settings = overrides_of(path, tuned, also=also)
        to = Path(self._options.to or Path(space.config.folder) / FILE)
        replaced = ", which is replaced" if to.exists() else ""
        write_overrides(to, path, settings, tuned, self._notes(best))
        self._say(
            f"\nwinner     {best.candidate.label}\n"
            f"written    {to}{replaced}: python launch/pretrain.py --config {to}{self._flags()}\n"
            f"or paste   {as_arguments(settings)}"
        )
        return to

    def _with_loader(self, best: Measurement, tuned: PretrainConfig, wait: dict[str, float]) -> None:
        """Runs the winner once on the configuration's images, and stores the median data wait in `wait`, ms."""
        space, found = self.space, self.search.found
        outcome = self._steps(tuned, 60 * self._options.candidate_minutes, loader=True)
        label = f"the winner with {tuned.data.workers} workers"
        if outcome.kind != "done":
            found.failed[label] = outcome.reason
            return
        real = Measurement.of(best.candidate, space.batch_size, outcome.values)
        wait[best.candidate.label] = 1e3 * float(np.median(real.wait_s))
        if real.worst_bytes > space.machine.room:
            found.failed[label] = (
                f"takes {real.worst_bytes / 1e9:.2f} GB of {space.machine.room / 1e9:.2f} GB that a process may take; "
                "raise engine.accumulation or lower data.prefetch"
            )

    def _workers(self, best: Measurement) -> Workers:
        """Measures how many workers the winner needs, if the configuration names data."""
        config, machine = self.space.config, self.space.machine
        if "workers" in (self._options.skip or ()):
            return Workers(reason="--skip")
        if config.data.reader != "synthetic" and config.data.train is None:
            return Workers(reason="data.train isn't set")

        def measure(count: int) -> Outcome:
            data = config.data.replace(workers=count)
            job = LoaderJob(config=config.replace(data=data), seconds=_LOADER_S)
            return self._children.run(
                measure_loader,
                job,
                processes=machine.processes,
                limit_s=_START_S + 60 * self._options.candidate_minutes,
            )

        tried = counts(config.data.workers, machine.cores, machine.processes)
        return choose_workers(tried, best.rates[1], machine.processes, measure)

    def _notes(self, best: Measurement) -> str:
        low, middle, high = best.rates
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return (
            f"Written by launch/tune.py on {date} for this machine:\n{self.space.machine.text()}.\n"
            f"{middle:.1f} images/s ({low:.1f} to {high:.1f}), {best.worst_bytes / 1e9:.2f} GB in the worst step.\n"
            "Batch, masks and hyperparameters are those of the base."
        )

    def _flags(self) -> str:
        """Returns the flags that import the plugins and start the number of processes that was tuned for."""
        options = self._options
        plugins = "".join(f" --plugin {module}" for module in PLUGINS)
        if options.devices:
            return f"{plugins} --devices {' '.join(options.devices)}"
        return f"{plugins} --processes {options.count}" if options.count > 1 else plugins


def _relative(folder: Path) -> Path:
    """Returns the folder relative to the current one, if it is inside it, so that the written file can be moved."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
