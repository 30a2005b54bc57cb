"""Run a program: record it, or run it on eager so that autograd can differentiate it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.fx import Node

from ..capture.calls import CallStep, hidden_writes, on_eager
from ..debug import outside_dynamo
from ..graph import Program
from ..trace.kinds import innermost
from ..trace.memory import storage_groups
from ..trace.modes import without_modes
from ..trace.node_views import storage_root
from ..trace.shapes.sig import Sig, contiguous_stride, reach
from ..trace.traced import under_way
from ..transforms.activity import flat_inputs, has_derivative, live
from ..transforms.lower import marked
from ..transforms.rules.table import entry_for
from ..transforms.vjp import cotangent_sig, vjp
from .aliasing import with_own_memory
from .batched import call_batched, check_draws
from .duals import pushed_program, refuse_cuts
from .late_reads import check_memory, storages
from .meetings import reaches_bent
from .own_nodes import may_lack_nodes, with_own_nodes
from .redraw import generator_states, redrawn
from .refused import check_kin, related, relation
from .unseen import Watched, check_hooks, unseen_in_transform

_functorch, _flag = torch._C._functorch, attrgetter("requires_grad")
_autocast, _function_modes = (
    torch._C._is_any_autocast_enabled,
    torch._C._is_torch_function_mode_enabled,
)
#: classes of tensors that several of are written to at once
PLAIN = (Tensor, torch.nn.Parameter)


def run_eager(program: Program) -> Callable[..., tuple]:
    """Return the program as a function of real tensors; mutated inputs are written back."""
    fn = on_eager(program)

    def call(*tensors: Tensor) -> tuple:
        outs = fn(*tensors)
        write_back(program, tensors, outs)
        return outs[: program.n_outputs]

    return call


def write_back(
    program: Program, tensors: Sequence[Tensor], outs: Sequence[Any], done: Collection[int] = ()
) -> None:
    """Give the written inputs their new values and derivatives. Inputs that have them already are
    skipped: a result that is the input itself may have been detached."""
    hidden = hidden_writes(program)
    news = with_own_memory(program, tensors, outs)[program.n_outputs :]
    if torch.is_grad_enabled() and any(new.requires_grad for new in news):
        flags = live(program, tuple(i for i, t in enumerate(tensors) if t.requires_grad))[
            program.n_outputs :
        ]
        news = [new if yes else new.detach() for new, yes in zip(news, flags, strict=True)]
    inside = forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack()
    unseen, their_news = [], []  # a network's statistics, or parameters, which one call copies
    for index, new, quiet in zip(program.mutated, news, hidden, strict=True):
        if index in done:
            continue
        t = tensors[index]
        if quiet and not inside and t.__class__ in PLAIN and new.__class__ is Tensor:
            if shows_memory(new, t):  # a backend has written to it
                if not t.is_inference():
                    torch.autograd.graph.increment_version(t)
                continue
            if not t.is_inference():
                unseen.append(t)
                their_news.append(new)
                continue
        if quiet and t.is_inference():
            t = t.detach()  # (outside of the mode it could not be written to itself)
        if quiet and (t.requires_grad or new.requires_grad):
            with torch.no_grad():
                t.copy_(new)
        else:
            t.copy_(new)
    if unseen:
        with torch.no_grad():
            torch._foreach_copy_(unseen, their_news)


def shows_memory(new: Tensor, t: Tensor) -> bool:
    """Return whether ``new`` is another tensor for all of the memory of ``t``."""
    return (
        new is not t
        and new.data_ptr() == t.data_ptr() != 0
        and new.shape == t.shape
        and new.stride() == t.stride()
        and new.dtype is t.dtype
    )


def execute(program: Program, tensors: Sequence[Tensor]) -> tuple:
    """Return the results of a program for these inputs and closed-over tensors."""
    if traces := under_way.traces:
        step = program.once(CallStep, lambda: CallStep(program, run_eager, with_own_nodes))
        return traces[-1].record(step, tensors)
    try:  # as `once` does, in this frame
        run = program.cache[single_call]
    except KeyError:
        run = program.cache[single_call] = single_call(program)
    if run is not None and not (_autocast() or _function_modes()):
        return run(*tensors)[: program.n_outputs]
    by_us = ours(program)
    forward = forward_ad._current_level >= 0
    if by_us and forward and _functorch.peek_interpreter_stack() is None:
        refuse_cuts(program, tensors)
    given = tensors
    if program.mutated and autograd_records(tensors):
        written = [tensors[i] for i in program.mutated]
        tensors = before_writes(written, tensors, range(len(tensors)))
    with without_modes():
        if by_us and (forward or autograd_records(tensors)):
            outs = ProgramFunction.apply(program, generator_states(program), *tensors)
            watch(program, outs)
        else:
            outs = eager_values(program, tensors)
            if by_us:
                outs = distinct(program, outs, program.n_outputs, tensors)
        if program.mutated:
            write_back(program, given, outs)
    return outs[: program.n_outputs]


def single_call(program: Program) -> Callable[..., tuple] | None:
    """Return the program as a function of real tensors if no more than a call of it is to be done:
    autograd differentiates its ops, and it writes to no input."""
    if program.mutated or ours(program) or has_control_flow(program):
        return None
    fn = on_eager(program)
    if not may_lack_nodes(program):
        return fn

    def call(*tensors: Tensor) -> tuple:
        run = on_eager(with_own_nodes(program)) if autograd_records(tensors) else fn
        return run(*tensors)

    return call


def autograd_records(tensors: Sequence[Tensor]) -> bool:
    """Return whether autograd records what is computed from these, outside of torch.func's vmap
    too: a batch does not say that what it is a batch of requires grad."""
    if not torch.is_grad_enabled():
        return False
    if any(map(_flag, tensors)):
        return True
    if _functorch.peek_interpreter_stack() is None:
        return False
    bare = [_functorch.get_unwrapped(t) for t in tensors if _functorch.is_batchedtensor(t)]
    return bool(bare) and autograd_records(bare)


def watch(program: Program, outs: Sequence) -> None:
    """Watch for hooks on results of which autograd does not see all."""
    for k in program.once(unseen_in_transform, lambda: unseen_in_transform(program)):
        if isinstance(outs[k], Tensor) and hasattr(node := outs[k].grad_fn, "watched"):
            node.watched[k] = Watched(outs[k])


def has_control_flow(program: Program) -> bool:
    """Return whether a program has nodes with bodies."""
    return program.once(
        has_control_flow, lambda: any(hasattr(n.target, "bodies") for n in program.graph.nodes)
    )


def eager_values(program: Program, tensors: Sequence[Tensor]) -> Sequence:
    """Return a program's outputs, run eagerly, without batches of torch.func's."""
    if has_control_flow(program):
        check_draws(program, tensors)
        return call_batched(lambda p, given: on_eager(p)(*given), program, tensors, whole)
    return on_eager(program)(*tensors)


def whole(program: Program, tensors: Sequence[Tensor]) -> Sequence:
    """Return all outputs of a program, which autograd can differentiate."""
    return execute(program.flat(), tensors)


def as_function(program: Program, name: str = "") -> Callable[..., list]:
    """Return the program as a Python function, to be captured again."""

    def run(*tensors: Tensor) -> list:
        return list(execute(program, tensors))

    run.__name__ = run.__qualname__ = name or program.name
    return run


def ours(program: Program) -> bool:
    """Return whether the derivative of a program's results must be taken from us."""
    return program.once(ours, lambda: marked(program) or beyond_autograd(program))


