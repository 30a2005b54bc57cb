"""Imports point down, never sideways, and the package never leans on the libraries it is checked
against. Its files and lines are short."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from aotfunc.trace import above

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "aotfunc").rglob("*.py"))

# From the top down; the units of one row are siblings. A unit may import itself and the rows
# below.
ROWS = [
    ("__main__",),
    ("__init__",),
    ("compile", "extend", "viewer"),
    ("api",),
    ("runtime",),
    ("capture",),
    ("partition", "backends"),
    ("transforms",),
    ("trace", "rules"),
    ("graph",),
    ("debug",),
    ("cache", "native"),
    ("errors", "progress"),
]
# Stricter than the rows: a backend does not know that a gradient exists; a rule is plain tensor
# code beside its table.
ONLY = {
    "backends": {"backends", "trace", "graph", "debug", "cache", "native", "errors", "progress"},
    "rules": {"rules"},
}

REFERENCES = (
    "functorch",
    "torch.func",
    "torch._functorch",
    "torch.vmap",
    "torch.fx.experimental.proxy_tensor",
)
# The derivation of a rule for a single op may ask PyTorch's own transforms; the module helpers
# hold no transform.
MAY_USE = {
    "aotfunc/transforms/fallback.py": REFERENCES,
    "aotfunc/api/stateless.py": ("torch.func.functional_call", "torch.func.stack_module_state"),
    "aotfunc/capture/patches.py": ("torch.func.linearize",),  # to put ours in its place
    "aotfunc/trace/recording.py": (
        "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    ),
}


def allowed(unit: str) -> set[str]:
    """The units that ``unit`` may import."""
    row = next((i for i, row in enumerate(ROWS) if unit in row), len(ROWS))
    return ONLY.get(unit) or {unit}.union(*ROWS[row + 1 :])


def unit_of(module: str) -> str:
    """The unit that a dotted module of the package belongs to: ``aotfunc.trace.emit`` is in
    ``trace``."""
    parts = module.split(".")
    return (
        "__init__"
        if len(parts) == 1
        else "rules"
        if parts[1:3] == ["transforms", "rules"]
        else parts[1]
    )


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def names_used(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import anywhere in ``source``, and of each ``torch.x.y`` that is
    spelled out."""
    inside = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def complaints(source: str, path: str) -> list[str]:
    """What is wrong with the imports of ``source``, the text of the file ``path`` of the
    package."""
    module, found = module_of(ROOT / path), []
    here = unit_of(module)
    for line, name in names_used(source, module, path.endswith("__init__.py")):
        if name.split(".")[0] == "aotfunc":
            # `from aotfunc import trace` and `import aotfunc.trace` name a unit; `from aotfunc
            # import grad` the page.
            there = unit_of(name)
            if name.count(".") == 1 and not any(there in row for row in ROWS):
                there = "__init__"
            if there not in allowed(here):
                found.append(f"{path}:{line}: {here} may not import {there} ({name})")
        elif under(name, REFERENCES) and not under(name, MAY_USE.get(path, ())):
            found.append(
                f"{path}:{line}: {name} is a reference for tests, not a part of the package"
            )
        elif here == "rules" and name.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
            found.append(f"{path}:{line}: a rule imports torch and its table only ({name})")
    return found


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in FILES])
def test_direction(path: str):
    assert not complaints((ROOT / path).read_text(), path)


def test_every_file_has_a_place():
    homeless = [str(p) for p in FILES if not any(unit_of(module_of(p)) in row for row in ROWS)]
    assert not homeless, "say in ROWS where these belong"


@pytest.mark.parametrize(
    "path, source",
    [
        ("aotfunc/trace/emit.py", "from ..transforms import walk"),
        ("aotfunc/trace/emit.py", "from aotfunc.transforms.rules import table"),
        ("aotfunc/trace/emit.py", "from .. import grad"),
        ("aotfunc/graph.py", "import aotfunc"),
        ("aotfunc/partition/cost.py", "def f():\n    from aotfunc.backends import eager"),
        (
            "aotfunc/backends/cpp.py",
            "from importlib import import_module\nimport_module('aotfunc.transforms')",
        ),
        ("aotfunc/backends/__init__.py", "from ..transforms.vjp import vjp"),
        ("aotfunc/transforms/rules/norm.py", "from ...graph import verify"),
        ("aotfunc/transforms/rules/norm.py", "import numpy as np"),
        ("aotfunc/runtime/execute.py", "from ..api.jit import jit"),
        ("aotfunc/capture/capture.py", "from ..runtime import guards"),
        ("aotfunc/api/stateless.py", "from torch.func import functional_call, vmap"),
        ("aotfunc/api/jit.py", "from torch._functorch.aot_autograd import aot_function"),
        ("aotfunc/trace/tracer.py", "def f(g):\n    return torch.func.grad(g)"),
        ("aotfunc/trace/tracer.py", "from torch import vmap"),
        ("aotfunc/trace/tracer.py", "from torch.fx.experimental import proxy_tensor"),
    ],
)
def test_the_checker_sees(path: str, source: str):
    assert complaints(source, path)


@pytest.mark.parametrize(
    "path, source",
    [
        ("aotfunc/__init__.py", "from .api.func import grad\nfrom .api.jit import jit"),
        (
            "aotfunc/api/jit.py",
            "from .make_fx import make_fx\nfrom ..backends import eager\nfrom aotfunc import "
            "graph",
        ),
        (
            "aotfunc/transforms/vjp.py",
            "from .rules import table\nfrom ..trace.tracer import trace\nfrom . import walk",
        ),
        (
            "aotfunc/transforms/rules/norm.py",
            "import math\nimport torch\nfrom .table import pointwise",
        ),
        ("aotfunc/transforms/fallback.py", "import torch.func\nfrom torch._functorch import vmap"),
        ("aotfunc/api/stateless.py", "from torch.func import functional_call"),
        ("aotfunc/partition/solve.py", "import networkx, scipy.sparse\nfrom ..trace import emit"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str):
    assert not complaints(source, path)


def test_files_and_lines_are_short():
    native = [p for end in ("*.cpp", "*.h") for p in (ROOT / "aotfunc").rglob(end)]
    lines = {p: p.read_text().splitlines() for p in (*FILES, *native)}
    assert not [str(p) for p in lines if len(lines[p]) > 400], "look for the second question"
    long = [f"{p}:{i}" for p in lines for i, text in enumerate(lines[p], 1) if len(text) > 99]
    assert not long


@pytest.mark.parametrize("package", ["aotfunc.partition", "aotfunc.extend"])
def test_a_star_brings_no_modules(package: str):
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    assert not [k for k, v in names.items() if isinstance(v, ModuleType)]


def test_functions_that_are_called_by_name():
    used = {n for p in FILES for n in re.findall(r'\babove\("(\w+)"', p.read_text())}
    assert used.issubset(above._MODULES)
    for name, module in above._MODULES.items():
        assert callable(getattr(import_module(f"aotfunc.{module}"), name))
