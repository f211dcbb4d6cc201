"""The only module that reads and writes environment variables. Imports `errors` and `launchers`, nothing else of ours.

Writes a `Launch` as the variables that `torch.distributed` and DeepSpeed read.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch, detect

_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes. Source: NAME_MAX and PATH_MAX of Linux's limits.h
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_TEMPLATE = re.compile(r"\{\{.*?\}\}")
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def detect_launch(environment: Mapping[str, str] | None = None, *, starts_others: bool = False) -> Launch:
    """Returns this process's rank and world, as `launchers.detect` reads them.

    Raises:
        ConfigError: a launcher's variables are incomplete or don't fit together; or a Slurm job has several tasks, but
            this process is none of them.
    """
    return detect(os.environ if environment is None else environment, starts_others=starts_others)


def export(launch: Launch) -> None:
    """Writes `launch` to torchrun's environment variables, which torch.distributed and DeepSpeed read."""
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(launch.local_world_size),
        MASTER_ADDR=launch.address or "127.0.0.1",
        MASTER_PORT=str(launch.port or free_port()),
    )


def export_accelerator(device_type: str) -> None:
    """Tells DeepSpeed which accelerator to use. Call it before `deepspeed` is imported."""
    os.environ["DS_ACCELERATOR"] = device_type


