"""PyTorch's Inductor as a backend: C++ on CPU (needs g++), Triton on GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import BackendError

aten = torch.ops.aten


def inductor(gm: fx.GraphModule, example_inputs: list) -> Callable:
    """Compile a functional aten graph with Inductor's inner compiler; decompositions are applied first."""
    try:
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V
    except ImportError as e:
        raise BackendError(f"the inductor backend needs a torch build with Inductor: {e}") from e
    if not any(t.is_cuda for t in example_inputs if isinstance(t, torch.Tensor)) and shutil.which("g++") is None:
        raise BackendError("the inductor backend needs a C++ compiler on the CPU: install g++")
    transposes_opened(gm)
    # results, and residuals that a backward half was promised, have the strides that the graph says
    out = next(iter(reversed(gm.graph.nodes)))
    out.meta["user_visible_output_idxs"] = [i for i, o in enumerate(out.args[0]) if isinstance(o, fx.Node)]
    fake_inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    mode = next((v.fake_mode for n in gm.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)
    with V.set_fake_mode(mode), torch.no_grad():
        fn: Any = compile_fx_inner(gm, fake_inputs)

    def call(*args: torch.Tensor) -> Any:
        return fn(list(args))

    return call


def transposes_opened(gm: fx.GraphModule) -> None:
    """Inductor knows ``permute`` only; our graphs are tidied to ``t`` and ``transpose``, after decomposition too."""
    for n in gm.graph.nodes:
        if n.target in (aten.t.default, aten.transpose.int):
            x = n.args[0]
            order = list(range(x.meta["val"].dim()))
            i, j = n.args[1:] if n.target is aten.transpose.int else (0, -1)
            if order:
                order[i], order[j] = order[j], order[i]
            n.target, n.args = aten.permute.default, (x, order)
    gm.recompile()


def _decompositions() -> dict:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


#: what Inductor wants opened up before it compiles
inductor.decompositions = _decompositions  # type: ignore[attr-defined]
