"""Times the part of a step after backward, the optimiser and the target update, for our step and the baseline.

It is timed twice: only the optimiser's step and the target's update, which both sides do; and everything after
backward. Ours then adds one total gradient norm and the finite check, and the baseline a norm read for each weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline import BaselineStep
from benchmarks.common import Row, in_turns, percentiles, ratios, table
from benchmarks.synthetic import Ours, images_for
from ijepa_scale import rng
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.optim.groups import set_hyper

ALONE, WHOLE, NORMS = "optimiser and target", "all after backward", "norms, one by one"


def gradients_for(module: nn.Module, device: torch.device) -> list[Tensor]:
    """Returns a random, keyed gradient for each trained parameter, on the device."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        1e-3 * torch.randn(parameter.shape, generator=rng.generator(0, "benchmark gradient", number)).to(device)
        for number, parameter in enumerate(trained)
    ]


def measure_update(config: PretrainConfig, module: JEPA, device: torch.device, rounds: int) -> Iterator[Row]:
    """Yields a row for each comparison: milliseconds of both sides (CPU time on the CPU) and their ratio per round."""
    ours = Ours(config, module, images_for(config, 1, device))
    bf16 = config.engine.precision == "bf16"
    baseline = BaselineStep(config.model, config.seed, device=device, bf16=bf16, module=module)
    gradients = gradients_for(module, device)
    hyper = ours.schedule(0)
    went_well = StepInfo(loss=torch.zeros((), device=device), grad_norm=0.0)

    def given(parameters: Any) -> None:
        for parameter, gradient in zip((p for p in parameters if p.requires_grad), gradients, strict=True):
            parameter.grad = gradient

    def ours_alone() -> None:
        set_hyper(ours.engine.optimizer.param_groups, hyper)
        ours.engine.optimizer.step()
        ours.engine.update_target(hyper.momentum, went_well)

    def ours_whole() -> None:
        ours.engine.update_target(hyper.momentum, ours.engine.step(hyper, 0))

    def baselines_alone() -> None:
        baseline.optimize(hyper.lr, hyper.weight_decay)
        baseline.move_target(hyper.momentum)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        ALONE: (ours_alone, baselines_alone),
        WHOLE: (ours_whole, lambda: baseline.update(hyper.lr, hyper.weight_decay, hyper.momentum)),
        NORMS: (lambda: None, baseline.norms),
    }
    for name, (mine, theirs) in pairs.items():
        timed = _timed(
            {"ours": (lambda: given(ours.engine.module.parameters()), mine),
             "baseline": (lambda: given(baseline.module.parameters()), theirs)},
            rounds, device, ours,
        )  # fmt: skip
        row = {
            "benchmark": "update", "what": name, "model": config.model.name, "precision": config.engine.precision,
            "unit": "ms", "baseline": percentiles(timed["baseline"]),
        }  # fmt: skip
        if name != NORMS:
            row |= {"ours": percentiles(timed["ours"]), "ratio": ratios(timed["baseline"], timed["ours"])}
        yield row


def _timed(
    works: dict[str, tuple[Callable[[], None], Callable[[], Any]]], rounds: int, device: torch.device, ours: Ours
) -> dict[str, list[float]]:
    """Returns the milliseconds of each work without its preparation: CPU time, or on a GPU synchronised wall time."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time

    def run(name: str) -> None:
        prepare, work = works[name]
        prepare()
        # the engine keeps a loss for its finite check; this loss depends on no weight
        ours.engine.backward(torch.zeros((), device=device, requires_grad=True))
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        spent[name].append(1e3 * (clock() - begin))

    in_turns({name: lambda _, name=name: run(name) for name in works}, rounds)
    return {name: values[1:] for name, values in spent.items()}


def report_update(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = []
    for row in rows:
        ours, ratio = (
            f"{row[key]['p20']:.2f} - {row[key]['p50']:.2f} - {row[key]['p80']:.2f}" if key in row else ""
            for key in ("ours", "ratio")
        )
        theirs = row["baseline"]
        lines.append([row["what"], ours, f"{theirs['p20']:.2f} - {theirs['p50']:.2f} - {theirs['p80']:.2f}", ratio])
    return table(["after backward", "ours, ms", "eager baseline, ms", "times the baseline"], lines)