def lay_cotangents(
    cts: Sequence[Tensor | None], vals: Sequence[Any]
) -> tuple[tuple[Sig | None, ...], list[Tensor]]:
    """Return the layouts that cotangents of these values need, and the given ones laid so."""
    plan = tuple(
        [c if c is None else cotangent_sig(v, c.stride()) for c, v in zip(cts, vals, strict=True)]
    )
    pairs = zip(cts, plan, strict=True)
    return plan, [laid(c, sig) for c, sig in pairs if c is not None and sig is not None]


def laid(t: Tensor, sig: Sig) -> Tensor:
    """Return ``t`` laid out as this signature, which is contiguous or in channels_last. (Batches
    of torch.func's do not know memory formats.)"""
    if sig.plain:
        return new_layout(t)
    order = [0, *range(2, sig.ndim), 1]
    return new_layout(t.permute(order)).permute(0, -1, *range(1, sig.ndim - 1))


def new_layout(t: Tensor) -> Tensor:
    """Return ``t`` laid out as new; ``t.contiguous()`` leaves strides of size 1."""
    t = t.contiguous()
    if 1 in t.shape and t.stride() != contiguous_stride(t.shape):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def before_writes(
    written: Sequence[Tensor], tensors: Sequence[Tensor], kept: Collection[int]
) -> Sequence[Tensor]:
    """Return the tensors, with copies of those ``kept`` whose memory is to be ``written``."""
    if not written or not kept:
        return tensors
    held, found = [*kept], [*tensors]
    groups = storage_groups([innermost(t) for t in (*written, *[tensors[i] for i in held])])
    lost = {*groups[: len(written)]}
    for i, memory in zip(held, groups[len(written) :], strict=True):
        if memory in lost:
            found[i] = strided_copy(tensors[i])
    return found


