"""Tools to look inside: the user's lines, the programs of a call, levels of AOTFUNC_DEBUG."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import os
import sys
from bisect import bisect
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from .cache import EVERY, Cache

#: AOTFUNC_DEBUG: 1 verifies every graph after every pass; 2 also compares every value of a run on
#: the eager backend with the shape, strides and dtype that its graph says it has; 3 also prints
#: every program, 4 the generated Python
LEVEL = int(os.environ.get("AOTFUNC_DEBUG", "0"))

#: AOTFUNC_TRACEBACK=full shows our frames in the tracebacks of errors.
FULL = os.environ.get("AOTFUNC_TRACEBACK") == "full"

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RULES = os.path.join(_OURS, "transforms", "rules", "")
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
#: files whose lines say nothing to a user; the last one runs the end of a `with` block
_NOT_THE_USERS = (_OURS, _TORCH, "<frozen", contextlib.__file__)
_is_user: dict[str, bool] = {}  # by file: a code object that Dynamo made need not be hashable


#: id of a code object -> the object, which keeps its id, and its :func:`lines_of`
LINES = Cache(1 << 10)


def lines_of(code: CodeType) -> tuple[CodeType, list[int], list[int]]:
    """Return the offsets at which lines begin, and their numbers."""
    starts, _, numbers = zip(*code.co_lines(), strict=True)
    known = [code.co_firstlineno if n is None else n for n in numbers]
    return code, [*starts], known


class Line(NamedTuple):
    """A place in the user's code, by the offset of an instruction. The line number takes time to
    find, and is found when it is read."""

    code: CodeType
    offset: int

    @property
    def number(self) -> int:
        _, starts, numbers = LINES.once(id(self.code), lambda: lines_of(self.code))
        return numbers[bisect(starts, self.offset) - 1]

    @property
    def text(self) -> str:
        return linecache.getline(self.code.co_filename, self.number).strip()

    def __str__(self) -> str:
        where = f"{os.path.basename(self.code.co_filename)}:{self.number} in {self.code.co_name}"
        return f"{where}: {text}" if (text := self.text) else where


class LineInModule(Line):
    """A line, and the innermost module being called there, as :func:`stages` sees them."""

    module = ""


_make = tuple.__new__  # Line(...) adds a Python frame
_CALL = torch.nn.Module._call_impl.__code__


def is_users(file: str) -> bool:
    """Return whether a file lies neither in torch nor in aotfunc."""
    mine = _is_user.get(file)
    if mine is None:
        mine = _is_user[file] = not file.startswith(_NOT_THE_USERS)
    return mine


def user_line(depth: int = 1) -> Line | None:
    """Return the innermost line on the stack that lies neither in torch nor in aotfunc."""
    frame = innermost = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            if watched is None:
                return _make(Line, (code, frame.f_lasti))
            line = _make(LineInModule, (code, frame.f_lasti))
            line.module = module_of(innermost)
            return line
        frame = frame.f_back  # type: ignore[assignment]
    return None


def module_of(frame: FrameType | None) -> str:
    """Return the name, in the outermost module that is being called, of the innermost one; the
    class of the outermost where that is the same."""
    called: list[torch.nn.Module] = []  # the outermost first
    while frame is not None:
        if frame.f_code is _CALL and not type(m := frame.f_locals["self"]).__module__.startswith(
            __package__
        ):
            called.insert(0, m)
        frame = frame.f_back
    names = [
        next((name for name, m in outer.named_modules() if m is inner), type(inner).__name__)
        for outer, inner in itertools.pairwise(called)
    ]
    return ".".join(names) or (type(called[0]).__name__ if called else "")


def where_defined(f: Any) -> str:
    """Return where a function was defined, for an error about its results. One of ours in place of
    a user's has that one's name."""
    code = getattr(inspect.unwrap(f) if callable(f) else f, "__code__", None)
    name = getattr(f, "__name__", type(f).__name__)
    return (
        name
        if code is None or code.co_filename.startswith(_OURS)
        else f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    )


def line_of_error(error: BaseException) -> Line | None:
    """Return the innermost of the user's lines that an error came through."""
    return innermost_line(error, lambda name: not name.startswith(_NOT_THE_USERS))


