"""Tell which ops give their result memory of its own."""

from __future__ import annotations

from typing import Any

import torch

from .pointwise import RULES
from .reductions import REDUCTIONS
from .views import VIEWS

aten = torch.ops.aten

#: op -> whether it does; False: the result may be the argument, or a view of it, whatever the
#: schema says; other ops are unknown
OWN_MEMORY: dict[Any, bool] = {
    **dict.fromkeys((*RULES, *REDUCTIONS), True),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), True),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), True),
    **dict.fromkeys((aten.convolution.default, aten.convolution_backward.default), True),
    **dict.fromkeys((aten.conj_physical.default, *VIEWS), False),
}
