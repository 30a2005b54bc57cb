"""A deterministic sample of the op matrix for every run: the ops that matter most, every thirtieth
of the others."""

import pytest
import torch

import aotfunc
from tests.ops import table

CORE = """
abs add addmm addmv addbmm amax amin argmax as_strided as_strided_scatter baddbmm bmm cat clamp
clone conj cos cumprod cumsum diag_embed diagonal div_no_rounding_mode dot einsum eq erf exp
expand expm1 flip float fill floor gather ge index_add index_copy index_fill index_put
index_select linalg_cholesky linalg_det linalg_inv linalg_norm linalg_qr linalg_solve linalg_svd
linalg_vector_norm log log1p log_softmax logsumexp masked_fill masked_select matmul max_binary
max_reduction_with_dim maximum mean min_binary mm mul mv narrow neg
nn_functional_adaptive_avg_pool2d nn_functional_avg_pool2d nn_functional_batch_norm
nn_functional_binary_cross_entropy_with_logits nn_functional_conv1d nn_functional_conv2d
nn_functional_conv_transpose2d nn_functional_cross_entropy nn_functional_dropout nn_functional_elu
nn_functional_embedding nn_functional_gelu nn_functional_group_norm nn_functional_hardswish
nn_functional_huber_loss nn_functional_interpolate_bilinear nn_functional_layer_norm
nn_functional_leaky_relu nn_functional_linear nn_functional_logsigmoid nn_functional_max_pool2d
nn_functional_mse_loss nn_functional_nll_loss nn_functional_pad_constant nn_functional_prelu
nn_functional_relu nn_functional_rms_norm nn_functional_scaled_dot_product_attention
nn_functional_silu nn_functional_softplus nn_functional_unfold norm permute pow prod reciprocal
repeat reshape roll rsqrt rsub scatter scatter_add select select_scatter sigmoid sign sin slice
slice_scatter softmax sort split sqrt square squeeze stack std sub sum t tan tanh topk trace
transpose tril triu unbind unfold unsqueeze var view view_as_complex view_as_real where zeros_like
_segment_reduce_lengths nn_functional_embedding_bag nn_functional_multi_margin_loss
nn_functional_multilabel_margin_loss NumpyCubeAutogradFunction NumpySplitCopyWithIntCustomOp
""".split()

OTHERS = [name for name in table.OPS if name not in CORE]
SAMPLE = [name for name in table.OPS if name in CORE] + OTHERS[::30]
DTYPES = (
    "float64",
    "complex128",
    "int64",
    "bool",
)  # float32 has the same rules: the whole matrix has it, too


def test_the_core_names_exist():
    assert not [name for name in CORE if name not in table.OPS]


def test_known_failures_name_ops_that_exist():
    assert {op for op, _, _ in table.known()} <= set(table.OPS)


@pytest.mark.limit(200)
@pytest.mark.parametrize("name", SAMPLE)
def test_op(name):
    known = table.known()
    wrong = []
    for (dtype, composition), outcome in table.run(name, only=DTYPES).items():
        listed = (name, dtype, composition) in known
        if table.failed(outcome) and not listed:
            wrong.append(f"{dtype} {composition}: {outcome}")
        elif not table.failed(outcome) and listed:
            wrong.append(
                f"{dtype} {composition}: listed in known_failures.txt, and {outcome}; take the "
                "line out"
            )
    assert not wrong, "\n".join(wrong)


def test_a_mask_has_every_derivative_and_is_no_constant_of_the_cache():
    x = torch.randn(6, dtype=torch.float64)
    for mask in (x > 0, x < 0, x > 9):
        aotfunc.check_grads(
            lambda x, mask=mask: (x[mask] ** 3).sum() + x.masked_select(mask).sin().sum(),
            (x,),
            order=2,
        )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64]
)  # the kernel has a way of its own for float32
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("offsets", [[0, 3, 3, 8]])  # one bag is empty
@pytest.mark.parametrize("how", ["sum", "mean", "max", "weighted", "last"])
def test_bags_of_embeddings(how, offsets, padding, dtype):
    indices = torch.tensor([0, 1, 1, 3, 2, 1, 4, 0][: 8 if how != "last" else offsets[-1]])
    mode = how if how in ("mean", "max") else "sum"
    named = {"mode": mode, "padding_idx": padding, "include_last_offset": how == "last"}
    offsets, table, weights = (
        torch.tensor(offsets),
        torch.randn(5, 3, dtype=dtype),
        torch.rand(8, dtype=dtype),
    )

    def f(table, *weights):
        given = {"per_sample_weights": weights[0]} if weights else {}
        return torch.nn.functional.embedding_bag(indices, table, offsets, **named, **given)

    primals = [table, weights] if how == "weighted" else [table]
    leaves = [p.clone().requires_grad_() for p in primals]
    out, back = aotfunc.vjp(f, *primals)
    torch.testing.assert_close(back(out), torch.autograd.grad(f(*leaves), leaves, out))
    if dtype is torch.float64:
        aotfunc.check_grads(f, primals, order=2)


@pytest.mark.parametrize("lengths", [((4, 4, 3), (2, 2, 1)), ((4, 3, 1), (1, 2, 0))])
@pytest.mark.parametrize("flat", [False, True])
def test_second_derivatives_of_ctc_loss(lengths, flat):
    of_input, of_target = lengths
    targets = torch.tensor([[1, 1], [3, 2], [2, 3]])
    if flat:
        targets = torch.cat([row[:n] for row, n in zip(targets, of_target)])
    x = torch.randn(4, 3, 4, dtype=torch.float64)

    def loss(x):
        logs = x.log_softmax(-1)
        return torch.nn.functional.ctc_loss(
            logs, targets, of_input, of_target, reduction="none", zero_infinity=True
        )

    aotfunc.check_grads(loss, (x,), order=2)
