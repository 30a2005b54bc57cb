"""Compile a graph to its own generated Python: straight-line calls of the ops, each value dropped
after its last use.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx import Node

from .. import debug
from ..debug import at
from ..errors import GraphError
from ..graph import Times, output_node
from ..trace.records import flat_tensors
from ..trace.shapes.sig import Facts, Sig

#: the namespaces of ops whose results have the strides of their rules or meta kernels
OURS = ("aten", "prims", "aotfunc", "aotfunc_effect")


class Generated(Protocol):
    """The result of :func:`compile_graph`."""

    boxed: Callable[[list], tuple]
    source: str

    def __call__(self, *values: Any) -> tuple: ...


def compile_graph(graph: fx.Graph, sized: Mapping[Node, tuple] | None = None) -> Generated:
    """Return a function of the graph's placeholders that returns its flat outputs as a tuple. Its
    attribute ``boxed`` takes them as one list, which it empties: an input is then free after its
    last use. With ``sized``, nodes' arguments with :class:`Times` in them, the size that these
    multiply is its first argument."""
    #: globals of the code, under names that no value has
    env: dict[str, Any] = {}
    taken = {n.name for n in graph.nodes}
    targets: dict[Any, str] = {}
    lines: list[str] = []
    last, read = last_uses(graph), {i for n in graph.nodes for i in n._input_nodes}
    parameters = []

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        return name

    size, values = free("size"), free("values")

    def outside(value: Any, name: str) -> str:
        env[name := free(name)] = value
        return name

    def literal(a: Any) -> str:
        if isinstance(a, Node):
            return a.name
        if a.__class__ is Times:
            return f"{int(a)} * {size}"
        if isinstance(a, list | tuple):
            inside = ", ".join([literal(x) for x in a])
            return f"[{inside}]"
        if (
            a is None
            or a.__class__ in (int, bool, str)
            or (a.__class__ is float and math.isfinite(a))
        ):
            return repr(a)
        return outside(a, f"c{len(env)}")

    for n in graph.nodes:
        if n.op == "placeholder":
            parameters.append(n.name)
            # a tangent given to a compiled call may have fewer gaps than its primal
            if debug.LEVEL >= 2 and sized is None and n.meta.get("role") != "tangent":
                lines.append(f"{literal(functools.partial(compare, n))}({n.name})")
            if n not in read:
                lines.append(f"del {n.name}")
            continue
        if n.op == "get_attr":
            lines.append(f"{n.name} = {literal(getattr(graph.owning_module, n.target))}")
            continue
        if n.op == "output":
            lines.append(f"return ({''.join([literal(a) + ', ' for a in n.args[0]])})")
            continue
        if n.target is operator.getitem:
            lines.append(f"{n.name} = {literal(n.args[0])}[{n.args[1]}]")
        else:
            call = entry_of(n)
            name = targets.get(call)
            if name is None:
                name = targets[call] = outside(call, f"f{len(targets)}")
            given = n.args if sized is None else sized.get(n, n.args)
            args = [literal(a) for a in given] + [f"{k}={literal(v)}" for k, v in n.kwargs.items()]
            lines.append(f"{n.name} = {name}({', '.join(args)})")
            if sized is None and unsure(n):
                lines.append(f"{n.name} = {literal(functools.partial(as_said, n))}({n.name})")
            if debug.LEVEL >= 2 and sized is None:
                lines.append(f"{literal(functools.partial(compare, n))}({n.name})")
        if dead := last.get(n):
            lines.append(f"del {', '.join([d.name for d in dead])}")
    if sized is not None:
        parameters.insert(0, size)
    inputs = [f"{', '.join(parameters)}, = {values}", f"{values}.clear()"] if parameters else []
    source = "\n    ".join([f"def run({values}):", *inputs, *lines])
    if debug.LEVEL >= 4:
        print(source, end="\n\n", file=sys.stderr)
    exec(compile(source, "<aotfunc>", "exec"), env)
    boxed = env["run"]

    def run(*values: Any) -> tuple:
        return boxed([*values])

    boxed.own, boxed.unchecked, boxed.alone = n_own_results(output_node(graph).args[0]), run, None
    run.boxed, run.source = boxed, source  # type: ignore[attr-defined]
    return cast(Generated, run)


def n_own_results(results: Sequence[Any]) -> int:
    """Return how many of the first results have memory that no other value shares."""
    for count, n in enumerate(results):
        if not isinstance(n, Node) or not makes_memory(n) or n in results[:count]:
            return count
    return len(results)


#: ops that, by PyTorch's own checks of its kernels, may return memory that others know
SHARING = frozenset(
    """
    lift lift_fresh lift_fresh_copy dequantize lu_unpack channel_shuffle _slow_conv2d_forward
    slow_conv3d_forward _unsafe_view q_per_channel_scales q_per_channel_zero_points
    """.split()
)


def makes_memory(n: Node) -> bool:
    """Return whether the value is a new tensor at each run: a kernel's, or an op's."""
    if n.meta.get("laid_out") is n:
        return True
    alone = isinstance(n.target, OpOverload) and n.meta["val"].__class__ is not tuple
    return alone and returns_new(n.target)


@functools.cache
def returns_new(op: OpOverload) -> bool:
    """Return whether an op's result shares no memory, by its schema and kernels."""
    if op.namespace != "aten" or not Facts(op).pure or op._opname in SHARING:
        return False
    return not op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


