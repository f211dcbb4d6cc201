"""The settings that docs/scaling.md recommends are accepted, explained, and fit on the cluster that they are for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.yaml_text import flat
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.planning.devices import Cluster, find_device
from ijepa_scale.planning.plan import Plan, plan

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
CLUSTERS = {  # heading -> the smallest cluster that it is for
    "One node of 8 GPUs with NVLink": Cluster(find_device("h100"), 8),
    "Few nodes with 8 × 400 Gb/s": Cluster(find_device("h100"), 32),
    "Nodes on 100 Gb/s or Ethernet": Cluster(find_device("a100-80gb"), 16, network_bandwidth=12.5e9),
    "GPUs with little memory": Cluster(find_device("rtx-4090"), 8),
}
SECTIONS = dict(re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", PAGE, flags=re.MULTILINE))


def block(heading: str, kind: str) -> Any:
    """Returns the section's block of YAML or JSON."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```", SECTIONS[heading], flags=re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text) if kind == "yaml" else json.loads(text)


def configured(settings: dict[str, Any]) -> PretrainConfig:
    changes = [f"{key}={json.dumps(value)}" for key, value in flat(settings).items()]
    return load_config(ROOT / "configs" / "in1k_vith14_ep300.yaml", changes)


def planned(heading: str, changes: dict[str, Any], ds_config: dict[str, Any] | None = None) -> Plan:
    engine = {**block(heading, "yaml")["engine"], **changes}
    zero = None if ds_config is None else ds_config["zero_optimization"]
    return plan(configured({"engine": engine}), CLUSTERS[heading], zero=zero)


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
    missing = [key for key in sorted(keys) if not re.search(rf"`{key}(: [\w]+)?`", rows)]
    assert not missing, missing


def test_values_that_the_tables_give_are_those_of_the_blocks() -> None:
    for heading, text in SECTIONS.items():
        zero = block(heading, "json")["zero_optimization"]
        for key, value in re.findall(r"^\| `(\w+)` (\S+) \|", text, flags=re.MULTILINE):
            if key in zero:
                assert zero[key] == json.loads(value.lower()), (heading, key)
        engine = block(heading, "yaml")["engine"]
        for key, value in re.findall(r"`(\w+): (\w+)`", text):
            if key in engine:
                assert engine[key] == yaml.safe_load(value), (heading, key)


def test_claims_about_time_hold() -> None:
    def speeds(heading: str, **changes: Any) -> dict[str, float]:
        return {each.spread.strategy + str(each.spread.replicas) + str(each.spread.reshard_after_forward):
                each.time.images_per_s for each in planned(heading, changes).strategies}  # fmt: skip

    node = speeds("One node of 8 GPUs with NVLink")
    assert node["ddp1False"] >= 0.98 * max(node.values()) and node["zero31False"] < node["zero11False"] * 1.001
    slow = speeds("Nodes on 100 Gb/s or Ethernet")
    assert slow["fsdp22False"] > slow["fsdp21False"] and slow["fsdp22False"] > slow["zero31False"]
