"""Reads and checks DeepSpeed JSON files, and combines them with the run's settings. Must not know any engine.

A file sets the ZeRO stage, its buckets and offload. Only the YAML sets batch size, accumulation, clipping, precision
and the optimiser, so the two can't contradict each other. DeepSpeed is imported inside functions. Importing it chooses
an accelerator, so callers that force one must export it before.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ijepa_scale.config.form import kind_of
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import ConfigError
from ijepa_scale.nearest import nearest
from ijepa_scale.regular_file import read_regular
from ijepa_scale.shipped import elsewhere, find

# Other keys that a file may hold. They change what is printed or measured, not what is trained.
DIAGNOSTICS = ("comms_logger", "dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown")

# Settings that belong to the YAML, with the keys that set them.
OWNED = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size_per_process and engine.accumulation",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the section optimizer",
    "scheduler": "the sections optimizer and schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "data_types": "engine.precision",
    "torch_autocast": "engine.precision",
    "communication_data_type": "engine.precision",
    "activation_checkpointing": "engine.checkpointing",
    "compile": "engine.compile",
    "zero_allow_untested_optimizer": "optimizer.impl",
    "zero_force_ds_cpu_optimizer": "optimizer.impl",
}

LOW_PRECISION_LAYERS = ("ijepa_scale.models.layers.Linear", "ijepa_scale.models.layers.PatchProjection")

# Settings that have one correct value under stage 3. `compose` writes them into every configuration.
FORCED_STAGE3: dict[str, tuple[Any, str]] = {
    "memory_efficient_linear": (False, "with torch.compile it makes gradients of 3-D inputs zero"),
    "stage3_param_persistence_threshold": (0, "parameters that stay gathered would hide the target encoder's updates"),
}

_STAGE3_ONLY = (
    "enable_sanity_checks leaf_module log_trace_cache_warnings memory_efficient_linear offload_param "
    "override_module_apply sub_group_size zero_hpz_partition_size zero_quantized_gradients "
    "zero_quantized_nontrainable_weights zero_quantized_weights"
).split()

# Settings that DeepSpeed supports but this package doesn't: (refused value, or None for any, and the reason).
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "compute_grad_norm": (False, "the finite check and optimizer.clip_norm need the norm"),
    "leaf_module": (None, "the engine already makes each block a leaf"),
    "offload_param": (None, "the target encoder's shards are updated on the device; use offload_optimizer"),
    "zenflow": (None, "it delays weight updates, which changes the training"),
    "zero_quantized_gradients": (True, "it changes the training; remove it"),
    "zero_quantized_nontrainable_weights": (True, "the target encoder would lose its small updates; remove it"),
    "zero_quantized_weights": (True, "DeepSpeed can't combine it with autocast; remove it"),
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Returns the content of a DeepSpeed JSON file, in which `zero_optimization` has a stage of 1 to 3.

    Raises:
        ConfigError: the file is unreadable, it has settings that belong to the YAML, unknown or ineffective keys or
            stage 0, or DeepSpeed isn't installed. One message lists all problems of the file.
    """
    content = _read(Path(path))
    problems = list(_top_level_problems(content))
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3) or isinstance(zero["stage"], bool):
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        if stage is None:
            problems.append("zero_optimization.stage is missing; write 1, 2 or 3, or use engine.strategy=ddp")
        elif stage == 0 and not isinstance(stage, bool):
            problems.append("zero_optimization.stage is 0, which is plain data parallelism; use engine.strategy=ddp")
        else:
            problems.append(f"zero_optimization.stage is {stage!r}; write 1, 2 or 3")
    else:
        problems.extend(_zero_problems(zero))
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return content


