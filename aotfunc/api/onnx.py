"""Convert an exported function to an ONNX model, and compare that with the function."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..capture.bodies import Flow
from ..capture.scan import Scan
from ..debug import at, user_line
from ..errors import ArgumentError, BackendError
from ..graph import Program, draws
from ..trace.shapes.sig import Sig

if TYPE_CHECKING:
    from .export import Exported

#: the largest error allowed to onnxruntime, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def to_onnx(exported: Exported, options: dict[str, Any]) -> Any:
    """See :meth:`.export.Exported.to_onnx`."""
    program, name = exported._program, f"to_onnx: {exported._data['name']}"
    if missing := [p for p in ("onnxscript", "onnxruntime") if find_spec(p) is None]:
        raise BackendError(f"to_onnx needs {' and '.join(missing)}: pip install aotfunc[onnx]")
    drawing = any(n.op == "call_function" and draws(n) for n in program.graph.nodes)
    if program.mutated or drawing:
        does = "draws random numbers" if drawing else "writes to an argument or a buffer"
        raise ArgumentError(
            f"{name} {does}{at(user_line(2))}, as modules do in training, and what an ONNX model "
            "returns depends on its inputs alone: export it in eval() mode"
        )
    if branches_on_values(program):
        raise ArgumentError(
            f"{name} has branches or loops (cond, switch, while_loop) that values decide on"
            f"{at(user_line(2))}, and torch.onnx converts one sequence of ops: take torch.where "
            "for branches, and scan, of a fixed length, for loops"
        )
    inputs = program.placeholders[: program.n_inputs]
    generator = torch.Generator().manual_seed(0)
    args, keywords = exported._arguments([sample_input(p.meta["val"], generator) for p in inputs])
    with torch.no_grad():
        expected = [y for y in tree_leaves(exported(*args, **keywords)) if y is not None]
    if not all(isinstance(y, Tensor) for y in expected):
        raise ArgumentError(f"{name} returns Python values, which an ONNX model cannot")
    if not set(inputs) & set(program.outputs):  # torch.onnx gives such a result the same name
        options = {"input_names": [p.name for p in inputs], **options}
    try:
        model = torch.onnx.export(exported.to_torch(), **{"verbose": False, **options})
    except torch.onnx.OnnxExporterError as e:
        reason: BaseException = e
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ArgumentError(f"{name} cannot be converted by torch.onnx: {reason}") from e
    given = [x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor)]
    for i, (x, y) in enumerate(zip(model(*given), expected, strict=True)):
        if not nearly_equal(x, y.cpu()):
            raise ArgumentError(
                f"{name}: torch.onnx converts it to a model whose output {i} is another: "
                f"{x.flatten()[:3].tolist()}… for {y.flatten()[:3].tolist()}…"
            )
    return model


def branches_on_values(program: Program) -> bool:
    """Return whether control flow in a program, or in a loop's body, depends on values."""
    flows = [n.target for n in program.graph.nodes if isinstance(n.target, Flow)]
    return any(not isinstance(f, Scan) or any(map(branches_on_values, f.bodies)) for f in flows)


def sample_input(sig: Sig, generator: torch.Generator) -> Tensor:
    x = torch.zeros(sig.shape, dtype=sig.dtype)
    return (x.normal_(generator=generator) if sig.differentiable else x).to(sig.device)


def nearly_equal(x: Tensor, y: Tensor) -> bool:
    """Return whether the model's output ``x`` equals the function's ``y`` up to rounding."""
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    part = TOLERANCE.get(y.dtype, 1e-4)
    scale = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
    return torch.allclose(x, y, rtol=part, atol=part * scale, equal_nan=True)
