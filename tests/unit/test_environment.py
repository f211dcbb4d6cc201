from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ijepa_scale.environment import child_environment, export_allocator, export_compile_cache, job
from ijepa_scale.errors import ConfigError


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_are_expandable_unless_the_user_has_set_the_allocator(name, monkeypatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for each in names:
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:128")
    export_allocator()
    found = {each: os.environ[each] for each in names if each in os.environ}
    expected = ("PYTORCH_ALLOC_CONF", "expandable_segments:True") if name is None else (name, "max_split_size_mb:128")
    assert found == dict([expected])


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, None),
        ({"JOB_ID": "36"}, "36"),
        ({"JOB_ID": "36", "ARRAY_JOB_ID": "36", "ARRAY_TASK_ID": "3"}, "36_3"),  # not the whole array
        ({"JOB_ID": "41", "ARRAY_JOB_ID": "36", "ARRAY_TASK_ID": "0"}, "36_0"),
    ],
)
def test_the_job_of_a_process(variables: dict[str, str], number: str | None, monkeypatch) -> None:
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert job() == number


READS = """
import os
import torch
from ijepa_scale import environment
for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
    os.environ.pop(name, None)
torch.cuda.is_available(), torch.cuda.device_count()  # what choose_device asks before
environment.export_allocator()
print(os.environ["PYTORCH_ALLOC_CONF"])
os.environ["PYTORCH_ALLOC_CONF"] = "no_such_key:True"
try:
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # reads the variable first
    print("not read")
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch built for GPUs")
def test_pytorch_reads_the_allocators_variable_after_its_import() -> None:
    done = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True, env=child_environment())
    assert done.stdout.splitlines()[0] == "expandable_segments:True"
    assert "Unrecognized key 'no_such_key'" in done.stdout, done


def test_the_compile_cache_is_the_one_that_was_named(tmp_path, monkeypatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    default = tmp_path / "cache" / "ijepa_scale" / "compile"
    assert export_compile_cache(None) == default and default.stat().st_mode & 0o077 == 0
    assert os.environ["TRITON_CACHE_DIR"] == str(default / "triton")
    named = export_compile_cache(str(tmp_path / "named"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(named) and named.is_dir()
    assert export_compile_cache(None) == named  # the user's variable
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    assert export_compile_cache(None) == default  # torch's own default isn't the user's word
    own = tmp_path / "torchinductor_of_my_project"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own))
    assert export_compile_cache(None) == own == Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the folder of compiled kernels can't be made .*; set engine.compile_cache"):
        export_compile_cache(str(tmp_path / "file" / "inside"))
    with pytest.raises(ConfigError, match="can't be made .*file is not a folder.; set engine.compile_cache"):
        export_compile_cache(str(tmp_path / "file"))


def test_a_compile_cache_that_others_can_write_is_refused(tmp_path, monkeypatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "untouched")
    for mode in (0o775, 0o757):
        shared = tmp_path / f"shared-{mode:o}"
        shared.mkdir()
        shared.chmod(mode)
        with pytest.raises(ConfigError, match=f"{shared} belongs to user .* has mode {mode:o}; .*: run chmod go-w"):
            export_compile_cache(str(shared))
    before = os.umask(0)
    try:
        inside = export_compile_cache(str(tmp_path / "new" / "inside"))
    finally:
        os.umask(before)
    assert [folder.stat().st_mode & 0o777 for folder in (inside, inside.parent)] == [0o700, 0o700]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "untouched")
    monkeypatch.setattr(os, "getuid", lambda: inside.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="has mode 700; it must belong to user .*to a folder of your own"):
        export_compile_cache(str(inside))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "untouched"
