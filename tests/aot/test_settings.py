"""Settings of PyTorch, and facts of outside tensors, that a function asks for: changed between
two calls they are never stale."""

import gc
import sys

import numpy as np
import pytest
import torch

from aotfunc import aot_function, jit, vmap
from tests.reference import assert_same

X = torch.tensor([1.0, 2.0])
W = torch.tensor([[1.0, 0.3], [0.1, 2.0]])
B = torch.backends
COMPILERS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}

#: ``name: (read, set)`` of what is True or False
FLAGS = {
    "cudnn.enabled": (lambda: B.cudnn.enabled, lambda v: setattr(B.cudnn, "enabled", v)),
    "cudnn.benchmark": (lambda: B.cudnn.benchmark, lambda v: setattr(B.cudnn, "benchmark", v)),
    "cudnn.deterministic": (
        lambda: B.cudnn.deterministic,
        lambda v: setattr(B.cudnn, "deterministic", v),
    ),
    "matmul.allow_tf32": (
        lambda: B.cuda.matmul.allow_tf32,
        lambda v: setattr(B.cuda.matmul, "allow_tf32", v),
    ),
    "mkldnn.enabled": (lambda: B.mkldnn.enabled, lambda v: setattr(B.mkldnn, "enabled", v)),
    "mkldnn.deterministic": (
        lambda: B.mkldnn.deterministic,
        lambda v: setattr(B.mkldnn, "deterministic", v),
    ),
    "opt_einsum": (lambda: B.opt_einsum.enabled, lambda v: setattr(B.opt_einsum, "enabled", v)),
    "flash": (lambda: B.cuda.flash_sdp_enabled(), B.cuda.enable_flash_sdp),
    "math": (lambda: B.cuda.math_sdp_enabled(), B.cuda.enable_math_sdp),
    "cudnn attention": (lambda: B.cuda.cudnn_sdp_enabled(), B.cuda.enable_cudnn_sdp),
    "fill_uninitialized_memory": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
        lambda v: setattr(torch.utils.deterministic, "fill_uninitialized_memory", v),
    ),
    "multithreading": (
        lambda: torch.autograd.is_multithreading_enabled(),
        torch._C._set_multithreading_enabled,
    ),
    "swap": (
        lambda: torch.__future__.get_swap_module_params_on_conversion(),
        torch.__future__.set_swap_module_params_on_conversion,
    ),
    "mha": (lambda: B.mha.get_fastpath_enabled(), B.mha.set_fastpath_enabled),
    "the garbage collector": (
        lambda: gc.isenabled(),
        lambda v: gc.enable() if v else gc.disable(),
    ),
    "how torch prints": (
        lambda: torch._tensor_str.get_printoptions()["precision"] == 4,
        lambda v: torch.set_printoptions(precision=4 if v else 6),
    ),
    "how numpy prints": (
        lambda: np.get_printoptions()["precision"] == 8,
        lambda v: np.set_printoptions(precision=8 if v else 4),
    ),
    "switch interval": (
        lambda: sys.getswitchinterval() > 0.1,
        lambda v: sys.setswitchinterval(0.25 if v else 0.005),
    ),
}


# (PyTorch's own tests, which others import, forbid to set flags outside of a context manager)
@torch.backends.__allow_nonbracketed_mutation()
@pytest.mark.parametrize("compiled", COMPILERS)
@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_that_changes(name, compiled):
    read, write = FLAGS[name]
    f = lambda x: x * 2 if read() else x * 3
    j, before = COMPILERS[compiled](f), read()
    try:
        for value in (before, not before, before):
            write(value)
            assert_same(j(X), f(X))
    finally:
        write(before)


@pytest.mark.parametrize("run", [vmap, lambda f: jit(f)], ids=["vmap", "jit"])
def test_what_is_set_inside_lasts(run):
    assert gc.isenabled()
    try:
        for on in (False, False, True):
            run(lambda x, on=on: ((gc.enable if on else gc.disable)(), x * gc.isenabled())[1])(X)
            assert gc.isenabled() is on
    finally:
        gc.enable()


@pytest.mark.parametrize("compiled", COMPILERS)
def test_a_default_dtype_of_autocast_that_changes(compiled):
    def f(x):
        with torch.autocast("cpu"):
            return x @ W

    j, before = COMPILERS[compiled](f), torch.get_autocast_dtype("cpu")
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            torch.set_autocast_dtype("cpu", dtype)
            assert_same(j(X), f(X))
            assert j(X).dtype is dtype
    finally:
        torch.set_autocast_dtype("cpu", before)


# ----- tensors from outside ----------------------------------------------------------------------

WHOLE = torch.ones(4)


def hooked(t):
    t.register_hook(lambda g: g)
    return t


def retained(t):
    t.retain_grad()
    return t


#: ``name: (ask, the tensors before, the tensors afterwards)``
ASKED = {
    "_version": (lambda t: t._version == 0, lambda: torch.ones(2), lambda t: t.add_(1)),
    "data_ptr": (
        lambda t: t.data_ptr() == WHOLE.data_ptr(),
        lambda: WHOLE.view(4),
        lambda t: torch.ones(4),
    ),
    "the storage's address": (
        lambda t: t.untyped_storage().data_ptr() == WHOLE.untyped_storage().data_ptr(),
        lambda: WHOLE.view(4),
        lambda t: torch.ones(4),
    ),
    "the storage's size": (
        lambda t: t.untyped_storage().nbytes() == 16,
        lambda: torch.ones(4),
        lambda t: torch.ones(5)[:4],
    ),
    "is_set_to": (lambda t: t.is_set_to(WHOLE), lambda: WHOLE.view(4), lambda t: torch.ones(4)),
    "_is_view": (lambda t: t._is_view(), lambda: WHOLE.view(4), lambda t: torch.ones(4)),
    "storage_offset": (
        lambda t: t.storage_offset() == 0,
        lambda: WHOLE[:2],
        lambda t: WHOLE[2:],
    ),
    "is_leaf": (
        lambda t: t.is_leaf,
        lambda: torch.ones(2, requires_grad=True),
        lambda t: t * 1,
    ),
    "hooks": (
        lambda t: bool(t._backward_hooks),
        lambda: torch.ones(2, requires_grad=True),
        hooked,
    ),
    "retains_grad": (
        lambda t: t.retains_grad,
        lambda: torch.ones(2, requires_grad=True) * 1,
        retained,
    ),
    "is_shared": (lambda t: t.is_shared(), lambda: torch.ones(2), lambda t: t.share_memory_()),
}


@pytest.mark.parametrize("compiled", COMPILERS)
@pytest.mark.parametrize("name", ASKED)
def test_a_fact_that_changes(name, compiled):
    ask, make, change = ASKED[name]
    held = [make()]
    f = lambda x: x * 2 if ask(held[0]) else x * 3
    j = COMPILERS[compiled](f)
    assert_same(j(X), f(X))
    held[0] = change(held[0])
    assert_same(j(X), f(X))
