"""The house holds: layers, no cycles, no hidden state, no surprises at import. New files are covered by themselves."""

import subprocess
from pathlib import Path

import pytest
from house_rules import (
    ROOT,
    Source,
    distributed_below_layer_3,
    import_cycles,
    imports_upwards,
    reads_environment,
    runs_at_import,
    sources,
    swallows_errors,
    synchronises,
    tells_how_it_was_made,
    too_long,
    unkeyed_randomness,
    unsafe,
)

CODE = ("ijepa_scale", "kernels", "launch", "benchmarks", "setup.py")
PACKAGE = ("ijepa_scale", "kernels", "launch", "benchmarks")
RULES = {  # rule -> where it holds
    imports_upwards: PACKAGE,
    distributed_below_layer_3: PACKAGE,
    reads_environment: CODE,
    synchronises: CODE,
    runs_at_import: PACKAGE,
    too_long: (*CODE, "tests"),
    swallows_errors: CODE,
    unsafe: CODE,
    unkeyed_randomness: ("ijepa_scale", "kernels", "launch"),
}
SKIPPED_FOLDERS = {".git", ".venv", "runs", "datasets", "build", "dist"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    found = [place for source in sources(*RULES[rule]) for place in rule(source)]
    assert not found, "\n".join(found)


def test_no_import_cycles():
    found = import_cycles(sources("ijepa_scale", "kernels"))
    assert not found, "\n".join(found)


def test_files_do_not_tell_how_they_were_made():
    found = [place for path in text_files() for place in tells_how_it_was_made(str(path), (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def text_files() -> list[Path]:
    """Returns the tracked text files; all of them where git isn't there."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        paths = [Path(name) for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
    kept = []
    for path in paths:
        if SKIPPED_FOLDERS.isdisjoint(path.parts) and (ROOT / path).is_file():
            if b"\0" not in (ROOT / path).read_bytes()[:8192]:
                kept.append(path)
    return kept


LONG_FUNCTION = "def f():\n" + "    pass\n" * 80
VIOLATIONS = [
    (imports_upwards, "ijepa_scale/rng.py", "from ijepa_scale.config import x", "layer 0 imports ijepa_scale.config"),
    (imports_upwards, "ijepa_scale/data/a.py", "from ijepa_scale import engine", "layer 2 imports ijepa_scale.engine"),
    (imports_upwards, "ijepa_scale/data/a.py", "from ..train import step", "layer 2 imports ijepa_scale.train.step"),
    (imports_upwards, "ijepa_scale/train/a.py", "def f():\n    import launch.demo", "layer 4 imports launch.demo"),
    (
        imports_upwards,
        "ijepa_scale/optim/a.py",
        "import ijepa_scale",
        "layer 2 imports ijepa_scale of layer 5",
    ),
    (imports_upwards, "ijepa_scale/new.py", "", "has no layer; give it one"),
    (imports_upwards, "kernels/a/triton.py", "from ijepa_scale import rng", "kernels import ijepa_scale.rng"),
    (distributed_below_layer_3, "ijepa_scale/optim/adamw.py", "import torch.distributed as dist", "layer 2 uses"),
    (distributed_below_layer_3, "ijepa_scale/optim/adamw.py", "from torch import distributed", "layer 2 uses"),
    (
        distributed_below_layer_3,
        "ijepa_scale/optim/adamw.py",
        "import torch\nx = torch.distributed.get_rank",
        "py:2: layer 2",
    ),
    (reads_environment, "launch/demo.py", "import os\nx = os.environ['A']", "launch/demo.py:2: environment"),
    (reads_environment, "ijepa_scale/rng.py", "from os import getenv", "rng.py:1: environment"),
    *(
        (synchronises, "ijepa_scale/train/step.py", f"def f(x):\n    return {text}", "waits for the device")
        for text in ("x.item()", "float(x)", "x.cpu()", "x.tolist()", "x.numpy()", "x.loss.detach().cpu()")
    ),
    (synchronises, "kernels/attention/a.py", "x = y.cpu()  # cheap", "a.py:1: cpu() waits for the device; if it"),
    (runs_at_import, "ijepa_scale/a.py", "import torch\ntorch.manual_seed(0)", "a.py:2: torch.manual_seed() runs"),
    (runs_at_import, "ijepa_scale/a.py", "class A:\n    x = load()", "a.py:2: load() runs"),
    (runs_at_import, "ijepa_scale/a.py", "def f(x=load()):\n    pass", "a.py:1: load() runs"),
    (runs_at_import, "ijepa_scale/a.py", "if True:\n    x = [load() for _ in 'ab']", "a.py:2: load() runs"),
    (too_long, "ijepa_scale/a.py", "\n" * 401, "401 lines, at most 400"),
    (too_long, "launch/a.py", "\n" * 61, "61 lines, at most 60"),
    (too_long, "ijepa_scale/train/step.py", "\n" * 81, "81 lines, at most 80"),
    (too_long, "ijepa_scale/a.py", LONG_FUNCTION, "f has 81 lines, at most 80"),
    (swallows_errors, "launch/a.py", "try:\n    f()\nexcept:\n    raise", "catches every error"),
    (swallows_errors, "launch/a.py", "try:\n    f()\nexcept Exception:\n    pass", "catches every error"),
    (unsafe, "ijepa_scale/a.py", "torch.load(p)", "torch.load without weights_only=True"),
    (unsafe, "ijepa_scale/a.py", "torch.load(p, weights_only=False)", "torch.load without weights_only=True"),
    (unsafe, "ijepa_scale/a.py", "yaml.load(f)", "yaml.load without a SafeLoader"),
    (unsafe, "ijepa_scale/a.py", "class L(yaml.Loader):\n    pass\nyaml.load(f, Loader=L)", "py:3: yaml.load without"),
    (unsafe, "ijepa_scale/a.py", "x = yaml.FullLoader", "FullLoader runs code"),
    (unsafe, "ijepa_scale/a.py", "pickle.loads(b)", "pickle.loads runs code"),
    (unsafe, "ijepa_scale/a.py", "subprocess.run('ls', shell=True)", "subprocess.run starts a shell"),
    (unsafe, "ijepa_scale/a.py", "os.system('ls')", "os.system starts a shell"),
    (unkeyed_randomness, "ijepa_scale/a.py", "import random", "the module random"),
    (unkeyed_randomness, "ijepa_scale/a.py", "np.random.shuffle(x)", "np.random.shuffle uses a shared generator"),
    (unkeyed_randomness, "ijepa_scale/a.py", "torch.rand(3)", "torch.rand uses a shared generator"),
]


@pytest.mark.parametrize("rule,path,text,expected", VIOLATIONS, ids=lambda v: getattr(v, "__name__", None))
def test_rule_catches(rule, path, text, expected):
    found = rule(Source(path, text))
    assert len(found) == 1 and expected in found[0], found


ALLOWED = [
    (imports_upwards, "ijepa_scale/train/a.py", "from ijepa_scale import rng\nimport ijepa_kernels.attention, torch"),
    (imports_upwards, "ijepa_scale/data/a.py", "from ijepa_scale import __version__\nfrom . import b"),
    (imports_upwards, "ijepa_scale/data/a.py", "from ..masks import c"),
    (distributed_below_layer_3, "ijepa_scale/engine/a.py", "import torch.distributed"),
    (reads_environment, "ijepa_scale/environment.py", "import os\nx = os.environ"),
    (synchronises, "ijepa_scale/train/pretrain.py", "x.item()"),
    (synchronises, "ijepa_scale/objectives/jepa.py", "x.tolist()  # a host tensor"),
    (runs_at_import, "launch/a.py", "log = logging.getLogger(__name__)\nif __name__ == '__main__':\n    main()"),
    (runs_at_import, "ijepa_scale/a.py", "@dataclass(frozen=True)\nclass A:\n    x: int = field(default=f)\nB = A(1)"),
    (runs_at_import, "ijepa_scale/a.py", "def f():\n    g()\nh = lambda: g()"),
    (swallows_errors, "launch/a.py", "try:\n    f()\nexcept Exception:\n    sys.exit(2)"),
    (unsafe, "ijepa_scale/a.py", "torch.load(p, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()"),
    (unsafe, "ijepa_scale/a.py", "class L(yaml.SafeLoader):\n    pass\nyaml.load(f, Loader=L)"),
    (unkeyed_randomness, "ijepa_scale/a.py", "torch.rand(3, generator=g)\nnp.random.Philox(key=1)"),
]  # fmt: skip


@pytest.mark.parametrize("rule,path,text", ALLOWED, ids=lambda v: getattr(v, "__name__", None))
def test_rule_allows(rule, path, text):
    assert rule(Source(path, text)) == []


def test_cycles_are_caught():
    files = [
        Source("ijepa_scale/data/a.py", "from ijepa_scale.data import b"),
        Source("ijepa_scale/data/b.py", "def f():\n    from ijepa_scale.data.c import name"),
        Source("ijepa_scale/data/c.py", "import ijepa_scale.data.a"),
        Source("ijepa_scale/data/d.py", "if TYPE_CHECKING:\n    from ijepa_scale.data import e"),
        Source("ijepa_scale/data/e.py", "from ijepa_scale.data import d"),
    ]
    assert import_cycles(files) == [
        "ijepa_scale.data.a -> ijepa_scale.data.b -> ijepa_scale.data.c -> ijepa_scale.data.a"
    ]


@pytest.mark.parametrize(
    "text", ["written by Cl" + "aude", "see /wo" + "rk/shared/x", "an AI assist" + "ant", "/ro" + "ot/x"]
)
def test_unwanted_words_are_caught(text):
    assert len(tells_how_it_was_made("README.md", f"fine\n{text}\n")) == 1
    assert tells_how_it_was_made("README.md", "this works: ../shared/data, work/main\n") == []
