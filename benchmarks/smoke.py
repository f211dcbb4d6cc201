"""Question: does each engine path train, with the real head shapes and the losses of fp32?

python -m benchmarks.smoke [--device cuda] [--brief] [--only NAME ...] [--to FILE]

Takes three steps of each path and compares losses and gradient norms with those of the plain engine in fp32 on the CPU,
on the same images, masks and starting weights. The model is a shallow ViT-H/14: 16 heads of 80 in the encoder, 16 of 24
in the predictor. On the CPU it is narrow, with 2 heads of these sizes. Prints one line for each path. A path that
fails, hangs or crashes doesn't stop the others: they go on in a new process. Exits with 1 if a path failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import logging
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import Row, append, read_rows, report_skip, require_device
from benchmarks.scaling import engine_settings
from benchmarks.synthetic import Ours, alone, configured, images_for, start
from ijepa_kernels.fp8_linear import Fp8UnavailableError
from ijepa_scale import rng
from ijepa_scale.engine.start import start_world
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.jepa import JEPA

STEPS = 3
IMAGES = {"cuda": 8, "cpu": 4}
SIZES = {  # by device
    "cuda": ("model.image_size=224", "model.patch_size=14"),
    "cpu": (
        "model.image_size=64", "model.patch_size=8", "model.width=160", "model.heads=2", "model.predictor_width=48",
        "masks.min_keep=3",
    ),
}  # fmt: skip
COMMON = (
    "model.name=vit_huge", "model.depth=2", "model.predictor_depth=2", "data.reader=synthetic", "engine.compile=false",
    "optimizer.start_lr=1e-3", "schedule.momentum=[0.5,1.0]",  # so that three steps move the weights far
)  # fmt: skip
PACKED, FP8, COMPILED = "masks.context=packed", "engine.target_precision=fp8", "engine.compile=true"
TAIL = "optimizer.impl=fused_tail"
BRIEF = ("plain, compiled", "fsdp2, fp8 target")  # of those that ask for compilation; the second is refused
GROUPS = "two mask groups"
# Largest relative differences from fp32 on the CPU that rounding explains: of losses, and of gradient norms. Found on
# the CPU: with the sizes for a GPU up to (1.4e-3, 3.5e-3) in bf16, (2.1e-3, 1.3e-3) in fp8, and (9.5e-3, 5e-2) with
# attention scores 10% too large; narrow layers round more, (3.5e-3, 2.4e-2), and (1.7e-2, 0.26) with such scores. In
# fp32 the patch convolution of a GPU may be in TF32.
CLOSE = {
    "cuda": {"fp32": (5e-4, 5e-3), "bf16": (4e-3, 2e-2), "fp8": (6e-3, 3e-2)},
    "cpu": {"fp32": (5e-4, 5e-3), "bf16": (8e-3, 6e-2), "fp8": (1e-2, 8e-2)},
}
NOISE = 1.8  # standard deviation of what is added to weights, times the root of their inputs
LIMIT_S = {False: 60, True: 240}  # for one path, without and with compilation; then its process is ended


def paths(device: str) -> dict[str, list[str]]:
    """Returns the settings of each path by name: every engine eager first, then what must be compiled."""
    found = {"plain, fp32": ["engine.strategy=plain", "engine.precision=fp32"]}
    for engine in ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3"):
        found[engine] = engine_settings(engine)
        found[f"{engine}, packed"] = [*engine_settings(engine), PACKED]
    plain = engine_settings("plain")
    found[f"plain, {GROUPS}"] = [*plain, f"masks.group_size={IMAGES[device] // 2}"]
    found["plain, selective checkpointing"] = [*plain, "engine.checkpointing=selective"]
    if device == "cuda":
        found["plain, CUDA graphs"] = [*plain, "engine.cuda_graphs=true"]
        found["plain, Triton kernels"] = [*plain, "engine.triton=[target_loss,target_update]"]
        found["plain, apex norms"] = [*plain, "engine.layer_norm=apex"]
    found["fsdp2, fp8 target"] = [*engine_settings("fsdp2"), FP8, COMPILED]  # refused
    found["plain, compiled"] = [*plain, COMPILED]
    found["plain, fp8 target, compiled"] = [*plain, FP8, COMPILED]
    if device == "cuda":
        found["plain, packed, compiled"] = [*plain, PACKED, COMPILED]
        found["fsdp2, compiled"] = [*engine_settings("fsdp2"), COMPILED]
        for engine in ("plain", "ddp", "fsdp2"):
            found[f"{engine}, fused tail, compiled"] = [*engine_settings(engine), TAIL, COMPILED]
        found["plain, fused tail, fp8 target, compiled"] = [*plain, TAIL, FP8, COMPILED]
        found["zero2, compiled"] = [*engine_settings("zero2"), COMPILED]
    return found


def run(device: torch.device, settings: list[str], world: World) -> tuple[list[float], list[float]]:
    """Returns losses and gradient norms of the first steps, on images, masks and weights that every path shares."""
    count = IMAGES[device.type]
    fixed = [f"masks.group_size={count}", f"data.batch_size={count}"]
    config = configured([*COMMON, *SIZES[device.type], *fixed, *settings])
    torch.compiler.reset()  # graphs of earlier paths would count towards torch.compile's limit
    ours = Ours(config, moved(start(config)), images_for(config, count, world.device), world=world)
    infos = [ours.take(step) for step in range(STEPS)]
    return [float(info.loss) for info in infos], [float(info.grad_norm) for info in infos]


def moved(module: JEPA) -> JEPA:
    """Returns the module after adding noise to its weights; else predictions are near 0 whatever attention does."""
    generator = rng.generator(0, "benchmark smoke")
    with torch.no_grad():
        for parameter in module.parameters():
            inputs = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter += NOISE * inputs**-0.5 * torch.randn(parameter.shape, generator=generator)
    return module


@functools.lru_cache
def expected(device: torch.device, masks: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Returns losses and gradient norms of the plain engine in fp32 on the CPU, with the sizes for `device`."""
    cpu = alone(torch.device("cpu"))
    return run(device, ["engine.strategy=plain", "engine.precision=fp32", *masks], cpu)


