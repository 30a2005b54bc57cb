"""A call of ``f`` recorded, and the program that the recording stands for: looked up by the recording's key, built
when it is new.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..debug import at, line_of
from ..errors import CaptureError
from ..graph import Program
from ..trace.emit import Builder, paused_gc
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.traced import Traced, current
from ..trace.tracer import Trace, recording
from ..trace.tree import flatten, unflatten
from . import intent
from .steps import GradStep
from .tidy import REWRITES, retidy

_programs: OrderedDict[tuple, Program] = OrderedDict()
_LIMIT = 4096


class Recording:
    """What one call did: the trace, the leaves that it returned, and which of them are tensors."""

    def __init__(self, trace: Trace, result: Any, names: Callable[[], Sequence[str]]) -> None:
        self.trace, self.names = trace, names
        self._program: Program | None = None
        self.leaves, self.spec = flatten(result)
        self.tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        found = [trace.ref_of(self.leaves[i]) for i in self.tensors]
        self.refs = tuple([ref for ref, _ in found])
        self.sigs = [sig for _, sig in found]

    @property
    def closed_over(self) -> list[Tensor]:
        return self.trace.lifted

    def program(self) -> Program:
        """The functional program: inputs, then closed-over tensors, to the tensors among the results."""
        if self._program is not None:
            return self._program
        key = (self.trace.key(), self.refs)
        program = _programs.get(key)
        if program is None:
            program = _programs[key] = self._build()
            if len(_programs) > _LIMIT:
                _programs.popitem(last=False)
        self._program = program
        return program

    def _build(self) -> Program:
        trace = self.trace
        # torch.autograd.grad inside f tells equal nodes apart, so with it merging has to wait
        plain = any(r[0].__class__ is GradStep for r in trace.records)
        with paused_gc():
            b = Builder(None, merge=False) if plain else Builder(REWRITES)
            f = Functionalizer(trace, b, input_nodes(trace, b, self.names()))
            f.run()
            mutated = f.mutated()
            shared = {self.refs[i] for i, _ in self.shared()}
            outs = [*(self._returned(f, r, r in shared) for r in self.refs), *(n for _, n in mutated)]
            program = Program(b.finish(outs), len(trace.inputs), len(self.refs), [i for i, _ in mutated], "capture")
        return retidy(program, "capture") if plain else program

    def _returned(self, f: Functionalizer, ref: int, shared: bool) -> Any:
        node = f.shown(ref) if shared else f.read(ref)
        if node in f.made_inside:  # a constant that f makes anew: nobody may get hold of ours
            return f.b.make("call_function", torch.ops.aten.clone.default, (node,), {}, node.meta["val"])
        return node

    @property
    def roots(self) -> list[int]:
        """For each returned tensor the value that it is a view of, or itself."""
        shared, _ = self.trace.roots(conjugates=False)
        return [shared.get(r, r) for r in self.refs]

    @property
    def aliases(self) -> tuple[tuple[int, int], ...]:
        """``(position, root)`` of those among the returned tensors that share memory with an input, a closed-over
        tensor or one another.
        """
        known = self.program().cache.get("aliases")
        if known is None:
            known = self.program().cache["aliases"] = self.shared()
        return known

    def shared(self) -> tuple[tuple[int, int], ...]:
        roots, count = self.roots, len(self.trace.inputs)
        return tuple((i, r) for i, r in enumerate(roots) if r < count or roots.count(r) > 1)

    def results(self, tensors: Sequence[Tensor]) -> Any:
        """The returned tree with these tensors in it."""
        leaves = list(self.leaves)
        for i, t in zip(self.tensors, tensors, strict=True):
            leaves[i] = t
        return unflatten(leaves, self.spec)


def record(
    f: Callable,
    leaves: Sequence[Any],
    rebuild: Callable[[Sequence[Any]], tuple[list, dict]],
    *,
    samples: dict[int, Any] | None = None,
    differentiated: Sequence[int] = (),
    batch: Any = None,
    why_not: str | None = None,
    constants: bool = True,
    name_of: Callable[[], Sequence[str]] | None = None,
) -> Recording:
    """Run ``f`` once on traced values that stand for the tensors among ``leaves``.

    ``samples[i]`` is the signature to use for leaf i instead of its own (a sample of a batch), and ``batch`` says what
    batch (:class:`~aotfunc.asked.Samples`). ``differentiated``
    leaves report ``requires_grad``. With ``why_not`` values may not be asked for, and it says why; with ``constants``
    those of closed-over tensors may.
    """
    intent.install()
    trace = Trace(why_not, constants)
    values = list(leaves)
    reals = []
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            if samples is not None and i in samples:
                t = trace.new(samples[i])
                trace.inputs.append(t)
                if x.requires_grad:
                    trace.leaves[t.ref] = True
            else:
                t = trace.input(x)
                if x.requires_grad:
                    trace.leaves[t.ref] = True
                    if x.is_leaf and x.__class__ is not Traced and i not in differentiated:
                        trace.protected.add(t.ref)
            values[i] = t
            reals.append(x)
    for i in differentiated:
        trace.leaves[values[i].ref] = True
    trace.samples = batch
    if why_not is None:
        dims = [None] * len(reals) if batch is None else batch.dims
        trace.concrete_inputs = [x if d is None else None for x, d in zip(reals, dims, strict=True)]
    trace.origins = reals
    args, kwargs = rebuild(values)
    with recording(trace):
        try:
            result = f(*args, **kwargs)
        except RuntimeError as e:
            if "data is not allocated" not in str(e):
                raise
            raise CaptureError(
                f"an op that reads its argument's memory itself was given a traced value{at(line_of(e))}; "
                "pass it Python numbers (x.tolist())"
            ) from e
        recording_ = Recording(trace, result, name_of or (lambda: ()))
    return recording_


def parameter_names(f: Callable, args: Any) -> Callable[[], list[str]]:
    """Names for the leaves of a call, after the function's parameters."""

    def names() -> list[str]:
        try:
            parameters = list(inspect.signature(f).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        found: list[str] = []
        for i, span in enumerate(args.spans):
            p = parameters[min(i, len(parameters) - 1)] if parameters else None
            variadic = p is None or p.kind is p.VAR_POSITIONAL
            base = "arg" if p is None else p.name
            name = f"{base}_{i}" if variadic else base
            tensors = [k for k in span if isinstance(args.leaves[k], Tensor)]
            spec = args.specs[i]
            labels = leaf_labels(spec) if spec is not None else [""]
            found += [f"{name}{labels[k - span.start]}" for k in tensors]
        start = args.spans[-1].stop if args.spans else 0
        labels = leaf_labels(args.kw_spec) if args.kw_spec is not None else []
        found += [
            labels[k - start].lstrip("_") for k in range(start, len(args.leaves)) if isinstance(args.leaves[k], Tensor)
        ]
        return found

    return names


def leaf_labels(spec: TreeSpec) -> list[str]:
    """``_key`` or ``_0`` for each leaf of a tree, joined along the path."""
    if spec.is_leaf():
        return [""]
    keys = spec.context if isinstance(spec.context, list) else range(spec.num_children)
    labels = []
    for i, child in enumerate(spec.children()):
        key = list(keys)[i] if i < len(list(keys)) else i
        labels += [f"_{key}{rest}" for rest in leaf_labels(child)]
    return labels


__all__ = ["Recording", "Traced", "current", "parameter_names", "record"]