def compose(
    plan: Mapping[str, Any],
    *,
    micro_batch: int,
    accumulation: int,
    clip_norm: float | None,
    precision: str,
    world: int,
    communication: str = "fp32",
) -> dict[str, Any]:
    """Returns the full configuration for `deepspeed.initialize`, with unsuitable defaults replaced.

    Args:
        plan: the content of a DeepSpeed file; it isn't changed.
        micro_batch: images per process and micro-batch.
        accumulation: micro-batches per optimiser step.
        clip_norm: the largest gradient norm; None means no clipping.
        precision: bf16 or fp32.
        world: the number of processes.
        communication: under bf16, the dtype in which weights of linear and patch layers are gathered and their
            gradients reduced.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(plan))
    settings.setdefault("steps_per_print", None)
    settings |= {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clip_norm is None else clip_norm,  # DeepSpeed's default is 1.0
        # autocast instead of the bf16 mode, so that parameters, shards and accumulated gradients stay fp32
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            # DeepSpeed compares exact classes, so by default it would send our layers in fp32
            "lower_precision_safe_modules": list(LOW_PRECISION_LAYERS) if communication == "bf16" else [],
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW; DeepSpeed's would have to be compiled
    }
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"] |= {key: value for key, (value, _) in FORCED_STAGE3.items()}
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(find(path)))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed file{elsewhere(path)}; use one of ds_configs/") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: not readable as JSON ({why}); fix it, or copy one of ds_configs/") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {kind_of(content)}; write a JSON object with zero_optimization")
    return content


def _top_level_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key in content:
        if key in OWNED:
            yield f"{key} is set by the YAML ({OWNED[key]}); remove it from this file"
        elif key.startswith("stage3_"):
            yield f"{key} has no effect outside zero_optimization; move it there"
        elif key != "zero_optimization" and key not in DIAGNOSTICS:
            near = nearest(key, ("zero_optimization", *DIAGNOSTICS))
            allowed = ", ".join(("zero_optimization", *DIAGNOSTICS))
            yield f"{key}: unknown; " + (f"did you mean {near}?" if near else f"choose one of {allowed}")


def _zero_problems(zero: Mapping[str, Any]) -> list[str]:
    """Returns the problems of `zero_optimization` under DeepSpeed's schema and the rules of this package."""
    schema = _schema()
    stage3_only, deprecated = set(_STAGE3_ONLY), {}
    for name, info in schema.model_fields.items():
        if info.alias or name.startswith("stage3_"):
            stage3_only.add(info.alias or name)
        if (info.json_schema_extra or {}).get("deprecated"):
            deprecated[name] = str(info.json_schema_extra.get("new_param") or "its successor")
    known = {info.alias or name for name, info in schema.model_fields.items()}
    problems: list[str] = []
    for key, value in zero.items():
        problems.extend(_key_problems(key, value, known, deprecated))
        if key in stage3_only & known and zero["stage"] < 3:
            problems.append(f"zero_optimization.{key} has no effect under stage {zero['stage']}; remove it")
        forced, reason = FORCED_STAGE3.get(key, (value, ""))
        if zero["stage"] == 3 and value != forced:
            problems.append(f"zero_optimization.{key} is {value!r}; it must be {json.dumps(forced)}: {reason}")
    return problems or list(_schema_problems(schema, zero))


def _key_problems(key: str, value: Any, known: set[str], deprecated: Mapping[str, str]) -> Iterator[str]:
    """Yields the problems of one setting, except for its type."""
    name = f"zero_optimization.{key}"
    if key not in known:
        near = nearest(key, sorted(known - set(deprecated)))
        yield f"{name}: unknown to DeepSpeed" + (f"; did you mean {near}?" if near else "; remove it")
    elif key in deprecated:
        yield f"{name} is deprecated; write {deprecated[key]} instead"
    elif value == "auto":
        yield f"{name} is 'auto', which only other trainers fill in; write a value"
    elif key == "zero_hpz_partition_size" and value != 1:
        yield f"{name} is {value}; write 1: secondary copies of the target encoder's weights would become stale"
    elif key in _UNSUPPORTED and value is not None:
        refused, reason = _UNSUPPORTED[key]
        if refused is None or value == refused:
            yield f"{name} can't be {json.dumps(value)} here: {reason}"
    elif key == "offload_optimizer" and isinstance(value, dict):
        if value.get("device") not in ("cpu", "none"):
            device = value.get("device")
            yield f"{name}.device is {device!r}; write 'cpu': the target's update can't read states on disk"
        if value.get("super_offload") or value.get("ratio", 1.0) != 1.0:
            yield f"{name} needs DeepSpeed's own CPU Adam for super_offload or ratio; remove them"


def _schema_problems(schema: Any, zero: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems that DeepSpeed's schema finds: types, ranges, keys of sub-sections."""
    import pydantic

    try:
        schema(**zero)
    except pydantic.ValidationError as error:
        for each in error.errors():
            name = ".".join(("zero_optimization", *map(str, each["loc"])))
            if each["type"] == "extra_forbidden":
                section = schema.model_fields[each["loc"][0]].annotation
                fields = next(kind.model_fields for kind in _members(section) if hasattr(kind, "model_fields"))
                near = nearest(str(each["loc"][-1]), list(fields))
                yield f"{name}: unknown to DeepSpeed" + (f"; did you mean {near}?" if near else "; remove it")
            else:
                yield f"{name} is {each['input']!r}; {each['msg'][:1].lower()}{each['msg'][1:]}"


def _members(annotation: Any) -> tuple[Any, ...]:
    """Returns the alternatives of an optional type."""
    return typing.get_args(annotation) or (annotation,)


def _schema() -> Any:
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError as error:
        raise ConfigError(
            f"engine.strategy=deepspeed needs DeepSpeed, which can't be imported ({error}); "
            "run DS_BUILD_OPS=0 pip install 'deepspeed>=0.19.8,<0.20', or use engine.strategy=fsdp2"
        ) from None
    return DeepSpeedZeroConfig
