"""Modules of FSDP2 inside a recording: where one is called, the parameters of its group are whole.

PyTorch's hooks around the module run as in eager mode, but for what moves parameters and what
waits for the backward. In the place of an all-gather an op of the graph gathers each parameter;
its derivative reduces the gradients of all processes. As in eager mode the backward gathers again
what the module lets go of after its forward."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..debug import at, user_line
from ..errors import CaptureError
from ..trace.dtensors import layout, of_spec, whole_of
from ..trace.patches import Exchange
from ..trace.traced import current, no_recording

FSDP = "torch.distributed.fsdp._fully_shard."


def fsdp_state(m: nn.Module) -> Any:
    """Return FSDP2's state of a module; None for other modules."""
    module = sys.modules.get(f"{FSDP}_fully_shard")
    return m._get_fsdp_state() if module and isinstance(m, module.FSDPModule) else None


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters that a module gathers."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = state._fsdp_param_group  # PyTorch 2.11
    return [] if group is None else [group]


#: states of modules inside of others, before PyTorch asks for the outermost one
_inside: weakref.WeakSet = weakref.WeakSet()


def prepare_group(m: nn.Module, label: str) -> None:
    """Let a module of FSDP2 hold its parameters in parts, as before its first call. Which one is
    the outermost is left to that call."""
    state = fsdp_state(m)
    groups = groups_of(state)
    if any(x._training_state.name != "IDLE" for x in (state, *groups)):
        raise CaptureError(
            f"{label} is a module of fully_shard whose forward or backward is under "
            f"way{at(user_line())}: compile the parts that it calls, each by itself"
        )
    if state._is_root is None:
        _inside.update(s for x in m.modules() if x is not m and (s := fsdp_state(x)) is not None)
        return
    with no_recording(), _disable_current_modes():
        for g in groups:
            g.wait_for_unshard()  # if one has begun
            g.reshard()


#: what may change from call to call
_settings = attrgetter(
    *("_sharded_state", "_training_state", "unshard_in_backward"),
    *("gradient_divide_factor", "_all_reduce_hook"),
    *("_all_gather_comm", "_reduce_scatter_comm"),
)


def settings(m: nn.Module) -> list:
    """Return what decides how the groups of a module of FSDP2 are gathered. The outermost one
    keeps what it gathered, by default."""
    state = fsdp_state(m)
    outermost = state not in _inside if state._is_root is None else state._is_root
    keeps = outermost and state._auto_reshard_after_forward
    return [
        (
            *_settings(g),
            g._reshard_after_forward and not keeps,
            getattr(g, "reduce_scatter_unused_params", False),
            any(map(awaits_reduction, g.fsdp_params)),
            reduces_in_part(g),
        )
        for g in groups_of(state)
    ]


def awaits_reduction(p: Any) -> bool:
    """Return whether a parameter has a gradient that eager backwards left with each process."""
    whole = getattr(p, "_unsharded_param", None)
    with no_recording():
        grads = p.unsharded_accumulated_grad, None if whole is None else whole.grad
    return any([g is not None for g in grads])


def reduces_in_part(group: Any) -> bool:
    return group.reduce_grads and not group.all_reduce_grads


def unrecorded_facts(group: Any) -> str | None:
    """Return what a recording does not know about a group."""
    params, mesh = group.fsdp_params, group.mesh_info
    own = {type(c).__module__ for c in (group._all_gather_comm, group._reduce_scatter_comm)}
    for what, so in {
        "no dimension of shards": not hasattr(mesh, "shard_process_group"),
        "dp_mesh_dims": getattr(mesh, "is_spmd_mesh", False),
        "parameters that were DTensors before": any(p.is_dtensor for p in params),
        "an offload_policy": any(p.offload_to_cpu and p.device.type != "cpu" for p in params),
        "parameters that gather themselves": any(
            hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in params
        ),
        "gradients of eager calls that are not reduced yet": any(map(awaits_reduction, params)),
        "set_requires_all_reduce(False)": reduces_in_part(group),
        "set_all_reduce_hook": group._all_reduce_hook is not None,
        "collectives of its own": own != {f"{FSDP}_fsdp_collectives"},
        "set_reduce_scatter_unused_params": getattr(group, "reduce_scatter_unused_params", False),
    }.items():
        if so:
            return what
    return None


# ----- while a function is recorded --------------------------------------------------------------


