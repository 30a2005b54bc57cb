"""What autograd would hide from a recording, written down: ``autograd.grad``, ``.backward()``, hooks, checkpoints
(for ``autograd.Function`` see :mod:`.function`).

These entry points of torch are redirected while a recording is under way in the calling thread, and do what they
always did otherwise. The code object of each function is exchanged, not its name, so that names bound earlier (``sq =
Sq.apply``) come along.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import Function
from torch.utils import module_tracker
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from .. import debug
from ..debug import at
from ..errors import CaptureError
from ..trace import outside
from ..trace.patches import ORIGINALS, recorded, redirect
from ..trace.records import instr_op, written_slots
from ..trace.shapes import Instr, contiguous_stride, fill, make_sig
from ..trace.traced import HOOKS, Traced, current, quiet, under_way
from ..trace.tracer import Trace
from . import module_hooks, outside_graphs
from .function import Context, apply_function, call_function, floating
from .rules.ctc import recordable
from .rules.packed import padded
from .steps import GradStep, interned

_installed = False


def install() -> None:
    """Redirect torch's entry points, once; each step may be done again by another thread."""
    global _installed
    if _installed:
        return
    apply = Function.apply.__func__  # type: ignore[attr-defined]
    redirect("apply", apply, applied, _ApplyTemplate.__dict__["apply"].__func__)
    redirect("grad", torch.autograd.grad, autograd_grad, _grad_template)
    redirect("backward", torch.autograd.backward, autograd_backward, _backward_template)
    redirect("ctc_loss", torch.nn.functional.ctc_loss, ctc_loss, _ctc_loss_template)
    redirect("seed", torch.random.manual_seed, manual_seed, _seed_template)
    redirect("random_seed", torch.random.seed, random_seed, _random_seed_template)
    redirect("get_state", torch.random.get_rng_state, get_rng_state, _get_state_template)
    redirect("set_state", torch.random.set_rng_state, set_rng_state, _set_state_template)
    redirect("fastpath", torch.backends.mha.get_fastpath_enabled, None, _fastpath_template)
    ORIGINALS.setdefault("checkpoint", torch_checkpoint._checkpoint_without_reentrant_generator)
    torch_checkpoint._checkpoint_without_reentrant_generator = checkpoint_region
    undisturbed(torch_checkpoint.checkpoint)
    HOOKS["register_hook"] = register_hook
    outside.install()
    module_hooks.install()
    ORIGINALS.setdefault("numpy", Tensor.numpy)
    Tensor.numpy = numpy_of_a_constant  # type: ignore[method-assign]
    ORIGINALS.setdefault("deepcopy", Tensor.__deepcopy__)
    Tensor.__deepcopy__ = deepcopy_of_a_constant  # type: ignore[method-assign]
    ORIGINALS.setdefault("rebuild", torch._utils._rebuild_tensor)
    torch._utils._rebuild_tensor = unpickled
    ORIGINALS.setdefault("tolist", Tensor.tolist)
    Tensor.tolist = tolist_of_a_constant  # type: ignore[method-assign]
    ORIGINALS.setdefault("any_requires_grad", torch._C._any_requires_grad)
    torch._C._any_requires_grad = any_requires_grad
    ORIGINALS.setdefault("pad_packed", torch._VF._pad_packed_sequence)
    torch._VF._pad_packed_sequence = pad_packed
    graph = torch.autograd.graph
    ORIGINALS.setdefault("saved_hooks", graph.saved_tensors_hooks.__enter__)
    graph.saved_tensors_hooks.__enter__ = enter_saved_tensors_hooks  # type: ignore[method-assign]
    redirect("multi_hook", graph.register_multi_grad_hook, register_multi_grad_hook, _multi_hook_template)
    _installed = True


def undisturbed(f: Callable) -> None:
    """Let a function that PyTorch keeps Dynamo out of import it no sooner than other code does."""
    body = f.__wrapped__  # type: ignore[attr-defined]

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return body(*args, **kwargs)
        del body.__dynamo_disable  # PyTorch keeps there what it calls for `f`, and now makes its own
        return f(*args, **kwargs)

    body.__dynamo_disable = call


