"""Where the user's code is, and what AOTFUNC_DEBUG asks for."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple

import torch

#: AOTFUNC_DEBUG=1 verifies every graph after every pass.
LEVEL = int(os.environ.get("AOTFUNC_DEBUG", "0"))

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
#: files whose lines say nothing to a user: the last is what runs the end of a `with` block
_NOT_THE_USERS = (_OURS, _TORCH, "<frozen", contextlib.__file__)
_is_user: dict[str, bool] = {}  # by file: a code object that Dynamo made need not be hashable


class Line(NamedTuple):
    """A place in the user's code, kept unrendered until somebody reads it."""

    code: CodeType
    number: int

    def __str__(self) -> str:
        text = linecache.getline(self.code.co_filename, self.number).strip()
        where = f"{os.path.basename(self.code.co_filename)}:{self.number} in {self.code.co_name}"
        return f"{where}: {text}" if text else where


def user_line(depth: int = 1) -> Line | None:
    """The innermost line on the stack that lies neither in torch nor in aotfunc."""
    frame = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        mine = _is_user.get(name)
        if mine is None:
            mine = _is_user[name] = not name.startswith(_NOT_THE_USERS)
        if mine:
            return Line(code, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def line_of(error: BaseException) -> Line | None:
    """The innermost of the user's lines that an error came through."""
    found, step = None, error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_OURS, _TORCH, "<frozen")):
            found = Line(step.tb_frame.f_code, step.tb_lineno)
        step = step.tb_next
    return found


def outside_dynamo(f: Callable) -> Callable:
    """Mark ``f`` as something that Dynamo does not look into: inside ``torch.compile`` a call of it is a graph break,
    and what it calls runs as it is. (Dynamo's own ``disable`` would import Dynamo, which takes seconds.)
    """
    eval_frame = torch._C._dynamo.eval_frame
    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(f.__code__, eval_frame._FrameExecStrategy(skip, skip))
    f._torchdynamo_disable = True  # type: ignore[attr-defined]
    return f


def at(line: Line | None) -> str:
    """`` (at file:line in function: source)``, or nothing where the line is not known."""
    return f" (at {line})" if line else ""