aten, functions, methods = torch.ops.aten, torch._C._VariableFunctions, torch._C.TensorBase
#: ops whose Python binding is half a microsecond quicker than the overload itself
BINDINGS: dict[Any, Callable] = {
    **{
        getattr(aten, name).Tensor: getattr(functions, name)
        for name in ("add", "sub", "mul", "div")
    },
    **{
        getattr(aten, name).default: getattr(functions, name)
        for name in """
        sin cos tanh exp log sqrt rsqrt neg abs sigmoid relu reciprocal erf expm1 log1p sign
        mm bmm mv dot addmm baddbmm t unsqueeze permute
        sum mean amax amin maximum minimum clone cat native_layer_norm
        _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data
        """.split()
    },
    aten.sum.dim_IntList: functions.sum,
    aten.mean.dim: functions.mean,
    aten.select.int: functions.select,
    aten.squeeze.dim: functions.squeeze,
    aten.transpose.int: functions.transpose,
    aten.where.self: functions.where,
    aten.detach.default: methods.detach,
    aten.view.default: methods.view,
    aten.expand.default: methods.expand,
}


def binds_one_overload(n: Node) -> bool:
    """Return whether a call of the op's binding can only mean this overload."""
    return (
        not n.kwargs
        and (n.args[0].__class__ is Node or n.target is aten.cat.default)
        and not any(a.__class__ is complex for a in n.args)
    )


def entry_of(n: Node) -> Callable:
    """Return the callable for a node: the target's own ``entry``, a binding, or the overload's C
    entry (``OpOverload.__call__`` adds a Python frame)."""
    target = n.target
    if not isinstance(target, OpOverload):
        return getattr(target, "entry", target)
    binding = BINDINGS.get(target)
    return binding if binding is not None and binds_one_overload(n) else target._op


def unsure(n: Node) -> bool:
    """Return whether the result's layout may differ from the graph's."""
    return n.target.__class__ is OpOverload and not lays_as_said(n.target)


@functools.cache
def lays_as_said(op: OpOverload) -> bool:
    return op.namespace in OURS


def as_said(n: Node, value: Any) -> Any:
    """Return a custom op's result in the layout of its fake implementation, for which its readers
    were captured. Raises GraphError for another shape."""

    def fit(sig: Any, x: Any) -> Any:
        if isinstance(sig, tuple) and isinstance(x, tuple | list):
            return tuple(map(fit, sig, x))
        if not isinstance(sig, Sig | Tensor) or not isinstance(x, Tensor):
            return x
        stride = sig.stride() if isinstance(sig, Tensor) else sig.stride
        if tuple(x.shape) != tuple(sig.shape):
            raise GraphError(
                f"{n.target} returned a tensor of shape {list(x.shape)}, and its fake "
                f"implementation says {list(sig.shape)}{at(n.meta.get('line'))}: mend what is "
                "registered with register_fake"
            )
        if x.stride() == stride:
            return x
        order = sorted(range(x.dim()), key=lambda d: -stride[d])
        return x.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))

    return fit(n.meta["val"], value)


def compare(n: Node, value: Any) -> None:
    """Raise GraphError if a value has another shape, stride, dtype or device than the graph says;
    of several results only those that are read count."""

    def differ(sig: Any, x: Any) -> bool:
        if isinstance(sig, tuple):
            return len(sig) != len(x) or any(map(differ, sig, x))
        if not isinstance(sig, Sig) or not isinstance(x, Tensor):
            return False
        facts = (tuple(x.shape), x.dtype, x.device.type)
        return facts != (sig.shape, sig.dtype, sig.device.type) or (
            x.numel() > 0 and x.stride() != sig.stride
        )

    said = n.meta["val"]
    if isinstance(said, tuple) and len(said) == len(value):
        read = {u.args[1] for u in n.users if u.target is operator.getitem}
        said, value = tuple([said[i] for i in read]), [value[i] for i in read]
    if differ(said, value):
        known = [(s, s.stride) for s in flat_tensors(said)]
        real = [(tuple(x.shape), x.stride(), x.dtype) for x in flat_tensors(value)]
        raise GraphError(
            f"{n.format_node()} is {real}, not {known} as the graph says{at(n.meta.get('line'))}"
        )


def last_uses(graph: fx.Graph) -> dict[Node, list[Node]]:
    """List, for each node, the values that no later node reads, inputs included."""
    last: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for n in reversed(graph.nodes):
        fresh = [i for i in n._input_nodes if i not in seen]
        seen.update(fresh)
        if n.op != "output":
            dead = fresh if n in seen or n.op != "call_function" else [*fresh, n]
            if dead:
                last[n] = dead
    return last
