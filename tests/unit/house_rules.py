"""The rules of the house, each a function from a parsed file to the places that break it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "architecture.md"
TOP_LAYER = 5
MAX_FILE_LINES, MAX_LAUNCH_LINES, MAX_STEP_LINES, MAX_FUNCTION_LINES = 400, 60, 80, 80
# Calls that may run at import. Names in CapWords construct values and may too.
IMPORT_TIME_CALLS = {
    "compile", "frozenset", "dict", "fromkeys", "tuple", "list", "range", "slice", "split", "array",  # constants
    "timedelta", "uint32", "uint64", "namedtuple", "cast",
    "field_validator", "model_validator",  # of pydantic
    "dataclass", "field", "getLogger", "lru_cache", "no_grad", "jit",  # say what a class or function is
    "custom_op", "register_autograd", "add_implicit_resolver", "add_representer",  # on things of the same file
}  # fmt: skip
SYNCHRONISING = {"item", "cpu", "tolist", "numpy", "synchronize", "print", "float", "int", "bool"}
WAITING = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "masked_select", "unique", "equal"}
STEP_PATH = (
    "ijepa_scale/train/step.py", "ijepa_scale/objectives/", "ijepa_scale/engine/target_update.py", "ijepa_scale/optim/",
    "ijepa_scale/masks/ahead.py", "ijepa_scale/models/", "ijepa_scale/augment/pipeline.py",
    "ijepa_scale/engine/base.py", "ijepa_scale/engine/native.py", "ijepa_scale/engine/zero.py",
    "ijepa_scale/engine/finite.py", "ijepa_scale/engine/target.py", "ijepa_scale/engine/graphs.py",
    "ijepa_scale/engine/block_norms.py", "ijepa_scale/metrics/meters.py",
    "ijepa_scale/metrics/own_time.py",
    "kernels/attention/", "kernels/fp8_linear/", "kernels/target_loss/", "kernels/target_update/",
)  # fmt: skip
UNKEYED = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}


@dataclass(frozen=True)
class Source:
    """A Python file of the repository: its path from the root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """The dotted name it is imported by."""
        parts = list(Path(self.path).with_suffix("").parts)
        parts[0] = "ijepa_kernels" if parts[0] == "kernels" else parts[0]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def layer(self) -> int | None:
        return layer_of(self.module)


