"""First calls in a fresh process that must not import Dynamo, Inductor or sympy: python -m
tests.first_calls raises where one does."""

import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils._sympy",
)
assert not any(name in sys.modules for name in HEAVY), "import torch brings them in"
doing = "import aotfunc"


class Guard:
    """Finds no module, but says who asks for one of these; not by an ImportError, which may be
    caught."""

    def find_spec(self, name, path, target=None):
        assert name not in HEAVY, f"{name} is imported by: {doing}"


sys.meta_path.insert(0, Guard())

import aotfunc  # noqa: E402
from aotfunc import (  # noqa: E402
    aot_function,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    make_fx,
    vjp,
    vmap,
)
from benchmarks.first_use_programs import BATCHES, PROGRAMS  # noqa: E402
from tests.functions import Cube  # noqa: E402

x, a, image = torch.randn(3, 4), torch.randn(3, 3), torch.randn(2, 3, 8, 8)
positive = a @ a.mT + torch.eye(3)


def trained(module, *inputs):
    def step():
        compiled = aotfunc.aot_module(module)
        out = compiled(*inputs)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()

    return step


def checkpointed(x, **how):
    return checkpoint(lambda x: x.sin().exp(), x, **how).sum()


def graph():
    module = make_fx(grad(lambda x: x.sin().prod()))(x)
    vals = [n.meta["val"] for n in module.graph.nodes if n.op != "output"]
    return module.code, str(module.graph), [(v.shape, v.device) for v in vals]


def written(x):
    y = x.clone()
    y[0] = 2.0
    y[:, y[0] > 1] *= x
    return y.sin()


def random(x):
    noise = (
        torch.randn_like(x)
        + torch.rand(4)
        + torch.empty_like(x).exponential_()
        + torch.bernoulli(torch.rand_like(x))
    )
    return (F.dropout(x, 0.5) * noise + torch.randint(5, (4,)) + torch.normal(x, 1.0))[
        torch.randperm(3)[0]
    ]


def ops(x):
    parts = [
        torch.cat([x.tril(), x.triu(1)]).cumsum(0),
        torch.diag_embed(x),
        x.logsumexp(0),
        F.pad(x, (1, -1)),
        x.roll(1, 0),
        torch.einsum("ij,kj->ik", x, x),
        torch.cdist(x, x + 1),
        x.index_add(0, torch.tensor([0, 1]), x[:2]),
        F.mish(x),
        x.scatter_reduce(0, torch.zeros(2, 4, dtype=torch.int64), x[:2], "amax"),
        x.masked_fill(x > 0, 0.5),
        x.fill_diagonal_(1.0),
        torch.fft.rfft(x).abs(),
        x.norm(dim=1),
        x.sort(0).values,
        x.median(1).values,
        F.glu(x),
        F.normalize(x),
        F.cosine_similarity(x, x + 1),
        F.softplus(x),
        F.gelu(x),
        F.embedding(torch.tensor([1, 0]), x),
        F.smooth_l1_loss(x, x + 2),
        F.huber_loss(x, x + 2),
        F.binary_cross_entropy_with_logits(x, x.sigmoid()),
        F.kl_div(x, x.softmax(1)),
        F.interpolate(x[None, None], scale_factor=2),
        F.interpolate(x[None], 7, mode="linear"),
        F.adaptive_max_pool1d(x, 2),
        F.avg_pool1d(x, 2),
        F.unfold(x[None, None], 2),
        F.pixel_shuffle(x.reshape(1, 4, 1, 3), 2),
        torch.linspace(0, 1, 4) * x,
        torch.tril_indices(3, 3) * x.sum(),
    ]
    if torch.__version__ >= "2.13":  # 2.11 has no derivative of its derivative
        parts.append(F.grid_sample(x[None, None], x[None, :, :2, None].expand(1, 3, 2, 2)))
    return sum(p.sum() for p in parts)


def kernels(x, i):
    rows = F.embedding(i, x.T) + F.pad(x, (1, 1, 0, 0))[:, 1:4].T.softmax(-1)
    image = torch.cat([rows, rows.flip(0)]).reshape(1, 1, -1, rows.shape[-1])
    pooled = F.max_pool2d(image, (2, 1))
    return F.cross_entropy(F.layer_norm(rows, rows.shape[-1:]), i) + pooled.sum() + rows[i].sum()


