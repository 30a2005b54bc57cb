"""Run a function eagerly, perhaps in float64, and undo what it writes, draws and binds."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..capture.tree import flatten
from ..errors import CaptureError
from ..runtime.guards.reads import CLOSED, Names, library_of_module
from ..runtime.guards.state import look
from ..runtime.guards.stores import undo_changes
from ..trace.modes import device_generators
from ..trace.shapes.sig import floating
from .as_python import as_python

WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}


class Rehearsal(TorchDispatchMode):
    """Run ops eagerly, in float64 if ``wide``; keep what they write to and draw from."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.kept: dict[int, tuple[Callable, Any]] = {}
        self.made: dict[int, StorageWeakRef] = {}
        self.eps = 0.0  # eps of the least precise dtype

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = (args, kwargs or {})
        counts = "batch_norm" in op._schema.name  # statistics, which a lazy module has just made
        writes = op._schema.is_mutable or counts
        for x in tree_leaves(given):
            if isinstance(x, torch.Generator) and id(x) not in self.kept:
                self.kept[id(x)] = x.set_state, x.get_state()
            elif isinstance(x, Tensor):
                if floating(x):
                    self.eps = max(self.eps, torch.finfo(x.dtype).eps)
                if not writes:
                    continue
                memory = x.untyped_storage()
                if memory._cdata not in self.kept and (counts or not self.is_made(memory)):
                    self.kept[memory._cdata] = memory.copy_, memory.clone()
        before = {memory._cdata for memory in memories(given)}
        more = widened if self.wide else lambda x: x
        args, kwargs = tree_map(more, given)
        result = tree_map(more, op(*args, **kwargs))
        for memory in memories(result):
            if memory._cdata not in before:
                self.made[memory._cdata] = StorageWeakRef(memory)
        return result

    def is_made(self, memory: Any) -> bool:
        """Return whether the memory was made in this block, before which it held nothing."""
        made = self.made.get(memory._cdata)
        return made is not None and not made.expired()


def memories(x: Any) -> list[Any]:
    """Return the memory of each tensor in a tree; sparse ones have none of their own."""
    tensors = [e for e in tree_leaves(x) if isinstance(e, Tensor)]
    return [t.untyped_storage() for t in tensors if t.layout is torch.strided]


def widened(x: Any) -> Any:
    """Return a tensor, or a dtype, with more digits."""
    if isinstance(x, torch.dtype):
        return WIDE.get(x, x)
    return x.to(WIDE[x.dtype]) if isinstance(x, Tensor) and x.dtype in WIDE else x


@contextlib.contextmanager
def rehearsed(wide: bool = False, spared: Sequence[Any] = ()) -> Iterator[Rehearsal]:
    """Undo all draws and writes inside the block, except writes to the memory of ``spared``."""
    mode = Rehearsal(wide)
    places = {memory._cdata for memory in memories(list(spared))}
    mode.kept |= {
        id(random): (random.setstate, random.getstate()),
        id(np.random): (np.random.set_state, np.random.get_state()),
    }
    mode.kept |= {id(g): (g.set_state, g.get_state()) for g in device_generators()}
    try:
        with mode:
            yield mode
    finally:
        for key, (restore, before) in mode.kept.items():
            if key not in places:
                restore(before)


