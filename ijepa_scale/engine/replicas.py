"""Finds processes whose copies of the same tensor have come apart, as after a flipped bit. Knows no strategy.

Processes hold the same elements of a tensor under DDP, HSDP, and for weights and target under ZeRO-1 and 2.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ReplicaError

_CHUNK = {False: 1 << 18, True: 1 << 22}  # elements at once; on a CPU (False) what its caches hold: 20 times faster


def checksum(tensor: Tensor) -> Tensor:
    """Returns a 64-bit checksum of a flat fp32 tensor, () int64 on its device. Doesn't synchronise.

    It is the sum modulo 2^64 of each element's bits times an odd number that depends on its place, so any single
    changed element changes it, and two that change places do.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().view(torch.int32)
    chunk = max(1, min(_CHUNK[tensor.is_cuda], bits.numel()))
    odd = torch.arange(1, 2 * chunk, 2, device=tensor.device)
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].to(torch.int64)
        total += (part * odd[: part.numel()]).sum() + 2 * start * part.sum()
    return total


def check_replicas(pieces: Iterable[Piece], world: World) -> None:
    """Compares what several processes hold. Reads all of it once and communicates, so every process must call it.

    Raises:
        ReplicaError: copies differ; names the processes; raised on every process.
    """
    if world.size == 1:
        return
    kept = [piece for piece in pieces if piece.tensor.numel()]
    keys = [(piece.name, piece.start, piece.tensor.numel()) for piece in kept]
    sums = torch.stack([checksum(piece.tensor) for piece in kept]).tolist() if kept else []  # host sync: once per save
    held = cast(list[dict[tuple[str, int, int], int]], world.gather_objects(dict(zip(keys, sums, strict=True))))
    copies: dict[tuple[str, int, int], dict[int, int]] = defaultdict(dict)
    for rank, mine in enumerate(held):
        for key, value in mine.items():
            copies[key][rank] = value
    apart = {key: found for key, found in copies.items() if len(set(found.values())) > 1}
    if apart:
        (name, *_), found = next(iter(apart.items()))
        (common, count), *_ = Counter(found.values()).most_common(1)
        odd = [rank for rank, value in found.items() if value != common]
        who = f"process {', '.join(map(str, odd))} differs from the others" if 2 * count > len(found) else (
            f"processes {', '.join(map(str, found))} differ"
        )  # fmt: skip
        raise ReplicaError(
            f"{who} in {len(apart)} of {len(copies)} tensors, such as {name}, which should be equal on all; this state "
            "isn't saved: start again to go on from the last checkpoint, and test the memory of that host"
        )