EXTRA = {
    "hessian of a product": lambda: hessian(lambda x: x.prod() + x.cumprod(0).sum())(x[0]),
    "jacobians of linear algebra": lambda: [
        transform(f)(positive)
        for transform in (jacrev, jacfwd)
        for f in (
            torch.linalg.inv,
            torch.linalg.det,
            torch.linalg.eigvalsh,
            torch.linalg.cholesky,
            torch.linalg.svdvals,
            torch.linalg.pinv,
            torch.matrix_exp,
            lambda a: torch.linalg.qr(a)[1],
            lambda a: torch.linalg.solve(a, a),
        )
    ],
    "batch norm": trained(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), image
    ),
    "group norm": trained(
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1)),
        image,
    ),
    "conv3d": trained(
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.PReLU(), nn.AvgPool3d(2)), torch.randn(1, 1, 5, 5, 5)
    ),
    "attention": trained(
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        torch.randn(2, 3, 8),
        torch.randn(2, 4, 8),
    ),
    "LSTM": trained(nn.LSTM(4, 5), torch.randn(3, 2, 4)),
    "checkpoint": lambda: [
        transform(lambda x, re=re: checkpointed(x, use_reentrant=re))(x)
        for re in (True, False)
        for transform in (grad, jit)
    ],
    "checkpoint, backward": lambda: aot_function(lambda x: checkpointed(x, use_reentrant=False))(
        x.clone().requires_grad_()
    ).backward(),
    "results that ops save": lambda: jit(
        lambda x: (
            (x.tanh(), x.softmax(0), x.norm(), x.cumprod(0), x.logsumexp(0), x.amax(1))
            + (*torch.linalg.qr(x), torch.linalg.inv(x[:, :3]), torch.linalg.svdvals(x))
        )
    )(x.clone().requires_grad_()),
    "graph": graph,
    "autograd.Function": lambda: vmap(grad(lambda x: Cube.apply(x).sum()))(x),
    "writes": lambda: aotfunc.functionalize(written)(x),
    "second derivatives": lambda: jvp(
        lambda x: vjp(lambda x: F.layer_norm(x, (4,)).sin(), x)[1](x)[0], (x,), (x,)
    ),
    "jit": lambda: jit(grad(lambda x: (x @ x.mT).relu().sum()))(x),
    "random": lambda: vmap(random, randomness="different")(torch.stack([x, x])),
    "grad of random": lambda: grad(lambda x: random(x).sum())(x),
    "ops": lambda: [
        ops(x.clone()),
        grad(lambda x: ops(x.clone()))(x),
        jvp(lambda x: ops(x.clone()), (x,), (x,)),
    ],
    "ops, batched": lambda: vmap(lambda x: ops(x.clone()))(torch.stack([x, x])),
    "a compiler of one's own": lambda: aot_function(
        lambda x: x.sin().sum(), lambda gm, inputs: gm
    )(x.clone().requires_grad_()).backward(),
    "ensemble": lambda: aotfunc.stack_module_state([nn.Linear(2, 2) for _ in range(2)]),
    "gradients taken inside": lambda: jit(
        lambda x: torch.autograd.grad((x.mT * 1).sin().sum(), x)[0].contiguous()
    )(x.clone().requires_grad_()),
    "kernels": lambda: [
        jit(f, backend="cpp")(x, torch.tensor([0, 2, 1]))
        for f in (kernels, lambda x, i: grad(kernels)(x, i))
    ],
    "sums in blocks": lambda: jit(
        grad(lambda x, w: F.layer_norm(x, (4,), w).sin().sum(), argnums=(0, 1)), backend="cpp"
    )(x.repeat(20, 1), x[0]),
    "scattered sums": lambda: jit(grad(lambda x, i: x[i].sin().sum()), backend="cpp")(
        x, torch.tensor([0, 2, 1, 0])
    ),
}

if __name__ == "__main__":
    measured = {
        name: lambda data=data: data()(aotfunc) for name, data in (PROGRAMS | BATCHES).items()
    }
    for doing, call in (measured | EXTRA).items():  # noqa: B007 - Guard tells it
        call()
    assert not any(name in sys.modules for name in HEAVY)
