"""The names of ``functorch.compile``: compilers to pass to :func:`aot_function`, and tools to look
inside.

Two mean nothing here, and say so when they are called: the TensorExpr compiler, and
``pythonkey_decompose`` (``make_fx`` takes a decomposition table)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions as get_decompositions

from .api.jit import aot_function as aot_function
from .api.jit import aot_module as aot_module
from .api.jit import jit as jit
from .backends import lookup
from .backends import register as register
from .backends.minify import minifier as minifier
from .debug import at
from .errors import BackendError, CaptureError
from .graph import output_node
from .partition import default_partition as default_partition
from .partition import min_cut_rematerialization_partition as min_cut_rematerialization_partition
from .runtime.anomaly import has_nan
from .runtime.compiled import EVERY
from .runtime.compiled import Compiled as Compiled
from .runtime.pipeline import naming

compiled_function = aot_function
compiled_module = aot_module


# ----- compilers ---------------------------------------------------------------------------------


def nop(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
    """Compile nothing: return the graph module itself."""
    return fx_g


def print_compile(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
    """Print the graph's code and compile nothing.

    >>> f = aot_function(lambda x: torch.sin(x), print_compile)
    >>> _ = f(torch.zeros(2))  # doctest: +NORMALIZE_WHITESPACE
    def forward(self, x):
        sin = torch.ops.aten.sin.default(x);  x = None
        return (sin,)
    """
    print(fx_g.code.strip())
    return fx_g


def debug_compile(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
    """Return a runner that checks: it runs op by op and raises where a value is not as the graph
    says (shape, dtype, device), or where finite numbers first become NaN, naming the node and the
    user's line."""

    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            expected, line = n.meta.get("val"), at(n.meta.get("line"))
            if isinstance(value, Tensor) and isinstance(expected, Tensor):
                got, said = ((t.shape, t.dtype, t.device) for t in (value, expected))
                if got != said:
                    raise CaptureError(f"{n.format_node()} is {got}, the graph says {said}{line}")
                if (
                    n.op == "call_function"
                    and has_nan(value)
                    and not any(has_nan(self.env[i]) for i in n._input_nodes)
                ):
                    raise CaptureError(f"{n.format_node()} is the first value with a NaN{line}")
            return value

    return lambda *args: Checked(fx_g, garbage_collect_values=False).run(*args)


def make_boxed_func(f: Callable) -> Callable:
    """Return ``f`` as a function of one list of arguments, which it may empty early."""

    def boxed(args: list) -> Any:
        return f(*args)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def make_boxed_compiler(compiler: str | Callable) -> Callable:
    """Return the compiler with results that take one list of arguments."""
    compiler = lookup(compiler)

    def boxed(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
        return make_boxed_func(compiler(fx_g, list(example_inputs)))

    return boxed


def memory_efficient_fusion(fn: Callable | nn.Module, **kwargs: Any) -> Any:
    """Return ``fn`` (a function or a module) compiled by Inductor with the min-cut partition:
    cheap values are recomputed in the backward, inside its fused loops, instead of being saved.
    ``kwargs`` are those of :func:`aot_function`."""
    options = {
        "fw_compiler": "inductor",
        "partition_fn": min_cut_rematerialization_partition,
        **kwargs,
    }
    return (aot_module if isinstance(fn, nn.Module) else aot_function)(fn, **options)


def ts_compile(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
    """Hand the graph to TorchScript (``torch.jit.script``)."""
    return torch.jit.script(fx_g) if output_node(fx_g.graph).args[0] else fx_g


def get_aot_graph_name() -> str:
    """Return the name of the graph that a compiler is being given in this thread, as
    ``jit_forward_0``: the function, the half, and its number in this thread. Raises BackendError
    if there is none."""
    if not naming.names:
        raise BackendError("get_aot_graph_name: no graph is being compiled in this thread")
    return naming.names[-1]


def get_aot_compilation_context() -> tuple[list[str], str, int]:
    """Return the names of the graphs that are being compiled in this thread, one within another,
    and of the innermost its function and its number; ``([], "model", 0)`` if there are none."""
    if not naming.names:
        return [], "model", 0
    function, _, number = naming.names[-1].rsplit("_", 2)
    return list(naming.names), function, int(number)


get_graph_being_compiled = get_aot_graph_name


# ----- pictures ----------------------------------------------------------------------------------


def draw_graph(
    traced: fx.GraphModule, fname: str, figname: str = "fx_graph", clear_meta: bool = True
) -> None:
    """Draw the graph into the file ``fname``: ``.dot`` (text), or an image format of Graphviz such
    as ``.svg``, the default. Needs pydot (``pip install aotfunc[viz]``) and for images the program
    ``dot`` of Graphviz; raises BackendError that says so. ``clear_meta`` leaves shapes out."""
    path = Path(fname if Path(fname).suffix else f"{fname}.svg")
    try:
        import pydot  # noqa: F401
    except ImportError as e:
        raise BackendError("draw_graph needs pydot: pip install pydot (or aotfunc[viz])") from e
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    kind = path.suffix[1:]
    if kind != "dot" and shutil.which("dot") is None:
        raise BackendError(
            f"drawing .{kind} needs Graphviz' program dot: install graphviz, or give the file the "
            "suffix .dot"
        )
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    if clear_meta:
        for n in graph.nodes:
            n.meta = {}
    dot = FxGraphDrawer(fx.GraphModule(traced, graph), figname).get_dot_graph()
    if kind == "dot":
        path.write_text(dot.to_string())
    else:
        dot.write(str(path), format=kind)


def draw_graph_compile(name: str) -> Callable:
    """Return a compiler that draws each graph into the file ``name`` and does nothing else."""

    def compiler(fx_g: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable:
        draw_graph(fx_g, name)
        return fx_g

    return compiler


def draw_joint_graph(
    graph: fx.GraphModule, joint_inputs: Any, file_name: str = "full_graph.svg", **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return a partition function that draws the joint graph; the default one splits it."""
    draw_graph(graph, file_name)
    return default_partition(graph, joint_inputs, **kwargs)


# ----- names without a meaning -------------------------------------------------------------------


def meaningless(name: str, instead: str) -> Callable:
    """Return the function of this name, which raises BackendError and says what to use instead."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise BackendError(f"aotfunc.compile.{name} means nothing here: {instead}")

    function.__name__ = function.__qualname__ = name
    return function


nnc_jit = meaningless("nnc_jit", "TensorExpr is no backend; use backend='inductor'")
pythonkey_decompose = meaningless("pythonkey_decompose", "pass decomposition_table to make_fx")

#: no options: policies are passed as values
config: dict[str, Any] = {}
#: AOTAutograd's options have no meaning here: ``decompositions=`` of :func:`aot_function` takes a
#: table
default_decompositions: dict[Any, Callable] = {}


def aot_module_simplified(
    mod: nn.Module, args: Sequence[Any], *compilers: Any, **options: Any
) -> Callable:
    """Return :func:`aot_module` as a function; the example ``args`` are not needed."""
    return aot_module(mod, *compilers, **options)


# ----- the cache ---------------------------------------------------------------------------------


def num_of_recompilations() -> int:
    """Return how many signatures living functions captured since clear_compile_cache()."""
    return sum(c.captures for c in EVERY)


def clear_compile_cache() -> None:
    """Forget all that was captured and compiled; the next calls capture again."""
    for c in EVERY:
        c.forget()
