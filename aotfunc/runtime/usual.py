"""The usual backward of a call with one node of autograd: all cotangents arrive, and go to the
compiled backward half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.fx import Node

from ..backends.results import is_lazy
from .batched import older_levels
from .execute import new_layout
from .guards.check import metadata_check
from .guards.keys import TENSORS, first_alike
from .unpacked import unpacked

if TYPE_CHECKING:
    from .halves import Halves


_gradients, _default_dtype = torch.is_grad_enabled, torch.get_default_dtype
_autocast, _function_mode = (
    torch._C._is_any_autocast_enabled,
    torch._C._is_torch_function_mode_enabled,
)
_inside_functorch = torch._C._functorch.peek_interpreter_stack


def op_by_op() -> bool:
    """Return whether PyTorch's own transforms are at work (torch.func's, forward AD): values are
    then batched or dual, and compiled code sees none of that."""
    return _inside_functorch() is not None or forward_ad._current_level >= 0


def unaffected(dtype: torch.dtype) -> bool:
    """Return whether a backward runs outside of any mode and transform, with this default dtype,
    and no second derivative is asked for."""
    return not (
        _gradients()
        or _inside_functorch() is not None
        or forward_ad._current_level >= 0
        or _autocast()
        or _function_mode()
        or _default_dtype() is not dtype
    )


#: how many layouts of cotangents are known at a time
LAYOUTS = 4


class UsualBackward:
    """The backward half of the only node of a call, as it is."""

    def __init__(self, halves: Halves) -> None:
        self.half, self.count = halves.backward, len(halves.saved)
        self.name, self.done = halves.call.__name__, frozenset(halves.whole[0])
        self.strides = [halves.vals[i].stride for i in halves.whole[0]]
        #: the values that compiled code need not look at again: whether they are such, and the
        #: cotangents among them that are to be laid out
        self.known: list[tuple[Callable[..., bool], list[int]]] = []
        self.unchecked: Callable[[list], Sequence] | None = None

    def run(self, values: list[Any]) -> Callable[[list], Sequence] | None:
        """Return the compiled half for residuals and cotangents like these, which are laid out as
        it takes them; None if some do not arrive, or are batches."""
        for alike, strange in self.known:
            if alike(*values):
                for k in strange:
                    values[k] = new_layout(values[k])
                return self.unchecked
        if older_levels() or any([c is None for c in values[self.count :]]):
            return None
        other = unpacked(values, self.half.program.placeholders[: self.count], self.name)
        given, strange = [*values], []
        for k, strides in enumerate(self.strides, self.count):
            if (c := values[k]).stride() != strides:
                values[k] = new_layout(c)
                strange.append(k)
        run = self.half.compiled(values)
        plain = not other and all([t.__class__ in TENSORS and not is_lazy(t) for t in values])
        if plain and first_alike(given) is None:  # the check refuses a tensor that is there twice
            unchecked = getattr(run, "unchecked", None)
            self.unchecked = run if unchecked is None else unchecked.boxed
            self.known = [(metadata_check(given), strange), *self.known[: LAYOUTS - 1]]
        return run


def usual_backward(halves: Halves) -> UsualBackward | None:
    """Return the usual backward of a call; None if the results of its backward half are not the
    gradients, or there is more to do than to run it."""
    if halves.met or halves.unseen or halves.bent or halves.late_reads or halves.reads_state:
        return None
    residuals = halves.forward.program.outputs[halves.early :]
    if not all([isinstance(x, Node) for x in (*residuals, *halves.backward.program.outputs)]):
        return None
    if not all([halves.vals[i].plain for i in halves.whole[0]]):
        return None
    return UsualBackward(halves)
