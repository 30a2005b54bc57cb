"""Record a call of ``f``; look the program up by the recording's key, or build it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from ..debug import at, line_of_error
from ..errors import CaptureError
from ..progress import doing, is_shown
from ..trace.dtensors import is_dtensor, stand_in
from ..trace.entering import as_outside
from ..trace.following import Following
from ..trace.kinds import KINDS
from ..trace.recording import record_into
from ..trace.tensor_classes import class_facts
from ..trace.traced import Traced, attributes, current, quiet
from ..trace.tracer import Trace, on_functions
from . import patches
from .captured import Captured
from .concretize import agreed
from .gathering import exchanged, is_sharded
from .instances import reassigned
from .plain_trees import flatten_plain
from .tree import Arguments, leaf_labels


def capture(
    f: Callable,
    leaves: Sequence[Any],
    rebuild: Callable[[list], tuple[list, dict]],
    *,
    samples: dict[int, Any] | None = None,
    differentiated: Sequence[int] = (),
    batch: Any = None,
    why_not: str | None = None,
    constants: bool = True,
    outside: Collection[int] = (),
    numbers: bool = False,
    following: Following | None = None,
    rolls: bool | None = None,
    name_of: Callable[[], Sequence[str]] | None = None,
    dtensors: bool = False,
    apart: bool = False,
) -> Captured:
    """Run ``f`` once on traced values that stand for the tensors among ``leaves``.

    ``samples[i]`` is the signature to use for leaf i instead of its own (a sample of a batch), and
    ``batch`` says what batch (:class:`~aotfunc.capture.followed.Samples`). ``differentiated``
    leaves report ``requires_grad``. With ``why_not`` values may not be asked for, and it says why;
    with ``constants`` those of closed-over tensors may. ``numbers``: Python numbers may be inputs
    of the program; those of ``following``, which stand among the leaves, are. ``rolls``: recurrent
    layers are loops; None: as in the recording around.

    What has no batch dimension, where others have, is passed as it is, as in torch.func. A tensor
    that is passed twice, or that ``f`` also closes over, is one traced value; as in torch.func,
    not where some are differentiated, nor if it is batched, nor ``apart``. Those whose ``id`` is
    among ``outside``, which ``f`` also closes over, are passed as they are. ``dtensors`` may be
    among the tensors."""
    # see outside_inference_mode, which takes longer for so many arguments
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return capture(**locals())
    patches.install()
    trace, outer = Trace(why_not, constants, ask=agreed), current()
    if rolls or (rolls is None and outer is not None and outer.rolls):
        trace.rolls = True
    if numbers and (outer is None or outer.lifts_numbers) and not under_fake_mode():
        trace.lifts_numbers = True
    if following is not None:
        trace.following = following
    if dtensors and outer is None:
        trace.dtensors = True
    autograd, reals = trace.autograd, trace.origins
    values = list(leaves)
    first: dict[int, Traced] = {}
    computed, protected = list[int](), list[int]()
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            reals.append(x)
            sampled = samples is not None and i in samples
            t = trace.input_like(samples[i]) if sampled else trace.input(x)  # type: ignore[index]
            if x.requires_grad:
                autograd.leaves[t.ref] = True
                if sampled or i in differentiated:
                    pass
                elif not x.is_leaf:
                    computed.append(t.ref)
                elif x.__class__ is not Traced:
                    protected.append(t.ref)
            if not (sampled or differentiated or apart):
                t = first.setdefault(id(x), t)
                trace.stand_for(t, x)
            if x.__dict__ and (given := attributes(x)):
                t.__dict__.update(given)
            if not (sampled or differentiated):  # torch.func wraps all of these
                t.__dict__.update(class_facts(x))
            # an index may stand beside traced ones
            whole = samples is not None and not sampled and x.dim()
            values[i] = x if whole or id(x) in outside else t
            if dtensors and trace.dtensors and is_dtensor(x) and values[i] is t:
                values[i] = stand_in(t, x)
    for i in differentiated:
        autograd.leaves[values[i].ref] = True
    if computed or protected:
        autograd.computed, autograd.protected = frozenset(computed), frozenset(protected)
    if batch is not None:
        trace.samples = batch
    if why_not is None:
        if batch is None:
            trace.concrete_inputs = [*reals]
        elif None not in batch.dims:
            trace.concrete_inputs = [None] * len(reals)
        else:
            trace.concrete_inputs = [
                x if d is None else None for x, d in zip(reals, batch.dims, strict=True)
            ]
    args, kwargs = rebuild(values)
    trees = kwargs or not KINDS.issuperset(map(type, args))
    if trees:
        args, kwargs = with_known_sizes(trace, (args, kwargs), values, leaves)

    def call() -> Captured:
        try:
            result = as_outside(f, *args, **kwargs)
        except RuntimeError as e:
            if (better := refusal_of(e)) is None:
                raise
            raise better from e
        if trees and reassigned((args, kwargs), values):
            raise CaptureError(
                "the function assigns to an attribute of an argument, which the caller would not "
                "see: arguments are made anew for each capture; return the new value instead"
            )
        return Captured(trace, result, name_of or (lambda: ()))

    if is_shown() or is_sharded():
        with doing(lambda: recorded_so_far(trace)), exchanged():
            recorded = record_into(trace, call)
    else:
        recorded = record_into(trace, call)
    if trace.seeds.drawn:
        trace.seeds.check()
    return recorded


def with_known_sizes(trace: Trace, tree: Any, values: Sequence, leaves: Sequence) -> Any:
    """Return arguments whose packed sequences have the sizes of their steps as constants:
    recurrent layers read these from memory. A sample of a batch does not know them."""
    packed = lambda x: isinstance(x, PackedSequence)
    if flatten_plain(tree) is not None or not any(map(packed, tree_leaves(tree, is_leaf=packed))):
        return tree
    reals = {id(v): x for v, x in zip(values, leaves, strict=True)}

    def known(p: Any) -> Any:
        sizes = reals.get(id(p.batch_sizes))
        if sizes is None or p.batch_sizes.shape != sizes.shape or sizes.__class__ is Traced:
            return p
        with quiet():
            constant = sizes.clone()
        trace.made_inside |= {trace.lift(constant)}
        return p._replace(batch_sizes=constant)

    return tree_map(lambda x: known(x) if packed(x) else x, tree, is_leaf=packed)


def recorded_so_far(trace: Trace) -> str:
    """Return how many ops have been recorded, and the line of the last one."""
    line = trace.records[-1][-1] if trace.records else None
    return f"capture, {len(trace.records):,} ops{at(line)}"


def refusal_of(error: RuntimeError) -> CaptureError | None:
    """Return our words for PyTorch's error about a traced value; None for any other error."""
    line = at(line_of_error(error))
    if type(error).__module__ == "torch._dynamo.exc":
        if (operator := called_by(error)) is not None:
            return on_functions(operator)
        return CaptureError(
            f"a function that torch.compile has compiled does not take traced values{line}; call "
            "the function that it was made from, or capture inside "
            'torch.compiler.set_stance("force_eager")'
        )
    if str(error) == f"{LEAF}.":
        return CaptureError(
            f"{LEAF}{line}. If it is a view of what was written to since: make the view after "
            "that write"
        )
    if "data is not allocated" in str(error):
        return CaptureError(
            "an op that reads its argument's memory itself was given a traced "
            f"value{line}; pass it Python numbers (x.tolist())"
        )
    return None


