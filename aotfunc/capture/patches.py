"""Exchange functions of torch at the first capture, all in one table, and put them back."""

# The templates get the names that they lack here with the globals of the code they replace.
# ruff: noqa: F821
# mypy: disable-error-code="name-defined"
from __future__ import annotations

import gc
import sys
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import Function
from torch.func import linearize
from torch.utils._pytree import tree_leaves

from .. import debug
from ..debug import at
from ..errors import CaptureError
from ..trace import collector, outside
from ..trace.above import above
from ..trace.patches import ORIGINALS, Attribute, Code, recorder
from ..trace.traced import under_way
from ..transforms.rules.ctc import recordable
from ..transforms.rules.packed import padded_sequences
from ..transforms.rules.table import entry_for
from . import module_hooks
from .checkpoints import checkpoint_region, recorded_apply
from .constants import deepcopy_of_a_constant, numpy_of_a_constant, tolist_of_a_constant, unpickled
from .generators import get_rng_state, initial_seed, manual_seed, random_seed, set_rng_state
from .gradients import autograd_backward, autograd_grad
from .hooks import register_multi_grad_hook


class Undisturbed:
    """A function that PyTorch keeps Dynamo out of, exchanged without importing Dynamo."""

    def __init__(self, f: Any) -> None:
        self.f, self.body = f, f.__wrapped__

    def install(self) -> None:
        setattr(self.body, "__dynamo_disable", self.call)

    def undo(self) -> None:
        if getattr(self.body, "__dynamo_disable", None) == self.call:
            # PyTorch keeps its wrapper of ``f`` there and makes a new one
            delattr(self.body, "__dynamo_disable")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return self.body(*args, **kwargs)
        self.undo()
        return self.f(*args, **kwargs)


def enter_saved_tensors_hooks(self: Any) -> None:
    """Refuse hooks that change what a derivative reads: a graph saves other tensors than autograd
    does. Hooks that only keep a tensor elsewhere make no difference."""
    if recorder() is not None and not isinstance(self, torch.autograd.graph.save_on_cpu):
        raise CaptureError(
            "saved_tensors_hooks inside a captured function are not "
            f"supported{at(debug.user_line())}: enter them around it (save_on_cpu may be inside)"
        )
    return ORIGINALS["saved_hooks"](self)


def any_requires_grad(*args: Any, **kwargs: Any) -> bool:
    """Return whether a custom op should call its registered backward as an
    ``autograd.Function``: not where the table has a rule for it."""
    if recorder() is None:
        return ORIGINALS["any_requires_grad"](*args, **kwargs)
    run = sys._getframe(1).f_locals.get("forward_no_grad")  # of the custom op that asks
    if run is not None and entry_for(getclosurevars(run).nonlocals.get("op")).vjp:
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))


class _ApplyTemplate:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore # noqa: B018 - the original has this one free variable
        if _aotfunc_recording() is None:
            return _torch_apply(cls, *args, **kwargs)
        return _aotfunc_apply(cls, *args, **kwargs)


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
    f = _torch_grad if _aotfunc_recording() is None else _aotfunc_grad
    rest = only_inputs, allow_unused, is_grads_batched, materialize_grads
    return f(outputs, inputs, grad_outputs, retain_graph, create_graph, *rest)


def _backward_template(  # type: ignore[no-untyped-def]
    tensors,
    grad_tensors=None,
    retain_graph=None,
    create_graph=False,
    grad_variables=None,
    inputs=None,
):
    f = _torch_backward if _aotfunc_recording() is None else _aotfunc_backward
    return f(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)


def _multi_hook_template(tensors, fn, *, mode="all"):  # type: ignore[no-untyped-def]
    f = _torch_multi_hook if _aotfunc_recording() is None else _aotfunc_multi_hook
    return f(tensors, fn, mode=mode)


def _seed_template(seed):  # type: ignore[no-untyped-def]
    f = _torch_seed if _aotfunc_recording() is None else _aotfunc_seed
    return f(seed)


def _set_state_template(new_state):  # type: ignore[no-untyped-def]
    f = _torch_set_state if _aotfunc_recording() is None else _aotfunc_set_state
    return f(new_state)


