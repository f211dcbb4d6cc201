"""Compares what the processes of a run say about themselves before they train. Knows no setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed import Store

from ijepa_scale.engine.meeting import Member, await_word, refuse
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError

_SHOWN = 8  # processes of a group, and differences, that a message names


def agree(part: Store, members: Sequence[Member], rank: int, facts: Mapping[str, str], deadline: float) -> None:
    """Checks that all processes say the same. Every process of the store's `part` must call it, once.

    Raises:
        ConfigError: they don't, or one says nothing until the `deadline`. All processes raise it, and one tells it.
    """
    own = members[rank]
    if rank:
        part.set(f"facts/{rank}", json.dumps(dict(facts)))
        await_word(part, "agreed", deadline, own)
        return
    said = [facts]
    for other in members[1:]:
        said.append(json.loads(await_word(part, f"facts/{other.rank}", deadline, own, str(other))))
    sizes = [{"the number of processes": str(member.size)} for member in members]
    found = differences(sizes, members) + differences(said, members)
    if found:
        more = [f"and {len(found) - _SHOWN} more differences"] if len(found) > _SHOWN else []
        refuse(part, *found[:_SHOWN], *more)
    part.set("agreed", "")


def check_alike(world: World, facts: Mapping[str, str]) -> None:
    """Checks that all processes say the same, later than `agree`. Communicates.

    Raises:
        ConfigError: they don't; raised on every process.
    """
    if world.size > 1:
        said: list[Any] = world.gather_objects(dict(facts))
        found = differences(said, world.members)
        if found:
            raise ConfigError(*found)


def differences(said: Sequence[Mapping[str, str]], members: Sequence[Member]) -> list[str]:
    """Returns a line for each fact that isn't the same on all processes, in the order of process 0's."""
    lines = []
    for key in dict.fromkeys(key for facts in said for key in facts):
        groups: dict[str, list[Member]] = {}
        for member, facts in zip(members, said, strict=True):
            groups.setdefault(facts.get(key, "absent"), []).append(member)
        if len(groups) > 1:
            parts = [f"{value} on {_named(group)}" for value, group in groups.items()]
            lines.append(f"{key} is {' but '.join(parts)}; start all processes with the same")
    return lines


def _named(group: Sequence[Member]) -> str:
    ranks = ", ".join(str(member.rank) for member in group[:_SHOWN])
    more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
    hosts = list(dict.fromkeys(member.host for member in group))
    shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    return f"process{'es' if len(group) > 1 else ''} {ranks}{more} ({shown})"
