"""The functions that compile: jit, aot_function, aot_module."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

from torch import nn

from ..errors import ArgumentError
from ..partition import Policy, default_partition, min_cut_rematerialization_partition
from ..partition.budget import Budget
from ..partition.partitions import Budgeted
from ..partition.policies import check_policy
from ..runtime.compiled import Compiled
from ..runtime.guards.explain import Explanation
from ..runtime.guards.parallel import check_parallel
from ..runtime.lowering import Lowered
from ..runtime.pipeline import Compiler, Partition, Pipeline
from .checks import Compilations
from .validated import validated

MemoryBudget: TypeAlias = float | int | str | Budget | None

#: options of functorch's aot_function that are accepted and ignored
FUNCTORCH_OPTIONS = frozenset(
    """
    num_params_buffers keep_inference_input_mutations dynamic enable_log
    disable_functionalization
    """.split()
)


@overload
def jit(
    f: None = None,
    backend: str | Compiler = "auto",
    static_argnums: Any = None,
    static_argnames: Any = None,
    exact: bool = False,
    memory_budget: MemoryBudget = None,
    policy: Policy | None = None,
    *,
    validate: bool = False,
) -> Callable[..., Compiled]: ...


@overload
def jit(
    f: Callable,
    backend: str | Compiler = "auto",
    static_argnums: Any = None,
    static_argnames: Any = None,
    exact: bool = False,
    memory_budget: MemoryBudget = None,
    policy: Policy | None = None,
    *,
    validate: bool = False,
) -> Compiled: ...


@validated(Compilations)
def jit(
    f: Callable | None = None,
    backend: str | Compiler = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    exact: bool = False,
    memory_budget: MemoryBudget = None,
    policy: Policy | None = None,
) -> Any:
    """Return ``f`` captured once per signature and compiled by ``backend``, a name (see
    ``aotfunc.backends``) or a ``compiler(gm, example_inputs) -> callable``. "auto" is "cpp" on the
    CPU if there is a C++ compiler, else "eager".

    The signature: tree, shapes, strides, dtypes, devices and requires_grad of the arguments,
    values of Python arguments, grad and autocast mode, default dtype and device, and the Python
    state that ``f`` and the functions that it calls read (:mod:`aotfunc.runtime.guards.state`):
    closures, globals, attributes, containers, modes and hooks of modules. Tensors in this state
    are inputs. Results are differentiable to any order, and transforms of the jitted function stay
    compiled. ``static_argnums`` and ``static_argnames`` are accepted for compatibility: Python
    arguments are always static. Raises CaptureError if ``f`` asks for values or changes a list or
    dictionary that is an argument, ArgumentError for a Python argument that can neither be hashed
    nor be described by its attributes, BackendError, which keeps the graph, if the compiler fails.
    Copies and unpickled functions are captured again. Without ``f`` it is a decorator, of
    functions and of methods.

    ``backend="cpp"`` computes sums of products in the order that costs least, which changes
    results by rounding; with ``exact`` it keeps the function's, see ``docs/contractions.md``.

    ``memory_budget`` and ``policy`` say how much is saved for the backward, as for
    :func:`aotfunc.partition`; by default the backward recomputes values that are cheap beside the
    memory that they take. With ``validate=True`` the first call, and its gradients, are compared
    with eager PyTorch's; ValidationError names the first op that differs.

    >>> jit(lambda x: torch.sin(x) * 2)(torch.zeros(2))
    tensor([0., 0.])
    >>> @jit(backend="eager")
    ... def doubled(x):
    ...     return x * 2
    >>> doubled(torch.ones(2))
    tensor([2., 2.])
    """
    if f is None:
        return functools.partial(
            jit, backend=backend, exact=exact, memory_budget=memory_budget, policy=policy
        )
    partition = budgeted(min_cut_rematerialization_partition, memory_budget, policy)
    return Compiled(f, Pipeline("jit", backend, partition=partition, exact=exact))


def budgeted(default: Partition, memory_budget: MemoryBudget, policy: Policy | None) -> Partition:
    """Return the partition function for a budget and a policy; the default if both are None."""
    check_policy(policy)
    if memory_budget is None and policy is None:
        return default
    return Budgeted(1.0 if memory_budget is None else memory_budget, policy)


@overload
def aot_function(
    fn: None = None, fw_compiler: str | Compiler = "auto", *args: Any, **options: Any
) -> Callable[..., Compiled]: ...


@overload
def aot_function(
    fn: Callable, fw_compiler: str | Compiler = "auto", *args: Any, **options: Any
) -> Compiled: ...


@validated(Compilations)
def aot_function(
    fn: Callable | None = None,
    fw_compiler: str | Compiler = "auto",
    bw_compiler: str | Compiler | None = None,
    partition_fn: Partition | None = None,
    decompositions: dict | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    exact: bool = False,
    memory_budget: MemoryBudget = None,
    policy: Policy | None = None,
    inference_compiler: str | Compiler | None = None,
    backend: str | Compiler | None = None,
    **options: Any,
) -> Any:
    """Return ``fn`` with its forward and backward captured ahead of time, partitioned by
    ``partition_fn`` and compiled.

    ``fw_compiler`` and ``bw_compiler`` (default: the same) take ``(gm, example_inputs)`` and
    return a callable, or are names of backends; ``inference_compiler`` (default: ``fw_compiler``)
    compiles for calls that autograd does not record; ``backend`` is :func:`jit`'s name of
    ``fw_compiler``. ``partition_fn(joint_module, joint_inputs, *, num_fwd_outputs)`` returns the
    forward module ``inputs -> (results, residuals)`` and the backward module ``(residuals,
    cotangents) -> gradients``; inputs that require no gradient have none. The default computes
    nothing twice; ``memory_budget`` and ``policy`` are those of :func:`aotfunc.partition`.
    ``decompositions`` maps ops to functions to use instead, after
    differentiation; ``exact`` is :func:`jit`'s. functorch's other options change nothing here.
    Guards, errors and guarantees are those of :func:`jit`; without ``fn`` it is a decorator, too.

    >>> f = aot_function(lambda x: torch.sin(x), "eager")
    >>> x = torch.zeros(2, requires_grad=True)
    >>> f(x).sum().backward(); x.grad
    tensor([1., 1.])
    """
    if unknown := set(options) - FUNCTORCH_OPTIONS:
        raise ArgumentError(f"aot_function: there is no option {', '.join(sorted(unknown))}")
    if backend is not None:
        if fw_compiler != "auto":
            raise ArgumentError(
                "aot_function: backend and fw_compiler are two names of one option"
            )
        fw_compiler = backend
    if partition_fn is None:
        partition_fn = budgeted(default_partition, memory_budget, policy)
    elif memory_budget is not None or policy is not None:
        raise ArgumentError("aot_function: partition_fn decides what memory_budget and policy do")
    pipeline = Pipeline(
        "aot_function",
        *(fw_compiler, bw_compiler, partition_fn, decompositions, exact, inference_compiler),
    )
    return Compiled(fn, pipeline) if fn is not None else lambda fn: Compiled(fn, pipeline)


#: tables that a compiled module shares with the original: an entry in one is an entry in the other
SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
)
#: what ``nn.Module`` sets where a hook is registered
OF_HOOKS = "_is_full_backward_hook"


def without_global_hooks(f: Any) -> Any:
    """Return a method of ``nn.Module`` that ignores the hooks of all modules."""
    scope = {
        name: OrderedDict() if name.startswith("_global_") and name.endswith("_hooks") else x
        for name, x in f.__globals__.items()
    }
    return types.FunctionType(f.__code__, scope, f.__name__, f.__defaults__, f.__closure__)


class CompiledModule(nn.Module):
    """A module with a compiled forward and all else of the original: tensors, submodules, state,
    attributes and methods. Hooks registered here run around the compiled call."""

    def __init__(self, module: nn.Module, compiled: Compiled) -> None:
        super().__init__()
        del self.__dict__["training"]
        self.__dict__ |= {name: module.__dict__[name] for name in SHARED}
        self.__dict__ |= {"orig_module": module, "_compiled": compiled}

    def extra_repr(self) -> str:
        return repr(self._compiled)

    # the original calls its own hooks
    _call_impl = without_global_hooks(nn.Module._call_impl)
    _get_backward_hooks = without_global_hooks(nn.Module._get_backward_hooks)
    _get_backward_pre_hooks = without_global_hooks(nn.Module._get_backward_pre_hooks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """See :meth:`Compiled.lower`."""
        return self._compiled.lower(*args, **kwargs)

    def explain(self) -> Explanation:
        """See :meth:`Compiled.explain`."""
        return self._compiled.explain()

    # ----- what classes of modules may do in their own way ---------------------------------------

    def train(self, mode: bool = True) -> CompiledModule:
        self.orig_module.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.orig_module.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.orig_module._load_from_state_dict(*args)

    def _apply(self, *args: Any, **kwargs: Any) -> CompiledModule:
        self.orig_module._apply(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "orig_module" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.orig_module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or name == OF_HOOKS or "orig_module" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.orig_module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.orig_module, name)


class CompiledContainer(CompiledModule):
    """A compiled module that is indexed, as ``nn.Sequential`` is."""

    def __len__(self) -> int:
        return len(self.orig_module)

    def __iter__(self) -> Any:
        return iter(self.orig_module)

    def __getitem__(self, key: Any) -> Any:
        return self.orig_module[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.orig_module[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.orig_module[key]

    def __add__(self, other: Any) -> Any:
        return self.orig_module + getattr(other, "orig_module", other)

    def __iadd__(self, other: Any) -> CompiledContainer:
        module = self.orig_module
        module += getattr(other, "orig_module", other)
        return self


def aot_module(mod: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Compile the forward of a module, as :func:`aot_function` does. The result has all of
    ``mod``: parameters, state and attributes under the same names. The options and errors are
    those of :func:`aot_function`.

    >>> net = aot_module(torch.nn.Linear(2, 1), "eager")
    >>> list(net.state_dict()), net.in_features
    (['weight', 'bias'], 2)
    >>> net(torch.ones(3, 2)).sum().backward(); net.weight.grad
    tensor([[3., 3.]])
    """
    for name, part in mod.named_modules():
        check_parallel(part, name or "the module", gradients=False)
    indexed = hasattr(type(mod), "__getitem__") and hasattr(type(mod), "__len__")
    compiled = aot_function(mod, *args, **kwargs)
    return (CompiledContainer if indexed else CompiledModule)(mod, compiled)
