"""Which ops, dtypes and samples are tested, how one of them is run, and which failures are
known."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.testing._internal import common_methods_invocations as opinfos
from torch.testing._internal.autograd_function_db import autograd_function_db
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.custom_op_db import custom_op_db
from torch.utils._pytree import tree_leaves

import aotfunc
from tests.ops.compositions import COMPOSITIONS, Call
from tests.ops.references import NoReference, Wrong

LIBRARIES = {"aotfunc": aotfunc, "torch": torch.func}
KNOWN = Path(__file__).with_name("known_failures.txt")
SAMPLES = 3
LARGE = 3000  # elements of one sample, where there are smaller ones
LIMIT_S = 20.0  # of processor time, for one op, dtype and composition
DTYPES = {"float32": torch.float32, "float64": torch.float64, "complex128": torch.complex128}
INTEGERS = {"int64": torch.int64, "bool": torch.bool}

DB = [*op_db, *autograd_function_db, *custom_op_db]

# OpInfo seeds inside the function, which a capture does once and its graph does not do again: here
# the checks seed.
seeding, opinfos.wrapper_set_seed = (
    opinfos.wrapper_set_seed,
    lambda op, *args, **kwargs: op(*args, **kwargs),
)
for op in DB:
    if (
        op.gradcheck_wrapper is seeding or op in autograd_function_db
    ):  # some of these do not take the op
        op.gradcheck_wrapper = opinfos.wrapper_set_seed


def names(text: str) -> set[str]:
    return set(text.split())


# Not functions of their inputs (uninitialised memory), results that are no tensors, sparse ones,
# CUDA's alone, and a Function whose backward does not look at the cotangent.
NO_FUNCTION = names(
    """
    empty empty_like empty_permuted empty_strided new_empty new_empty_strided item equal allclose
    is_pinned resize_ resize_as_ to_sparse sparse_mm_reduce sparse_sampled_addmm jiterator_unary
    jiterator_binary jiterator_2inputs_2outputs jiterator_4inputs_with_extra_args
    jiterator_binary_return_by_ref NumpyCubeNotComposableAutogradFunction
    """
)
# vmap asks which kind of randomness is meant, and PyTorch's two kinds are tested in
# tests/func/test_random.py.
RANDOM = names(
    """
    bernoulli multinomial normal normal_in_place normal_number_mean rand_like randn_like
    randint_like randint randn uniform cauchy exponential geometric log_normal pca_lowrank
    svd_lowrank nn_functional_dropout nn_functional_dropout2d nn_functional_dropout3d
    nn_functional_alpha_dropout nn_functional_feature_alpha_dropout_with_train
    nn_functional_feature_alpha_dropout_without_train nn_functional_rrelu
    nn_functional_fractional_max_pool2d nn_functional_fractional_max_pool3d
    """
)
# vmap has no answer where a result's shape depends on values; which error it is, is tested in
# tests/func/test_vmap.py.
RAGGED = names(
    "argwhere bincount masked_select nonzero unique unique_consecutive NumpyNonzeroCustomOp "
    "NumpyNMSCustomOp"
)
# Random in some samples only, which are left out.
DROPPING = {
    "nn_functional_scaled_dot_product_attention",
    "nn_functional_multi_head_attention_forward",
}

# autograd's own gradient is not that of finite differences, and those decide
WRONG_IN_AUTOGRAD = {"as_strided_scatter"}

OPS = {
    op.formatted_name: op
    for op in DB
    if op.name not in NO_FUNCTION and op.formatted_name not in NO_FUNCTION
}


def dtypes(op) -> list[str]:
    """The three dtypes as far as the op takes them, else one integer type (for vmap alone)."""
    given = op.supported_dtypes("cpu")
    found = [name for name, dtype in DTYPES.items() if dtype in given]
    return found or [name for name, dtype in INTEGERS.items() if dtype in given][:1]


def compositions(name: str, dtype: str) -> list[str]:
    op = OPS[name]
    found = list(COMPOSITIONS)
    if not (
        dtype in DTYPES
        and op.supports_autograd
        and DTYPES[dtype] in op.supported_backward_dtypes("cpu")
    ):
        found = ["vmap"]
    return [c for c in found if not (name in RANDOM | RAGGED and "vmap" in c)]


def draws(sample) -> bool:
    """Whether an attention sample has dropout."""
    given = sample.kwargs.get("dropout_p", 0.0) or (sample.args[9:10] or (0.0,))[0]
    return bool(given)


def samples(name: str, dtype: str, count: int = SAMPLES) -> list:
    """Up to ``count`` small ones, spread over the op's list; the smallest ones where all are
    large. Those whose gradient eager makes sparse are left out: it is refused, which
    ``tests/aot/test_modules.py`` checks."""
    torch.manual_seed(0)
    found, large = [], []
    for sample in OPS[name].sample_inputs("cpu", (DTYPES | INTEGERS)[dtype], requires_grad=False):
        leaves = tree_leaves((sample.input, sample.args, sample.kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if any(t.layout != torch.strided for t in tensors) or (name in DROPPING and draws(sample)):
            continue
        size = sum(t.numel() for t in tensors)
        (found if size <= LARGE else large).append((size, sample))
        if len(found) == 60:
            break
    found = found or sorted(large, key=lambda pair: pair[0])[:count]
    step = max(1, (len(found) - 1) // max(count - 1, 1))
    return [s for _, s in found[::step][:count] if not s.kwargs.get("sparse")]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A limit in processor time, so that a busy machine changes no outcome."""

    def expired(signum, frame):
        raise TimeoutError(f"longer than {seconds:g} s")

    old = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def text(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def check(name: str, dtype: str, composition: str, lib: str = "aotfunc") -> str:
    """'right', 'error: what', 'wrong: how' or 'none: why there is no reference'."""
    compared, reason = 0, "no sample"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited(LIMIT_S):
                for variant, sample in enumerate(samples(name, dtype)):
                    call = Call.of(OPS[name], sample, trusted=name not in WRONG_IN_AUTOGRAD)
                    try:
                        call = call if composition == "vmap" else call.differentiated()
                        COMPOSITIONS[composition](LIBRARIES[lib], call, variant)
                        compared += 1
                    except NoReference as none:
                        reason = text(none)
        except Wrong as error:
            return f"wrong: {text(error)}"
        except Exception as error:
            return f"error: {type(error).__name__}: {text(error)}"
    return "right" if compared else f"none: {reason}"


def failed(outcome: str) -> bool:
    return outcome.startswith(("error", "wrong"))


def cells(name: str) -> list[tuple[str, str]]:
    """Every (dtype, composition) of one op."""
    return [(d, c) for d in dtypes(OPS[name]) for c in compositions(name, d)]


def run(
    name: str, lib: str = "aotfunc", only: tuple[str, ...] | None = None
) -> dict[tuple[str, str], str]:
    """The outcome of every cell of one op, or of those in the dtypes ``only``."""
    return {(d, c): check(name, d, c, lib) for d, c in cells(name) if only is None or d in only}


def known() -> dict[tuple[str, str, str], str]:
    """(op, dtype, composition) -> reason; lines are ``op dtype composition  reason``, # starts a
    comment."""
    entries = {}
    for line in KNOWN.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            op, dtype, composition, *reason = line.split(maxsplit=3)
            entries[op, dtype, composition] = reason[0] if reason else ""
    return entries