def line_in_a_rule(error: BaseException) -> Line | None:
    """Return the innermost line of a rule, ours or an extension's, that an error came through."""
    table = _RULES + "table.py"
    return innermost_line(
        error,
        lambda name: (
            (name.startswith(_RULES) and name != table) or not name.startswith(_NOT_THE_USERS)
        ),
    )


def innermost_line(error: BaseException, in_file: Callable[[str], bool]) -> Line | None:
    """Return the innermost line, in one of these files, that an error came through."""
    found, step = None, error.__traceback__
    while step is not None:
        if in_file(step.tb_frame.f_code.co_filename):
            found = Line(step.tb_frame.f_code, step.tb_lasti)
        step = step.tb_next
    return found


def outside_dynamo(f: Callable) -> Callable:
    """Keep Dynamo out of ``f``: inside ``torch.compile`` a call of it is a graph break, and the
    functions that it calls run as they are. (Dynamo's own ``disable`` would import Dynamo, which
    takes seconds.)"""
    eval_frame, code = torch._C._dynamo.eval_frame, f.__code__
    if id(code) not in _skipped and hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
        _skipped[id(code)] = code
    f._torchdynamo_disable = True  # type: ignore[attr-defined]
    return f


#: the code that Dynamo skips, by its id: closures share it
_skipped: dict[int, CodeType] = {}


def at(line: Line | None) -> str:
    """Return `` (at file:line in function: source)``, or nothing where the line is not known."""
    return f" (at {line})" if line else ""


class Stage(NamedTuple):
    """A program that a call went through: its pass, its code, its number of ops, its graph."""

    made_by: str
    code: str
    size: int
    graph: Any


class Stages(list[Stage]):
    """The programs of one call in order; each prints as Python under a line such as ``# vjp: 31 ->
    25 nodes``."""

    def __repr__(self) -> str:
        parts, before = [], None
        for made_by, code, size, _ in self:
            change = f"{size}" if before is None else f"{before} -> {size}"
            parts.append(f"# {made_by}: {change} nodes\n{code}")
            before = size
        return "\n\n".join(parts)

    def __rich__(self) -> Any:
        """Return what rich prints: the same in colours."""
        from rich.syntax import Syntax

        return Syntax(repr(self), "python", background_color="default")


#: the list in which new programs are noted while :func:`stages` watches
watched: Stages | None = None
_printed: Any = None  # the graph that was printed last, under AOTFUNC_DEBUG=3


def note(made_by: str, graph: Any, code: Callable[[], str], size: int) -> None:
    """Show a new program to :func:`stages`, and under AOTFUNC_DEBUG=3."""
    global _printed
    known = [] if watched is None else [stage.graph for stage in watched]
    if any(graph is g for g in (*known, _printed)):
        return  # only called by another name
    stage = Stage(made_by, code(), size, graph)
    if watched is not None:
        watched.append(stage)
    if LEVEL >= 3:
        _printed = graph
        print(repr(Stages([stage])), end="\n\n", file=sys.stderr)


def stages(f: Callable) -> Callable[..., Stages]:
    """Return the function ``(*args, **kwargs) -> Stages`` that calls ``f`` and returns the
    programs that this made, in order.

    ``f`` may be a function that calls transforms, a transformed function, or one compiled by
    ``jit``, ``aot_function`` or ``aot_module``. It is captured anew, as in a fresh process; what
    was remembered is there again afterwards. A pass that leaves its program as it is makes none.
    An error of ``f`` is raised; AOTFUNC_DEBUG=3 prints the programs that were made until then.

    >>> stages(grad(lambda x: x.sin()))(torch.zeros(()))
    # capture: 1 nodes
    def capture(x):
        sin = torch.ops.aten.sin.default(x);  x = None
        return (sin,)
    <BLANKLINE>
    # vjp: 1 -> 1 nodes
    def vjp(x):
        cos = torch.ops.aten.cos.default(x);  x = None
        return (cos,)
    """

    def call(*args: Any, **kwargs: Any) -> Stages:
        global watched
        caches = [(cache, cache.state()) for cache in EVERY]
        outer, found = watched, Stages()
        watched = found
        try:
            for cache, _ in caches:
                cache.clear()
            f(*args, **kwargs)
        finally:
            watched = outer
            for cache, before in caches:
                cache.restore(before)
        return found

    return call
