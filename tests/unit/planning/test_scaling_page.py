"""The settings that docs/scaling.md recommends are accepted, explained, and fit on the cluster that they are for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ijepa_scale.config import load_config
from ijepa_scale.config.yaml_text import flat
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.planning.devices import Cluster, find_device
from ijepa_scale.planning.plan import Plan, plan
from ijepa_scale.planning.sweep import NETWORKS, Assumptions, sweep

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
NODE, FAST, SLOW, SMALL = (
    "One node of 8 GPUs with NVLink", "Few nodes with 8 × 400 Gb/s", "Nodes on 100 Gb/s or Ethernet",
    "GPUs with little memory",
)  # fmt: skip
H14, G16 = "in1k_vith14_ep300", "in22k_vitg16_ep44"
CLUSTERS = {  # heading -> what it is for
    NODE: (H14, Cluster(find_device("h100"), 8)),
    FAST: (H14, Cluster(find_device("h100"), 32)),
    SLOW: (H14, Cluster(find_device("a100-80gb"), 16, network_bandwidth=12.5e9 / 8)),
    SMALL: (G16, Cluster(find_device("rtx-4090"), 8)),
}
SETTINGS = PAGE.partition("## Which settings")[2]
SECTIONS = dict(re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", SETTINGS, flags=re.MULTILINE))


def block(heading: str, kind: str) -> Any:
    """Returns the section's block of YAML or JSON."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```", SECTIONS[heading], flags=re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text) if kind == "yaml" else json.loads(text)


def planned(heading: str, changes: dict[str, Any], ds_config: dict[str, Any] | None = None) -> Plan:
    """Returns the plan of the section's run with its block of YAML and these changes of `engine`."""
    name, cluster = CLUSTERS[heading]
    settings = flat({"engine": {**block(heading, "yaml")["engine"], **changes}})
    config = load_config(
        ROOT / "configs" / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )
    return plan(config, cluster, zero=None if ds_config is None else ds_config["zero_optimization"])


def speeds(heading: str, **changes: Any) -> dict[str, float]:
    """Returns the images/s of each strategy."""
    return {re.sub(r" \d+x\d+", "", each.spread.label): each.time.images_per_s
            for each in planned(heading, changes).strategies}  # fmt: skip


def test_there_is_a_section_for_each_cluster() -> None:
    assert list(SECTIONS) == list(CLUSTERS)


@pytest.mark.parametrize("heading", CLUSTERS)
def test_blocks_are_accepted_and_fit(heading: str, tmp_path: Path) -> None:
    chosen = planned(heading, {}).chosen
    assert chosen.fits, f"{chosen.spread.label}: {chosen.footprint.peak / 1e9:.1f} GB"
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(block(heading, "json")))
    content = load_ds_config(file)
    changes = {"strategy": "deepspeed", "ds_config": str(file), "replicas": 1, "reshard_after_forward": False}
    zero = planned(heading, changes, content)
    assert zero.chosen.spread.stage == content["zero_optimization"]["stage"] and zero.chosen.fits


@pytest.mark.parametrize("heading", CLUSTERS)
def test_every_key_has_its_reason(heading: str) -> None:
    until = PAGE.partition(f"### {heading}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    explained = PAGE.partition(f"### {heading}\n")[0] + until  # sections refer to the ones above
    rows = "\n".join(line for line in explained.splitlines() if line.startswith("| `"))
    keys = {key.rpartition(".")[2] for kind in ("yaml", "json") for key in flat(block(heading, kind))}
    missing = [key for key in sorted(keys) if not re.search(rf"`{key}(: \w+)?`", rows)]
    assert not missing, missing


def test_values_that_the_tables_give_are_those_of_the_blocks() -> None:
    for heading, text in SECTIONS.items():
        zero = block(heading, "json")["zero_optimization"]
        for key, value in re.findall(r"^\| `(\w+)` (\S+) \|", text, flags=re.MULTILINE):
            if key in zero:
                assert zero[key] == json.loads(value), (heading, key)
        engine = block(heading, "yaml")["engine"]
        for key, value in re.findall(r"`(\w+): (\w+)`", "\n".join(re.findall(r"^\| .*? \|", text, flags=re.MULTILINE))):
            if key in engine:
                assert engine[key] == yaml.safe_load(value), (heading, key)


def rows_of_sweep() -> list[list[str]]:
    table = PAGE.partition("### What it says")[2].partition("\n\n![")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] != "|--"]


def test_the_table_is_what_the_sweep_says() -> None:
    config = load_config(ROOT / "configs" / f"{H14}.yaml", ["engine.accumulation=2"])
    rows = [row for row in rows_of_sweep() if row[0].isdigit()]
    found = sweep(config, find_device("h100"), [int(row[0]) for row in rows], Assumptions(), gpus_per_node=8)
    assert len(rows) == 6 and "as on 1 to 8 nodes at 400 Gb/s" in PAGE
    for row in rows:
        networks = [found.at(int(row[0]), network) for network in NETWORKS]
        best, ddp = (
            [next(point for point in points if point.strategy == name) for points in networks]
            for name in (row[2], "ddp")
        )
        assert row[1] == str(best[-1].micro_batch) and row[3] == f"{best[-1].images_per_s:,.0f}"
        assert best[-1].images_per_s == max(point.images_per_s for point in networks[-1] if point.fits)
        zero3 = next(point for point in networks[-1] if point.strategy == "zero3")
        assert (zero3.images_per_s == pytest.approx(best[-1].images_per_s)) == (int(row[0]) <= 8)
        for cell, points in ((row[4], best), (row[5], ddp)):
            assert cell == ", ".join(f"{point.efficiency:.0%}" for point in points).replace("%,", ",")


def test_figures_in_the_text_are_those_of_the_plan() -> None:
    node, fast = speeds(NODE), speeds(FAST)
    assert f"{1 - node['ddp'] / max(node.values()):.1%}" == "2.5%"
    assert PAGE.count("2.5%") == 3 and "2.5% slower than the fastest strategy" in PAGE
    assert round(100 * (fast["fsdp2"] / fast["ddp"] - 1)) == 11 and "FSDP2 is 11% faster than DDP" in PAGE
    one, two = speeds(SLOW), speeds(SLOW, accumulation=2)
    assert round(100 * (two["hsdp"] / two["fsdp2"] - 1)) == 23 and round(100 * (1 - one["hsdp"] / one["fsdp2"])) == 5
    assert "HSDP is 23% faster than FSDP2 over both nodes; with one it is 5% slower" in PAGE
    assert round(100 * (one["hsdp"] / one["ddp"] - 1)) == 40 and "HSDP is 40% faster than DDP here" in PAGE
    small, kept = planned(SMALL, {}), planned(SMALL, {"reshard_after_forward": False})
    assert not next(each for each in small.strategies if each.spread.strategy == "ddp").fits
    saved = kept.chosen.footprint.peak - small.chosen.footprint.peak
    assert f"{saved / 1e9:.1f} GB less" in PAGE and f"{small.chosen.footprint.peak / 1e9:.1f} GB in all" in PAGE
    assert kept.chosen.time.step_s == pytest.approx(small.chosen.time.step_s)
    assert not planned(SMALL, {"checkpointing": "none"}).chosen.fits
