"""The recording of one call of a function, and its program, looked up by the recording's key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Node

from ..cache import Cache
from ..errors import CaptureError
from ..graph import Program, weight
from ..trace.aliases import Shown, final_views
from ..trace.arrays import as_returned, check_arrays
from ..trace.dtensors import undistributed
from ..trace.emit import Builder, paused_gc
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.kinds import is_fake
from ..trace.nested import with_items
from ..trace.outside import check_stand_ins
from ..trace.scalars import TENSOR, bits_of
from ..trace.shared_parts import check_shared_parts
from ..trace.traced import Traced, quiet
from ..trace.tracer import Trace
from ..transforms.tidy import rebuilt
from .deferred import check_calls, check_checkpoints
from .grad_step import builder_for
from .live_hooks import TensorHooks
from .makers import with_makers
from .recorded_makers import makers_of, unread
from .tree import flatten, unflatten

aten = torch.ops.aten

#: recording's key -> its programs, weighed in nodes: each takes one or two kilobytes with all that
#: is derived from it
_programs = Cache(1 << 16, weight)


_NONE = nullcontext()


class Numbers:
    """Recordings' Python numbers: the ``first`` ones, and the positions that have ``varied``."""

    def __init__(self, first: tuple) -> None:
        self.first = first
        self.varied: tuple[int, ...] = ()

    def inputs(self, now: tuple) -> tuple[tuple[int, ...], ...]:
        """Return the positions of each number that becomes an input; equal ones share it."""
        if now != self.first:
            changed = {i for i, (x, y) in enumerate(zip(now, self.first, strict=True)) if x != y}
            if not changed.issubset(self.varied):
                self.varied = tuple(sorted(changed.union(self.varied)))
        places: dict[Any, list[int]] = {}
        for i in self.varied:
            places.setdefault(now[i], []).append(i)
        return tuple(map(tuple, places.values()))