#: C++'s errors about leaves, also for views whose memory has got a history since
LEAF = "a leaf Variable that requires grad is being used in an in-place operation"


def under_fake_mode() -> bool:
    """Return whether FakeTensors are made here, which a number's tensor would not mix with."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def called_by(error: BaseException) -> str | None:
    """Return the operator on functions in which Dynamo raised an error."""
    step = error.__traceback__
    while step is not None:
        folder, file = os.path.split(step.tb_frame.f_code.co_filename)
        if (
            os.path.basename(folder) in ("_higher_order_ops", "attention")
            and file.removesuffix(".py") in OPERATORS
        ):
            return file.removesuffix(".py")
        step = step.tb_next
    return None


OPERATORS = ("flex_attention",)


def as_called(f: Callable) -> Callable:
    """Return ``f`` with gradients off, or in inference mode, if that is so here, as a recording
    sets both; forward_ad still sees what autograd would not."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode()(f)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return f

    def without_gradients(*args: Any, **kwargs: Any) -> Any:  # torch.no_grad()(f) costs more
        with torch.no_grad():
            return f(*args, **kwargs)

    return without_gradients


def parameter_names(f: Callable, args: Any) -> Callable[[], list[str]]:
    """Return names for the leaves of a call, after the function's parameters."""

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
            labels[k - start].lstrip("_")
            for k in range(start, len(args.leaves))
            if isinstance(args.leaves[k], Tensor)
        ]
        return found

    return names


def argument_names(f: Callable, count: int) -> list[str]:
    """Return the names of ``count`` positional arguments of ``f``; ``*args`` are numbered."""
    called = f.forward if isinstance(f, torch.nn.Module) else f
    try:
        parameters = inspect.signature(called).parameters.items()
        names = [
            n for n, p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]


def labelled(f: Callable, arguments: Arguments) -> tuple[list[str], list[Any]]:
    """Return a name for each leaf of a call, and the leaf."""
    names: list[str] = []
    for base, spec in zip(argument_names(f, len(arguments.specs)), arguments.specs, strict=True):
        names += [f"{base}{rest}" for rest in (leaf_labels(spec) if spec is not None else [""])]
    if arguments.kw_spec is not None:
        names += [label.lstrip("_") for label in leaf_labels(arguments.kw_spec)]
    return names, arguments.leaves
