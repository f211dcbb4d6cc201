"""A flipped bit in one process's copy of the state is found before it is saved, and the process is named."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.replicas import check_replicas, checksum
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ReplicaError
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES
from tests.distributed.training import make, masks_config, part


def flip(world: World, engine: dict, kinds: list[str]) -> list[str]:
    """Returns what is said after 2 steps, and after each flip of a bit of one kind's tensor on process 1."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(), masks_config())
    for index in range(2):
        step(part(index, world))
    said = []
    for kind in ("", *kinds):
        bit, place = 1 << random.Random(kind).randrange(31), None
        if kind and world.rank == 1:
            place = next(p for p in built.pieces(working=True) if p.name.startswith(kind) and p.tensor.numel() > 9)
            place.tensor.view(torch.int32)[7] ^= bit
        try:
            check_replicas(built.pieces(working=True), world)
            said.append("")
        except ReplicaError as error:
            said.append(str(error))
        if place is not None:
            place.tensor.view(torch.int32)[7] ^= bit
    return said


KINDS = {
    "ddp": ["model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.", "target."],
    "hsdp": ["model.", "optimizer.exp_avg.", "target."],
    "zero1": ["working.", "target."],
    "zero2": ["working.", "target."],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in ("hsdp", "zero1") else n for n in KINDS]
)
def test_a_flipped_bit_is_found(name: str) -> None:
    processes, engine = ENGINES[name]
    for clean, *flipped in run(flip, processes, engine, KINDS[name]):
        assert clean == ""
        for kind, said in zip(KINDS[name], flipped, strict=True):
            assert "in 1 of " in said and f"such as {kind}" in said, said
            assert said.startswith("processes ") and "1" in said.split(" differ")[0]


def held_by(world: World) -> str:
    from ijepa_scale.engine.protocol import Piece

    value = torch.ones(20)
    value[3] += world.rank == 2
    try:
        check_replicas([Piece(name="a", tensor=value, start=0, shape=(20,))], world)
    except ReplicaError as error:
        return str(error)
    return ""


def test_of_three_the_odd_one_is_named() -> None:
    assert all(said.startswith("process 2 differs from the others in 1 of 1") for said in run(held_by, 3))


@given(st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_any_bit_and_any_exchange_changes_the_checksum(size: int, data: st.DataObject) -> None:
    tensor = torch.randn(size)
    before = int(checksum(tensor))
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    changed = tensor.clone()
    changed.view(torch.int32)[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert int(checksum(changed)) != before
    other = data.draw(st.integers(0, size - 1))
    if tensor[place] != tensor[other]:
        swapped = tensor.clone()
        swapped[[place, other]] = swapped[[other, place]]
        assert int(checksum(swapped)) != before


def test_a_checksum_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = int(checksum(tensor))
    monkeypatch.setattr("ijepa_scale.engine.replicas._CHUNK", {False: 7})
    assert int(checksum(tensor)) == whole
