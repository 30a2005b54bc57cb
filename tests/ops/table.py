"""Which ops, dtypes and samples are tested, how one of them is run, and which failures are known."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.testing._internal import common_methods_invocations as opinfos
from torch.testing._internal.common_methods_invocations import op_db

from tests.ops.compositions import COMPOSITIONS, Call, NoReference

KNOWN = Path(__file__).with_name("known_failures.txt")
SAMPLES = 3
LIMIT_S = 20.0  # one op, dtype and composition
DTYPES = {"float64": torch.float64, "complex128": torch.complex128, "int64": torch.int64, "bool": torch.bool}

# OpInfo seeds inside the function, which a capture does once and its graph does not do again: here the checks seed.
seeding, opinfos.wrapper_set_seed = opinfos.wrapper_set_seed, lambda op, *args, **kwargs: op(*args, **kwargs)
for op in op_db:
    if op.gradcheck_wrapper is seeding:
        op.gradcheck_wrapper = opinfos.wrapper_set_seed

# Not functions of their inputs: uninitialised memory, or a result that is not a tensor.
NO_FUNCTION = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "item",
    "equal",
}
NO_FUNCTION |= {"jiterator_2inputs_2outputs", "jiterator_4inputs_with_extra_args", "jiterator_binary"}  # CUDA alone
NO_FUNCTION |= {
    "jiterator_binary_return_by_ref",
    "jiterator_unary",
    "allclose",
    "resize_",
    "resize_as_",
    "is_pinned",
    "to_sparse",
    "sparse_mm_reduce",
    "sparse_sampled_addmm",
}
# vmap asks which kind of randomness is meant, and PyTorch's two kinds are tested in tests/func/test_random.py.
RANDOM = {
    "bernoulli",
    "multinomial",
    "normal",
    "rand_like",
    "randn_like",
    "randint_like",
    "randint",
    "randn",
    "uniform",
}
RANDOM |= {"cauchy", "exponential", "geometric", "log_normal", "pca_lowrank", "svd_lowrank", "normal_number_mean"}
RANDOM |= {
    "nn_functional_" + n for n in ("dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}
RANDOM |= {
    "nn_functional_feature_alpha_dropout_with_train",
    "nn_functional_rrelu",
    "nn_functional_fractional_max_pool2d",
}
RANDOM |= {"nn_functional_fractional_max_pool3d", "nn_functional_scaled_dot_product_attention", "normal_in_place"}
RANDOM |= {"nn_functional_multi_head_attention_forward"}

# vmap has no answer where a result's shape depends on values; which error it is, is tested in tests/func/test_vmap.py.
RANDOM_OR_RAGGED = RANDOM | {"argwhere", "bincount", "masked_select", "nonzero", "unique", "unique_consecutive"}

# autograd's own gradient is not that of finite differences (test_ops.py compares with those)
WRONG_IN_AUTOGRAD = {"as_strided_scatter"}

OPS = {op.formatted_name: op for op in op_db}
OPS = {name: op for name, op in OPS.items() if op.name not in NO_FUNCTION and not op.name.startswith("sparse")}


def dtypes(op) -> list[str]:
    """float64 and complex128 where the op takes them, else one integer type (for vmap alone)."""
    given = op.supported_dtypes("cpu")
    found = [d for d in ("float64", "complex128") if DTYPES[d] in given]
    return found or [d for d in ("int64", "bool") if DTYPES[d] in given][:1]


def compositions(name: str, dtype: str) -> list[str]:
    op = OPS[name]
    floating = dtype in ("float64", "complex128")
    derivative = op.supports_autograd and DTYPES[dtype] in op.supported_backward_dtypes("cpu")
    if not (floating and derivative):
        return [] if name in RANDOM_OR_RAGGED else ["vmap"]
    found = [c for c in COMPOSITIONS if not (name in RANDOM_OR_RAGGED and "vmap" in c)]
    return [c for c in found if name not in WRONG_IN_AUTOGRAD or "vjp" not in c]


def samples(name: str, dtype: str) -> list:
    """Up to SAMPLES small ones, spread over the op's list."""
    torch.manual_seed(0)
    found = []
    for sample in OPS[name].sample_inputs("cpu", DTYPES[dtype], requires_grad=False):
        tensors = [
            t
            for t in torch.utils._pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
            if isinstance(t, torch.Tensor)
        ]
        if sum(t.numel() for t in tensors) <= 3000 and all(t.layout == torch.strided for t in tensors):
            found.append(sample)
        if len(found) == 60:
            break
    step = max(1, (len(found) - 1) // max(SAMPLES - 1, 1))
    return found[::step][:SAMPLES]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def expired(signum, frame):
        raise TimeoutError(f"longer than {seconds:g} s")

    old = signal.signal(signal.SIGALRM, expired)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, old)


def check(name: str, dtype: str, composition: str) -> str:
    """'pass', 'skip: why' (PyTorch has no reference), or 'FAIL: why'."""
    compared, reason = 0, "no sample"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited(LIMIT_S):
                for variant, sample in enumerate(samples(name, dtype)):
                    try:
                        COMPOSITIONS[composition](Call.of(OPS[name], sample), variant)
                        compared += 1
                    except NoReference as none:
                        reason = str(none)
        except Exception as error:
            text = " ".join(str(error).split())
            return f"FAIL: {type(error).__name__}: {text[:160]}"
    return "pass" if compared else f"skip: {' '.join(reason.split())[:120]}"


def run(name: str) -> dict[tuple[str, str], str]:
    """Every (dtype, composition) of one op."""
    return {(d, c): check(name, d, c) for d in dtypes(OPS[name]) for c in compositions(name, d)}


def known() -> dict[tuple[str, str, str], str]:
    """(op, dtype, composition) -> reason; lines are ``op dtype composition  reason``, # starts a comment."""
    entries = {}
    for line in KNOWN.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            op, dtype, composition, *reason = line.split(maxsplit=3)
            entries[op, dtype, composition] = reason[0] if reason else ""
    return entries
