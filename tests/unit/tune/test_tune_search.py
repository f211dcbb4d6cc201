"""The search: its order, what it skips, which candidate wins, and that it survives any failure of a candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ijepa_scale.tune.children import Outcome
from ijepa_scale.tune.ranking import Measurement, is_faster, ranked, winner
from ijepa_scale.tune.search import Budget, Search
from ijepa_scale.tune.space import Candidate, Space
from tests.unit.tune.tune_stubs import config, done, failed, machine, measured, space

Answer = Callable[[Candidate], Outcome]


class Probe:
    """Replaces child processes: answers at once, and records the candidates it was called with."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[Candidate] = []
        self.seconds: list[float] = []
        self._answer = answer

    def __call__(self, candidate: Candidate, seconds: float) -> Outcome:
        self.asked.append(candidate)
        self.seconds.append(seconds)
        return self._answer(candidate)


def searched(answer: Answer, where: Space | None = None, **budget: Any) -> tuple[Search, Probe, list[str]]:
    probe, said = Probe(answer), []
    limits = Budget(**{"seconds": 600.0, "candidate_seconds": 60.0, "candidates": 40, **budget})
    search = Search(where or space(), probe, limits, say=said.append, clock=lambda: 2.0 * len(probe.asked))
    search.run()
    return search, probe, said


def speed(**seconds: float) -> Answer:
    """Returns a probe of 1 s steps, made longer or shorter by the given settings of a candidate."""

    def answer(candidate: Candidate) -> Outcome:
        engine = candidate.engine
        names = (f"micro_{candidate.micro_batch}", engine.checkpointing, engine.attention, candidate.spread)
        step_s = 1.0 + sum(seconds.get(name.replace(" ", "_"), 0.0) for name in names)
        return done(step_s + (seconds.get("compiled", 0.0) if engine.compile else 0.0))

    return answer


def test_recomputing_is_not_tried_if_all_images_fit_at_once() -> None:
    search, probe, _ = searched(speed(micro_32=0.1, compiled=0.5, math=3.0))
    assert [(each.micro_batch, each.engine.checkpointing) for each in probe.asked[:2]] == [(64, "none"), (32, "none")]
    assert {each.engine.checkpointing for each in probe.asked} == {"none"}
    assert search.found.left_out["checkpointing full"] == "64 images, all of a step, fit at once with less"
    best = search.winner
    assert best is not None and best.candidate.micro_batch == 64 and not best.candidate.engine.compile


def test_smaller_micro_batches_are_tried_while_they_are_faster() -> None:
    _, probe, _ = searched(speed(micro_64=0.5, micro_32=0.3, micro_16=0.2, micro_8=0.2))
    assert [each.micro_batch for each in probe.asked[:4]] == [64, 32, 16, 8]  # stops, because 8 is no faster


def test_checkpointing_is_tried_for_what_does_not_fit_without() -> None:
    def answer(candidate: Candidate) -> Outcome:
        room = {"none": 8, "selective": 16, "full": 64}[candidate.engine.checkpointing]
        if candidate.micro_batch > room:
            return failed("memory", "out of memory (in the first steps)")
        return done(10.0 / candidate.micro_batch)

    search, probe, said = searched(answer)
    tried = [(each.engine.checkpointing, each.micro_batch) for each in probe.asked[:9]]
    assert tried == [
        ("none", 64), ("none", 32), ("none", 16), ("none", 8), ("none", 4),
        ("selective", 64), ("selective", 32), ("selective", 16), ("full", 64),
    ]  # fmt: skip
    assert search.winner is not None and search.winner.candidate.engine.checkpointing == "full"
    label = "plain, 64 images x 1, checkpointing none, eager, attention auto"
    assert search.found.failed[label] == "out of memory (in the first steps)"
    assert said[0] == f"[1] {label}: failed: out of memory (in the first steps)"


@pytest.mark.parametrize("kind", ["memory", "signal", "refused", "error", "time"])
def test_the_search_survives_every_failure(kind: str) -> None:
    search, probe, _ = searched(lambda candidate: failed(kind, "it was so"))
    assert search.winner is None and set(search.found.failed.values()) == {"it was so"}
    if kind in ("refused", "error"):
        assert len(probe.asked) == 3  # once per mode, because a smaller micro-batch can't fix these


def test_the_worst_step_disqualifies_though_drawn_masks_ran() -> None:
    def answer(candidate: Candidate) -> Outcome:
        return done(0.1, peak=8e9, worst=15.5e9) if candidate.micro_batch == 64 else done(1.0)

    search, _, _ = searched(answer)
    assert search.winner is not None and search.winner.candidate.micro_batch == 32
    reason = search.found.failed["plain, 64 images x 1, checkpointing none, eager, attention auto"]
    assert reason == (
        "takes 15.50 GB with the longest masks (8.00 GB with drawn ones) of 15.20 GB that a process may take"
    )


def test_what_the_plan_leaves_out_is_never_started() -> None:
    where = space(config(batch=2048, model="vit_huge"), machine(kind="cuda", gigabytes=80))
    search, probe, _ = searched(speed(), where)
    label = "plain, 2048 images x 1, checkpointing none, compiled, attention auto"  # auto compiles on CUDA
    assert search.found.left_out[label].endswith("of 80.0 GB by the plan")
    assert label not in [each.label for each in probe.asked]


def test_compilation_then_attention_are_tried_on_the_fastest() -> None:
    search, probe, _ = searched(speed(compiled=-0.3, math=-0.1, micro_32=1.0))
    assert [(each.engine.compile, each.engine.attention) for each in probe.asked[1:4]] == [
        (False, "auto"), (True, "auto"), (True, "math"),
    ]  # fmt: skip
    assert search.winner is not None and search.winner.candidate.engine.attention == "math"
    assert search.found.left_out["attention flash"] == "attention auto is flash on this machine"