def measure(name: str, settings: list[str], device: torch.device) -> Row:
    """Returns the row of a path.

    Raises:
        ConfigError: the package refuses the path, or something that it needs isn't installed.
    """
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed isn't installed")
    world = start_world(Launch(), device, alone=name.startswith("plain"))
    losses, norms = expected(device, tuple(setting for setting in settings if setting.startswith("masks.")))
    begin = time.perf_counter()
    found = run(device, settings, world)
    precision = "fp8" if FP8 in settings else "fp32" if "engine.precision=fp32" in settings else "bf16"
    differences = [
        max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True))
        for pair in ((found[0], losses), (found[1], norms))
    ]  # fmt: skip
    limits = CLOSE[device.type][precision]
    close = all(a <= limit for a, limit in zip(differences, limits, strict=True))  # false for NaN
    return {
        "benchmark": "smoke", "path": name, "status": "ok" if close else "failed", "steps": STEPS,
        "seconds": time.perf_counter() - begin, "losses": found[0], "losses_fp32": losses, "grad_norms": found[1],
        "grad_norms_fp32": norms, "loss_difference": differences[0], "grad_norm_difference": differences[1],
        "reason": "" if close else f"further from fp32 than {limits}",
    }  # fmt: skip


def line(row: Row) -> str:
    """Returns a path's line."""
    if "losses" not in row:
        return f"{row['path']}: {row['status'].upper()}, {row['reason']}"
    pairs = ", ".join(f"{a:.4f} ({b:.4f})" for a, b in zip(row["losses"], row["losses_fp32"], strict=True))
    return (
        f"{row['path']}: {row['status'] if row['status'] == 'ok' else row['status'].upper()}, losses (fp32) {pairs}, "
        f"{row['loss_difference']:.1e} apart, gradient norms {row['grad_norm_difference']:.1e}, {row['seconds']:.1f} s"
    )


def here(names: list[str], device: torch.device, to: Path) -> None:
    """Runs these paths in this process, and writes and prints each row. Exits with 1 after a path that raised."""
    known = paths(device.type)
    for name in names:
        signal.alarm(LIMIT_S[COMPILED in known[name]])  # its default action ends the process, even in a collective
        try:
            row = measure(name, known[name], device)
        except (ConfigError, Fp8UnavailableError) as error:
            row = {"benchmark": "smoke", "path": name, "status": "skipped", "reason": str(error)}
        except Exception as error:  # whatever it is, it is a row, and the other paths go on in a new process
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            append(to, {"benchmark": "smoke", "path": name, "status": "failed", "reason": reason})
            sys.exit(1)  # a failed path may leave this process's device or process group unusable
        append(to, row)
        if row["status"] == "skipped":
            report_skip(name, row["reason"])
        else:
            print(line(row), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    signal.alarm(LIMIT_S[False])  # for the end of the process, which may wait for a process group


def everywhere(names: list[str], device: str, to: Path) -> Iterator[Row]:
    """Yields the rows of these paths, each run in a child process that goes on until a path fails."""
    left = list(names)
    while left:
        before = len(read_rows(to))
        command = [sys.executable, "-u", "-m", "benchmarks.smoke", "--device", device, "--to", str(to), "--here", *left]
        child = subprocess.run(command, check=False)
        rows = read_rows(to)[before:]
        raised = bool(rows) and rows[-1]["status"] == "failed" and "losses" not in rows[-1]
        if len(rows) < len(left) and not raised:  # the process ended within a path, or before the first
            code = child.returncode
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            limit = LIMIT_S[COMPILED in paths(device)[left[len(rows)]]]
            why += f", not done after {limit} s" if code == -signal.SIGALRM else ""
            rows.append({"benchmark": "smoke", "path": left[len(rows)], "status": "failed", "reason": why})
            append(to, rows[-1])
        for row in rows:
            if row["status"] == "failed" and "losses" not in row:
                print(line(row), flush=True)
            yield row
        left = left[len(rows) :]


def main() -> None:
    """Runs the paths, prints a line for each and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="names of paths (default: all)")
    parser.add_argument("--brief", action="store_true", help="compile for one path only, since each takes long")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_device(parser, options.device)
    logging.basicConfig(level=logging.WARNING)
    if options.here:
        here(options.here, torch.device("cuda:0" if options.device == "cuda" else "cpu"), options.to)
        return
    every = paths(options.device)
    known = [name for name in every if not options.brief or COMPILED not in every[name] or name in BRIEF]
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"unknown --only {', '.join(sorted(unknown))}; choose from {'; '.join(known)}")
    with tempfile.TemporaryDirectory() as scratch:
        to = options.to or Path(scratch) / "rows.jsonl"
        rows = list(everywhere(options.only or known, options.device, to))
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "skipped", "failed")}
    print(", ".join(f"{number} {status}" for status, number in count.items()))
    sys.exit(1 if count["failed"] else 0)


if __name__ == "__main__":
    main()
