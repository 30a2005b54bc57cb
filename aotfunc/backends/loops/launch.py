"""Launch a kernel: call it with tensors and return new ones.

In Python a call takes several µs, so native code makes it (``launch.cpp``, compiled once for all
launches), which reads the C++ tensor at an offset in the Python object, found here. If any of that
is missing, the plain form does the same in Python.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...debug import LEVEL
from ...errors import ArgumentError, BackendWarning, CompilerError
from ...native import toolchain
from ...native.build import built
from ...native.fastcall import Unlike, address, check_objects, python_function, word
from ...trace.shapes.sig import reach
from . import native

#: the shape, strides and dtype of a tensor
Output = tuple[Sequence[int], Sequence[int], torch.dtype]

EMPTY: Mapping[int, int] = {}

#: classes of tensors that have memory, or are zeros
TENSORS = (Tensor, nn.Parameter)

DTYPES = {x for x in vars(torch).values() if isinstance(x, torch.dtype)}


class Launch:
    """``launch(*inputs)`` allocates the kernel's outputs, runs it, and returns them: one tensor,
    or a tuple. ``entry`` is a quicker callable that does the same.

    ``order`` says for each of the kernel's buffers which of ``[*inputs, *outputs]`` it is. Only
    the memory of inputs is read: the caller guarantees their dtypes, sizes, strides and
    conjugation. Outputs that have ``taken`` an input's memory, which nothing else may use, are new
    in the plain form. Raises TypeError for a wrong number of inputs or one that is no tensor, and
    its subclass ArgumentError for a tensor without memory on the CPU."""

    __slots__ = ("__name__", "entry", "plain", "taken")

    def __init__(
        self,
        kernel: native.LoadedKernel,
        rows: int,
        sizes: Sequence[int],
        outputs: Sequence[Output],
        order: Sequence[int],
        grain: int | None = None,
        taken: Mapping[int, int] = EMPTY,
    ) -> None:
        self.__name__ = kernel.function.__name__
        self.plain = functools.partial(launch_plainly, kernel, rows, sizes, outputs, order, grain)
        self.taken = taken
        self.entry: Callable = self.plain
        if (quick := native_form()) and all(d in quick.dtypes for *_, d in outputs):
            self.entry = quick(self.plain, taken)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.entry(*inputs)

    def taking(self, taken: Mapping[int, int]) -> Launch:
        """Return the launch whose outputs take the memory of inputs."""
        kernel, rows, sizes, outputs, order, grain = self.plain.args
        return Launch(kernel, rows, sizes, outputs, order, grain, taken)


def launch_plainly(
    kernel: native.LoadedKernel,
    rows: int,
    sizes: Sequence[int],
    outputs: Sequence[Output],
    order: Sequence[int],
    grain: int | None,
    *inputs: Tensor,
) -> Any:
    """Run a launch in Python."""
    name, count = kernel.function.__name__, count_inputs(order, outputs)
    if len(inputs) != count:
        raise TypeError(f"the kernel {name} takes {count} tensors, not {len(inputs)}")
    with torch._C.DisableTorchFunctionSubclass():
        inputs = tuple(map(materialized, inputs))
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor):
                kind = type(t).__name__
                raise TypeError(f"the kernel {name} takes tensors; input {i} is a {kind}")
            if not has_memory(t):
                raise ArgumentError(
                    f"the kernel {name}: input {i}, on {t.device}, has no CPU memory; the eager "
                    "backend takes such tensors"
                )
        outs = [torch.empty_strided(s, t, dtype=d, device="cpu") for s, t, d in outputs]
        tensors = [*inputs, *outs]
        kernel(rows, sizes, [tensors[i] for i in order], grain)
    return outs[0] if len(outs) == 1 else tuple(outs)


def materialized(t: Any) -> Any:
    """Give memory to a tensor of zeros that has none yet."""
    if not isinstance(t, Tensor) or not t._is_zerotensor():  # type: ignore[attr-defined]
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_()


def has_memory(t: Tensor) -> bool:
    """Return whether a kernel can read ``t``, which may be sparse, fake or on another device."""
    try:
        return t.untyped_storage().device.type == "cpu" and bool(t.data_ptr() or not t.numel())
    except RuntimeError:
        return False


def bytes_of(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    return reach(shape, strides) * dtype.itemsize


def count_inputs(order: Sequence[int], outputs: Sequence[Output]) -> int:
    """Return how many inputs there are: buffers that a kernel does not write."""
    return max(order, default=-1) + 1 - len(outputs)


# ----- the native form ---------------------------------------------------------------------------


@functools.cache
def native_form() -> Native | None:
    """Return a function that makes a native function of a plain launch, None if it is not
    available; under AOTFUNC_DEBUG a warning says why."""
    try:
        return Native()
    except (CompilerError, OSError, AttributeError, ValueError, Unlike) as e:
        if LEVEL:
            warnings.warn(f"kernels are called in Python, not natively: {e}", BackendWarning)
        return None


class Native:
    """The functions of ``launch.cpp``, with the facts that they need about this process. Raises
    Unlike, and AttributeError or OSError if PyTorch or Python lacks what they call."""

    def __init__(self) -> None:
        offset = offset_of_tensors()
        shim = ctypes.CDLL(toolchain.torch_library())
        python = ctypes.CDLL(str(Path(toolchain.torch_library()).with_name("libtorch_python.so")))
        parts = ("launch.cpp", "loop.h", "loop.cpp")
        source = "\n".join([(native.HERE / part).read_text() for part in parts])
        library = ctypes.CDLL(str(built(source)))
        self.launch, self.loop = address(library.aot_launch), address(library.aot_loop)
        names = {d: f"aoti_torch_dtype_{str(d).removeprefix('torch.')}" for d in DTYPES}
        self.dtypes = {d: shim[name]() for d, name in names.items() if hasattr(shim, name)}
        for name, x in (
            ("offset", offset),
            ("tensor", id(Tensor)),
            ("parameter", id(nn.Parameter)),
            ("wrap", address(python._Z16THPVariable_WrapRKN2at10TensorBaseE)),
            ("grain", native.GRAIN),
        ):
            ctypes.c_int64.in_dll(library, f"aot_{name}").value = x
        forked = ctypes.c_int32.in_dll(library, "aot_forked")
        forked.value = native._forked
        os.register_at_fork(after_in_child=lambda: setattr(forked, "value", 1))
        self.first(native.LoadedKernel(library.aot_first))

    def __call__(self, plain: functools.partial, taken: Mapping[int, int] = EMPTY) -> Callable:
        """Return a native function that does the same as the plain launch."""
        kernel, rows, sizes, outputs, order, grain = plain.args
        largest = max([math.prod(shape) for shape, _, _ in outputs], default=0)
        plan = [count_inputs(order, outputs), len(outputs), len(order), len(sizes)]
        plan += [rows, grain or 0, largest, kernel.address, *order, *sizes]
        for i, (shape, strides, dtype) in enumerate(outputs):
            bytes = bytes_of(shape, strides, dtype)
            plan += [self.dtypes[dtype], bytes, taken.get(i, -1), len(shape), *shape, *strides]
        name = kernel.function.__name__
        return python_function(name, self.launch, (array("q", plan).tobytes(), plain), __name__)

    def first(self, kernel: native.LoadedKernel) -> None:
        """Check that a launch works. Raises Unlike."""
        outputs = [((2, 3), (1, 2), torch.float32)]
        launch = self(functools.partial(launch_plainly, kernel, 6, (), outputs, (0, 1), None))
        for x in (torch.arange(6.0), nn.Parameter(torch.arange(7.0))[1:]):
            y = launch(x)
            facts = (type(y), y.shape, y.stride(), y.dtype, y.requires_grad)
            right = facts == (Tensor, (2, 3), (1, 2), torch.float32, False)
            if not right or y.T.flatten().tolist() != x.tolist():
                raise Unlike("a first launch gave something else than it should")


def offset_of_tensors() -> int:
    """Find the offset of ``at::Tensor`` in a Python tensor. Raises Unlike if unsure."""
    check_objects()
    x = torch.zeros(2)
    several = (x, x[1:], x.detach().requires_grad_(), nn.Parameter(x))
    within = range(16, Tensor.__basicsize__ - 7, 8)
    found = [o for o in within if all(word(t, o) == t._cdata for t in several)]
    if len(found) != 1:
        raise Unlike("tensors of this PyTorch are laid out in another way")
    return found[0]
