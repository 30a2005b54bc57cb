"""What users call to compile: jit, aot_function, aot_module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import nn

from ..errors import ArgumentError
from ..partition import default_partition
from ..runtime.compiled import Compiled
from ..runtime.guards.explain import Explanation
from ..runtime.lowering import Lowered
from ..runtime.pipeline import Compiler, Partition, Pipeline

#: options of functorch's aot_function that are accepted and have no meaning here
FUNCTORCH_OPTIONS = frozenset(
    {
        "num_params_buffers",
        "keep_inference_input_mutations",
        "inference_compiler",
        "dynamic",
        "enable_log",
    }
    | {"disable_functionalization"}
)


@overload
def jit(
    f: None = None,
    backend: str | Compiler = "auto",
    static_argnums: Any = None,
    exact: bool = False,
) -> Callable[..., Compiled]: ...


@overload
def jit(
    f: Callable,
    backend: str | Compiler = "auto",
    static_argnums: Any = None,
    exact: bool = False,
) -> Compiled: ...


def jit(
    f: Callable | None = None,
    backend: str | Compiler = "auto",
    static_argnums: int | Sequence[int] | None = None,
    exact: bool = False,
) -> Any:
    """``f`` captured once per signature and compiled by ``backend``, a name (see
    ``aotfunc.backends``) or a ``compiler(gm, example_inputs) -> callable``. "auto" is "cpp" on the
    CPU where there is a C++ compiler, else "eager".

    The signature: tree, shapes, strides, dtypes, devices and requires_grad of the arguments,
    values of Python arguments, grad and autocast mode, default dtype and device, and the Python
    state that ``f`` and what it calls read (:mod:`aotfunc.runtime.guards.state`): closures,
    globals, attributes, containers, modes and hooks of modules. Tensors among it are inputs.
    Results are differentiable to any order, and transforms of the jitted function stay compiled.
    ``static_argnums`` is accepted for compatibility: Python arguments are always static. Raises
    CaptureError if ``f`` asks for values or changes a list or dictionary that is an argument,
    ArgumentError for a Python argument that can neither be hashed nor be described by its
    attributes, BackendError, which keeps the graph, if the compiler fails. Copies and pickled ones
    are captured again. Without ``f`` it is a decorator, of functions and of methods.

    ``backend="cpp"`` computes sums of products in the order that costs least, which changes
    results by rounding; with ``exact`` it keeps the function's, see ``docs/contractions.md``.

    >>> jit(lambda x: torch.sin(x) * 2)(torch.zeros(2))
    tensor([0., 0.])
    >>> @jit(backend="eager")
    ... def doubled(x):
    ...     return x * 2
    >>> doubled(torch.ones(2))
    tensor([2., 2.])
    """
    if f is None:
        return functools.partial(jit, backend=backend, static_argnums=static_argnums, exact=exact)
    return Compiled(f, Pipeline("jit", backend, exact=exact))


@overload
def aot_function(
    fn: None = None, fw_compiler: str | Compiler = "auto", *args: Any, **options: Any
) -> Callable[..., Compiled]: ...


@overload
def aot_function(
    fn: Callable, fw_compiler: str | Compiler = "auto", *args: Any, **options: Any
) -> Compiled: ...


def aot_function(
    fn: Callable | None = None,
    fw_compiler: str | Compiler = "auto",
    bw_compiler: str | Compiler | None = None,
    partition_fn: Partition = default_partition,
    decompositions: dict | None = None,
    static_argnums: int | Sequence[int] | None = None,
    exact: bool = False,
    **options: Any,
) -> Any:
    """``fn`` with its forward and backward captured ahead of time, partitioned by ``partition_fn``
    and compiled.

    ``fw_compiler`` and ``bw_compiler`` (default: the same) take ``(gm, example_inputs)`` and
    return a callable, or are names of backends. ``partition_fn(joint_module, joint_inputs, *,
    num_fwd_outputs)`` returns the forward module ``inputs -> (results, residuals)`` and the
    backward module ``(residuals, cotangents) -> gradients``; inputs that require no gradient have
    none. ``decompositions`` maps ops to functions to use instead, after differentiation;
    ``exact`` is :func:`jit`'s. functorch's other options change nothing here. Guards, errors and
    guarantees are those of :func:`jit`; without ``fn`` it is a decorator, too.

    >>> f = aot_function(lambda x: torch.sin(x), "eager")
    >>> x = torch.zeros(2, requires_grad=True)
    >>> f(x).sum().backward(); x.grad
    tensor([1., 1.])
    """
    if unknown := set(options) - FUNCTORCH_OPTIONS:
        raise ArgumentError(f"aot_function: there is no option {', '.join(sorted(unknown))}")
    pipeline = Pipeline(
        "aot_function", fw_compiler, bw_compiler, partition_fn, decompositions, exact
    )
    return Compiled(fn, pipeline) if fn is not None else lambda fn: Compiled(fn, pipeline)


class CompiledModule(nn.Module):
    """A module whose forward is compiled; parameters and buffers are the original's."""

    def __init__(self, module: nn.Module, compiled: Compiled) -> None:
        super().__init__()
        self.orig_module = module
        self._compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """See :meth:`Compiled.lower`."""
        return self._compiled.lower(*args, **kwargs)

    def explain(self) -> Explanation:
        """See :meth:`Compiled.explain`."""
        return self._compiled.explain()


def aot_module(mod: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """:func:`aot_function` of a module: a module with the same parameters and buffers whose
    forward is compiled."""
    return CompiledModule(mod, aot_function(mod, *args, **kwargs))
