"""Results of which the eager backend says that no other tensor shares their memory, against what
PyTorch's kernels return."""

import contextlib

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from aotfunc import jit
from aotfunc.backends.eager import compile_graph, returns_new
from aotfunc.runtime.autograd import users
from tests.sweeps import every

OPS = every(12, [op for op in op_db if "jiterator" not in op.name])


class Compare(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if isinstance(out, torch.Tensor) and returns_new(op):
            with _disable_current_modes():
                again = op(*args, **kwargs)
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            assert not any(again is x for x in given), op
            if again.layout is torch.strided:
                assert users(again) == 1 and not again._is_view(), op
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}{op.variant_test_name}")
def test_no_other_tensor_shares_a_new_result(op):
    dtype = torch.float32 if torch.float32 in op.dtypes else next(iter(op.dtypes))
    samples = [*op.sample_inputs("cpu", dtype, requires_grad=False)]
    for s in every(5, samples):
        with contextlib.suppress(RuntimeError, NotImplementedError), Compare(), torch.no_grad():
            op(s.input, *s.args, **s.kwargs)


def own(f, *args):
    return compile_graph(jit(f, backend="eager").lower(*args).graph).boxed.own


def test_views_inputs_and_equal_results_are_not_new():
    x = torch.randn(3, 4)
    assert own(lambda x: (x.sin(), x @ x.t(), x.t()), x) == 2
    assert own(lambda x: x.max(0), x) == 0
    assert own(lambda x: (x.sin(), x), x) == 1
