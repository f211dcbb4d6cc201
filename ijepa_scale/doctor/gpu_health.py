"""Asks nvidia-smi about the GPUs of this host: memory, errors, throttling, links to the host. Starts no CUDA."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator

from ijepa_scale.doctor.finding import Finding, size_text
from ijepa_scale.no_answer import NoAnswer

LIMIT_S = 15.0  # nvidia-smi hangs where a GPU has been lost
_FIELDS = (
    "index", "name", "memory.total", "memory.used", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip
# Of recent drivers and of older ones. Source: `nvidia-smi --help-query-gpu`.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of the reasons for lower clocks that a healthy GPU doesn't have.
# Source: NVIDIA's NVML reference, nvmlClocksEventReasons.
_BAD_REASONS = {
    0x08: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}
_MEBIBYTE = 2**20
_MUCH_USED = 2 * 2**30  # bytes that other programs hold; a display or a monitor takes less

Query = Callable[[tuple[str, ...]], list[list[str]]]


def ask_nvidia_smi(fields: tuple[str, ...]) -> list[list[str]]:
    """Returns a row of answers for each GPU.

    Raises:
        NoAnswer: it doesn't answer.
        OSError: it isn't there, or refuses.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NoAnswer(LIMIT_S) from None
    if done.returncode:
        raise OSError(f"nvidia-smi says: {(done.stdout + done.stderr).strip().splitlines()[0]}")
    return [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def gpu_health(query: Query = ask_nvidia_smi) -> Iterator[Finding]:
    """Yields a line for each GPU of this host that nvidia-smi names; none where it isn't installed."""
    if query is ask_nvidia_smi and shutil.which("nvidia-smi") is None:
        return
    reasons = _throttling(query)
    for row in query(_FIELDS):
        yield _health(dict(zip(_FIELDS, row, strict=True)), reasons)


def _throttling(query: Query) -> dict[str, int | None]:
    """Returns the bits of each GPU by its index; empty if this driver knows none of the names."""
    for name in _REASONS:
        try:
            rows = query(("index", name))
        except OSError:
            continue  # a driver that knows the other name
        return {index: int(value, 16) if value.startswith("0x") else None for index, value in rows}
    return {}


def _health(told: dict[str, str], reasons: dict[str, int | None]) -> Finding:
    index, total, used = told["index"], _bytes(told["memory.total"]), _bytes(told["memory.used"])
    problems = []
    errors = told["ecc.errors.uncorrected.volatile.total"]
    if errors.isdigit() and int(errors):
        remedy = "reset the GPU, and have it replaced if they come again"
        problems.append((f"{errors} uncorrected memory errors", remedy))
    bits = reasons.get(index)
    for bit, name in _BAD_REASONS.items():
        if bits is not None and bits & bit:
            problems.append((f"clocks lowered: {name}", "check cooling and power of the host"))
    now, most = told["pcie.link.width.current"], told["pcie.link.width.max"]
    if now.isdigit() and most.isdigit() and int(now) < int(most):
        problems.append((f"PCIe x{now} of x{most}", "have the card or its riser reseated"))
    if used is not None and used > _MUCH_USED:
        problems.append((f"other programs hold {size_text(used)}", "end them: nvidia-smi names them"))
    memory = "unknown memory" if total is None else f"{size_text(total)} memory"
    ecc = f"{errors} uncorrected errors" if errors.isdigit() else "ECC not told"
    return Finding(
        check=f"GPU {index}",
        found=f"{told['name']}, {memory}, {told['temperature.gpu']} C, {ecc}"
        + "".join(f"; {what}" for what, _ in problems),
        verdict="wrong" if problems else "ok",
        remedy="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
        values={**told, "throttle_bits": bits},
    )


def _bytes(mebibytes: str) -> float | None:
    return float(mebibytes) * _MEBIBYTE if mebibytes.replace(".", "", 1).isdigit() else None


__all__ = ["LIMIT_S", "ask_nvidia_smi", "gpu_health"]
