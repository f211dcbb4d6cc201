"""One thing is in the singular, in messages too."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.plurals import counted
from tests.unit.house_rules import ROOT

NOUNS = {
    "step": "steps",
    "class": "classes",
    "process": "processes",
    "batch": "batches",
    "GPU": "GPUs",
    "box": "boxes",
    "epoch": "epochs",
}


@given(st.integers(0, 10**9), st.sampled_from(list(NOUNS)))
def test_only_one_is_in_the_singular(number: int, noun: str) -> None:
    assert counted(number, noun) == f"{number} {noun if number == 1 else NOUNS[noun]}"


def test_what_a_new_user_sees_first_is_counted() -> None:
    """The lines of every small run: a plural written out in one of them is found here."""
    seen = ("train/task.py", "train/setup.py", "evaluate/summary.py", "data/sources/folder.py", "data/order.py",
            "data/sources/tar_shards.py")  # fmt: skip
    for name in seen:
        text = (ROOT / "ijepa_scale" / name).read_text()
        found = re.findall(r"\{[\w.()]+\} (?:steps|images|shards|processes|samples|rows|class folders)\b", text)
        assert not found, (name, found)