def enter_saved_tensors_hooks(self: Any) -> None:
    """Hooks that change what a derivative reads are refused, as a graph saves other tensors than autograd does. Where
    a tensor is kept meanwhile makes no difference to it.
    """
    if recorded() is not None and not isinstance(self, torch.autograd.graph.save_on_cpu):
        raise CaptureError(
            f"saved_tensors_hooks inside a captured function are not supported{at(debug.user_line())}: enter them "
            "around it (save_on_cpu may be inside)"
        )
    return ORIGINALS["saved_hooks"](self)


def any_requires_grad(*args: Any, **kwargs: Any) -> bool:
    """What a custom op asks before it calls its registered backward as an ``autograd.Function``."""
    if recorded() is None:
        return ORIGINALS["any_requires_grad"](*args, **kwargs)
    return any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))


def register_multi_grad_hook(*_: Any, **__: Any) -> RemovableHandle:
    """Hooks of several tensors are refused; those of FlopCounterMode, which follow modules backward, do nothing."""
    if sys._getframe(2).f_code.co_filename == module_tracker.__file__:
        return RemovableHandle(OrderedDict())
    raise CaptureError(f"hooks of several tensors inside a captured function are not supported{at(debug.user_line())}")


@functools.wraps(Tensor.numpy)
def numpy_of_a_constant(self: Tensor, *, force: bool = False) -> Any:
    """Memory of a tensor from outside; what torch does on the way must not be recorded."""
    if current() is None:
        return ORIGINALS["numpy"](self, force=force)
    value = constant(self)
    with quiet():
        return ORIGINALS["numpy"](value, force=force)


def tolist_of_a_constant(self: Tensor) -> Any:
    """Values of a tensor from outside."""
    return ORIGINALS["tolist"](constant(self))


def deepcopy_of_a_constant(self: Tensor, memo: dict) -> Tensor:
    """A copy of a tensor from outside, as a new leaf."""
    if current() is None or under_way.quiet:
        return ORIGINALS["deepcopy"](self, memo)
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def unpickled(*parts: Any) -> Tensor:
    """A tensor in memory that pickle has read, as one from outside."""
    trace = current()
    if trace is None or under_way.quiet:
        return ORIGINALS["rebuild"](*parts)
    if not trace.may_ask_constants:
        raise CaptureError(
            f"a tensor is unpickled in a function that is compiled once{at(debug.user_line())}: do so outside"
        )
    with quiet():
        return ORIGINALS["rebuild"](*parts)


def constant(t: Tensor) -> Tensor:
    """The value of a tensor from outside, if it may be asked for."""
    trace = current()
    return t if trace is None or under_way.quiet else trace.value(t)


class _ApplyTemplate:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore[name-defined] # noqa: B018 - the original has this one free variable
        if _aotfunc_recording() is None:  # type: ignore[name-defined] # noqa: F821
            return _torch_apply(cls, *args, **kwargs)  # type: ignore[name-defined] # noqa: F821
        return _aotfunc_apply(cls, *args, **kwargs)  # type: ignore[name-defined] # noqa: F821


def _grad_template(  # type: ignore[no-untyped-def]
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph=False,
    only_inputs=True,
    allow_unused=None,
    is_grads_batched=False,
    materialize_grads=False,
):
    f = _torch_grad if _aotfunc_recording() is None else _aotfunc_grad  # type: ignore[name-defined] # noqa: F821
    return f(
        outputs,
        inputs,
        grad_outputs,
        retain_graph,
        create_graph,
        only_inputs,
        allow_unused,
        is_grads_batched,
        materialize_grads,
    )


def _backward_template(  # type: ignore[no-untyped-def]
    tensors, grad_tensors=None, retain_graph=None, create_graph=False, grad_variables=None, inputs=None
):
    f = _torch_backward if _aotfunc_recording() is None else _aotfunc_backward  # type: ignore[name-defined] # noqa: F821
    return f(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)


def _multi_hook_template(tensors, fn, *, mode="all"):  # type: ignore[no-untyped-def]
    f = _torch_multi_hook if _aotfunc_recording() is None else _aotfunc_multi_hook  # type: ignore[name-defined] # noqa: F821
    return f(tensors, fn, mode=mode)


def _seed_template(seed):  # type: ignore[no-untyped-def]
    f = _torch_seed if _aotfunc_recording() is None else _aotfunc_seed  # type: ignore[name-defined] # noqa: F821
    return f(seed)


