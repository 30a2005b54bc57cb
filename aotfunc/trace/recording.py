"""Record a function body into a trace, with the thread's and PyTorch's states set aside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..debug import is_users
from ..errors import CaptureError, OpError, RuleError, made
from . import operators  # noqa: F401
from .casts import CONTEXTS, cache_enabled, enable_cache
from .collector import paused_gc
from .constructors import CONSTRUCTORS
from .modes import is_exporting, outside_export
from .numbers import SPLIT, watch
from .patches import Exchange
from .recurrent import RECURRENT
from .traced import current, under_way
from .tracer import Trace

functorch = torch._C._functorch
_grad_enabled, _enable_grad = torch.is_grad_enabled, torch._C._set_grad_enabled
_tangents_enabled = torch._C._is_fwd_grad_enabled
_enable_tangents = torch._C._set_fwd_grad_enabled
_set_aside = torch._C._autograd._saved_tensors_hooks_set_tracing
_push, _pop = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack
_modes = torch._C._len_torch_dispatch_stack
_level_of_functorch = functorch.maybe_current_level
_compiling = torch._C._dynamo.eval_frame.get_eval_frame_callback
_compile_by = torch._C._dynamo.eval_frame.set_eval_frame

#: torch's functions -> what they are during a recording
functions = Exchange(CONSTRUCTORS | CONTEXTS | SPLIT)
layers = Exchange(RECURRENT)


def record_into(trace: Trace, body: Callable[[], Any]) -> Any:
    """Return ``body()`` recorded into ``trace``: with gradients and tangents on, autocast's cache
    and Dynamo off, functorch's levels and saved_tensors_hooks aside (parameters make autograd save
    traced values), no garbage collection. All of it holds for this thread alone and is undone even
    where Ctrl-C comes in between.

    Raises CaptureError where a number was refused, or anything else that eager mode does, even if
    ``body`` caught the error.
    """
    traces, compiling, modes = under_way.traces, _compiling(), _modes()
    _set_aside(aside := _set_aside(True))
    grad, tangents, cache = _grad_enabled(), _tangents_enabled(), cache_enabled()
    before = trace, traces, len(traces), modes, grad, tangents, cache, aside, compiling
    outermost = made.errors is None  # no list is kept in a frame, which its errors hold
    usual = trace.may_ask_constants and not (
        trace.rolls or _level_of_functorch() is not None or is_exporting()
    )
    with paused_gc(), functions if usual else surroundings(trace):
        try:
            if outermost:
                made.errors = []
            if compiling is not None:
                _compile_by(None)  # Dynamo must not compile what f calls
            if cache:
                enable_cache(False)
            if not grad:
                _enable_grad(True)
            if not tangents:
                _enable_tangents(True)
            _set_aside(True)
            traces.append(trace)
            # as `with trace` does, without the flags that TorchDispatchMode keeps for the whole
            # process
            _push(trace)
            trace.depth = modes + 1
            result = body()
            if trace.deferred:
                trace.settle()
            note_caught(trace)
        except Exception as e:
            note_caught(trace)
            if (trace.refused or e) is not e:
                raise taken(trace) from e
            trace.refused = None
            raise
        finally:
            if outermost:
                made.errors = None
            try:
                end_recording(*before)
            except BaseException:  # Ctrl-C interrupted the exit
                end_recording(*before)
                raise
    if trace.refused is not None:
        raise taken(trace)
    return result


#: the names of errors by which a function says that it knows of refusals
OURS = {"CaptureError", "RuleError", "AotfuncError"}


def note_caught(trace: Trace) -> None:
    """Take note of the first refusal that the function itself caught, as a RuntimeError: it went
    on where eager mode, which refuses nothing, does not go. The frame that catches an error is the
    outermost of its traceback."""
    for e in made.errors or ():
        refusal = isinstance(e, (CaptureError, RuleError)) and not isinstance(e, OpError)
        if refusal and (at := e.__traceback__) and is_users(at.tb_frame.f_code.co_filename):
            code = at.tb_frame.f_code
            if OURS.isdisjoint(code.co_names + code.co_freevars):
                trace.refused = trace.refused or e


def taken(trace: Trace) -> Exception:
    """Return what a recording has refused; the error is to hold its frames, and these the trace,
    but not the trace the error."""
    error, trace.refused, trace.place = trace.refused, None, None
    assert error is not None
    return error


def end_recording(
    trace: Trace,
    traces: list[Trace],
    depth: int,
    modes: int,
    grad: bool,
    tangents: bool,
    cache: bool,
    aside: bool,
    compiling: Any,
) -> None:
    """Put back the states of :func:`record_into`, and end the recording."""
    while _modes() > modes:
        _pop(None)
    del traces[depth:]
    if _grad_enabled() is not grad:
        _enable_grad(grad)
    if _tangents_enabled() is not tangents:
        _enable_tangents(tangents)
    if cache_enabled() is not cache:
        enable_cache(cache)
    _set_aside(aside)
    if compiling is not None:
        _compile_by(compiling)
    trace.finish()


def surroundings(trace: Trace) -> AbstractContextManager:
    """Exchange torch's functions; set aside torch.func's levels, torch.export, reads of numbers
    that would be frozen, and recurrent layers that become loops, if there are any."""
    inside = _level_of_functorch() is not None
    stack = ExitStack()
    stack.enter_context(functions)
    if inside:
        stack.enter_context(without_functorch())
        stack.enter_context(ByReference(trace))
    if is_exporting():
        stack.enter_context(outside_export())
    if not trace.may_ask_constants:
        stack.enter_context(watch)
    if trace.rolls:
        stack.enter_context(layers)
    return stack


_NONE = nullcontext()


def without_functorch() -> AbstractContextManager:
    """Set torch.func's levels aside, if there are any."""
    if _level_of_functorch() is None:
        return _NONE
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


class ByReference(TorchFunctionMode):
    """Make tensors of torch.func's levels that the recorded function closes over values of the
    recording: the dispatcher would unwrap them, and lose what their level follows."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.values: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (tensor, value)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore
        if current() is None:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def value(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and is_set_aside(x)):
            return x
        if id(x) not in self.values:
            self.values[id(x)] = x, self.trace.outside_value(x)
        return self.values[id(x)][1]


def is_set_aside(x: Tensor) -> bool:
    """Return whether ``x`` is of a level that is set aside, not of one entered since."""
    if not functorch.is_functorch_wrapped_tensor(x):
        return False
    if _level_of_functorch() is None:
        return True
    return functorch.is_gradtrackingtensor(x) and functorch.unwrap_if_dead(x) is not x
