"""A graph on which a compiler failed, as a script that runs without the program it is from."""

from __future__ import annotations

import hashlib
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ..backends import REGISTRY, Backend
from ..native.store import kernel_directory

SCRIPT = '''"""A graph on which a compiler failed: {error}

Compile and run it: python {path}
Print the smallest part on which that fails: python {path} minify
Values of tensors are random numbers, or zeros where they are integers."""

import sys

import torch
from torch import device, fx, inf, nan
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import aotfunc
from aotfunc.compile import minifier

{compiler}


def tensor(shape, stride, dtype, device):
    size = max(0, 1 + sum((n - 1) * step for n, step in zip(shape, stride)))
    make = torch.randn if dtype.is_floating_point or dtype.is_complex else torch.zeros
    return make(size).to(dtype).to(device).as_strided(shape, stride)


class Graph(torch.nn.Module):
    def __init__(self):
        super().__init__()
{constants}

    {code}


inputs = [
{inputs}
]


def failure(gm, inputs):
    try:
        compiler(gm, inputs)(*inputs)
    except Exception as error:
        return error


def with_values(gm, inputs):
    FakeTensorProp(gm).propagate(*inputs)
    return gm


if __name__ == "__main__":
    torch.manual_seed(0)
    gm = with_values(fx.symbolic_trace(Graph()), inputs)
    if sys.argv[1:] == ["minify"]:
        gm, inputs = minifier(gm, inputs, lambda gm, inputs: failure(gm, inputs) is not None)
        print(gm.code)
    elif error := failure(gm, inputs):
        raise error
'''


def kept_as_script(gm: fx.GraphModule, backend: Backend, error: Exception) -> Path:
    """Write the graph, its inputs by their shapes, and the compiler's name and settings to a file
    beside the kernels. Raises OSError if there is no place for it."""
    vals = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    held = {n.target: getattr(gm, n.target) for n in gm.graph.find_nodes(op="get_attr")}
    constants = [f'self.register_buffer("{k}", {value_code(t)})' for k, t in held.items()]
    parts = {
        "error": f"{type(error).__name__}: {error}".splitlines()[0].replace('"""', "'''"),
        "compiler": text_of(backend),
        "constants": textwrap.indent("\n".join(constants or ["pass"]), " " * 8),
        "code": "\n    ".join(gm.code.strip().splitlines()),
        "inputs": textwrap.indent("\n".join([f"{value_code(v)}," for v in vals]), " " * 4),
    }
    name = hashlib.sha256("".join(parts.values()).encode()).hexdigest()[:16]
    path = kernel_directory() / f"failed_{name}.py"
    path.write_text(SCRIPT.format(path=path, **parts))
    return path


def value_code(val: Any) -> str:
    """Return code that makes a value like this one."""
    if not isinstance(val, Tensor):
        return repr(val)
    return f"tensor({tuple(val.shape)}, {val.stride()}, {val.dtype}, {str(val.device)!r})"


def text_of(backend: Backend) -> str:
    """Return the import of a compiler that has a name."""
    named = [name for name, known in REGISTRY.items() if known is backend]
    if named:
        return f'compiler = aotfunc.backends.lookup("{named[0]}")'
    f: Callable = backend.compile
    module, name = getattr(f, "__module__", ""), getattr(f, "__qualname__", "")
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is f:
        return f"from {module} import {name} as compiler"
    return (
        "def compiler(gm, example_inputs):\n"
        f'    raise NotImplementedError("put {name or type(f).__name__} here, which has no name '
        'to import")'
    )
