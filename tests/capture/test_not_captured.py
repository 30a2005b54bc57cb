"""What cannot be captured is refused in words: operators that take functions, nested tensors; and
what looked as if it could not is right: packed sequences, dtypes that only the kernels know."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

import aotfunc
from aotfunc import grad, jacfwd, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same, grads, jacobian, loop

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Q = torch.randn(1, 2, 16, 16)

TRANSFORMS = {
    "vmap": lambda f: vmap(f)(X[None]),
    "jit": lambda f: jit(f)(X),
    "make_fx": lambda f: make_fx(f)(X),
    "aot": lambda f: aotfunc.aot_function(f, "eager")(X),
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (X,)),
}
OPERATORS = {
    "flex_attention": lambda x: flex_attention(Q * x.sum(), Q, Q),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_functions(name, transform):
    if name == "flex_attention" and transform in ("grad", "jvp"):
        pytest.skip("torch refuses the backward on CPU in words of its own")
    with pytest.raises(
        CaptureError, match=rf"^{name}\w* calls functions .*not captured.*torch.where"
    ) as e:
        TRANSFORMS[transform](OPERATORS[name])
    assert "test_not_captured.py" in str(e.value)


NESTED = {
    "of traced values": lambda x: torch.nested.as_nested_tensor([x[0], x[1]]),
    "jagged": lambda x: (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged) * x.sum()
    ),
    "padded": lambda x: (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]).to_padded_tensor(0.0) * x.sum()
    ),
    "from outside": lambda x: outside * x.sum(),
}
with warnings.catch_warnings(action="ignore"):  # torch says that they are a prototype
    outside = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NESTED)
def test_nested_tensors(name, transform):
    with pytest.raises(CaptureError, match=r"nested tensors are not captured.*pad them"):
        TRANSFORMS[transform](NESTED[name])


@pytest.mark.parametrize("transform", [grad, vmap, jit, jacfwd, aotfunc.functionalize])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_arguments(transform, layout):
    with pytest.raises(CaptureError, match=r"nested tensors are not captured.*pad them"):
        transform(lambda x: x * 2)(
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        )


# ----- packed sequences --------------------------------------------------------------------------

T = torch.randn(5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
NETS = {kind: getattr(torch.nn, kind)(3, 4).double() for kind in ("LSTM", "GRU", "RNN")}


def padded(net, lengths, options, more):
    def f(x):
        x = x.transpose(0, 1) if options.get("batch_first") else x
        out, _ = net(pack_padded_sequence(x, lengths, **options))
        values, counts = pad_packed_sequence(out, options.get("batch_first", False), **more)
        assert torch.equal(counts, torch.as_tensor(lengths))
        return values

    return f


PACKED = {
    **{kind: padded(net, [5, 3, 1], {}, {}) for kind, net in NETS.items()},
    "lengths as a tensor": padded(NETS["GRU"], torch.tensor([5, 3, 1]), {}, {}),
    "batch first": padded(NETS["GRU"], [5, 5, 2], {"batch_first": True}, {}),
    "not sorted": padded(
        NETS["LSTM"], [2, 4, 1], {"enforce_sorted": False}, {"padding_value": -1.5}
    ),
    "total length": padded(NETS["GRU"], [4, 2, 1], {}, {"total_length": 6, "padding_value": 0.5}),
    "no net": lambda x: pad_packed_sequence(pack_padded_sequence(x.sin(), [4, 4, 1]))[0].cos(),
    "of a list": lambda x: pad_packed_sequence(pack_sequence([x[:, 0], x[:3, 1]]))[0] ** 2,
    "unpacked": lambda x: torch.cat(unpack_sequence(pack_sequence([x[:, 0], x[:3, 1]]))) ** 2,
    "numbers": lambda x: pad_packed_sequence(
        PackedSequence(x[0].sin(), torch.tensor([2, 1])), padding_value=2.0
    )[0],
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    f = PACKED[name]
    total = lambda x: f(x).sin().sum()
    batch = torch.stack([T, T.cos()])
    compiled = jit if name != "lengths as a tensor" else lambda f: f
    assert_same(compiled(f)(T), f(T))
    assert_same(grad(total)(T), grads(total)(T))
    assert_same(vjp(f, T)[1](torch.ones_like(f(T)))[0], grads(lambda x: f(x).sum())(T))
    assert_same(vmap(f)(batch), loop(f)(batch))
    assert_same(vmap(grad(total))(batch), loop(grads(total))(batch))
    assert_same(compiled(grad(total))(T), grads(total)(T))
    if name in ("GRU", "no net"):
        assert_same(jacfwd(f)(T[:, :, :3]), jacobian(f, T))


def test_lengths_from_outside_are_not_frozen():
    with pytest.raises(CaptureError, match=r"a number of a packed sequence"):
        jit(PACKED["lengths as a tensor"])(T)


# ----- what only the kernels know ----------------------------------------------------------------


def test_grouped_products_in_float32():
    a, b = torch.randn(8, 16), torch.randn(2, 16, 16)
    offs = torch.tensor([4, 8], dtype=torch.int32)
    f = lambda a, b: torch._grouped_mm(a, b, offs=offs)
    plain = lambda a, b: torch.cat([a[:4] @ b[0], a[4:] @ b[1]])
    want = torch.autograd.grad(plain(a.requires_grad_(), b.requires_grad_()).sin().sum(), (a, b))
    a, b = a.detach(), b.detach()
    for run in (grad, lambda f, argnums: jit(grad(f, argnums))):
        assert_same(
            run(lambda a, b: f(a, b).sin().sum(), (0, 1))(a, b), want, atol=1e-4, rtol=1e-4
        )
    assert_same(jit(f)(a, b), plain(a, b), atol=1e-4, rtol=1e-4)
    w = b.mT.contiguous()  # a layer's weight: its gradient lies as it does
    assert_same(grad(lambda w: f(a, w.mT).sin().sum())(w), want[1].mT, atol=1e-4, rtol=1e-4)
    graph = make_fx(grad(lambda w: f(a, w.mT).sin().sum()))(w).graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
