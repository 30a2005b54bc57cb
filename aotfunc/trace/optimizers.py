"""Record steps of ``torch.optim``: one parameter after the other, with counters and learning rates
as tensors.

An optimizer asks for the number in a counter, and scales by it: a program would freeze both. The
functions and methods that it does so with are exchanged while a number would be frozen."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .following import LOW
from .traced import is_frozen

#: methods with a factor -> its name, and a form with a tensor as factor, which rounds alike
SCALED: dict[str, tuple[str, Callable]] = {
    "add": ("alpha", lambda x, y, a: x.addcmul(y, a)),
    "addcmul": ("value", lambda x, y, z, a: x.addcmul(y * a, z)),
    "addcdiv": ("value", lambda x, y, z, a: x.addcdiv(y * a, z)),
    "lerp": ("weight", Tensor.lerp),
}


def scaling(method: Callable, name: str, form: Callable) -> Callable:
    """Return ``method`` with a tensor's number, its argument ``name``, by reference."""

    @functools.wraps(method)
    def scaled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name == "weight" and len(args) == 2:
            *args, kwargs[name] = args  # type: ignore[assignment]
        factor = kwargs.get(name)
        if not (isinstance(factor, Tensor) and is_frozen() and promotes_nothing(x, args, factor)):
            return method(x, *args, **kwargs)
        if x.dtype not in LOW or name == "alpha":
            factor = factor.to(x.dtype)
        if x.dtype in LOW:  # kernels compute in float32
            new = form(x.float(), *[t.float() for t in args], factor).to(x.dtype)
        else:
            new = form(x, *args, factor)
        return x.copy_(new) if method.__name__.endswith("_") else new

    return scaled


def promotes_nothing(x: Tensor, others: Sequence[Any], factor: Tensor) -> bool:
    """Return whether a factor promotes no dtype, as a number does not."""
    real = factor.is_floating_point() or factor.dtype is torch.int64
    same = all(isinstance(t, Tensor) and t.dtype is x.dtype for t in others)
    return same and (x.is_floating_point() or x.is_complex()) and real and not factor.dim()


def counter_value(get_value: Callable) -> Callable:
    """Return ``_get_value`` with tensors as doubles, in which Python computes."""

    @functools.wraps(get_value)
    def value(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and is_frozen() else get_value(x)

    return value


def one_after_another(several: Callable, single: Callable) -> Callable:
    """Return an optimizer's function for ``several`` tensors at once with the one for ``single``
    tensors, looked up, in its place: a backend fuses what is recorded."""

    @functools.wraps(several)
    def step(*args: Any, **kwargs: Any) -> Any:
        if is_frozen() and kwargs.get("found_inf") is not None:
            raise CaptureError(
                f"a fused optimizer's step for a GradScaler{at(user_line())}: leave `fused` out"
            )
        return (single() if is_frozen() else several)(*args, **kwargs)

    return step


def optimizer_steps() -> dict[tuple[Any, str], Callable]:
    """Return what is exchanged in the modules of ``torch.optim``, and methods of tensors."""
    found: dict[tuple[Any, str], Callable] = {
        (Tensor, name + end): scaling(getattr(Tensor, name + end), *how)
        for name, how in SCALED.items()
        for end in ("", "_")
    }
    for module in [m for n, m in sys.modules.items() if n.startswith("torch.optim.")]:
        table = vars(module)
        if "_get_value" in table:
            found[module, "_get_value"] = counter_value(table["_get_value"])
        for name, f in table.items():
            for prefix in ("_multi_tensor_", "_fused_"):
                single = name.replace(prefix, "_single_tensor_")
                if name.startswith(prefix) and single in table:
                    found[module, name] = one_after_another(
                        f, functools.partial(operator.getitem, table, single)
                    )
    return found
