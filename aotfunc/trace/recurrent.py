"""Record the step of torch's recurrent layers once, as the body of a loop, while loops are native
code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .above import above
from .patches import recorder


def rolled(name: str) -> Callable:
    """Return the replacement of torch's function of this name, which would record each step."""
    unrolled = getattr(torch._VF, name)

    def layers(*args: Any) -> Any:
        trace = recorder()
        loop = trace is not None and trace.rolls and fits(name, *args)
        return above("recurrent", name, *args) if loop else unrolled(*args)

    return layers


def fits(name: str, x: Tensor, start: Any, weights: Any, bias: Any, *rest: Any) -> bool:
    """Return whether a call may be a loop: equal sequences of several steps on the CPU, of one
    dtype without a kernel (oneDNN's LSTM) or rounding, without projections."""
    if not isinstance(bias, bool) or torch.is_autocast_enabled("cpu"):  # else packed
        return False
    starts, batch_first = [*start] if name == "lstm" else [start], rest[-1]
    return (
        x.dtype in ((torch.float64,) if name == "lstm" else (torch.float32, torch.float64))
        and all(t.dtype is x.dtype and t.device.type == "cpu" for t in [x, *starts, *weights])
        and len(weights) == len(starts[0]) * (4 if bias else 2)
        and x.numel() > 0
        and x.shape[batch_first] > 1
    )


RECURRENT = {(torch._VF, name): rolled(name) for name in ("rnn_tanh", "rnn_relu", "gru", "lstm")}