class Outside:
    """The Python state that ``f`` and the objects among ``leaves`` reach. With a lazy module among
    it nothing is undone until the module has its shapes, as parameters keep the memory that they
    get; nor after a run that imports the user's modules, which happens once."""

    def __init__(self, f: Callable, leaves: Sequence[Any]) -> None:
        self.f, self.leaves = f, leaves
        self.remember()

    def remember(self) -> None:
        """Take the state of now for the one to return to."""
        objects = [x for x in self.leaves if not isinstance(x, Tensor)]
        labels = [f"object {i}" for i in range(len(objects))]
        self.state = None
        with contextlib.suppress(CaptureError):
            self.state = look(self.f, objects, labels, Names())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Undo, at the end of the block, all changes of the state."""
        modules = set(sys.modules)
        try:
            yield
        finally:
            new = sys.modules.keys() - modules
            if self.state is None or any(library_of_module(m) not in CLOSED for m in new):
                self.remember()
            else:
                undo_changes(self.state)


class EagerRun:
    """An eager run of ``f`` on copies of ``leaves``: ``outs`` and ``aux``, the leaves of its
    result, ``given``, the copies after it, and ``pulled``, the cotangents of the leaves ``wrt``
    among these, then of tensors that ``f`` closes over."""

    def __init__(self, check: Any, leaves: Sequence[Any], wide: bool = False) -> None:
        copies = copied(leaves, [id(leaves[k]) for k in check.wrt], wide)
        roots = [copies[id(leaves[k])].requires_grad_() for k in check.wrt]
        # eager refuses writes to a leaf that requires grad
        given = {k: x.clone() if x.requires_grad else x for k, x in copies.items()}
        self.given = [given.get(id(x), x) for x in leaves]
        grad_mode = torch.set_grad_enabled(check.derives or torch.is_grad_enabled())
        with grad_mode, check.outside.kept(), as_python(), rehearsed(wide, self.given) as mode:
            args, kwargs = check.arguments.rebuilt(self.given)
            result = check.reference(*args, **kwargs)
            output, aux = result if check.has_aux else (result, ())
            outs = flatten(output)[0]
            if check.closed is None:
                check.closed = check.more(outs, roots)
            found = pulled(outs, [*roots, *check.closed], check.cotangents(outs))
            # ``f`` may have written to tensors that it made
            kept = lambda xs: [x.detach().clone() if isinstance(x, Tensor) else x for x in xs]
            self.outs, self.aux, self.pulled = kept(outs), kept(flatten(aux)[0]), kept(found)
            self.eps = mode.eps


def copied(leaves: Sequence[Any], apart: Sequence[int], wide: bool) -> dict[int, Tensor]:
    """Return copies of the tensors by their ids. They share memory as these do, except those
    ``apart``, by id, which become leaves of autograd."""
    copies, groups = {}, dict[Any, dict[int, Tensor]]()
    for x in filter(lambda x: isinstance(x, Tensor), leaves):
        alone = id(x) in apart or x.layout is not torch.strided or x.is_conj() or x.is_neg()
        place = id(x) if alone else (x.untyped_storage()._cdata, x.dtype)
        groups.setdefault(place, {})[id(x)] = x
    more = widened if wide else lambda x: x
    for group in groups.values():
        x, *others = group.values()
        if not others:
            copies[id(x)] = more(x.detach().clone())
            continue
        size = x.untyped_storage().nbytes() // x.itemsize
        whole = more(x.detach().as_strided((size,), (1,), 0).clone())
        for x in group.values():
            copies[id(x)] = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    return copies


def pulled(outs: Sequence[Any], wrt: Sequence[Tensor], w: Sequence[Tensor]) -> list[Tensor]:
    """Return the cotangents of ``wrt`` for those of the floating results."""
    pairs = zip(filter(floating, outs), w, strict=True)
    given = [(x, c.to(x.dtype)) for x, c in pairs if x.requires_grad]
    if not given or not wrt:
        return [torch.zeros_like(x) for x in wrt]
    results, cotangents = zip(*given, strict=True)
    found = torch.autograd.grad(results, wrt, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wrt, found, strict=True)]


def leaves_behind(outs: Sequence[Any], known: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of autograd's graph that results depend on, without the known ones."""
    found, seen, queue = [], set(), [x.grad_fn for x in outs if isinstance(x, Tensor)]
    while queue:
        step = queue.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        queue += [s for s, _ in step.next_functions]
        x = getattr(step, "variable", None)
        if x is not None and not any(x is k for k in known):
            found.append(x)
    return found
