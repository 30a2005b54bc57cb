"""A name says one thing: no two functions or classes of the package share one, unless it is the
name of an op, as the rules of that op have in each table."""

import ast
from collections import defaultdict

import torch

from tests.test_imports import FILES, ROOT

#: functions of users, with the pass or the op of that name behind them. This list only shrinks.
ALLOWED = {"jvp", "laplacian", "scan", "switch", "vjp", "vmap", "while_loop"}
OPS = (torch.ops.aten, torch.ops.aotfunc, torch.ops.aotfunc_layout, torch.ops._c10d_functional)


def is_op(name: str) -> bool:
    bare = name.strip("_")
    return any(hasattr(ops, n) for ops in OPS for n in (bare, f"linalg_{bare}"))


def shared_names() -> dict[str, list[str]]:
    """The files of each function or class at the top of several modules."""
    files = defaultdict(list)
    for path in FILES:
        names = {
            n.name
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.FunctionDef | ast.ClassDef)
        }
        for name in names:
            files[name].append(str(path.relative_to(ROOT)))
    return {name: there for name, there in files.items() if len(there) > 1 and name != "_"}


def test_no_two_functions_share_a_name():
    shared = {name for name in shared_names() if not is_op(name)}
    assert shared == ALLOWED
