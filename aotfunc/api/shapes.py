"""Tell what a function returns without running it; make the tensors it reads arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture.tree import Arguments, Operands, unflatten
from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import Program
from ..runtime.execute import execute
from ..trace.entering import entry
from ..trace.shapes.sig import Sig
from .call import Call, tensors_of


@entry
def eval_shape(f: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the tree of ``f(*args, **kwargs)`` with tensors on the meta device: shapes, strides
    and dtypes. Nothing is computed, and the arguments may be on the meta device, too. Raises
    CaptureError if ``f`` cannot be captured.

    >>> eval_shape(lambda x: x @ x.mT, torch.empty(3, 5, device="meta")).shape
    torch.Size([3, 3])
    """
    call = Call("eval_shape", f, Arguments(args, kwargs, f), (), False)
    vals = [v for v in call.program.vals if isinstance(v, Sig)]
    return call.tree(
        [torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device="meta") for v in vals]
    )


@entry
def closure_convert(f: Callable, *args: Any) -> tuple[Callable, list[Tensor]]:
    """Return ``(pure, tensors)``: ``pure(*args, *tensors)`` is ``f(*args)`` as a function of the
    tensors that ``f`` closes over.

    ``pure`` takes arguments of the trees, shapes and Python values of ``args``, and is ``f`` as it
    was captured, for a rule that must differentiate what the user's function closes over. Raises
    CaptureError if ``f`` writes to a tensor from outside.

    >>> w = torch.tensor(3.0)
    >>> pure, tensors = closure_convert(lambda x: x * w, torch.tensor(2.0))
    >>> tensors, pure(torch.tensor(2.0), torch.tensor(5.0))
    ([tensor(3.)], tensor(10.))
    """
    call = Call("closure_convert", f, Arguments(args, {}, f), (), False, apart=True)
    if call.program.mutated:
        raise CaptureError(
            "closure_convert: the function writes to an argument or to a tensor from outside"
            f"{at(user_line())}; return the new value instead"
        )
    whole = tuple([i for i, _ in call.program.once("whole views", call.rec.whole_views)])
    output = Operands((unflatten(call.rec.leaves, call.spec),), opened=True).without_tensors()
    return Pure(call.program, len(args), output, whole), list(call.rec.closed_over)


@dataclass(frozen=True)
class Pure:
    """A function of ``count`` arguments, and of the tensors that it closed over: its program, and
    its output without tensors, some of which are ``whole`` views of inputs. It keeps no tensor
    alive, and is equal to another that was captured alike."""

    program: Program
    count: int
    output: Operands
    whole: tuple[int, ...]

    def __call__(self, *values: Any) -> Any:
        given = tensors_of(Arguments(values[: self.count], {}))
        outs = execute(self.program, [*given, *values[self.count :]])
        found = [x.view_as(x) if i in self.whole else x for i, x in enumerate(outs)]
        return self.output.rebuilt(found)[0]
