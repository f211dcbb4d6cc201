"""Question: how far from a single process does each engine end after 20 fp32 steps on gloo?

python -m benchmarks.engines [--to benchmarks/results/engines.jsonl]

Prints a table and appends a JSONL row for each engine and accumulation, with the largest differences of loss and target
weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import append
from tests.distributed.test_engines import ENGINES, STEPS, loss_difference, reference, worst
from tests.distributed.training import curve


def main() -> None:
    """Runs all engines of the distributed tests, with accumulation 1 and 2."""
    from tests.distributed.harness import run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="file that the rows are appended to")
    options = parser.parse_args()
    expected = reference()
    print("| engine | accumulation | largest loss difference | largest target weight difference |\n|---|---|---|---|")
    for name, (processes, engine) in ENGINES.items():
        for accumulation in (1, 2):
            settings = {**engine, "precision": "fp32", "accumulation": accumulation}
            found = run(curve, processes, settings, {}, {}, STEPS)[0]
            loss, target = loss_difference(found, expected), worst(found, expected, "target.")
            print(f"| {name} x{processes} | {accumulation} | {loss:.1e} | {target:.1e} |", flush=True)
            append(
                options.to,
                {
                    "engine": name, "processes": processes, "accumulation": accumulation, "steps": STEPS,
                    "loss": loss, "target": target,
                },
            )  # fmt: skip


if __name__ == "__main__":
    main()
