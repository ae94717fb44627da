"""The house stands: imports run strictly downward, rooms stay small and apart, nothing hides at module level.

The import graph is drawn from the source, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = "lepton_dist"
HOUSE = Path(__file__).parents[1] / PACKAGE

FLOORS = (
    {"errors"},
    {"files"},  # on the ground floor with errors, as documents, which reads through it
    {"documents", "values", "checkpoint_files"},
    {"plan", "config", "telemetry"},
    {"kernels", "comm"},
    {"storage", "model", "text"},
    {"parallel"},
    {"engine", "training", "compress", "importers"},
    {"coordinator"},
    {"runtime"},
    {"serving", "api", "bench"},
    {"cli"},
    {""},  # the front door, lepton_dist/__init__.py: it names what is public, and nobody inside goes through it
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SIGN_LINES = 500, 100, 5
ENVIRONMENT_READERS = ("config/", "comm/world.py", "comm/launcher.py")
MUTATORS = {
    "append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "add", "discard", "setdefault",
    "appendleft", "popleft", "sort", "reverse",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    target: str
    line: int


@dataclass
class Module:
    """One source file: its dotted name, its tree, and what it imports."""

    path: str
    source: str
    known: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))

    @property
    def room(self) -> str:
        return room_of(self.name)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    def imports(self) -> Iterator[Import]:
        """Every imported module, as precisely as the source says it."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = self.name.split(".")
                    drop = node.level - (1 if self.path.endswith("__init__.py") else 0)
                    base = ".".join(parts[: len(parts) - drop] + ([base] if base else []))
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield Import(full if full in self.known else base, node.lineno)

    def own_imports(self) -> Iterator[Import]:
        return (item for item in self.imports() if item.target.split(".")[0] == PACKAGE)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


def read_house(files: dict[str, str]) -> list[Module]:
    modules = [Module(path, source) for path, source in files.items()]
    known = {module.name for module in modules}
    for module in modules:
        module.known = known
    return modules


def upward(modules: list[Module]) -> Iterator[str]:
    """Imports that do not run strictly downward."""
    for module in modules:
        if module.room not in FLOOR_OF:
            yield f"{module.path}: the room {module.room!r} stands on no floor; give it one in the design and here"
            continue
        for item in module.own_imports():
            room = room_of(item.target)
            if room != module.room and FLOOR_OF.get(room, len(FLOORS)) >= FLOOR_OF[module.room]:
                floors = f"floor {FLOOR_OF[module.room]} imports floor {FLOOR_OF.get(room, '?')}"
                yield f"{module.path}:{item.line}: {module.room or 'the package'} imports {item.target}: {floors}"


def circles(modules: list[Module]) -> Iterator[str]:
    """Modules that import each other, within rooms too."""
    below = {module.name: sorted({item.target for item in module.own_imports()} & module.known) for module in modules}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield " -> ".join((*path[path.index(name) :], name))
        elif name not in done:
            for target in below[name]:
                if target != name:
                    yield from walk(target, (*path, name))
            done.add(name)

    for name in sorted(below):
        yield from walk(name, ())


def too_long(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        lines = module.source.count("\n")
        limit = MAX_FILE_LINES
        if Path(module.path).name == "__init__.py" and len(Path(module.path).parts) == 2:
            limit = MAX_SIGN_LINES
        if lines > limit:
            yield f"{module.path}: {lines} lines; at most {limit}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield f"{module.path}:{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}"


def module_containers(tree: ast.Module) -> set[str]:
    """Names that the module binds to a list, dict or set."""
    names: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = node.value
        builds = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp) or (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id in {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter"}
        )
        if builds:
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def changed_names(function: ast.AST) -> Iterator[tuple[str, int]]:
    """Names whose object a function changes in place: x[...] = , del x[...], x.append(...)."""
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if isinstance(node.value, ast.Name):
                yield node.value.id, node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.attr in MUTATORS
        ):
            yield node.func.value.id, node.lineno


def bound_names(function: ast.AST) -> set[str]:
    """Names that are a function's own: arguments and assignments."""
    names = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    return names | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def hidden_state(modules: list[Module]) -> Iterator[str]:
    """State at module level: `global`, or a module's container that its functions change."""
    for module in modules:
        containers = module_containers(module.tree)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.path}:{node.lineno}: global {', '.join(node.names)}"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = bound_names(node)
                for name, line in changed_names(node):
                    if name in containers and name not in own:
                        yield f"{module.path}:{line}: {name}, which the module holds, is changed"


def environment_reads(modules: list[Module]) -> Iterator[str]:
    """Uses of the environment outside the places that may."""
    for module in modules:
        if module.path.startswith(ENVIRONMENT_READERS):
            continue
        for node in ast.walk(module.tree):
            is_attribute = isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}
            is_name = isinstance(node, ast.alias) and node.name in {"environ", "environb", "getenv", "putenv"}
            if is_attribute or is_name:
                yield f"{module.path}:{node.lineno}: the environment is read only in {', '.join(ENVIRONMENT_READERS)}"


