"""Writes a pretraining checkpoint as the published `.pth.tar`, from which the published code can resume."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ijepa_scale.checkpoint.published_order import published_groups, published_names, published_numbers
from ijepa_scale.checkpoint.store import Checkpoint
from ijepa_scale.checkpoint.whole import write_file
from ijepa_scale.config import ModelConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.pos_embed import positions
from ijepa_scale.new_file import PatientFile
from ijepa_scale.optim.adamw import AdamW
from ijepa_scale.plurals import counted
from ijepa_scale.schedules import Schedule

# The state of an unused gradient scaler: the published code loads one even though it trains in bf16.
_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def export_published(checkpoint: Checkpoint, path: str | Path, *, steps_per_epoch: int, processes: int = 1) -> Path:
    """Writes a pretraining checkpoint as a `.pth.tar` from which the published code can resume.

    `processes` is the number of processes of the resumed run, because the file stores the batch size of each. The
    published code resumes only at the start of an epoch.

    Raises:
        CheckpointError: the checkpoint isn't from pretraining, is of another optimiser than AdamW or inside an epoch,
            or its batch doesn't divide.

    Source: the project's specification of the file, sections 5 and 10.
    """
    config = checkpoint.extra.get("config", {})
    if not {"model", "optimizer", "schedule"} <= config.keys() or "target.norm.weight" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} isn't a pretraining checkpoint; give one that has a target encoder")
    if (optimizer_name := config["optimizer"].get("name", "adamw")) != "adamw":
        raise CheckpointError(
            f"{checkpoint.path} was trained with optimizer.name={optimizer_name}, and the published file holds AdamW's "
            "states; export the encoder as .safetensors, or give a checkpoint of optimizer.name=adamw"
        )
    epoch, inside = divmod(checkpoint.step, steps_per_epoch)
    if inside:
        raise CheckpointError(
            f"{checkpoint.path} is {counted(inside, 'step')} into epoch {epoch + 1} of "
            f"{steps_per_epoch} steps; the published "
            f"code resumes only at full epochs: give, for example, a checkpoint of step "
            f"{max(1, epoch) * steps_per_epoch}"
        )
    batch, rest = divmod(int(checkpoint.extra["identity"]["batch size of all processes"]), processes)
    if rest:
        raise CheckpointError(
            f"batch {batch * processes + rest} is not divisible by {counted(processes, 'process')}; give a divisor"
        )
    hyper = _schedule(config, steps_per_epoch)(max(0, checkpoint.step - 1))
    model = ModelConfig(**config["model"])
    trained = checkpoint.full("model.")
    states = {state: checkpoint.full(f"optimizer.{state}.") for state in AdamW.Config.state_names}
    names = published_names(model)
    positions = _positions(model)
    optimizer = _optimizer(names, {**trained, **positions}, config["optimizer"], (hyper.lr, hyper.weight_decay))
    parameters = dict(
        zip(published_numbers(model), (p for g in optimizer.param_groups for p in g["params"]), strict=True)
    )
    for name in trained:
        optimizer.state[parameters[name]] = {
            "step": torch.tensor(float(checkpoint.step)),
            **{state: tensors[name] for state, tensors in states.items()},
        }
    target = {**checkpoint.full("target."), "pos_embed": positions["encoder.pos_embed"]}
    content: dict[str, Any] = {
        **{part: _part(f"{part}.", names, {**trained, **positions}) for part in ("encoder", "predictor")},
        "target_encoder": _part("encoder.", names, {f"encoder.{name}": tensor for name, tensor in target.items()}),
        "opt": optimizer.state_dict(),
        "scaler": dict(_SCALER),
        "epoch": epoch,
        "loss": float(checkpoint.extra.get("loss", float("nan"))),
        "batch_size": batch,
        "world_size": processes,
        "lr": config["optimizer"]["lr"],  # the peak, as the published code stores it; the groups hold the present one
    }
    return write_file(Path(path), lambda temporary: _write(content, temporary))


def _write(content: dict[str, Any], path: Path) -> None:
    with PatientFile(path) as file:
        torch.save(content, cast(IO[bytes], file))


def _positions(model: ModelConfig) -> dict[str, Tensor]:
    sizes = resolve(model)
    return {
        "encoder.pos_embed": positions(sizes.width, sizes.grid, sizes.position_grid)[None],
        "predictor.predictor_pos_embed": positions(sizes.predictor_width, sizes.grid, sizes.position_grid)[None],
    }


def _optimizer(
    names: list[str], tensors: dict[str, Tensor], config: dict[str, Any], rates: tuple[float, float]
) -> torch.optim.AdamW:
    """Returns an AdamW over the four groups, so that PyTorch itself numbers the parameters and fills in settings."""
    lr, weight_decay = rates
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(published_groups(names)):
        excluded = {"WD_exclude": True, "weight_decay": 0} if index >= 2 else {"weight_decay": weight_decay}
        groups.append({"params": [torch.nn.Parameter(tensors[name]) for name in group], **excluded})
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(config["betas"]), eps=config["eps"])


def _part(prefix: str, names: list[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name.removeprefix(prefix)}": tensors[name] for name in names if name.startswith(prefix)}


def _schedule(config: dict[str, Any], steps_per_epoch: int) -> Schedule:
    optimizer, schedule = config["optimizer"], config["schedule"]
    rates = ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay")
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        momentum=tuple(schedule["momentum"]),
        **{name: schedule[name] for name in ("epochs", "warmup_epochs", "ipe_scale")},
        **{name: optimizer[name] for name in rates},
    )