def _set_state_template(new_state):  # type: ignore[no-untyped-def]
    f = _torch_set_state if _aotfunc_recording() is None else _aotfunc_set_state  # type: ignore[name-defined] # noqa: F821
    return f(new_state)


def _fastpath_template() -> bool:
    """nn's fused layers have no derivative. (What torch looks up is spelled out: Dynamo looks into this function.)"""
    return _is_fastpath_enabled and _aotfunc_recording() is None  # type: ignore[name-defined] # noqa: F821


def _random_seed_template():  # type: ignore[no-untyped-def]
    f = _torch_random_seed if _aotfunc_recording() is None else _aotfunc_random_seed  # type: ignore[name-defined] # noqa: F821
    return f()


def _get_state_template():  # type: ignore[no-untyped-def]
    f = _torch_get_state if _aotfunc_recording() is None else _aotfunc_get_state  # type: ignore[name-defined] # noqa: F821
    return f()


def _ctc_loss_template(  # type: ignore[no-untyped-def]
    log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False
):
    f = _torch_ctc_loss if _aotfunc_recording() is None else _aotfunc_ctc_loss  # type: ignore[name-defined] # noqa: F821
    return f(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)


def ctc_loss(*args: Any) -> Tensor:
    """The loss in a form that a recording can take."""
    return recordable(ORIGINALS["ctc_loss"], *args)


def pad_packed(data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor, Tensor]:
    """``torch.nn.utils.rnn.pad_packed_sequence``, likewise."""
    pad = ORIGINALS["pad_packed"] if recorded() is None else padded
    return pad(data, sizes, batch_first, value, length)


def drawn(trace: Trace) -> bool:
    """Whether random numbers were drawn already, as far as the recording goes: they are drawn when it runs."""
    return any(r[0].facts.random for r in trace.records)


def set_rng_state(new_state: Tensor) -> None:
    """The default generator's state may be set before the first draw, by a function that is run again each time."""
    ORIGINALS["set_state"](settable("torch.set_rng_state", new_state))


def manual_seed(seed: int) -> Any:
    """As :func:`set_rng_state`."""
    return ORIGINALS["seed"](settable("torch.manual_seed", seed))


def random_seed() -> int:
    """As :func:`set_rng_state`."""
    settable("torch.seed", None)
    return ORIGINALS["random_seed"]()


def get_rng_state() -> Tensor:
    """The default generator's state, as long as it is the one that the program will find."""
    settable("torch.get_rng_state", None)
    return ORIGINALS["get_state"]()


def settable(what: str, value: Any) -> Any:
    """``value``; raises CaptureError where the generator's state is set, or looked at, at another time than it runs."""
    trace = current()
    if trace is not None:
        if drawn(trace):
            trace.seeds.refuse(f"{what} after a draw inside a captured function, which draws when it runs")
        if not trace.may_ask_constants:
            trace.seeds.refuse(f"{what} inside a compiled function would run only once; call it outside")
        trace.seeds.setting()
    return value


# ----- autograd.grad and .backward() ---------------------------------------------------------------------------------


def autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """``torch.autograd.grad`` inside a recording: one recorded step."""
    trace = current()
    assert trace is not None
    outs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    keys = list(inputs) if isinstance(inputs, dict) else None
    ins = [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if keys is not None else inputs)
    if not any(isinstance(t, Traced) for t in (*outs, *ins)):
        return outside_graphs.along(
            outputs,
            inputs,
            grad_outputs,
            retain_graph,
            create_graph,
            only_inputs,
            allow_unused,
            is_grads_batched,
            materialize_grads,
        )
    gs = (
        [None] * len(outs)
        if grad_outputs is None
        else [grad_outputs]
        if isinstance(grad_outputs, Tensor)
        else list(grad_outputs)
    )
    for o, g in zip(outs, gs, strict=True):
        if g is None and (o.numel() != 1 or is_grads_batched):
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    size = gs[0].shape[0] if is_grads_batched else None  # type: ignore[union-attr]
    refs = [trace.ref_of(o)[0] for o in outs]
    ins = [before_hooks(x) if x.__class__ is Traced and x.tracer is trace else x for x in ins]
    inside = functools.partial(gradients_inside, trace, outs, gs, create_graph, size)
    grads = outside_graphs.gradients(trace, refs, ins, gs, inside, retain_graph, create_graph, is_grads_batched)
    if any(g is None for g in grads) and not (allow_unused or materialize_grads):
        raise CaptureError(
            f"one of the differentiated tensors was not used to compute the outputs{at(debug.user_line())}; "
            "allow_unused=True returns None for it"
        )
    if materialize_grads:
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, ins, strict=True)]
    return dict(zip(keys, grads, strict=True)) if keys is not None else tuple(grads)


