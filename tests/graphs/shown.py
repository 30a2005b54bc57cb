"""The printed code of a graph, shortened for reading, after checking that the graph computes what
it should."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from aotfunc import make_fx
from tests.reference import assert_same, fresh

#: 2.11's meta kernel says that select_scatter into an expanded tensor keeps its stride 0: one op
# more is left there
dense_scatter = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="as printed from torch 2.12 on"
)


def shown(f, *args, like=None, **kwargs):
    """``make_fx(f)(*args).code`` without ``torch.ops.`` and the freeing of names, one trailing
    newline.

    The graph is run once and compared, results and final values of arguments, with ``like``
    (default: ``f`` itself) from the same seed."""
    gm = make_fx(f)(*args, **kwargs)
    runs = []
    for call in (gm, like or f):
        mine, named = fresh((args, kwargs))
        torch.manual_seed(0)
        with torch.no_grad() if call is gm else torch.enable_grad():
            runs.append(
                (
                    call(*mine, **named),
                    [x for x in tree_leaves(mine) if isinstance(x, torch.Tensor)],
                )
            )
    assert_same(*runs)
    return readable(gm.code)


def readable(code):
    code = re.sub(r";  (\w+ = )+None", "", code.replace("torch.ops.", ""))
    code = re.sub(r"\n\s*\n", "\n", code)
    return "\n".join(line.rstrip() for line in code.strip().splitlines()) + "\n"


def by_autograd(f):
    """The gradient of ``f`` with respect to its first argument, by torch.autograd."""

    def run(x, *rest):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x, *rest), x)[0]

    return run