def sources(*folders: str) -> list[Source]:
    """Returns the Python files below these folders, or these files."""
    paths = [path for f in folders for path in ([ROOT / f] if f.endswith(".py") else sorted((ROOT / f).rglob("*.py")))]
    return [Source(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths]


@lru_cache
def layers() -> dict[str, int]:
    """Returns the layer of each module of the package, and of `kernels`, from the table in docs/architecture.md."""
    rows = re.findall(r"^\| (\d) \|([^|]*)\|", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)/?`", names)}


def layer_of(module: str) -> int | None:
    """Returns the layer of one of our modules; None where it has none. The package itself faces outwards: top."""
    first, _, rest = module.partition(".")
    if first == "ijepa_kernels":
        return layers()["kernels"]
    if first == "ijepa_scale" and rest and rest != "__version__":
        return layers().get(rest.partition(".")[0])
    return 0 if rest == "__version__" else TOP_LAYER


def imports(source: Source, known: set[str] | None = None, *, typing: bool = True) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of all that a file imports, `from package import name` as package.name.

    With `known` modules, names that aren't modules stand for the module they are in. `typing` false
    leaves out what is imported under TYPE_CHECKING.
    """
    skipped = (
        set()
        if typing
        else {id(child) for node in ast.walk(source.tree) if _is_typing(node) for child in ast.walk(node)}
    )
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if known is None or name in known else base


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")


def dotted(node: ast.AST) -> str:
    """Returns a.b.c for such an expression; with '()' or '?' in front of what isn't a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Yields each call and the dotted name called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def keyword(call: ast.Call, name: str) -> object:
    """Returns the constant given for a keyword; None where there is none."""
    values = [k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)]
    return values[0] if values else None


def imports_upwards(source: Source) -> list[str]:
    if source.layer is None:
        return [f"{source.path}: has no layer; give it one in docs/architecture.md"]
    found = []
    for line, name in imports(source):
        if name.partition(".")[0] not in ("ijepa_scale", "ijepa_kernels", "launch", "benchmarks"):
            continue
        layer = layer_of(name)
        if layer is None:
            found.append(f"{source.path}:{line}: {name} has no layer")
        elif layer > source.layer:
            found.append(f"{source.path}:{line}: layer {source.layer} imports {name} of layer {layer}")
        if source.module.startswith("ijepa_kernels") and name.startswith("ijepa_scale"):
            found.append(f"{source.path}:{line}: kernels import {name}; they must not know the package")
    return found


def import_cycles(files: list[Source]) -> list[str]:
    known = {source.module for source in files}
    graph = {s.module: {n for _, n in imports(s, known, typing=False) if n in known and n != s.module} for s in files}
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def distributed_below_layer_3(source: Source) -> list[str]:
    if source.layer is None or source.layer >= 3:
        return []
    lines = [line for line, name in imports(source) if name.startswith("torch.distributed")]
    lines += [node.lineno for node in ast.walk(source.tree) if dotted(node) == "torch.distributed"]
    return [f"{source.path}:{line}: layer {source.layer} uses torch.distributed" for line in lines]


def reads_environment(source: Source) -> list[str]:
    if source.path == "ijepa_scale/environment.py":
        return []
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    attributes = [
        n.lineno
        for n in ast.walk(source.tree)
        if isinstance(n, ast.Attribute) and dotted(n) in {f"os.{x}" for x in names}
    ]
    lines = attributes + [line for line, name in imports(source) if name in {f"os.{x}" for x in names}]
    return [
        f"{source.path}:{line}: environment variables are read in ijepa_scale/environment.py only" for line in lines
    ]


def synchronises(source: Source) -> list[str]:
    """The step itself may not wait at all; what it runs may where the line says `host`, and why."""
    if not source.path.startswith(STEP_PATH):
        return []
    is_step, lines = source.path == "ijepa_scale/train/step.py", source.text.splitlines()
    return [
        f"{source.path}:{call.lineno}: {name.rpartition('.')[2]}() waits for the device; if it doesn't, say '# host'"
        for call, name in calls(source.tree)
        if name.rpartition(".")[2] in (SYNCHRONISING if is_step else WAITING)
        and (is_step or not re.search(r"#.*\bhost\b", lines[(call.func.end_lineno or call.lineno) - 1]))
    ]


def runs_at_import(source: Source) -> list[str]:
    return [
        f"{source.path}:{call.lineno}: {dotted(call.func)}() runs at import"
        for call in _import_time_calls(source.tree)
        if not _makes_a_constant(dotted(call.func).rpartition(".")[2])
    ]


def _makes_a_constant(name: str) -> bool:
    return name in IMPORT_TIME_CALLS or name.lstrip("_")[:1].isupper()


def _import_time_calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yields the calls made while `node` is executed, function bodies and the main block left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return
    if isinstance(node, ast.Call):
        yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        children: list[ast.AST] = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.Lambda):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _import_time_calls(child)


def too_long(source: Source) -> list[str]:
    limit = MAX_LAUNCH_LINES if source.path.startswith("launch/") else MAX_FILE_LINES
    limit = MAX_STEP_LINES if source.path == "ijepa_scale/train/step.py" else limit
    count = len(source.text.splitlines())
    found = [f"{source.path}: {count} lines, at most {limit}"] if count > limit else []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{source.path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
                )
    return found


def swallows_errors(source: Source) -> list[str]:
    """A bare except, or one for all errors that neither raises nor exits."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is not None and dotted(node.type) in ("Exception", "BaseException")
        leaves = any(isinstance(n, ast.Raise) for n in ast.walk(node)) or any(
            name in ("sys.exit", "os._exit") for _, name in calls(node)
        )
        if node.type is None or (broad and not leaves):
            found.append(f"{source.path}:{node.lineno}: catches every error and goes on")
    return found


def unsafe(source: Source) -> list[str]:
    """Loads that run code, and shells."""
    found = [
        f"{source.path}:{node.lineno}: {node.attr} runs code from YAML"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in ("FullLoader", "UnsafeLoader", "unsafe_load", "full_load")
    ]
    for call, name in calls(source.tree):
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            found.append(f"{source.path}:{call.lineno}: torch.load without weights_only=True")
        if name in ("yaml.load", "yaml.load_all") and not _loads_safely(source, call):
            found.append(f"{source.path}:{call.lineno}: {name} without a SafeLoader")
        if name in ("pickle.load", "pickle.loads", "eval", "exec"):
            found.append(f"{source.path}:{call.lineno}: {name} runs code from data")
        if keyword(call, "shell") is True or name in ("os.system", "os.popen"):
            found.append(f"{source.path}:{call.lineno}: {name} starts a shell")
    return found


def _loads_safely(source: Source, call: ast.Call) -> bool:
    """Returns whether a yaml.load is given the SafeLoader, or a class of the same file made from it."""
    classes = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)
               if [dotted(base) for base in node.bases] == ["yaml.SafeLoader"]}  # fmt: skip
    return any(k.arg == "Loader" and dotted(k.value) in {*classes, "yaml.SafeLoader"} for k in call.keywords)


def unkeyed_randomness(source: Source) -> list[str]:
    """Draws from a generator that the whole process shares."""
    found = [
        f"{source.path}:{line}: the module random" for line, name in imports(source) if name.split(".")[0] == "random"
    ]
    for call, name in calls(source.tree):
        owner, _, last = name.rpartition(".")
        shared = owner in ("np.random", "numpy.random") and last[:1].islower() and last != "default_rng"
        seeding = name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all")
        drawing = owner == "torch" and last in UNKEYED and not any(k.arg == "generator" for k in call.keywords)
        if shared or seeding or drawing:
            found.append(f"{source.path}:{call.lineno}: {name} uses a shared generator; take one from rng.py")
    return found


# Put together here so that this file doesn't break its own rule.
UNWANTED = re.compile(
    "|".join(
        rf"\b{first}{second}\b"
        for first, second in (
            ("clau", "de"), ("anth", "ropic"), ("chat", "gpt"), ("open", "ai"), ("co", "pilot"), ("gem", "ini"),
            ("ll", "ms?"), ("language ", "models?"), ("assist", "ants?"), ("sub", "agents?"), ("ai", "-generated"),
        )
    )
    + "|" + "/wo" + r"rk/(main|shared|repos|\.)" + "|/ro" + "ot/" + "|con" + r"tract\.md",
    re.IGNORECASE,
)  # fmt: skip


def tells_how_it_was_made(path: str, text: str) -> list[str]:
    """Words about tools, and one machine's paths, in any text file."""
    return [
        f"{path}:{number}: {match[0]!r} doesn't belong here"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in UNWANTED.finditer(line)
    ]