def export_allocator() -> None:
    """Makes PyTorch's allocator on GPUs grow segments in place, unless the user has configured the allocator.

    Lengths change from step to step; fixed segments fragment under such sizes until memory runs out. PyTorch reads the
    variable at its first allocation on a GPU: call this before. Children inherit it.

    Source: `CUDAAllocatorConfig::instance` of `c10/cuda/CUDAAllocatorConfig.h`: torch 2.11 asks for the older names of
    `_ALLOCATOR_NAMES` first and other versions for PYTORCH_ALLOC_CONF, so any of the three counts as the user's.
    """
    if not any(name in os.environ for name in _ALLOCATOR_NAMES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def export_cublas_workspace() -> None:
    """Gives cuBLAS the fixed workspaces with which its products repeat bit for bit. Call before the first product.

    Raises:
        ConfigError: the user has chosen others.

    Source: "Results reproducibility" in cuBLAS's documentation.
    """
    found = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if found not in _WORKSPACES:
        raise ConfigError(
            f"engine.deterministic is true but CUBLAS_WORKSPACE_CONFIG is {found!r}; unset it, or set it to "
            f"{' or '.join(_WORKSPACES)}"
        )


def export_compile_cache(folder: str | None) -> Path:
    """Sets the folder where torch.compile and Triton keep compiled kernels, and returns it.

    Call it before either is first used.

    Without `folder` it is the user's TORCHINDUCTOR_CACHE_DIR, or else a folder in the user's cache folder. Torch's own
    default, which torch sets at import, is not used: it is under /tmp, which clusters empty between jobs. The kernels
    are executed, so no one else may have write access to the folder.

    Raises:
        ConfigError: the folder can't be made, or others can write to it.
    """
    chosen = compile_cache_folder(folder)
    try:
        for missing in reversed([path for path in (chosen, *chosen.parents) if not path.exists()]):
            missing.mkdir(exist_ok=True, mode=0o700)  # one by one: parents=True would ignore `mode` for the parents
        state = chosen.stat()
        if not stat.S_ISDIR(state.st_mode):
            raise NotADirectoryError(f"{chosen} is not a folder")
    except OSError as error:
        raise ConfigError(
            f"the folder of compiled kernels can't be made ({error}); set engine.compile_cache"
        ) from error
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise ConfigError(
            f"the folder of compiled kernels {chosen} belongs to user {state.st_uid} and has mode "
            f"{state.st_mode & 0o777:o}; it must belong to user {os.getuid()} and no one else may write to it, since "
            "its code is executed: run chmod go-w on it, or set engine.compile_cache to a folder of your own"
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(chosen)
    if folder is not None or "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(chosen / "triton")
    return chosen


def compile_cache_folder(folder: str | None) -> Path:
    """Returns the folder that `export_compile_cache` would set, without making it."""
    own = _user_cache() / "compile"
    found = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if found and found == _inductor_default():
        found = ""
    return Path(folder or found or own).expanduser().resolve()


def cache_folder() -> Path:
    """Returns the folder of downloaded files: IJEPA_SCALE_CACHE, else `ijepa_scale` in the user's cache folder."""
    own = os.environ.get("IJEPA_SCALE_CACHE")
    return Path(own).expanduser() if own else _user_cache()


def _user_cache() -> Path:
    """Source: the XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ijepa_scale"


def _inductor_default() -> str | None:
    """Returns torch's own default for TORCHINDUCTOR_CACHE_DIR; None for a user without a name.

    Computed here because this module must not import torch.

    Source: default_cache_dir of `torch/_inductor/runtime/cache_dir_utils.py`.
    """
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # torch fails here too, so the user must have set the variable
        return None
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + user)


class LiteralPath(str):
    """An expanded path with a `$` that begins no variable."""


def written_path(path: object) -> str:
    """Returns a path as a configuration or a command line writes it, so that it expands to the same one."""
    return str(path).replace("$", "$$")


def expand_path(text: str) -> str:
    """Returns a path with a leading `~` or `~user` and each `$NAME` or `${NAME}` replaced; addresses stay as they are.

    Only a `$` that a name follows begins a variable, and `$$` is a `$` that begins none. The result is the same when it
    is expanded again: one with such a `$` is a `LiteralPath`. Addresses hold `://`, or begin with
    `published:`, `timm:`, `transformers:`, or `pipe:`, which a shell expands.

    Raises:
        ConfigError: a variable isn't set or holds another, `${` begins something else, there is no such user, or the
            path is empty, too long, holds a template's braces, or characters that no path can.
    """
    if isinstance(text, LiteralPath):
        return text
    if not text.strip():
        raise ConfigError("give a path; . is the working directory")
    if text.startswith("pipe:"):
        return text
    check_filled(text)
    is_address = "://" in text or text.startswith(("published:", "timm:", "transformers:"))
    parts = [text] if is_address else text.split("$$")  # between them stands a `$` that begins no variable
    if any("${" in (part if is_address else _VARIABLE.sub("", part)) for part in parts):
        raise ConfigError("interpolations aren't read, write the value itself")
    if "\0" in text or not _encodes(text):
        raise ConfigError("a path can't hold the character NUL or half a surrogate pair; remove it")
    if is_address:
        return text
    missing = next((name for part in parts for name in _names(part) if name not in os.environ), None)
    if missing is not None:
        raise ConfigError(f"the variable {missing} isn't set; set it, or write $${missing} for ${missing} in a name")
    parts = [_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], part) for part in parts]
    whole, inside = "$".join(parts), next((name for part in parts for name in _names(part)), None)
    if inside is not None:
        raise ConfigError(f"it stands for {whole!r}, which holds the variable {inside}; write the path itself")
    if not whole.strip():
        raise ConfigError("its variables are empty; set them, or write the path itself")
    found = os.path.expanduser(whole)
    if found.startswith("~"):
        user = found.partition("/")[0]
        raise ConfigError(f"there is no home folder of {user}; write the path itself, or ./{user} for that name")
    longest = max(len(os.fsencode(part)) for part in found.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(found)) > _LONGEST_PATH:
        raise ConfigError(
            f"it has {len(os.fsencode(found))} bytes and a name of {longest} in it; Linux takes {_LONGEST_PATH} and "
            f"{_LONGEST_NAME}: shorten it"
        )
    check_filled(found)
    return LiteralPath(found) if len(parts) > 1 or "$$" in found else found


def check_filled(text: str) -> None:
    """Checks that a text isn't a template that nobody has filled in.

    Raises:
        ConfigError: it holds `{{ ... }}`.
    """
    if _TEMPLATE.search(text):
        raise ConfigError("a template's {{ }} aren't read, write the value itself")


def _encodes(path: str) -> bool:
    """Returns whether a path has bytes: half a surrogate pair has none, unless it stands for an undecodable byte."""
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def _names(text: str) -> list[str]:
    """Returns the names of the variables in a path."""
    return [name or braced for braced, name in _VARIABLE.findall(text)]


def child_environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment with `changes`, for starting a child process."""
    return {**os.environ, **changes}


def hidden_gpus() -> str | None:
    """Returns the variable by which the user hides all GPUs from CUDA or ROCm, as NAME='value'; None if there is none.

    Source: "CUDA_VISIBLE_DEVICES" in the CUDA C++ programming guide: an invalid index hides itself and all after it.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        value = os.environ.get(name)
        if value is not None and not re.match(r"\s*(\d|GPU-|MIG-)", value):  # such as "", "-1" or Slurm's NoDevFiles
            return f"{name}={value!r}"
    return None


def c_compiler() -> str | None:
    """Returns the C compiler that Triton uses: CC, else gcc, else clang; None if there is none.

    Source: `_build` of `triton/runtime/build.py`.
    """
    named = os.environ.get("CC")
    return named if named is not None else shutil.which("gcc") or shutil.which("clang")


def default_threads(processes: int) -> None:
    """Sets OMP_NUM_THREADS to this process's share of the cores, unless the user has set it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, processes))))


def threads() -> int | None:
    """Returns OMP_NUM_THREADS, or None if it isn't set."""
    value = os.environ.get("OMP_NUM_THREADS")
    return int(value) if value else None


def job() -> str | None:
    """Returns the number of the Slurm job that this process is part of, if it is: of a job array's task, as in 36_3.

    The number that Slurm also gives such a task is, for one of them, that of the whole array.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def export_interface(name: str) -> None:
    """Tells gloo which network interface to use, unless the user has. Call it before the process group is made."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def namespace(kind: str) -> str:
    """Returns what tells this process's namespace from those of other machines and containers, "" if that is hidden.

    `kind` is one of those of /proc/self/ns, such as net or pid. Source: namespaces(7), random(4) for the boot's number.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(f'/proc/self/ns/{kind}')}"
    except OSError:
        return ""


def free_port() -> int:
    """Returns a TCP port that was free on this host a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def git_revision(folder: str) -> str | None:
    """Returns the git revision of `folder`, followed by '+' if files differ from it; None outside git."""
    try:
        revision = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")
