"""The kernels' benchmark: every way runs on small sizes, and its verdicts follow from the times."""

import pytest
import torch

from benchmarks import kernel_cases, kernels
from ijepa_scale.config.architectures import Sizes


@pytest.fixture
def rows(monkeypatch):
    sizes = Sizes(width=48, depth=1, heads=3, mlp_width=96, predictor_depth=1)
    small = kernel_cases.Setting(
        name="small", sizes=sizes, images=2, tokens=16, predicted=3, crop=32, device=torch.device("cpu")
    )
    monkeypatch.setattr(kernels, "settings", lambda device, quick: [small])
    monkeypatch.setattr(kernel_cases, "compiled", lambda function: function)  # a minute of C++ otherwise
    monkeypatch.setitem(kernels.COPIED, "cpu", 1 << 20)
    return list(kernels.run(torch.device("cpu"), quick=True))


def test_each_kernel_has_rows_with_times_and_shares(rows):
    assert len(rows) == 8  # fp8_linear has two
    assert {row["kernel"].replace(" ", "_") for row in rows} == set(kernel_cases.KERNELS)
    for row in rows:
        assert {"eager", "compiled"} <= row["ways"].keys() == row["shares"].keys()
        assert all(0 < values["p20"] <= values["p50"] <= values["p80"] for values in row["ways"].values())
        assert all(share > 0 for share in row["shares"].values())
        assert (row["times_compiled"] is None) == (row["ours"] in row["missing"])
    missing = {row["kernel"] for row in rows if row["times_compiled"] is None}
    assert missing == {"target_loss", "target_update", "fused_tail"}


def test_the_report_names_what_loses_and_what_is_missing(rows):
    rows[0]["times_compiled"], rows[1]["times_compiled"] = 0.5, 2.0
    text = kernels.report(rows)
    assert f"{rows[0]['kernel']}, small: {rows[0]['shape']}: LOSES to torch.compile, 0.50 times its speed" in text
    assert f"{rows[1]['shape']}: LOSES" not in text
    assert "target_loss, small: no triton: Triton needs a CUDA device" in text
    assert "no verdict, ours doesn't run on cpu" in text


def test_least_time_is_the_slower_of_moving_and_computing():
    cost = {"read_bytes": 60.0, "written_bytes": 40.0, "flops": 1000.0}
    case = kernel_cases.Case(kernel="k", shape="s", ways={}, ours="ours", cost=cost)
    assert kernels.least_ms(case, 100.0, None) == 1000.0
    assert kernels.least_ms(case, 100.0, 500.0) == 2000.0
    half = kernel_cases.Case(kernel="k", shape="s", ways={}, ours="ours", cost=cost, fp8=True)
    assert kernels.least_ms(half, 100.0, 250.0) == 2000.0


def test_a_forced_backend_that_refuses_is_named_and_other_errors_are_raised():
    def refuse():
        raise RuntimeError("no available kernel\nmore")

    at, clock = kernel_cases.settings(torch.device("cpu"), True)[0], kernels.Clock(torch.device("cpu"))
    ways = {"compiled": lambda: None, "ours": lambda: None, "cudnn": refuse}
    case = kernel_cases.Case(kernel="k", shape="s", ways=ways, ours="ours", cost={})
    assert kernels.measure(case, at, clock, 1)["missing"] == {"cudnn": "no available kernel"}
    case = kernel_cases.Case(kernel="k", shape="s", ways={**ways, "ours": refuse}, ours="ours", cost={})
    with pytest.raises(RuntimeError, match="no available kernel"):
        kernels.measure(case, at, clock, 1)