def test_a_machine_that_cannot_compile_is_measured_eager_and_the_reason_is_reported() -> None:
    search, probe, _ = searched(speed(), space(at=machine(kind="cuda", compile_problem="no compiler; install gcc")))
    assert not any(each.engine.compile for each in probe.asked)
    assert search.found.left_out["compile True"] == "no compiler; install gcc"


def test_every_spread_is_tried_on_several_processes() -> None:
    where = space(config(), machine(processes=2))
    search, probe, _ = searched(speed(zero1=-0.5, micro_16=0.5), where)
    assert {each.spread for each in probe.asked} == {"ddp", "fsdp2", "fsdp2 reshard", "zero1", "zero2", "zero3"}
    best = search.winner
    assert best is not None and best.candidate.spread == "zero1"
    assert (best.candidate.engine.ds_config or "").endswith("ds_configs/zero1.json")


def test_sharding_may_come_without_the_checkpointing_that_ddp_needs() -> None:
    def answer(candidate: Candidate) -> Outcome:
        if candidate.spread == "ddp" and (candidate.engine.checkpointing, candidate.micro_batch) != ("full", 16):
            return failed("memory", "out of memory")
        return done(2.0 if candidate.engine.checkpointing == "full" else 1.0)

    search, _, _ = searched(answer, space(config(), machine(processes=2)))
    best = search.winner
    assert best is not None and best.candidate.spread != "ddp"
    assert (best.candidate.engine.checkpointing, best.candidate.micro_batch) == ("none", 32)


def test_settings_that_do_not_go_together_are_left_out() -> None:
    where = space(config(cuda_graphs=True), machine(processes=2))
    search, _, _ = searched(speed(), where)
    reason = search.found.left_out["strategy fsdp2, replicas 1, reshard_after_forward False"]
    assert reason.startswith("engine.cuda_graphs is true but strategy is fsdp2")


def test_the_fastest_are_measured_again_in_reverse_order() -> None:
    search, probe, _ = searched(speed(micro_32=0.1, compiled=0.2, math=9.0))
    assert probe.asked[-3:] == [probe.asked[2], probe.asked[1], probe.asked[0]]
    assert [len(each.step_s) for each in search.found.measured.values()] == [10, 10, 10, 5]  # math is much slower


def test_what_fails_the_second_time_does_not_win() -> None:
    again: list[Candidate] = []

    def answer(candidate: Candidate) -> Outcome:
        again.append(candidate)
        if again.count(candidate) == 2 and candidate.micro_batch == 64 and not candidate.engine.compile:
            return failed("memory", "out of memory")
        return speed(micro_32=0.1, compiled=0.2)(candidate)

    search, _, _ = searched(answer)
    assert search.winner is not None and search.winner.candidate.micro_batch == 32


def test_the_budget_ends_the_search() -> None:
    search, probe, said = searched(speed(), candidates=1)
    assert len(probe.asked) == 1 and search.winner is not None
    assert "--limit 1 is reached" in search.found.left_out.values()
    search, probe, said = searched(speed(), seconds=7.0)  # each takes 2 s, and none starts with less than 5 s left
    assert probe.seconds == [7.0, 5.0]
    assert "--minutes 0.116667 are over" in search.found.left_out.values()
    assert said[-1].startswith("not measured once more: plain, 64") and said[-1].endswith("--minutes 0.116667 are over")


def test_stages_can_be_skipped() -> None:
    skip = ("compile", "attention", "spreads", "finals")
    search, probe, _ = searched(speed(micro_16=0.5), space(config(), machine(processes=2)), skip=skip)
    assert [each.micro_batch for each in probe.asked] == [32, 16]
    assert search.found.left_out["stage spreads"] == "--skip"


def candidates() -> list[Candidate]:
    found = space()
    return [found.candidate(found.engine, 64, **changes) for changes in ({"compile": True}, {}, {"attention": "math"})]


def test_rates_within_the_spread_are_ties_and_the_simplest_wins() -> None:
    compiled, simple, math = candidates()
    configured = space().config.engine
    fast = measured(compiled, [1.0, 0.9, 1.1, 1.0, 1.0])
    tie = measured(simple, [1.0, 1.0, 1.0, 1.1, 1.1])
    slow = measured(math, [1.4, 1.4, 1.5, 1.3, 1.4])
    assert ranked([slow, tie, fast])[-1] is slow and not is_faster(fast, tie) and is_faster(tie, slow)
    assert winner([fast, tie, slow], configured) is tie
    clearly: Measurement = measured(compiled, [0.9, 0.8, 1.0, 0.9, 0.9])
    assert winner([clearly, tie, slow], configured) is clearly


def test_steps_are_compared_one_by_one_as_they_share_their_masks() -> None:
    compiled, simple, _ = candidates()
    lengths = [1.0, 2.0, 3.0, 4.0, 5.0]  # very different, but each step is 5% faster
    assert is_faster(measured(compiled, [0.95 * s for s in lengths]), measured(simple, lengths))


def test_a_group_is_as_fast_as_its_slowest_process() -> None:
    first, second = done([1.0, 2.0, 1.0], worst=2e9), done([2.0, 1.0, 1.0], worst=3e9)
    found = Measurement.of(candidates()[1], 64, (*first.values, *second.values))
    assert found.step_s == (2.0, 2.0, 1.0) and found.worst_bytes == 3e9
    assert found.rates[1] == 32.0 and found.step_ms == 2000.0
    assert found.mfu(None) is None and found.mfu(64e9) == pytest.approx(0.5)
