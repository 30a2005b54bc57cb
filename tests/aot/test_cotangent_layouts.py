"""The cotangent of a result is planned to lie as the result does, however the one that arrives
lies: the backward of a network in channels_last stays in it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_function, grad, jacrev, jit, vjp, vmap
from tests.inputs import f64
from tests.reference import assert_same


def channels_last(x):
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class Block(nn.Module):
    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv(3, 4, 3, padding=1), norm(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def laid_as(x, order):
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


#: results that lie in their own ways, of an argument of shape (2, 3, 4, 5)
RESULTS = {
    "channels_last": lambda x: channels_last(x.sin()),
    "transposed": lambda x: x.sin().transpose(1, 3),
    "turned": lambda x: laid_as(x.sin(), [3, 1, 0, 2]),
    "a part with gaps": lambda x: laid_as(x.sin(), [3, 1, 0, 2])[:, 1:],
    "expanded": lambda x: x.sin()[:, :1].expand(2, 3, 4, 5),
    "one channel": lambda x: channels_last(x.sin()[:, :1]),
    "a row of pixels": lambda x: channels_last(x.sin()[:, :, :1, :1]),
    "a diagonal": lambda x: x.sin()[:, 0].diagonal(0, 1, 2),
    "no elements": lambda x: channels_last(x.sin()[:0]),
    "three dimensions of space": lambda x: channels_last(x.sin()[:, :, None]),
}
#: cotangents that arrive, laid out in their own ways
ARRIVING = {
    "contiguous": lambda y: torch.cos(y.detach()).contiguous(),
    "as the result": lambda y: torch.cos(y.detach()),
    "expanded": lambda y: f64().expand(y.shape),
    "backwards": lambda y: laid_as(y.detach().cos(), list(range(y.dim()))[::-1]),
    "every other": lambda y: torch.stack([y.detach(), y.detach()], -1)[..., 0],
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(
    "compiled", [jit, lambda f: aot_function(f, "eager"), lambda f: jit(jit(f))]
)
def test_cotangents_that_lie_anyhow(compiled, name):
    f, x = RESULTS[name], f64(2, 3, 4, 5).requires_grad_()
    mine = compiled(f)
    for arriving in ARRIVING.values():
        torch.manual_seed(0)
        ct = arriving(f(x))
        y, z = mine(x), f(x)
        assert y.stride() == z.stride()
        got, want = (torch.autograd.grad(out, x, ct, create_graph=True)[0] for out in (y, z))
        assert_same(got, want)
        assert_same(*(torch.autograd.grad(g.sin().sum(), x)[0] for g in (got, want)))


@pytest.mark.parametrize("name", RESULTS)
def test_transforms(name):
    f, x = RESULTS[name], f64(2, 3, 4, 5)
    y, back = vjp(f, x)
    for ct in [arriving(y) for arriving in ARRIVING.values()]:
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(f(leaf), leaf, ct)
        assert_same(back(ct)[0], want)
        cts = torch.stack([ct, 2 * ct])
        assert_same(vmap(back)(cts)[0], torch.stack([want, 2 * want]))
    loss = lambda f: lambda x: (f(x).cos() * f(x)).sum()
    assert_same(grad(loss(jit(f)))(x), grad(loss(f))(x))
    if y.numel():
        reference = torch.autograd.functional.jacobian(f, x)
        assert_same(jacrev(f)(x), reference)
        assert_same(jit(jacrev(jit(f)))(x), reference)


def test_batched_cotangents():
    f, x = RESULTS["channels_last"], f64(2, 3, 4, 5).requires_grad_()
    cts = f64(6, 2, 3, 4, 5)
    got = torch.autograd.grad(jit(f)(x), x, cts, is_grads_batched=True)[0]
    assert_same(got, torch.autograd.grad(f(x), x, cts, is_grads_batched=True)[0])


@pytest.mark.parametrize(
    "conv, norm, shape",
    [(nn.Conv2d, nn.BatchNorm2d, (2, 3, 6, 6)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 4, 4, 4))],
)
def test_a_network_in_channels_last_stays_in_it(conv, norm, shape):
    torch.manual_seed(0)
    net = channels_last_module(Block(conv, norm), len(shape))
    x = channels_last(torch.randn(shape)).requires_grad_()
    backwards = []
    f = aot_function(net, lambda gm, _: gm, lambda gm, _: backwards.append(gm) or gm)
    got = torch.autograd.grad(f(x).square().sum(), [x, *net.parameters()])
    want = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    torch.testing.assert_close(got, want)
    assert got[0].stride() == want[0].stride() and got[0].stride(1) == 1
    for node in backwards[-1].graph.nodes:
        val = node.meta["val"] if node.op in ("placeholder", "call_function") else None
        if getattr(val, "shape", ())[2:] == shape[2:]:
            assert val.stride()[1] == 1, f"{node.format_node()} has strides {val.stride()}"
    torch.autograd.grad(f(x).sum(), x)  # an expanded cotangent lies as the result does
    assert len(backwards) == 1


def channels_last_module(net, rank):
    form = torch.channels_last if rank == 4 else torch.channels_last_3d
    return net.to(memory_format=form)


def test_a_function_of_ones_own_gets_what_its_backward_expects():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

        @staticmethod
        def backward(ctx, g):
            return (
                g.permute(0, 2, 3, 1)
                .reshape(-1, g.shape[1])
                .mul(0.5)
                .reshape(g.shape[0], *g.shape[2:], g.shape[1])
                .permute(0, 3, 1, 2)
            )

    def f(x):
        return Halved.apply(channels_last(x.sin()))

    x = f64(2, 3, 4, 5).requires_grad_()
    for ct in (f64(2, 3, 4, 5), channels_last(f64(2, 3, 4, 5))):
        got, want = (torch.autograd.grad(g(x), x, ct)[0] for g in (jit(f), f))
        assert_same(got, want)


def test_hooks_of_modules_see_their_gradients():
    net = channels_last_module(Block(), 4)
    seen = []
    handle = net.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].detach()))
    handle.remove()
    net.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    x = channels_last(torch.randn(2, 3, 5, 5)).requires_grad_()
    got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (jit(net), net))
    torch.testing.assert_close(got, want)
    assert F.relu(got).shape == x.shape


BATCHES = {
    "transposed": lambda: torch.randn(5, 4, 6).transpose(0, 1),
    "columns first": lambda: torch.randn(4, 6, 5).transpose(1, 2),
    "two batch dimensions": lambda: torch.randn(2, 3, 4, 6).permute(2, 0, 1, 3),
}
PRODUCTS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "of computed values": lambda x, w, b: F.linear(x * 2, w * 2),
    "matmul": lambda x, w, b: x @ w.t() + b,
    "from the left": lambda x, w, b: w @ x.mT,
    "a vector": lambda x, w, b: x @ w[0],
    "a vector from the left": lambda x, w, b: w[0] @ x.mT,
    "bmm": lambda x, w, b: x.flatten(0, -3).bmm(w.t().expand(x[..., 0, 0].numel(), 6, 8)),
}


@pytest.mark.parametrize("grad_of_batch", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_products_of_batches_and_a_matrix(batch, product, grad_of_batch):
    """A matrix that requires grad is not made a batch of."""
    w, b = torch.randn(8, 6).requires_grad_(), torch.randn(8).requires_grad_()
    x = BATCHES[batch]().requires_grad_(grad_of_batch)
    given = [t for t in (x, w, b) if t.requires_grad]
    results = []
    for f in aot_function(PRODUCTS[product], "eager"), PRODUCTS[product]:
        y = f(x, w, b)
        grads = torch.autograd.grad(y.sin().sum(), given, allow_unused=True)
        results.append([y, *[g for g in grads if g is not None]])
    assert_same(*results)
    assert [t.stride() for t in results[0]] == [t.stride() for t in results[1]]


@pytest.mark.parametrize(
    "left, right",
    [
        *(((2, 3, 5), (5,)), ((5,), (4, 5, 5)), ((3, 2, 4, 5), (5,)), ((5,), (2, 3, 5, 4))),
        *(((4, 0), (2, 0, 3)), ((2, 4, 0), (0, 3)), ((2, 4, 0), (0,)), ((0,), (2, 0, 3))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_batches_and_vectors_and_empty_ones(left, right, dtype):
    def given():
        torch.manual_seed(0)
        make = lambda s: torch.randn(*s[:-2], *s[:-3:-1]).mT if len(s) > 1 else torch.randn(s)
        return [make(s).to(dtype).requires_grad_() for s in (left, right)]

    results = []
    for f in jit(torch.matmul, backend="eager"), torch.matmul:
        a, b = given()
        y = f(a, b)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (a, b))])
    for got, want in zip(*results, strict=True):
        assert got.equal(want) and got.shape == want.shape


LOSSES = {
    "laid out": lambda a, b: (a.square() + b.sin()).sum(),
    "expanded": lambda a, b: a.sum() + b.sum(),
    "one tensor for both": lambda a, b: (a + b).square().sum(),
    "backwards": lambda a, b: (a * b.flip(0)).t().flip(0).sum(),
    "of one result": lambda a, b: b.sum(),
}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_layouts_that_take_turns(backend):
    def f(x, w):
        return torch.tanh(x * w), x * w.exp()

    compiled, given = jit(f, backend=backend), [f64(3, 4).requires_grad_() for _ in "xw"]
    for _ in range(3):
        for loss in LOSSES.values():
            for second in (False, True):
                found = [
                    torch.autograd.grad(loss(*g(*given)), given, create_graph=second)
                    for g in (compiled, f)
                ]
                assert_same(*found)
                if second:
                    assert_same(
                        *[torch.autograd.grad(sum(x.exp().sum() for x in g), given) for g in found]
                    )
