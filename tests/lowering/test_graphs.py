"""Compiled blocks on CUDA need at most 2 graphs per role, whatever the lengths, packing, fp8 and checkpointing."""

from __future__ import annotations

import pytest

from tests.lowering.recorded import result, start


@pytest.mark.long
def test_two_graphs_per_role() -> None:
    cases = result(start("graphs"))
    assert len(cases) == 6
    for case in cases:
        assert case["lengths"] >= 4, case
        assert case["graphs"] == {"target": 2, "context": 1, "predictor": 2}, case


def test_a_graph_break_fails() -> None:
    child = start("lowered", "90", "graph_break")
    _, error = child.communicate(timeout=600)
    assert child.returncode != 0 and "graph_break" in error
