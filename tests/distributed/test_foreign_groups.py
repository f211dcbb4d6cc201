"""A program that has made its process group itself trains on it, and is told if its processes differ."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_scale import environment
from tests.distributed.commands import clean_environment, losses, write_config, write_data

PROGRAM = """
import os, sys
import torch.distributed as dist
import ijepa_scale
from ijepa_scale.errors import UserError

if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        ijepa_scale.run(sys.argv[1], sys.argv[2 + int(os.environ["RANK"]) :][:1])
    except UserError as error:
        print("refused:", error)
    dist.barrier()  # the group is the program's, and still there
"""


@pytest.mark.parametrize("rates", [("1e-3", "1e-3"), ("1e-3", "2e-3")], ids=["alike", "different"])
def test_a_group_of_the_program(rates: tuple[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", write_data(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "program.py").write_text(PROGRAM)
    port, processes = str(environment.free_port()), []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in place.items()}
        words = [str(tmp_path / "program.py"), str(config), *(f"optimizer.lr={rate}" for rate in rates)]
        processes.append(
            subprocess.Popen(
                [sys.executable, *words], env=clean_environment(**variables), cwd=tmp_path,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    if rates[0] == rates[1]:
        assert len(losses(tmp_path / "run")) > 1 and not any("refused:" in text for text in said), said
    else:
        assert all("refused: optimizer.lr is 0.001 on process 0" in text for text in said), said
        assert not os.path.exists(tmp_path / "run" / "metrics.jsonl")
