"""A run in this process, as its launcher's environment says: for notebooks, submitit, Ray and other programs."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ijepa_scale import environment, stopping
from ijepa_scale.cluster import slurm_commands
from ijepa_scale.config import read_config
from ijepa_scale.engine.world import choose_device
from ijepa_scale.errors import ConfigError, UserError
from ijepa_scale.stopping import Stopped
from ijepa_scale.train import processes
from ijepa_scale.train.command import choose_for_processes, train_here
from ijepa_scale.train.finetune import FinetuneTask
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.task import Result, Task

logger = logging.getLogger(__name__)

_TASKS: dict[str, type[Task]] = {"pretrain": PretrainTask, "finetune": FinetuneTask}


def run(
    config: str | Path, overrides: Sequence[str] = (), *, kind: Literal["pretrain", "finetune"] = "pretrain"
) -> Result:
    """Trains in this process, of as many as the launcher has started, and returns the result.

    Every process of a run must call it. Their environment counts as for `launch/pretrain.py`: torchrun's variables, as
    Ray sets them, or those of a Slurm step, as under submitit. Without either it is the only process. Started again,
    the run goes on from its newest checkpoint.

        ijepa_scale.run("configs/demo.yaml", ["optimizer.lr=1e-3"])
        executor.submit(ijepa_scale.run, "configs/demo.yaml")       # of submitit, with requeueing

    Raises:
        UserError: a problem that the user can fix.
        ijepa_scale.stopping.Stopped: the run was asked to stop, by a signal, and has saved its state.
    """
    if kind not in _TASKS:
        raise ConfigError(f"kind is {kind!r}; give {' or '.join(_TASKS)}")
    requeue = signal.getsignal(signal.SIGUSR2)
    launch = environment.detect_launch()
    task = _TASKS[kind]
    flags = argparse.Namespace(devices=None, processes=None)
    loaded = read_config(config, overrides, kind=task.config_kind, choose=partial(choose_for_processes, flags))
    processes.set_threads(launch)
    try:
        return train_here(task, loaded.notes, loaded.config, launch, choose_device(loaded.config.engine, launch))
    except Stopped:
        if callable(requeue) and (stopping.last_signal() == signal.SIGUSR2 or _preempted(requeue)):
            requeue(signal.SIGUSR2, None)  # the state is saved, so whoever waits for this signal may end the process
        raise


def _preempted(requeue: Callable[..., object]) -> bool:
    """Returns whether Slurm has announced submitit's job its end by SIGTERM, without ending it yet.

    If the tasks ended by themselves now, Slurm would take the job for failed. One that was cancelled isn't running.
    """
    job = environment.job()
    is_submitit = type(getattr(requeue, "__self__", None)).__module__.partition(".")[0] == "submitit"
    if not is_submitit or job is None or stopping.last_signal() != signal.SIGTERM:
        return False
    try:
        return slurm_commands.state(job)[0] == "RUNNING"
    except UserError as error:
        logger.error("can't ask Slurm whether job %s is to start again (%s); submit it again", job, error)
        return False


def _again(*arguments: Any, **named: Any) -> Any:
    """Returns what submitit runs when it has requeued a job: the same, which goes on from the newest checkpoint."""
    from submitit.helpers import DelayedSubmission

    return DelayedSubmission(run, *arguments, **named)


run.checkpoint = _again  # type: ignore[attr-defined]  # the name that submitit looks for