def _fastpath_template() -> bool:
    """Return False to torch while recording, as nn's fused layers have no derivative. (Torch's
    look-ups are spelled out, as Dynamo looks into this function.)"""
    return _is_fastpath_enabled and (_aotfunc_recording() is None or not _aotfunc_fastpath())


def _increment_version_template(tensor):  # type: ignore[no-untyped-def]
    if _aotfunc_recording() is not None:
        _aotfunc_increment_version()
    return _torch_increment_version(tensor)


def called_by_torch(frames: int = 2) -> bool:
    """Return whether the function of torch's that asks was called by torch's own code."""
    return str(sys._getframe(frames).f_globals.get("__name__")).startswith(("torch.", "aotfunc."))


def check_version() -> None:
    """Refuse ``increment_version`` in the user's code: no call would count it."""
    if not called_by_torch(3):
        raise CaptureError(
            "increment_version inside a captured function would happen during the capture "
            f"only{at(debug.user_line())}; write by PyTorch's ops, or in a custom op"
        )


def _random_seed_template():  # type: ignore[no-untyped-def]
    f = _torch_random_seed if _aotfunc_recording() is None else _aotfunc_random_seed
    return f()


def _initial_seed_template():  # type: ignore[no-untyped-def]
    f = _torch_initial_seed if _aotfunc_recording() is None else _aotfunc_initial_seed
    return f()


def _get_state_template():  # type: ignore[no-untyped-def]
    f = _torch_get_state if _aotfunc_recording() is None else _aotfunc_get_state
    return f()


def _ctc_loss_template(  # type: ignore[no-untyped-def]
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank=0,
    reduction="mean",
    zero_infinity=False,
):
    f = _torch_ctc_loss if _aotfunc_recording() is None else _aotfunc_ctc_loss
    return f(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)


def ctc_loss(*args: Any) -> Tensor:
    """Return the loss in a form that a recording can take."""
    return recordable(ORIGINALS["ctc_loss"], *args)


def pad_packed(
    data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int
) -> tuple[Tensor, Tensor]:
    """Run ``torch.nn.utils.rnn.pad_packed_sequence`` in a form that a recording can take."""
    pad = ORIGINALS["pad_packed"] if recorder() is None else padded_sequences
    return pad(data, sizes, batch_first, value, length)


def _cond_template(pred, true_fn, false_fn, operands=()):  # type: ignore[no-untyped-def]
    if torch.compiler.is_dynamo_compiling() or _aotfunc_recording() is None:
        return _torch_cond(pred, true_fn, false_fn, operands)
    return _aotfunc_cond(pred, true_fn, false_fn, operands)


def _while_loop_template(cond_fn, body_fn, carried_inputs):  # type: ignore[no-untyped-def]
    if torch.compiler.is_dynamo_compiling() or _aotfunc_recording() is None:
        return _torch_while_loop(cond_fn, body_fn, carried_inputs)
    return _aotfunc_while_loop(cond_fn, body_fn, carried_inputs)


def _scan_template(combine_fn, init, xs, *, dim=0, reverse=False):  # type: ignore[no-untyped-def]
    if torch.compiler.is_dynamo_compiling() or _aotfunc_recording() is None:
        return _torch_scan(combine_fn, init, xs, dim=dim, reverse=reverse)
    return _aotfunc_scan(combine_fn, init, xs, dim, reverse)


def _map_template(f, xs, *args):  # type: ignore[no-untyped-def]
    if torch.compiler.is_dynamo_compiling() or _aotfunc_recording() is None:
        return _torch_map(f, xs, *args)
    return _aotfunc_map(f, xs, *args)


def _associative_scan_template(  # type: ignore[no-untyped-def]
    combine_fn, xs, dim, reverse=False, combine_mode="pointwise"
):
    if torch.compiler.is_dynamo_compiling() or _aotfunc_recording() is None:
        return _torch_associative_scan(combine_fn, xs, dim, reverse, combine_mode)
    return _aotfunc_associative_scan(combine_fn, xs, dim, reverse)


def _linearize_template(func, *primals):  # type: ignore[no-untyped-def]
    f = _torch_linearize if _aotfunc_recording() is None else _aotfunc_linearize
    return f(func, *primals)


