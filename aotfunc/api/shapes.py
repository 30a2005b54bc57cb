"""Tell what a function returns without running it; make the tensors it reads arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.tree import Arguments
from ..debug import at, user_line
from ..errors import CaptureError
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
    arguments = Arguments(args, {}, f)
    call = Call("closure_convert", f, arguments, (), False, apart=True)
    if call.program.mutated:
        raise CaptureError(
            "closure_convert: the function writes to an argument or to a tensor from outside"
            f"{at(user_line())}; return the new value instead"
        )
    count = len(args)

    def pure(*values: Any) -> Any:
        given = tensors_of(Arguments(values[:count], {}, f))
        return call.tree(execute(call.program, [*given, *values[count:]]))

    return pure, list(call.rec.closed_over)