def gradients_inside(
    trace: Trace, outs: Sequence, gs: Sequence, create_graph: bool, size: int | None, ins: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients in ``ins``, as far as the recording goes: None for those that do not lead to ``outs`` here."""
    refs = [trace.ref_of(o)[0] for o in outs]
    used = [trace.autograd.reaches(trace.ref_of(x)[0], refs) for x in ins]
    wanted = [x for x, yes in zip(ins, used, strict=True) if yes]
    if not wanted:
        return [None] * len(ins)
    for x in wanted:
        outside.check_hooks(trace, x, at(debug.user_line()))
    sigs = [trace.ref_of(x)[1].start for x in wanted]
    if size is not None:
        sigs = [make_sig(s := (size, *x.shape), contiguous_stride(s), x.dtype, x.device) for x in sigs]
    step = interned(GradStep, tuple(sigs), len(outs), tuple(g is not None for g in gs), bool(create_graph), size)
    found = iter(trace.record(step, [*outs, *(g for g in gs if g is not None), *wanted]))
    return [next(found) if yes else None for yes in used]


def autograd_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``.backward()`` inside a recording: gradients of the leaves that were made inside."""
    trace = current()
    assert trace is not None
    outs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gs = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    refs = [trace.ref_of(o)[0] for o in outs]
    if inputs is None:
        found, leaves = trace.autograd.leaves_of(refs)
    else:
        leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        found = [ref for ref, _ in map(trace.ref_of, leaves) if ref < len(trace.inputs)]
    if found:
        raise CaptureError(
            "`.backward()` inside a captured function would write the .grad of a tensor from outside"
            f"{at(debug.user_line())}; return the gradient instead, by torch.autograd.grad(...) or grad(f), or call "
            ".backward() on the result"
        )
    if not leaves:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    for x, g in zip(leaves, autograd_grad(outs, leaves, gs, create_graph=create_graph), strict=True):
        x.grad = g if x.grad is None else x.grad + g


# ----- checkpoints and hooks -----------------------------------------------------------------------------------------


def checkpoint_region(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Non-reentrant checkpointing inside a recording: what runs meanwhile is tagged, to be computed again in the
    backward.
    """
    trace = recorded()
    if trace is None:
        yield from ORIGINALS["checkpoint"](fn, *args, **kwargs)
        return
    outer, start = trace.region, len(trace.records)
    trace.region = trace.regions = trace.regions + 1
    try:
        yield
    finally:
        trace.region = outer
    context_fn = kwargs.get("context_fn", args[1] if len(args) > 1 else torch_checkpoint.noop_context_fn)
    if context_fn is not torch_checkpoint.noop_context_fn:
        keep_saved(trace, start, context_fn()[0])


def keep_saved(trace: Trace, start: int, context: Any) -> None:
    """Take out of a checkpointed region, whose records begin at ``start``, the ops that the policy of
    ``create_selective_checkpoint_contexts`` says to save.
    """
    if not hasattr(context, "policy_fn"):
        raise CaptureError(
            f"checkpoint(context_fn=...) with contexts of your own is not captured{at(debug.user_line())}; those of "
            "create_selective_checkpoint_contexts are"
        )
    save = (torch_checkpoint.CheckpointPolicy.MUST_SAVE, torch_checkpoint.CheckpointPolicy.PREFER_SAVE)
    told = torch_checkpoint.SelectiveCheckpointContext(is_recompute=False)
    for i, (instr, refs, grad, region, line) in enumerate(trace.records[start:], start):
        if isinstance(instr, Instr) and region == trace.regions:
            protos = [s.proto for s in instr.sigs]
            args, kwargs = fill(instr.args, protos), {k: fill(v, protos) for k, v in instr.kwargs.items()}
            if context.policy_fn(told, instr.op, *args, **kwargs) in save:
                trace.records[i] = (instr, refs, grad, None, line)


def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``Function.apply`` inside a recording; reentrant checkpoints are Functions, too. Without an argument that
    requires grad a compiled one has no derivative of what it closes over either.
    """
    if cls is not torch_checkpoint.CheckpointFunction:
        return apply_function(cls, *args, **kwargs)
    trace = current()
    assert trace is not None
    outer, records = trace.region, len(trace.records)
    trace.region = trace.regions = trace.regions + 1
    given = [a for a in args[2:] if isinstance(a, Tensor)]
    requiring = [a for a in given if a.requires_grad]
    try:
        with nullcontext() if trace.may_ask_constants or requiring else torch.no_grad():
            result = args[0](*args[2:])
    except RuntimeError as e:
        if "a leaf Variable that requires grad" in str(e):
            raise written_in_checkpoint() from e
        raise
    finally:
        trace.region = outer
    if trace.may_ask_constants or not (requiring and torch.is_grad_enabled()):
        return result
    roots = {trace.root(trace.ref_of(a)[0]) for a in given}
    if any(trace.root(refs[s]) in roots for instr, refs, *_ in trace.records[records:] for s in written_slots(instr)):
        raise written_in_checkpoint()
    return tree_map_only(Tensor, lambda t: requiring_grad(t, requiring), result)


def written_in_checkpoint() -> CaptureError:
    return CaptureError(
        f"a checkpoint writes to its argument{at(debug.user_line())}, and would do so again in the backward; say "
        "use_reentrant=False, or clone() it there"
    )


def requiring_grad(t: Tensor, because_of: Sequence[Tensor]) -> Tensor:
    """A result that requires grad as those of a Function do, though nothing of it has a derivative."""
    if t.requires_grad or not floating(t):
        return t
    return call_function("checkpoint", because_of, lambda ctx: t.clone(), Context(), lambda ctx, g: None)


def reads(instr: Any, refs: Sequence[int], ref: int) -> bool:
    """Whether a step has a derivative with respect to ``ref`` as it was before: not the value that it writes there."""
    return instr_op(instr) is not torch.ops.aten.detach.default and all(refs[s] != ref for s in written_slots(instr))


def register_hook(t: Traced, hook: Callable) -> Any:
    """A tensor hook: from here on ``t`` is a value whose cotangent passes through the hook. Refused where that is not
    what a hook of autograd's sees: what ``t`` was used for before, or an input's gradient after a write.
    """
    trace = t.tracer
    own = trace.root(t.ref)
    if any(t.ref in refs and grad and reads(instr, refs, t.ref) for instr, refs, grad, *_ in trace.records):
        raise CaptureError(f"a hook of a tensor that was used before{at(debug.user_line())}: register it at once")
    if own < len(trace.inputs) and own in trace.roots().written:
        raise CaptureError(
            f"a hook of an argument that was written to{at(debug.user_line())}: register it first, outside"
        )

    why = f"a tensor with a hook{at(debug.user_line())} shares memory, and one is written or both are returned; "
    why += "register the hook on a clone()"

    before = next((s for s in trace.stand_ins if s.hooks and s.new == t.ref), None)
    hooks = (hook,) if before is None else (*before.hooks, hook)
    source = trace.alias(t)
    value = old = source.ref = t.ref if before is None else before.old

    def backward(ctx: Any, g: Tensor) -> Tensor:
        for each in hooks:  # in this order
            changed = each(g)
            g = g if changed is None else changed
        return g

    if t.is_leaf and t.ref not in trace.autograd.leaves:  # a view made under no_grad, which no gradient reaches
        return _Handle()
    with torch.enable_grad():
        t.ref = call_function("hook", [source], lambda ctx: source.view_as(source), Context(), backward).ref
    trace.stand_ins.append(outside.StandIn(len(trace.records), value, old, t.ref, why, hooks))
    if own < len(trace.inputs):
        trace.hooked.add(t.ref)
    return _Handle()


def before_hooks(t: Traced) -> Traced:
    """The value that a tensor was before hooks were registered on it: its gradient has passed them."""
    hooked = {s.new: s.old for s in t.tracer.stand_ins if s.hooks}
    twin = t.tracer.alias(t)
    while twin.ref in hooked:
        twin.ref = hooked[twin.ref]
    return t if twin.ref == t.ref else twin


class _Handle:
    def remove(self) -> None:
        raise CaptureError(f"a tensor hook cannot be removed inside a captured function{at(debug.user_line())}")
