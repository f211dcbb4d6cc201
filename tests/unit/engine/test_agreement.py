"""What differs between processes is found, named, and told by one of them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from ijepa_scale.engine.agreement import agree, differences
from ijepa_scale.engine.meeting import Member
from ijepa_scale.errors import ConfigError

FACTS = st.dictionaries(st.sampled_from("abcde"), st.sampled_from(["0", "1", "absent "]))


def members_of(count: int) -> list[Member]:
    return [Member(rank=rank, size=count, host=f"host{rank // 2}", pid=rank) for rank in range(count)]


@given(st.lists(FACTS, min_size=1, max_size=5))
def test_exactly_the_facts_that_differ_are_named(said: list[dict[str, str]]) -> None:
    found = [line.split(" ")[0] for line in differences(said, members_of(len(said)))]
    expected = {key for key in "abcde" if len({facts.get(key) for facts in said}) > 1}
    assert sorted(found) == sorted(expected)


def test_the_processes_and_hosts_are_named() -> None:
    said = [{"seed": "0"}, {"seed": "0"}, {"seed": "3"}, {}]
    assert differences(said, members_of(4)) == [
        "seed is 0 on processes 0, 1 (host0) but 3 on process 2 (host1) but absent on process 3 (host1); "
        "start all processes with the same"
    ]
    many = [{"seed": str(rank // 500)} for rank in range(1000)]
    (line,) = differences(many, members_of(1000))
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 492 more (host0, host1, host2 and 247 more)" in line


def outcomes(said: list[dict[str, str]], sizes: list[int]) -> list[ConfigError | None]:
    store = HashStore()
    members = [Member(rank=rank, size=size, host="a", pid=rank) for rank, size in enumerate(sizes)]

    def process(rank: int) -> ConfigError | None:
        try:
            agree(store, members, rank, said[rank], time.monotonic() + 20)
        except ConfigError as error:
            return error
        return None

    with ThreadPoolExecutor(len(said)) as pool:
        return list(pool.map(process, range(len(said))))


def test_all_go_on_or_none() -> None:
    assert outcomes([{"seed": "0"}] * 3, [3, 3, 3]) == [None] * 3
    errors = outcomes([{"seed": "0"}, {"seed": "0"}, {"seed": "1"}], [3, 3, 3])
    assert [error is not None and error.is_told for error in errors] == [False, True, True]
    assert {str(error) for error in errors} == {str(errors[0])} and "seed is 0 on processes 0, 1 (a)" in str(errors[0])


def test_processes_that_were_told_different_numbers_are_refused() -> None:
    errors = outcomes([{}, {}], [2, 4])
    assert "the number of processes is 2 on process 0 (a) but 4 on process 1 (a)" in str(errors[0])


def test_of_very_many_differences_the_first_are_told() -> None:
    said = [{f"file {number}": str(rank) for number in range(300)} for rank in range(2)]
    error = outcomes(said, [2, 2])[0]
    assert error is not None and len(error.problems) == 9 and error.problems[-1] == "and 292 more differences"


def test_a_process_that_says_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"has waited for process 1 \(1 on host0\) for 0 s without an answer"):
        agree(HashStore(), members_of(2), 0, {}, time.monotonic() + 0.05)