def distinct(program: Program, outs: Sequence, count: int, tensors: Sequence[Tensor]) -> Sequence:
    """Replace those of the first ``count`` that are the same tensor as another, or an input:
    without its marks of intent a graph may compute two results in one node. The new ones share its
    memory if the results do (``x.detach()``)."""
    seen = set(map(id, tensors))
    total = len(seen)
    seen.update(map(id, outs[:count]))
    if len(seen) == total + count:
        return outs
    outputs = program.outputs
    results = program.once(
        "memory", lambda: [isinstance(n, Node) and storage_root(n) for n in outputs]
    )
    found = list(outs)
    first = {id(t): n for t, n in zip(tensors, program.placeholders, strict=True)}
    for i, (o, n) in enumerate(zip(found[:count], results, strict=False)):
        if isinstance(o, Tensor) and id(o) in first:
            found[i] = o.detach() if first[id(o)] is n else strided_copy(o)
        first.setdefault(id(o), n)
    return found


def strided_copy(t: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
    """Return a copy with this ``stride``, by default that of ``t``; ``clone()`` closes gaps and
    expansions."""
    copy, stride = t.clone(), t.stride() if stride is None else stride
    if copy.stride() == stride or not t.numel():
        return copy
    memory = copy.new_zeros(reach(t.shape, stride)).as_strided(t.shape, stride)
    once = tuple([slice(0, 1) if step == 0 else slice(None) for step in stride])
    memory[once] = copy[once]
    return memory


def beyond_autograd(program: Program) -> bool:
    """Return whether PyTorch would differentiate the graph wrongly or not at all."""
    return any(map(is_beyond_autograd, program.graph.nodes))


def is_beyond_autograd(n: Node) -> bool:
    """Return whether PyTorch has no derivative of a node, or a wrong one: so for some backward
    ops, writes to parts of complex tensors and to strided views, negative powers of two, and the
    mean and deviation that a normalisation returns beside its result."""
    if n.target is getitem:
        op, i = n.args[0].target, n.args[1]  # type: ignore[union-attr]
        return i in (1, 2) and entry_for(op).wrong_in_autograd == "statistics"
    if not isinstance(n.target, OpOverload):
        return False
    which = entry_for(n.target).wrong_in_autograd
    if which == "complex":
        return n.meta["val"].dtype.is_complex
    return which == "all" or "_backward" in n.target._schema.name


def zero_tangent(sig: Any) -> Tensor:
    """Return the tangent of zeros of a result."""
    return torch.zeros(sig.shape, dtype=sig.dtype, device=sig.device)


def alive(program: Program, tensors: Sequence[Tensor]) -> Sequence[bool]:
    """Return which of the results have a derivative."""
    forward = forward_ad._current_level >= 0  # any may have a tangent
    return live(program, tuple(i for i, t in enumerate(tensors) if t.requires_grad or forward))


class ProgramFunction(torch.autograd.Function):
    """An un-jitted program as one autograd node. Its backward is our vjp of the program, run in
    the same way and so differentiable again; it draws the random numbers of the forward again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: Program, states: list, *tensors: Tensor) -> tuple:  # type: ignore
        outs = eager_values(program, tensors)
        pairs = zip(
            distinct(program, outs, len(outs), tensors), alive(program, tensors), strict=True
        )
        # a view of a tensor that requires grad would require grad, too
        return tuple(
            [
                o if yes or not isinstance(o, Tensor) or not o._is_view() else o.detach()
                for o, yes in pairs
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.program, ctx.states, *tensors = inputs
        # hooks of saved tensors give other tensors back
        kept = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        ctx.memory = storages(tensors) if kept else []
        ctx.dtype, ctx.kin = torch.get_default_dtype(), relation()
        ctx.watched = {}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        sample = _functorch.is_batchedtensor
        flags, vals = alive(ctx.program, tensors), ctx.program.flat().vals
        # torch.func.vmap loses the marks of samples
        ctx.flags = [
            yes or (has_derivative(v) and sample(o))
            for yes, v, o in zip(flags, vals, output, strict=True)
        ]
        marked = [o for o, yes in zip(output, ctx.flags, strict=True) if not yes]
        ctx.mark_non_differentiable(*[o for o in marked if isinstance(o, Tensor)])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        """Push tangents of torch's forward mode; our own forward mode does not come here."""
        program, given = ctx.program, tangents[2:]
        wrt = tuple(i for i, t in enumerate(given) if t is not None)
        with redrawn(ctx.states):
            outs = execute(
                pushed_program(program, wrt), [*ctx.saved_tensors, *(given[i] for i in wrt)]
            )
        pushed = zip(outs[len(program.outputs) :], program.flat().vals, ctx.flags, strict=True)
        # autograd takes None for the tangents of marked results, and of no others
        return tuple(
            [(zero_tangent(v) if t is None else t) if yes else None for t, v, yes in pushed]
        )

    @staticmethod
    @outside_dynamo
    def backward(ctx: Any, *cts: Tensor | None) -> tuple:
        program, tensors = ctx.program, ctx.saved_tensors
        check_memory(tensors, ctx.memory, "a transform")
        wrt = tuple(i for i, need in enumerate(ctx.needs_input_grad[2:]) if need)
        whole = program.flat()
        found = [c if has_derivative(v) else None for v, c in zip(whole.vals, cts, strict=True)]
        have = [c is not None for c in found]
        if ctx.watched:
            unseen, mine = unseen_in_transform, [i for i, yes in enumerate(have) if yes]
            check_hooks(ctx.watched, program.cache[unseen], mine, program.name)
        if reaches_bent(whole, wrt, [i for i, yes in enumerate(have) if yes]):
            check_kin(ctx, program.name)
        plan, given = lay_cotangents(found, whole.vals)
        joint = whole.once(("vjp", wrt, plan), lambda: vjp(whole, wrt, have, keep=(), plan=plan))
        with without_modes(ctx.dtype), redrawn(ctx.states), related(ctx):
            grads = call_batched(execute, joint, [*tensors, *given])
        zeros = set().union(*itertools.compress(flat_inputs(whole, wrt), have))
        result: list = [None] * (len(tensors) + 2)
        for i, g in zip(wrt, grads, strict=True):
            result[i + 2] = torch.zeros_like(tensors[i]) if g is None and i in zeros else g
        return tuple(result)
