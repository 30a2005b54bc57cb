"""Ops that write autograd's knowledge into a graph: identities in value, each with a derivative of
its own.

A value made under ``torch.no_grad()`` and read outside passes through ``aten.detach``. A view made
there passes through ``dead_end``: it requires grad if its base does, and has no derivative. A
write that autograd does not see is ``hidden_write(old, new)``: the new value with the old
derivative.
"""

import torch

_library = torch.library.Library("aotfunc", "DEF")
_library.define("hidden_write(Tensor old, Tensor new) -> Tensor")
_library.impl("hidden_write", lambda old, new: new.clone(), "CompositeExplicitAutograd")
torch.library.register_autograd("aotfunc::hidden_write", lambda ctx, g: (g, None), lib=_library)
hidden_write = torch.ops.aotfunc.hidden_write.default

_library.define("dead_end(Tensor(a) x) -> Tensor(a)")
_library.impl("dead_end", torch.no_grad()(lambda x: x.view_as(x)), "CompositeImplicitAutograd")
dead_end = torch.ops.aotfunc.dead_end.default

_library.define("once(Tensor x) -> Tensor")
_library.impl("once", lambda x: x.clone(), "CompositeExplicitAutograd")
#: refuses to be differentiated: @once_differentiable
once = torch.ops.aotfunc.once.default

_library.define("no_tangent(Tensor x) -> Tensor")
_library.impl("no_tangent", lambda x: x.clone(), "CompositeExplicitAutograd")
#: without a forward-mode derivative
no_tangent = torch.ops.aotfunc.no_tangent.default


def _checked(x: torch.Tensor, where: str) -> torch.Tensor:
    if bool(x.isnan().any()):
        raise RuntimeError(f"a gradient has nan values{where}")
    return x.clone()


_library.define("check_gradient(Tensor x, str where) -> Tensor")
_library.impl("check_gradient", _checked, "CompositeExplicitAutograd")
_library.impl("check_gradient", lambda x, where: x.clone(), "Meta")
#: raises RuntimeError for a NaN
check_gradient = torch.ops.aotfunc.check_gradient.default

#: marks whose value is their argument
IDENTITIES = (torch.ops.aten.detach.default, dead_end, no_tangent, once)

_errors: list[Exception] = []


def _fail(x: torch.Tensor, error: int) -> torch.Tensor:
    raise _errors[error].with_traceback(None)


_library.define("fail(Tensor x, int error) -> Tensor")
_library.impl("fail", _fail, "CompositeExplicitAutograd")
_library.impl("fail", lambda x, error: x.clone(), "Meta")
#: raises the error that recording a user's backward raised
fail = torch.ops.aotfunc.fail.default


def number_of(error: Exception) -> int:
    """Return the number by which ``fail`` knows an error."""
    _errors.append(error)
    return len(_errors) - 1