def forbidden_imports(modules: list[Module]) -> Iterator[str]:
    """mpi4py outside comm/; pickle and its kin anywhere; eval and exec."""
    for module in modules:
        for item in module.imports():
            top = item.target.split(".")[0]
            if top == "mpi4py" and module.room != "comm":
                yield f"{module.path}:{item.line}: only comm/ imports mpi4py"
            if top in {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}:
                yield f"{module.path}:{item.line}: {top}: nothing that comes from outside is ever unpickled"
            if item.target.startswith("torch.distributed"):
                yield f"{module.path}:{item.line}: torch.distributed: ranks talk through comm/"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                yield f"{module.path}:{node.lineno}: {node.func.id}"


RULES = (upward, circles, too_long, hidden_state, environment_reads, forbidden_imports)


@pytest.mark.parametrize("rule", RULES)
def test_the_house(rule) -> None:
    files = {path.relative_to(HOUSE).as_posix(): path.read_text() for path in sorted(HOUSE.rglob("*.py"))}
    assert files
    findings = list(rule(read_house(files)))
    assert not findings, "\n" + "\n".join(findings)


def test_every_room_has_its_sign() -> None:
    rooms = {path.parent for path in HOUSE.rglob("*.py")} - {HOUSE}
    missing = [str(room.relative_to(HOUSE)) for room in rooms if not (room / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


@pytest.mark.parametrize(
    ("rule", "files", "finding"),
    [
        (upward, {"plan/a.py": "from lepton_dist.config import x"}, "plan/a.py:1: plan imports lepton_dist.config"),
        (upward, {"comm/a.py": "def f():\n    import lepton_dist.engine.b"}, "comm/a.py:2: comm imports"),
        (upward, {"attic/a.py": ""}, "the room 'attic' stands on no floor"),
        (upward, {"model/a.py": "from lepton_dist import Plan", "__init__.py": ""}, "model/a.py:1"),
        (upward, {"comm/a.py": "from ..engine import b"}, "comm imports lepton_dist.engine"),
        (
            circles,
            {"plan/a.py": "from lepton_dist.plan import b", "plan/b.py": "import lepton_dist.plan.a"},
            "lepton_dist.plan.a -> lepton_dist.plan.b -> lepton_dist.plan.a",
        ),
        (too_long, {"plan/a.py": "x = 1\n" * 501}, "501 lines; at most 500"),
        (too_long, {"plan/__init__.py": "\n" * 6}, "6 lines; at most 5"),
        (too_long, {"plan/a.py": "def f():\n" + "    x = 1\n" * 100}, "f has 101 lines"),
        (hidden_state, {"plan/a.py": "x = 1\ndef f():\n    global x"}, "plan/a.py:3: global x"),
        (hidden_state, {"plan/a.py": "CACHE = {}\ndef f():\n    CACHE[1] = 2"}, "plan/a.py:3: CACHE"),
        (hidden_state, {"plan/a.py": "CACHE: list[int] = []\ndef f():\n    CACHE.append(2)"}, "plan/a.py:3: CACHE"),
        (environment_reads, {"plan/a.py": "import os\nx = os.environ['A']"}, "plan/a.py:2"),
        (environment_reads, {"plan/a.py": "from os import getenv"}, "plan/a.py:1"),
        (forbidden_imports, {"plan/a.py": "from mpi4py import MPI"}, "only comm/ imports mpi4py"),
        (forbidden_imports, {"comm/a.py": "import pickle"}, "comm/a.py:1: pickle"),
        (forbidden_imports, {"comm/a.py": "eval('1')"}, "comm/a.py:1: eval"),
    ],
)
def test_the_rules_find_what_they_are_for(rule, files: dict[str, str], finding: str) -> None:
    assert finding in "\n".join(rule(read_house(files)))


def test_the_rules_leave_good_houses_alone() -> None:
    good = {
        "__init__.py": "from lepton_dist.api import x",
        "api/__init__.py": '"""Sign."""\n',
        "config/a.py": "import os\nx = os.environ['A']",
        "comm/a.py": "from mpi4py import MPI\nfrom lepton_dist.config import a\nfrom lepton_dist.comm.b import c",
        "comm/b.py": "from lepton_dist.errors import E\nTABLE = {1: 2}\ndef f(TABLE):\n    TABLE[1] = 3\nmodel.eval()",
        "errors.py": "E = 1",
    }
    assert [finding for rule in RULES for finding in rule(read_house(good))] == []


def test_importing_the_package_is_quick_and_light() -> None:
    code = "import sys, time; t = time.perf_counter(); import lepton_dist; print(time.perf_counter() - t, *sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=HOUSE.parent, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    best_s = min(float(run.stdout.split()[0]) for run in runs)
    heavy = {"torch", "numpy", "mpi4py", "transformers", "tokenizers", "cupy"} & set(runs[0].stdout.split())
    assert not heavy, f"import lepton_dist imports {sorted(heavy)}"
    assert best_s < 0.3, f"import lepton_dist takes {best_s:.2f} s; at most 0.3 s"