class Captured:
    """The recording of one call: the trace, its leaves, and which of them are tensors."""

    refs: tuple[int, ...]
    _program: Program | None = None
    _key: Any = None
    numbers: tuple[tuple[int, ...], ...] = ()  # positions of those that are inputs
    literal = False  # no number may be an input

    def __init__(self, trace: Trace, result: Any, names: Callable[[], Sequence[str]]) -> None:
        self.trace, self.names = trace, names
        plain = not (trace.rebound or trace.arrays)
        if plain and result.__class__ is Traced and result.tracer is trace:
            self.leaves, self.spec, self.tensors, self.refs = [result], None, [0], (result.ref,)
        else:
            self._flatten(result)
        if trace.arrays:
            check_arrays(trace)
            trace.arrays = ()
        if trace.stand_ins:
            check_stand_ins(trace, self.refs)
        if trace.mutates:
            check_shared_parts(trace, self.refs)
            check_calls(trace)
            check_checkpoints(trace)

    def _flatten(self, result: Any) -> None:
        """Set the leaves of the result, and the numbers of its tensors."""
        trace = self.trace
        self.leaves, self.spec = flatten(result)
        if trace.arrays:
            self.leaves = [as_returned(trace, x) for x in self.leaves]
        if trace.dtensors:
            self.leaves = [*map(undistributed, self.leaves)]
        self.tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        if len(self.tensors) < len(self.leaves):
            for x in self.leaves:
                if isinstance(x, Iterator | Awaitable):
                    raise CaptureError(
                        f"the function returns a {type(x).__name__}, which would go on when the "
                        "capture is over; return a list or a tuple of the values"
                    )
        #: the returned tensors, then those in the new memory of arguments and closed-over tensors
        self.refs = tuple(
            [trace.ref_of(self.leaves[i])[0] for i in self.tensors]
            + [ref for ref, *_ in (trace.rebound or {}).values()]
        )

    @cached_property
    def seen(self) -> dict[int, Shown]:
        """Find the memory that each value shows, see :func:`~aotfunc.trace.aliases.final_views`. A
        value that Functions passed on has memory of its own, unless another shows it."""
        found = final_views(self.trace)
        paths = [found[r].path if r in found else [Shown(r)] for r in self.refs]
        for step in {step for path in paths for step in path if step.passed}:
            root = step.root
            if root >= len(self.trace.inputs) and all(
                step in path for path in paths if path[0].ref == root
            ):
                # no other value shows that memory
                step.of, step.apart, step.passed = None, False, False
        return found

    @property
    def returned(self) -> list[Shown]:
        """Find the memory that each returned tensor shows."""
        return [self.seen.get(r) or Shown(r) for r in self.refs]

    @property
    def roots(self) -> list[int]:
        """Return the value that each returned tensor is a view of, or itself if passed on."""
        return [next((s.ref for s in x.path[:0:-1] if s.passed), x.root) for x in self.returned]

    @property
    def enables(self) -> bool:
        """Return whether the function ran with gradients off and turned them on inside."""
        off = not torch.is_grad_enabled() and forward_ad._current_level < 0  # see as_called
        return off and any(grad for _, _, grad, *_ in self.trace.records)

    def gradients(self) -> AbstractContextManager:
        """Turn gradients on around its program if the function turned them on."""
        on = self.enables and not torch.is_inference_mode_enabled()
        return torch.enable_grad() if on else _NONE

    @property
    def key(self) -> Any:
        """Return the key of its programs. Asking for it decides which numbers are inputs."""
        if self._key is None:
            self._key = self.keyed()
        return self._key

    def keyed(self) -> Any:
        key = (self.trace.key(), self.refs)
        if not self.trace.numbers:
            return key
        now = bits_of(self.trace.numbers)
        known = _programs.once(key, lambda: Numbers(now))
        if self.literal:
            return known, (), now
        self.numbers = known.inputs(now)
        fixed = (
            now
            if not known.varied
            else tuple([x for i, x in enumerate(now) if i not in known.varied])
        )
        return known, self.numbers, fixed

    @property
    def closed_over(self) -> list[Tensor]:
        """Return the inputs of its programs after the function's own."""
        if self._key is None:
            self._key = self.keyed()
        return self.trace.lifted if not self.numbers else self.with_numbers

    @cached_property
    def with_numbers(self) -> list[Tensor]:
        trace = self.trace
        with quiet():
            how = {"dtype": TENSOR.dtype, "device": TENSOR.device}
            numbers = [torch.tensor(trace.numbers[at], **how) for at, *_ in self.numbers]
        fake: Any = next(filter(is_fake, (*trace.origins, *trace.lifted)), None)
        return [
            *trace.lifted,
            *(map(fake.fake_mode.from_tensor, numbers) if fake is not None else numbers),
        ]

    def program(self, memory: tuple[tuple[int, bool], ...] | None = None) -> Program:
        """Return the functional program: inputs, then closed-over tensors, to the tensors among
        the results. ``memory`` lists other results instead, pairs of a value and a flag: the
        value, or the whole memory that it was made with."""
        if memory is None and self._program is not None:
            return self._program
        if self._key is None:
            self._key = self.keyed()
        key = (*self._key, memory)
        program = _programs[key]
        if program is None:
            program = self._build(memory)
            _programs.put(key, program)
        if memory is None:
            self._program = program
        return program

    def _build(self, memory: tuple[tuple[int, bool], ...] | None) -> Program:
        trace = self.trace
        with paused_gc():
            b, plain = builder_for(trace)
            f = self._functionalizer(b)
            f.run()
            mutated = f.mutated()
            if memory is None:
                shared = {self.refs[i] for i, _ in self.shared()}
                found = [f.shown(r) if r in shared else f.read(r) for r in self.refs]
                results = [*map(f.as_made, self.refs, found)]
            else:
                results = [self._memory(f, r) if whole else f.read(r) for r, whole in memory]
            outs = [*results, *(n for _, n in mutated)]
            program = Program(
                b.finish(outs), len(trace.inputs), len(results), [i for i, _ in mutated], "capture"
            )
        program = rebuilt(program, "capture") if plain else program
        refs = self.refs if memory is None else [r for r, _ in memory]
        return with_makers(program, makers_of(trace, refs), unread(trace, refs))

    def _functionalizer(self, b: Builder) -> Functionalizer:
        inputs, numbers = input_nodes(self.trace, b, self.names()), {}
        for places in self.numbers:
            numbers.update(dict.fromkeys(places, b.placeholder("number", TENSOR, role="const")))
        return Functionalizer(self.trace, b, inputs, numbers=numbers)

    def _memory(self, f: Functionalizer, ref: int) -> Node:
        """Return a value's memory, without copies into parts; cut if its views are detached."""
        node = f.as_made(ref, f.memory(ref))
        if node.meta["val"].offset and f.trace.mutates and f.env[ref].storage.memory.version:
            node = f.fitted(f.b.call(aten.clone.default, node), f.env[ref].storage.sig)
        paths = [
            s.path for r in self.refs if (s := self.seen.get(r)) is not None and s.root == ref
        ]
        alone = ref not in self.refs and all(
            any(s.call[0] is aten.detach.default for s in path[1:]) for path in paths
        )
        return f.detached(node) if alone and node.meta["val"].differentiable else node

    def as_recorded(self, memory: tuple[tuple[int, bool], ...]) -> Program:
        """Return :meth:`program` op by op, without rewriting or merging; its last results are the
        returned tensors, and values with hooks that autograd calls."""
        trace = self.trace
        with paused_gc():
            b = Builder(None, merge=False)
            f = self._functionalizer(b)
            f.direct = False
            f.run()
            outs = [self._memory(f, r) if whole else f.read(r) for r, whole in memory]
            returned: dict[int, Node] = {}
            outs += [n for _, n in f.mutated()]
            for ref, n in {r: f.read(r) for r in self.refs}.items():
                # one tensor for each result
                returned[ref] = b.call(aten.alias.default, n) if n in returned.values() else n
            outs += [returned[r] for r in self.refs]
            # (kept for earlier values, which depend on them)
            outs += [f.read(h.ref) for h in trace.live_hooks or () if isinstance(h, TensorHooks)]
            return Program(b.finish(outs), len(trace.inputs), len(outs), (), "capture")

    @property
    def aliases(self) -> tuple[tuple[int, int], ...]:
        """List ``(position, root)`` of the returned tensors that share memory."""
        return (self._program or self.program()).once("aliases", self.shared)

    def shared(self) -> tuple[tuple[int, int], ...]:
        roots, count = self.roots, len(self.trace.inputs)
        return tuple((i, r) for i, r in enumerate(roots) if r < count or roots.count(r) > 1)

    def whole_views(self) -> list[tuple[int, int]]:
        """List ``(position, input)`` of the results that the program takes for an input, where the
        function returned a view of all of it (``x[:]``)."""
        trace, program = self.trace, self.program()
        itself = dict(enumerate(trace.finals))
        return [
            (i, trace.position(root))
            for i, root in self.shared()
            if root < len(trace.inputs)
            and program.outputs[i] is program.placeholders[trace.position(root)]
            and self.refs[i] != itself.get(root, root)
        ]

    def unlike_inputs(
        self, tensors: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return these results, the last ones, with another tensor on the same memory in place of
        an input where the function returned one."""
        views = (self._program or self.program()).once("whole views", self.whole_views)
        if not views:
            return tensors
        found, skipped = list(tensors), len(self.refs) - len(tensors)
        for i, at in views:
            k = i - skipped
            if k >= 0 and (found[k] is inputs[at] or isinstance(found[k], Traced)):
                found[k] = found[k].view_as(found[k])
        return found

    def results(self, tensors: Sequence[Tensor]) -> Any:
        """Return the returned tree with these tensors."""
        if len(self.tensors) < len(self.leaves):
            tensors = with_items(self.leaves, self.tensors, tensors)
        return unflatten(tensors, self.spec)
