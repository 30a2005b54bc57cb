"""Tell how far Inductor is with a graph, by the stack of the thread that compiles it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..progress import doing


def compiling() -> doing:
    """Return the step of a compilation by Inductor that begins now, in this thread."""
    here = threading.get_ident()
    return doing(lambda: f"Inductor, {step_of(here)}")


def step_of(thread: int) -> str:
    """Return what a thread does within Inductor: the innermost known function on its stack."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch._inductor."):
            if say := STEPS.get(frame.f_code.co_qualname):
                with suppress(Exception):  # other PyTorch versions use other names
                    return say(frame.f_locals)
        frame = frame.f_back
    return "preparation"


def among(items: Iterable, item: Any) -> str:
    """Return how many of the items come before one of them.

    >>> among([torch.sin, torch.cos, torch.tan], torch.tan)
    '2 of 3'
    """
    items = list(items)
    return f"{next((i for i, other in enumerate(items) if other is item), 0):,} of {len(items):,}"


#: slow function of Inductor -> the text for its local variables
STEPS: dict[str, Callable[[dict[str, Any]], str]] = {
    "post_grad_passes": lambda local: "passes over the graph",
    "GraphLowering.run": lambda local: (
        f"lowering, {among(local['self'].graph.nodes, local['self'].current_node)}"
    ),
    "Scheduler._init": lambda local: f"fusion of {len(local['nodes']):,} ops",
    "Scheduler._codegen": lambda local: f"kernels, {among(local['nodes'], local.get('node'))}",
    "valid_vec_isa_list": lambda local: "tests of what the processor can do",
    "AsyncCompile._wait_futures": lambda local: (
        f"compiler, {among(local['kernels'], local.get('key'))}"
    ),
}
