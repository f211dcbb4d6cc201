"""Damaged shards lead to a counted bad sample or a clear error: no hang, no memory growth, no silent loss."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_fuzzed_shards(tmp_path):
    command = [sys.executable, "-m", "tests.unit.data.fuzz_shards", str(tmp_path), "150"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    endings = json.loads(done.stdout.splitlines()[-1])
    grown = endings.pop("grown_mb")
    assert grown < 200, f"{grown} MB more than for a whole shard of 20 kB"
    assert sum(endings.values()) >= 100 and endings["counted"] > 20 and endings["clear error"] > 20
