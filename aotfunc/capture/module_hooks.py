"""Record full backward hooks and pre-hooks of modules.

As in eager, an identity in front of the module and one behind it call the hooks when the reverse
walk passes. The hooks are recorded as programs of the gradients. A hook is given the gradients of
the module's outputs and inputs together: a :class:`HookedCall` takes those of the outputs from the
identity behind to the one in front."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.hooks import BackwardHook

from ..trace.emit import Builder
from ..trace.patches import ORIGINALS, Attribute, recorder
from ..trace.tracer import Trace
from ..transforms.vjp import contiguous_sig
from ..transforms.walk import filled_node
from .autograd_function import BEGIN, End
from .custom_derivative import CustomDerivative, RuleProgram, failing, is_ours, splice_rule
from .deferred import Deferred, calls_late
from .function_rules import patterns
from .live_hooks import Identity, ModuleHooks, SharedIdentity
from .recorded_rule import recorded_rule


class HookedCall(SharedIdentity):
    """One call of a module, between its two identities."""

    def __init__(self) -> None:
        super().__init__()
        #: reverse walk -> (the hooks' program for the present gradients, these, what it closes
        #: over)
        self.given: WeakKeyDictionary[Builder, tuple[Any, list, list]] = WeakKeyDictionary()
        self._batched: WeakKeyDictionary[Any, HookedCall] = WeakKeyDictionary()

    def batched(self, walk: Any) -> HookedCall:
        return self._batched.setdefault(walk, HookedCall())


class Front(Identity):
    """The identity in front of a module: hooks may replace the gradients of its inputs."""

    link: HookedCall

    def call(self, hooks: ModuleHooks) -> Callable[[Sequence[Any]], list[Any]]:
        return hooks.front

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        inputs = self.parts(n)[0]
        # the path to the input does not pass the output
        if (found := self.link.given.pop(b, None)) is None:
            return inputs, [g.get(i) for i in range(self.n_outputs)]
        part, cotangents, residuals = found
        if is_ours(part):
            raise part
        if isinstance(part, Exception):
            return inputs, failing(b, part, g, inputs)
        mine = [
            g[i] if i in g else filled_node(b, 0, v)
            for i, v in enumerate(self.vals)
            if v.differentiable
        ]
        return inputs, splice_rule(b, part, [*mine, *cotangents], residuals)

    def batched(self, walk: Any, vals: tuple, batched: Callable[[Any], Any]) -> CustomDerivative:
        return Front(self.__name__, vals, (), self.link.batched(walk))


class Behind(Identity):
    """The identity behind a module, whose pre-hooks may replace gradients of its outputs."""

    link: HookedCall

    def __init__(
        self, name: str, vals: tuple, backward: tuple, link: HookedCall, hooks: dict, saved: int
    ) -> None:
        super().__init__(name, vals, backward, link)
        self.hooks, self.saved, self.unguarded = hooks, (None,) * saved, tuple(range(saved))

    @property
    def rules(self) -> list:
        return [*super().rules, *self.hooks.values()]

    def call(self, hooks: ModuleHooks) -> Callable[[Sequence[Any]], list[Any]]:
        return hooks.behind

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        inputs, cotangents = super().pull(b, n, g, active, again)
        have = tuple(i in g for i, v in enumerate(self.vals) if v.differentiable)
        if (part := self.hooks.get(have, self.hooks.get(None))) is not None:
            self.link.given[b] = (
                part,
                [c for c in cotangents if c is not None],
                self.parts(again)[2],
            )
        return inputs, cotangents

    def batched(self, walk: Any, vals: tuple, batched: Callable[[Any], Any]) -> CustomDerivative:
        backward = tuple((have, batched(part)) for have, part in self.backward.items())
        hooks = {have: batched(part) for have, part in self.hooks.items()}
        return Behind(
            self.__name__, vals, backward, self.link.batched(walk), hooks, len(self.saved)
        )


def setup_input_hook(hook: Any, args: tuple) -> tuple:
    trace = recorder()
    if trace is None:
        return ORIGINALS["setup_input_hook"](hook, args)
    hook.n_inputs, hook.input_tensors_index, hook.link = len(args), None, HookedCall()
    if not tracked(args):
        return args
    hook.input_tensors_index, vals = tensors_among(trace, args)
    front = Front(f"{type(hook.module).__name__}_input", vals, (), hook.link)
    hook.input_vals = vals
    return record_identity(trace, args, hook.input_tensors_index, End(front), "")[1]


def setup_output_hook(hook: Any, args: Any) -> Any:
    trace = recorder()
    if trace is None:
        return ORIGINALS["setup_output_hook"](hook, args)
    outs = args if isinstance(args, tuple) else (args,)
    if not tracked(outs):
        return args
    places, vals = tensors_among(trace, outs)
    name = f"{type(hook.module).__name__}_output"
    first = End(Behind(name, vals, (), hook.link, {}, 0))
    waiting, outs = record_identity(
        trace, outs, places, first, f"a hook of {type(hook.module).__name__}"
    )
    mine = waiting.hooks = ModuleHooks(hook.module, hook.user_hooks, hook.user_pre_hooks)
    mine.n_inputs, mine.inputs = hook.n_inputs, hook.input_tensors_index or ()
    mine.n_outputs, mine.outputs = len(outs), places

    def make(d: Deferred) -> tuple[End, list[int]]:
        if d.live:
            hook.link.live = mine
            return first, []
        calls_late(*hook.user_pre_hooks, *hook.user_hooks)
        return hooked_identity(d, hook, name, mine.n_outputs, places, vals)

    waiting.wait(make)
    return outs if isinstance(args, tuple) else outs[0]


def hooked_identity(
    waiting: Deferred, hook: Any, name: str, count: int, places: list[int], vals: tuple
) -> tuple[End, list[int]]:
    """Return the identity behind a module, its hooks as programs, and what they read."""
    residuals: list[int] = []

    def part(rule: Callable, sigs: Sequence[Any]) -> Any:
        made = recorded_rule(waiting.name, rule, sigs, hook)
        if isinstance(made, Exception):
            return made
        program, trace = made
        refs = waiting.refs(trace.lifted)
        if isinstance(refs, Exception):
            return refs
        residuals.extend(refs)
        return RuleProgram(program, len(residuals) - len(refs), len(refs))

    backwards, hooks = [], {}
    floats = [v.differentiable for v in vals]
    for have in patterns(sum(floats), materialize=False):
        present = iter(have or (True,) * sum(floats))
        here = [i for i, yes in zip(places, floats, strict=True) if yes and next(present)]
        sigs = [contiguous_sig(v) for i, v in zip(places, vals, strict=True) if i in here]
        before = part(
            lambda *gs, here=here: pre_hooked(hook, values_at(count, here, gs), places), sigs
        )
        backwards.append((have, before))
        if hook.input_tensors_index is None or not isinstance(before, RuleProgram):
            continue
        given = before.program.outputs
        there = [i for i, o in zip(places, given, strict=True) if o is not None]
        mine = [
            i
            for i, v in zip(hook.input_tensors_index, hook.input_vals, strict=True)
            if v.differentiable
        ]
        sigs = [contiguous_sig(v) for v in hook.input_vals if v.differentiable]

        def after(*gs: Tensor, mine: list = mine, there: list = there) -> list:
            inner, outer = gs[: len(mine)], gs[len(mine) :]
            return hooked(
                hook, values_at(hook.n_inputs, mine, inner), values_at(count, there, outer)
            )

        hooks[have] = part(after, [*sigs, *(o.meta["val"] for o in given if o is not None)])
    return End(Behind(name, vals, tuple(backwards), hook.link, hooks, len(residuals))), residuals


def tracked(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in values
    )


def tensors_among(trace: Trace, values: Sequence[Any]) -> tuple[list[int], tuple]:
    """Return the positions and signatures of the tensors among ``values``."""
    places = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
    return places, tuple(trace.ref_of(values[i])[1] for i in places)


def record_identity(
    trace: Trace, values: tuple, places: list[int], step: End, name: str
) -> tuple[Deferred, Any]:
    """Record the identity of values at ``places``; return it, with the step that may wait."""
    tensors = [values[i] for i in places]
    trace.record(BEGIN, tensors)
    results = trace.record(step, [*tensors, *tensors])
    new = dict(zip(places, results, strict=True))
    found = [new.get(i, x) for i, x in enumerate(values)]
    whole = tuple(found) if type(values) is tuple else type(values)(*found)
    return Deferred(trace, name, tensors, results, ()), whole


# ----- what eager does when the gradients are there ----------------------------------------------


def values_at(size: int, places: Sequence[int], values: Sequence[Any]) -> tuple:
    given = dict(zip(places, values, strict=True))
    return tuple(given.get(i) for i in range(size))


def pre_hooked(hook: Any, gradients: tuple, places: Sequence[int]) -> list:
    """Return a module's output gradients after its pre-hooks; perhaps call its hooks."""
    for f in hook.user_pre_hooks:
        gradients = replaced("pre hook", "grad_output", f(hook.module, gradients), gradients)
    if hook.input_tensors_index is None:
        if hook.user_hooks:
            warnings.warn(
                "a full backward hook is called with the gradients of a module's outputs alone, "
                "since no input requires grad",
                stacklevel=2,
            )
        for f in hook.user_hooks:
            changed = f(hook.module, (None,) * hook.n_inputs, gradients)
            if changed is not None and any(x is not None for x in changed):
                raise RuntimeError(
                    "Backward hook for Modules where no input requires gradient should always "
                    "return None or None for all gradients."
                )
    return [gradients[i] for i in places]


def hooked(hook: Any, gradients: tuple, outer: tuple) -> list:
    """Return the gradients of a module's inputs after its hooks."""
    for f in hook.user_hooks:
        gradients = replaced("hook", "grad_input", f(hook.module, gradients, outer), gradients)
    return [gradients[i] for i in hook.input_tensors_index]


def replaced(kind: str, what: str, new: Any, old: tuple) -> Any:
    if new is None:
        return old
    if len(new) != len(old):
        raise RuntimeError(
            f"Backward {kind} returned an invalid number of {what}, got {len(new)}, but expected "
            f"{len(old)}"
        )
    return new


#: the functions that ``nn.Module`` calls if there are such hooks
PATCHES = tuple(
    Attribute(f.__name__, BackwardHook, f.__name__, f)
    for f in (setup_input_hook, setup_output_hook)
)
