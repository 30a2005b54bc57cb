"""Tell which nodes a kernel may compute, and which ones it looks through."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from .blocks import block_sums
from .constants import FULL, constant
from .dtypes import DTYPES
from .indexed import IOTAS, TAKEN, iota
from .pointwise import RULES
from .reductions import REDUCTIONS
from .resized import RESIZED
from .scans import SCANS
from .scatter import adds
from .views import SEVERAL, VIEWS, source_of

#: what a node calls that a kernel may look through
SHOWN = frozenset((operator.getitem, *VIEWS, *SEVERAL, *FULL, *IOTAS))


def in_kernels(n: Any) -> bool:
    """Return whether a node may be in a kernel: it has a rule and is a plain CPU tensor."""
    return (
        isinstance(n, Node)
        and n.op == "call_function"
        and (
            n.target in RULES
            or n.target in REDUCTIONS
            or n.target in SCANS
            or n.target in TAKEN
            or n.target in RESIZED
            or n.target is block_sums
            or adds(n)
        )
        and plain_on_cpu(n)
        and not n.meta["val"].storage_offset()  # `as_strided` counts from before it
        and all(map(plain_on_cpu, n.all_input_nodes))
    )


def plain_on_cpu(n: Node) -> bool:
    """Return whether a node is one tensor on the CPU, of a dtype that kernels know."""
    val = n.meta.get("val")
    return (
        isinstance(val, Tensor)
        and val.device.type == "cpu"
        and val.dtype in DTYPES
        and val.numel() != 0  # they have no memory to read
    )


def seen_through(n: Any) -> bool:
    """Return whether a kernel that reads this node reads its argument, or a number, instead."""
    return (
        isinstance(n, Node)
        and n.target in SHOWN  # ops hash slowly: most nodes are looked up once
        and (source_of(n) is not None or constant(n) is not None or iota(n) or n.target in SEVERAL)
    )


def within_kernels(n: Any) -> bool:
    """Return whether a kernel may compute a node, or look through it."""
    return in_kernels(n) or seen_through(n)
