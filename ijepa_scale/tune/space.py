"""Defines the candidates to try, and those that the plan rules out before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_kernels.attention.backend import ON_CPU
from ijepa_scale.config import EngineConfig, PretrainConfig
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.footprint import footprint
from ijepa_scale.planning.spread import Spread, ZeroBuckets
from ijepa_scale.planning.strategy import resolve_compile, resolve_engine
from ijepa_scale.plurals import counted
from ijepa_scale.shipped import find
from ijepa_scale.train.setup import global_batch
from ijepa_scale.tune.machine import Machine
from ijepa_scale.tune.worst import Lengths, worst_tokens

CHECKPOINTING = ("none", "selective", "full")  # the simplest first
SPREADS = ("plain", "ddp", "zero1", "zero2", "fsdp2", "fsdp2 reshard", "zero3")  # the simplest first
PLAN_SLACK = 1.1  # the plan is an estimate, so it rules out only candidates this far above the memory
_STEP_DOWN = 1.5  # the smallest ratio of one micro-batch to the next one that is tried
_ON_GPU = ("flash", "cudnn", "efficient")  # math stores all attention scores; fa3 and fa4 need other packages


@dataclass(frozen=True)
class Candidate:
    """One way of computing the configuration's step. The strategy isn't `auto`."""

    engine: EngineConfig
    micro_batch: int  # images that one process computes at once: its share of the batch / engine.accumulation

    @property
    def spread(self) -> str:
        """A short name of how the step is spread over the processes."""
        engine = self.engine
        if engine.strategy == "deepspeed":
            return f"zero{stage_of(engine)}"
        if engine.strategy != "fsdp2":
            return engine.strategy
        name = f"hsdp x{engine.replicas}" if engine.replicas > 1 else "fsdp2"
        return f"{name} reshard" if engine.reshard_after_forward else name

    @property
    def label(self) -> str:
        """A short description of the candidate."""
        engine = self.engine
        compiled = "compiled" if engine.compile else "eager"
        return (
            f"{self.spread}, {counted(self.micro_batch, 'image')} x {engine.accumulation}, "
            f"checkpointing {engine.checkpointing}, "
            f"{compiled}, attention {engine.attention}"
        )

    def simplicity(self, configured: EngineConfig) -> tuple[int, ...]:
        """Returns a sort key that is smaller for simpler candidates, for choosing among equally fast ones."""
        engine = self.engine
        return (
            CHECKPOINTING.index(engine.checkpointing),
            int(engine.compile),
            SPREADS.index(self.spread) if self.spread in SPREADS else len(SPREADS),
            int(engine.attention != configured.attention),
            engine.accumulation,
        )


def stage_of(engine: EngineConfig) -> int:
    """Returns the ZeRO stage in the DeepSpeed file, or 0 if it has none; the engine checks the file."""
    stage = _zero_section(engine).get("stage")
    return stage if isinstance(stage, int) else 0


def _zero_section(engine: EngineConfig) -> dict[str, Any]:
    """Returns `zero_optimization` of the DeepSpeed file, unchecked, because checking it would import deepspeed."""
    try:
        section = parse_json(find(engine.ds_config or "").read_bytes())["zero_optimization"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return section if isinstance(section, dict) else {}


class Space:
    """The candidates of one configuration on one machine."""

    def __init__(
        self, config: PretrainConfig, machine: Machine, worst: Lengths, ds_configs: Path | None = None
    ) -> None:
        """Checks that the batch divides among the processes.

        `ds_configs` is the folder of zero1.json, zero2.json and zero3.json.

        Raises:
            ConfigError: it doesn't, or the configuration names the strategy for a single process but there are more.
        """
        accumulation_1 = config.engine.replace(accumulation=1)
        self.batch_size = global_batch(config.replace(engine=accumulation_1), machine.processes)
        self.share = self.batch_size // machine.processes
        self.config, self.machine, self.worst = config, machine, worst
        self._ds_configs = ds_configs
        engine, self.reason = resolve_engine(
            config.engine,
            config.model,
            world=machine.processes,
            processes_per_node=machine.processes,
            device=machine.kind,
            device_memory_bytes=machine.memory_bytes,
            optimizer_states=config.optimizer.state_names,
        )
        self.engine, _ = resolve_compile(engine, device=machine.kind, problem=machine.compile_problem)
        if self.engine.strategy == "plain" and machine.processes > 1:
            raise ConfigError(
                f"engine.strategy is plain but {machine.processes} processes are requested; set engine.strategy=auto, "
                "or tune with one process"
            )

    def candidate(self, engine: EngineConfig, micro_batch: int, **changes: Any) -> Candidate:
        """Returns the engine with these changes and a micro-batch that divides a process's share.

        Raises:
            ConfigError: the settings contradict each other.
        """
        accumulation = self.share // micro_batch
        if changes.get("strategy", "deepspeed") != "deepspeed":
            changes["zero_communication"] = "fp32"  # other values are refused without DeepSpeed
        if changes.get("compile") is False:
            changes["compile_cache"] = None  # likewise
        return Candidate(engine.replace(accumulation=accumulation, **changes), micro_batch)

    def config_of(self, candidate: Candidate) -> PretrainConfig:
        """Returns the configuration as the candidate computes it."""
        return self.config.replace(engine=candidate.engine)

    def micro_batches(self) -> list[int]:
        """Returns the micro-batches to try, the largest first, each at most two thirds of the previous one."""
        found: list[int] = []
        for size in (size for size in range(self.share, 0, -1) if self.share % size == 0):
            if not found or _STEP_DOWN * size <= found[-1]:
                found.append(size)
        return found

    def needed(self, candidate: Candidate) -> float:
        """Returns the bytes that one process needs by the plan in the step with the longest masks."""
        grid = self.config.model.grid
        tokens = worst_tokens(self.config.masks, grid[0] * grid[1], self.worst, images=candidate.micro_batch)
        engine = candidate.engine
        spread = Spread(
            strategy=candidate.spread if engine.strategy == "deepspeed" else engine.strategy,
            world=self.machine.processes,
            local=self.machine.processes,
            replicas=engine.replicas,
            reshard_after_forward=engine.reshard_after_forward and engine.strategy == "fsdp2",
            precision=engine.precision,
            communication=engine.zero_communication,
            accumulation=engine.accumulation,
            optimizer_states=self.config.optimizer.state_names,
            renews_copies=self.config.optimizer.renews_copies,
            zero=ZeroBuckets.of(_zero_section(engine)) if engine.strategy == "deepspeed" else ZeroBuckets(),
        )
        plan = footprint(
            self.config.model,
            tokens,
            spread,
            checkpointing=engine.checkpointing,
            device=self.machine.kind,
            cuda_graphs=engine.cuda_graphs,
        )
        return plan.peak

    def planned_out(self, candidate: Candidate) -> str | None:
        """Returns why the plan rules a candidate out; None if it may fit."""
        if candidate.engine.strategy == "deepspeed" and not stage_of(candidate.engine):
            return None  # the engine will report what is wrong with the file
        needed = self.needed(candidate)
        if needed <= PLAN_SLACK * self.machine.room:
            return None
        return f"needs {needed / 1e9:.1f} GB of {self.machine.memory_bytes / 1e9:.1f} GB by the plan"

    def attentions(self, ran: str, configured: str) -> Iterator[tuple[str, str | None]]:
        """Yields kernels other than the configured one, each with the reason to leave it out, or None.

        `ran` is the kernel that the configured setting has chosen.
        """
        choices = [name for name in ON_CPU if name != "auto"] if self.machine.kind == "cpu" else list(_ON_GPU)
        for name in choices:
            if name != configured:
                same = f"attention {configured} is {ran} on this machine" if name == ran else None
                yield name, same

    def spreads(self, engine: EngineConfig) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """Yields the name of each way to spread the step over several processes, with its settings or a reason.

        The reason, a string, says why it can't be tried.
        """
        if self.machine.processes == 1:
            return
        none: dict[str, Any] = {"ds_config": None, "replicas": 1, "reshard_after_forward": False}
        yield "ddp", {"strategy": "ddp", **none}
        yield "fsdp2", {"strategy": "fsdp2", **none}
        yield "fsdp2 reshard", {"strategy": "fsdp2", **none, "reshard_after_forward": True}
        for stage in (1, 2, 3):
            path = None if self._ds_configs is None else self._ds_configs / f"zero{stage}.json"
            if path is None or not path.is_file():
                yield f"zero{stage}", f"{path or f'zero{stage}.json'} doesn't exist"
            else:
                yield f"zero{stage}", {"strategy": "deepspeed", **none, "ds_config": str(path)}