class Gathering:
    """The parameters that are whole in one recording."""

    def __init__(self, states: list[Any]) -> None:
        #: group -> the tables of its modules, and what was in them
        self.before: dict[Any, list[tuple[Any, Any, Any]]] = {}
        self.states, self.calls = states, 0

    def gather(self, trace: Any, group: Any) -> None:
        """Put whole parameters into the modules of a group, unless they are there."""
        if group in self.before:
            return
        if (what := unrecorded_facts(group)) is not None:
            raise CaptureError(
                f"a module of fully_shard with {what} is not captured{at(user_line())}. Compile "
                "its content, fully_shard(aot_module(part)), and leave what calls it uncompiled"
            )
        self.calls += 1
        wholes = [gathered_parameter(trace, group, p, self.calls) for p in group.fsdp_params]
        before = self.before[group] = []
        for p, whole in zip(group.fsdp_params, wholes, strict=True):
            info = p._module_info
            shared = zip(info.shared_modules, info.shared_param_names, strict=True)
            for m, name in ((info.module, info.param_name), *shared):
                for table, key in parameter_places(m, name):
                    before.append((table, key, table[key]))
                    table[key] = whole

    def release(self, group: Any) -> None:
        """Put the parts back into the modules of a group, unless it keeps what it gathered."""
        if group._training_state.name != "FORWARD" or group._reshard_after_forward:
            self.put_back(group)

    def put_back(self, group: Any) -> None:
        for table, key, x in reversed(self.before.pop(group, [])):
            table[key] = x

    def end(self) -> None:
        """Leave all modules as between two calls."""
        for group in list(self.before):
            self.put_back(group)
        for state in self.states:
            for x in (state, *groups_of(state)):
                x._training_state = type(x._training_state).IDLE
            state._modules_to_run_forward.clear()
            if state._state_ctx.iter_forward_root is state:
                state._state_ctx.iter_forward_root = None


def parameter_places(m: nn.Module, name: str) -> Iterator[tuple[Any, Any]]:
    """List where a module keeps a parameter; recurrent layers have a list of them, too."""
    yield m._parameters, name
    if name in (names := getattr(m, "_flat_weights_names", ())):
        yield m._flat_weights, names.index(name)


def gathered_parameter(trace: Any, group: Any, p: Any, call: int) -> Tensor:
    """Record the gathering of a parameter for a call of its group."""
    from torch.distributed.tensor import Partial, Replicate

    spec = p.sharded_param._spec
    everywhere = lambda placement: layout(spec.mesh, [placement] * spec.mesh.ndim)
    divisor = group.gradient_divide_factor
    return torch.ops.aotfunc_layout.gather(
        whole_of(trace, p.sharded_param),
        p._orig_size,
        p._contiguous_orig_stride,
        p.param_dtype or p.sharded_param.dtype,
        p.reduce_dtype,
        everywhere(Replicate()),
        everywhere(Partial("avg")),
        of_spec(spec),
        call,
        1.0 if divisor is None else spec.mesh.size() / divisor,
        group._reshard_after_forward and group.unshard_in_backward,
    )


@contextmanager
def gathering() -> Iterator[None]:
    """Let modules of FSDP2 gather by ops of the recording inside the block."""
    trace: Any = current()
    trace.gathering = Gathering([])
    try:
        yield
    finally:
        trace.gathering.end()


def exchanged() -> AbstractContextManager:
    """Exchange what the hooks of FSDP2 call, if it is imported."""
    return group_functions() if is_sharded() else _NONE


#: return whether FSDP2 is imported
is_sharded = functools.partial(sys.modules.__contains__, f"{FSDP}_fully_shard")


_NONE = nullcontext()


@functools.cache
def group_functions() -> Exchange:
    """Return the functions that gather, let go and wait for the backward, recorded."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    def recorded(cls: type, name: str, ours: Callable) -> Callable:
        original = getattr(cls, name)

        @functools.wraps(original)
        def f(self: Any, *args: Any, **kwargs: Any) -> Any:
            trace = current()
            if trace is None:
                return original(self, *args, **kwargs)
            if trace.gathering is None:
                if cls is FSDPState:  # its hook has begun the call
                    Gathering([self]).end()
                raise CaptureError(
                    "modules of fully_shard are called by compiled functions (jit, aot_function, "
                    "aot_module), outside of their loops and branches, and by nothing else that "
                    f"is captured{at(user_line())}"
                )
            return ours(trace.gathering, self, *args, **kwargs)

        return f

    first = FSDPState._root_pre_forward

    def root_pre_forward(found: Gathering, state: Any, *args: Any) -> Any:
        found.states.append(state)
        with no_recording(), _disable_current_modes():
            state._lazy_init()
        return first(state, *args)

    ours: dict[type, dict[str, Callable]] = {
        FSDPState: {
            "_root_pre_forward": root_pre_forward,
            "_register_pre_backward_hook": lambda found, state, output: output,
        },
        FSDPParamGroup: {
            "unshard": lambda found, group, async_op=False: found.gather(current(), group),
            "reshard": lambda found, group: found.release(group),
            "_register_post_backward_hook": lambda found, group, args, kwargs: (args, kwargs),
            "_record_post_forward": lambda found, group: None,
        },
    }
    return Exchange(
        {
            (cls, name): recorded(cls, name, f)
            for cls, table in ours.items()
            for name, f in table.items()
        }
    )