graph = torch.autograd.graph
#: the names of torch's functions as attributes of their modules
operators = {
    name: getattr(sys.modules[f"torch._higher_order_ops.{name}"], name)
    for name in ("while_loop", "scan", "map", "associative_scan")
}

#: all that the first capture exchanges, for the whole process
PATCHES: tuple[Code | Attribute | Undisturbed, ...] = (
    Code(
        "apply",
        Function.apply.__func__,
        recorded_apply,
        _ApplyTemplate.apply.__func__,  # type: ignore[attr-defined]
    ),
    Code("grad", torch.autograd.grad, autograd_grad, _grad_template),
    Code("backward", torch.autograd.backward, autograd_backward, _backward_template),
    Code("ctc_loss", torch.nn.functional.ctc_loss, ctc_loss, _ctc_loss_template),
    Code("seed", torch.random.manual_seed, manual_seed, _seed_template),
    Code("random_seed", torch.random.seed, random_seed, _random_seed_template),
    Code("initial_seed", torch.random.initial_seed, initial_seed, _initial_seed_template),
    Code("get_state", torch.random.get_rng_state, get_rng_state, _get_state_template),
    Code("set_state", torch.random.set_rng_state, set_rng_state, _set_state_template),
    Code("fastpath", torch.backends.mha.get_fastpath_enabled, called_by_torch, _fastpath_template),
    Code("increment_version", graph.increment_version, check_version, _increment_version_template),
    Attribute("gc.isenabled", gc, "isenabled", collector.isenabled),
    Attribute("gc.enable", gc, "enable", partial(collector.set_collecting, True)),
    Attribute("gc.disable", gc, "disable", partial(collector.set_collecting, False)),
    Code(
        "multi_hook",
        graph.register_multi_grad_hook,
        register_multi_grad_hook,
        _multi_hook_template,
    ),
    Attribute(
        "checkpoint",
        torch_checkpoint,
        "_checkpoint_without_reentrant_generator",
        checkpoint_region,
    ),
    Undisturbed(torch_checkpoint.checkpoint),
    Code("cond", torch.cond, partial(above, "torch_cond"), _cond_template),
    Code(
        "while_loop",
        operators["while_loop"],
        partial(above, "torch_while_loop"),
        _while_loop_template,
    ),
    Code("scan", operators["scan"], partial(above, "torch_scan"), _scan_template),
    Code("map", operators["map"], partial(above, "torch_map"), _map_template),
    Code(
        "associative_scan",
        operators["associative_scan"],
        partial(above, "torch_associative_scan"),
        _associative_scan_template,
    ),
    Code("linearize", linearize, partial(above, "linearize"), _linearize_template),
    Attribute("numpy", Tensor, "numpy", numpy_of_a_constant),
    Attribute("tolist", Tensor, "tolist", tolist_of_a_constant),
    Attribute("deepcopy", Tensor, "__deepcopy__", deepcopy_of_a_constant),
    Attribute("rebuild", torch._utils, "_rebuild_tensor", unpickled),
    Attribute("any_requires_grad", torch._C, "_any_requires_grad", any_requires_grad),
    Attribute("pad_packed", torch._VF, "_pad_packed_sequence", pad_packed),
    Attribute("saved_hooks", graph.saved_tensors_hooks, "__enter__", enter_saved_tensors_hooks),
    *outside.PATCHES,
    *module_hooks.PATCHES,
)
_installed = False


def install() -> None:
    """Exchange all of them, unless that is done; another thread may repeat each step."""
    global _installed
    if not _installed:
        # Dynamo knows the getters of Tensor as torch has them, and keeps them
        torch.overrides.get_default_nowrap_functions()
        for patch in PATCHES:
            patch.install()
        _installed = True


def restore_torch() -> None:
    """Put back everything in torch that the first capture has exchanged; the next capture
    exchanges it again.

    Raises CaptureError inside a captured function. No other thread may be in one.

    >>> restore_torch()
    """
    global _installed
    if under_way.traces:
        raise CaptureError("restore_torch() inside a captured function: call it outside")
    if _installed:
        _installed = False
        for patch in reversed(PATCHES):
            patch.undo()
