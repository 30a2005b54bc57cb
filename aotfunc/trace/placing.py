"""Make DTensors: of parts without values, and with other placements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .kinds import is_dtensor
from .traced import no_recording

# ----- DTensors without values -------------------------------------------------------------------


@functools.cache
def fakes() -> FakeTensorMode:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.of_parts = True  # type: ignore[attr-defined]
    return mode


def without_values(x: Any) -> Tensor:
    """Return the part of a DTensor that this process holds, or a plain tensor, as a FakeTensor."""
    part = x._local_tensor if is_dtensor(x) else x
    if hasattr(part, "fake_mode"):
        return part
    with fakes():
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)


def mirror(x: Tensor) -> Tensor:
    """Return a tensor like ``x`` whose part has no values."""
    part = without_values(x)
    return dtensor(part, x._spec) if is_dtensor(x) else part  # type: ignore[attr-defined]


def mirrored(f: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return what ``f`` makes of such tensors, unrecorded."""
    with no_recording(), _disable_current_modes(), torch.no_grad():
        args, kwargs = tree_map_only(Tensor, mirror, (args, kwargs))
        return f(*args, **kwargs)


# ----- placements --------------------------------------------------------------------------------


def dtensor(part: Tensor, spec: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor(part, spec, requires_grad=False)


def dtensor_spec(mesh: Any, placements: Sequence[Any], shape: Any, stride: Any, dtype: Any) -> Any:
    """Return PyTorch's description of a DTensor."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(stride), dtype)
    return DTensorSpec(mesh, tuple(placements), tensor_meta=meta)


def replicated(x: Any, mesh: Any) -> Any:
    """Return a plain tensor that all processes have as a DTensor."""
    if is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate

    return dtensor(x, dtensor_spec(mesh, [Replicate()] * mesh.ndim, x.shape, x.stride(), x.dtype))


def resharded(x: Any, placements: Sequence[Any]) -> Any:
    """Return a DTensor with other placements."""
    from torch.distributed.tensor._redistribute import redistribute_local_tensor

    if x._spec.placements == tuple(placements):
        return x
    spec = dtensor_spec(x._spec.mesh, placements, x.shape, x.stride(), x.dtype)
    return dtensor(waited(redistribute_local_tensor(x._local_tensor, x._spec, spec)), spec)


def everywhere(x: Any) -> Tensor:
    """Return the whole of a DTensor."""
    from torch.distributed.tensor import Replicate

    return resharded(x, [Replicate()] * x._spec.mesh.ndim)._local_tensor


def waited(part: Any) -> Tensor:
    """Return a part when a collective is done with it."""
    return part.wait() if hasattr(part, "trigger_wait") else part
