"""Activations, losses of single elements and their derivatives, at ordinary and special values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.backends.test_cpp import SPECIAL, agree, floats

pytestmark = pytest.mark.usefixtures("cache")
aten = torch.ops.aten

#: functions of a gradient or a second value, and of a value
ELEMENTS = {
    "elu backward": lambda g, x: aten.elu_backward(g, 1.2, 1.1, 0.9, False, x),
    "elu backward of a result": lambda g, x: aten.elu_backward(g, 1.2, 1, 1, True, x.clamp(-1)),
    "celu": lambda g, x: F.celu(x, 1.3),
    "hardtanh backward": lambda g, x: aten.hardtanh_backward(g, x, -1.0, 1.0),
    "hardswish backward": lambda g, x: aten.hardswish_backward(g, x),
    "mish": lambda g, x: (F.mish(x), aten.mish_backward(g, x)),
    "logsigmoid": lambda g, x: F.logsigmoid(x),
    "logsigmoid backward": lambda g, x: aten.log_sigmoid_backward(g, x, (-x.abs()).exp()),
    "shrink": lambda g, x: (F.hardshrink(x), F.softshrink(x)),
    "hardshrink backward": lambda g, x: aten.hardshrink_backward(g, x, 0.5),
    "softshrink backward": lambda g, x: aten.softshrink_backward(g, x, 0.5),
    "prelu": lambda g, x: F.prelu(x, g.flatten()[:1]),
    "logit": lambda g, x: (torch.logit(x), torch.logit(x, 1e-3), torch.logit(x, 0.9)),
    "logit backward": lambda g, x: aten.logit_backward(g, x),
    "logit backward with a bound": lambda g, x: aten.logit_backward(g, x, 1e-3),
    "xlogy": lambda g, x: (torch.xlogy(g, x), torch.xlogy(x, g), torch.special.xlog1py(x, g)),
    "entropy": lambda g, x: torch.special.entr(x),
    "logaddexp": lambda g, x: (torch.logaddexp(g, x), torch.logaddexp2(g, x)),
    "hypot": lambda g, x: (torch.hypot(g, x), torch.copysign(g, x)),
    "fmax": lambda g, x: (torch.fmax(g, x), torch.fmin(g, x)),
    "nan_to_num": lambda g, x: (torch.nan_to_num(x), torch.nan_to_num(x, 1.0, 2.0, 3.0)),
    "heaviside": lambda g, x: (torch.heaviside(x, g), torch.sgn(x), torch.isposinf(x)),
    "huber": lambda g, x: F.huber_loss(g, x, reduction="none"),
    "smooth l1": lambda g, x: F.smooth_l1_loss(g, x, reduction="none"),
    "soft margin": lambda g, x: F.soft_margin_loss(x, g, reduction="none"),
    "of logits": lambda g, x: F.binary_cross_entropy_with_logits(
        x, g.sigmoid(), pos_weight=g.sigmoid() + 1, reduction="none"
    ),
    "losses": lambda g, x: (F.huber_loss(g, x), F.smooth_l1_loss(g, x, reduction="sum")),
    "glu": lambda g, x: (F.glu(x), aten.glu_backward(g[..., ::2].contiguous(), x, -1)),
    "dropout backward": lambda g, x: aten.native_dropout_backward(g, x > 0, 1.25),
    "zeros": lambda g, x: aten.zero(x) + g,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ELEMENTS)
def test_elements(case, dtype):
    g, x = (floats(4, 38).to(dtype) for _ in range(2))
    unit = max(1e-6, 2 * torch.finfo(dtype).eps)
    agree(ELEMENTS[case], g, x, kernels=None, rtol=unit, atol=unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part", range(4))
def test_special_values(part, dtype):
    """NaN, infinities and the ends of the range; PyTorch itself has two gradients of NaN, in
    vectors and behind the last one."""
    cases = [c for c in ELEMENTS if c != "losses"][part::4]
    x = torch.tensor([*SPECIAL, 1.0, 3.0, -3.0, 100.0] * 2, dtype=dtype)

    def all_of(g, x, y):
        found = [ELEMENTS[c](g, x) for c in cases]
        found += [ELEMENTS[c](y, x) for c in cases if "backward" not in c]
        return [y for r in found for y in ([r] if isinstance(r, torch.Tensor) else r)]

    agree(all_of, floats(x.numel()).to(dtype), x, x.roll(5), kernels=None)
