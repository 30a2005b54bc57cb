"""Compiled functions of DTensors beside eager ones, and beside one process; called by
:mod:`.processes`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_module, grad, jit, make_fx, vmap
from aotfunc.errors import CaptureError, PartitionError
from tests.functions import Twice

ROWS, COLUMNS, ALL = Shard(0), Shard(1), Replicate()
close = torch.testing.assert_close


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


# ----- plans -------------------------------------------------------------------------------------


class Model(nn.Module):
    """A small language model of one block."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.before, self.between, self.last = (nn.LayerNorm(8) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, tokens):
        x = self.table(tokens)
        h = self.before(x)
        q, k, v = (f(h).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(h)
        x = x + self.down(F.gelu(self.up(self.between(x))))
        return self.head(self.last(x))


def sequences():
    """A plan that shards the sequence between the layers, and features inside of them."""
    into = lambda: ColwiseParallel(input_layouts=COLUMNS)
    out_of = lambda: RowwiseParallel(output_layouts=COLUMNS)
    return {
        "table": RowwiseParallel(input_layouts=ALL, output_layouts=COLUMNS),
        **{name: SequenceParallel() for name in ("before", "between", "last")},
        **{name: into() for name in ("q", "k", "v", "up")},
        **{name: out_of() for name in ("o", "down")},
        "head": ColwiseParallel(input_layouts=COLUMNS, output_layouts=ALL),
    }


def layers():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def check_plans(mesh):
    """Losses, gradients and steps are those of one process and of the uncompiled plan."""
    draw = torch.Generator().manual_seed(1)
    tokens, x = torch.randint(0, 12, (2, 4), generator=draw), torch.randn(3, 8, generator=draw)
    entropy = lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten())
    square = lambda y: whole(y).square().mean()
    split = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    inside = {
        "0": ColwiseParallel(use_local_output=False),
        "1": PrepareModuleInput(
            input_layouts=[Shard(-1)], desired_input_layouts=[ALL], use_local_output=True
        ),
        "2": RowwiseParallel(input_layouts=ALL, output_layouts=ROWS, use_local_output=False),
    }
    plan = lambda how: lambda m: parallelize_module(m, mesh, how)
    compiled = lambda m: aot_module(m, "eager")
    for make, given, loss, eager, ours in (
        (Model, tokens, entropy, plan(sequences()), lambda m: compiled(plan(sequences())(m))),
        (layers, x, square, plan(split), lambda m: aot_module(plan(split)(m), "cpp")),
        (layers, x, square, plan(split), lambda m: plan(split)(compiled(m))),
        (layers, x, square, plan(inside), lambda m: compiled(plan(inside)(m))),
    ):
        torch.manual_seed(0)
        plain = make()
        nets = plain, eager(copy.deepcopy(plain)), ours(copy.deepcopy(plain))
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in nets]
        for _ in range(2):
            losses = [loss(m(given)) for m in nets]
            for one, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                one.backward()
            close([whole(one) for one in losses[1:]], losses[:1] * 2)
            for p, q, r in zip(*[m.parameters() for m in nets], strict=True):
                assert (type(r), type(r.grad)) == (type(q), type(q.grad))
                assert not isinstance(r, DTensor) or r.grad.placements == r.placements
                close([whole(q.grad), whole(r.grad)], [p.grad] * 2)
            for optimizer in optimizers:
                optimizer.step()


# ----- functions ---------------------------------------------------------------------------------


def product(x, w):
    return (x @ w).tanh()


def written(x, w):
    h = x * 2
    h.mul_(w.mean())
    return h, DTensor.from_local(h.to_local().sin(), h.device_mesh, h.placements)


def whole_written(x, w):
    h = x * 2 * w.mean()
    return h, h.sin()


def trees(x, w):
    y = x @ w
    return {"x": x, "t": x.t(), "all": y.full_tensor(), "moved": y.redistribute(placements=[ALL])}


def parts(x, w):
    """Parts that are computed with as such, and put together again."""
    mesh = x.device_mesh
    local = x.redistribute(placements=[ROWS]).to_local(grad_placements=[ROWS])
    total = DTensor.from_local(local.sum(0), mesh, [Partial()])
    return DTensor.from_local(local * 2, mesh, [ROWS]).sin(), total * w.sum(1)


def whole_parts(x, w):
    return (x * 2).sin(), x.sum(0) * w.sum(1)


def whole_args(args):
    return [whole(t).detach().requires_grad_() for t in args]


def without_rule(x, w):
    return (x @ x.t() + w.sum()).tanh().cumsum(0)


def losses(x, w):
    return F.mse_loss(x, x.sin()) + F.binary_cross_entropy_with_logits(w * 2, w.sigmoid())


#: functions that are not compared with eager DTensors -> the same ones of whole tensors
WHOLE = {written: whole_written, parts: whole_parts, without_rule: without_rule}
WHOLE |= {losses: losses}  # PyTorch takes the mean over each process's part


def check_functions(mesh):
    """Values, placements, and first and second derivatives are eager's."""
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 6, generator=draw), torch.randn(6, 8, generator=draw)
    uneven = torch.randn(5, 3, generator=draw), torch.randn(3, 7, generator=draw)
    for f, x, w, where in (
        (product, a, b, [(p, q) for p in (ROWS, COLUMNS, ALL) for q in (ROWS, COLUMNS)]),
        (product, *uneven, [(ROWS, COLUMNS), (COLUMNS, COLUMNS)]),
        *((f, a, b, [(ROWS, COLUMNS)]) for f in (written, trees, parts, without_rule, losses)),
    ):
        compiled = jit(f, "eager")
        for places in where:
            args = [
                distribute_tensor(t, mesh, [p]).requires_grad_()
                for t, p in zip((x, w), places, strict=True)
            ]
            # PyTorch's second derivative of parts is that of one process; 2.11 has no `flip`
            other = (WHOLE[f], whole_args(args)) if f in WHOLE else (f, args)
            found = [results(*each) for each in ((compiled, args), other)]
            close(*found, msg=lambda m, f=f, places=places: f"{f.__name__} {places}: {m}")
            mine = compiled(*args)
            if f is product:
                theirs = f(*args)
                assert mine.placements == theirs.placements
                gradients = torch.autograd.grad(whole(mine).sum(), args)
                assert [g.placements for g in gradients] == [(p,) for p in places]
        assert compiled.captures == len(where)
    check_writes(mesh, a, b)


def results(f, args):
    """All that comes of a function, whole: values, gradients and those of the gradients. PyTorch
    2.11's own second derivative of a whole tensor is wrong, so none is taken."""
    y = f(*args)
    ys = [y] if isinstance(y, torch.Tensor) else [*(y.values() if isinstance(y, dict) else y)]
    first = torch.autograd.grad(ys, args, [*map(doubled, ys)], create_graph=True)
    second = torch.autograd.grad(first, args, [*map(doubled, first)], allow_unused=True)
    return [whole(t).detach() for t in (*ys, *first, *second) if t is not None]


def doubled(t):
    full = whole(t.detach()) * 2
    return distribute_tensor(full, t.device_mesh, [ALL]) if isinstance(t, DTensor) else full


def check_writes(mesh, a, b):
    def step(x, w):
        x.add_((x @ w).sum() / 100)
        return x.sum()

    x, y = (distribute_tensor(a, mesh, [ROWS]) for _ in range(2))
    w, compiled = distribute_tensor(b, mesh, [COLUMNS]), jit(step, "eager")
    for _ in range(2):
        close(*[whole(t) for t in (compiled(x, w), step(y, w))])
        close(whole(x), whole(y))


def kept_some(x):
    return F.dropout(x.sin(), 0.3).cos()


#: functions that draw a number for each element
DRAWS = (
    kept_some,
    lambda x: checkpoint(kept_some, x, use_reentrant=False),
    lambda x: kept_some(kept_some(x)) + torch.randn_like(x) * x,
    lambda x: torch.bernoulli(torch.full_like(x, 0.4)) * torch.zeros_like(x).uniform_(1, 2) * x,
    lambda x: torch.empty_like(x).normal_(2.0, 3.0) * torch.rand_like(x) * x,
    lambda x: torch.empty_like(x).exponential_() * torch.empty_like(x).log_normal_() * x,
    lambda x: torch.native_dropout(x, 0.5, True)[0] * torch.ones_like(x).geometric_(0.4),
    lambda x: F.alpha_dropout(x, 0.5) + F.gumbel_softmax(x) + F.dropout1d(x, 0.5),
)


def check_draws(mesh):
    """Each process draws for its part from its own generator, as in eager mode on the CPU."""
    draw = torch.Generator().manual_seed(4)
    a, rank = torch.randn(5, 6, generator=draw), mesh.get_local_rank()
    for f in DRAWS:
        compiled = jit(f, "eager")
        for place in ROWS, COLUMNS, ALL:
            x = distribute_tensor(a, mesh, [place]).requires_grad_()
            found = []
            try:
                f(x)
            except (NotImplementedError, RuntimeError):  # it has fewer rules
                assert torch.__version__.startswith("2.11")
                continue
            for way in f, compiled, compiled:
                torch.manual_seed(7 if place == ALL else rank)
                y = way(x)
                (g,) = torch.autograd.grad(whole(y).sum(), x)
                found.append([y.to_local(), whole(g), torch.rand(2)])
            close(found[1:], found[:1] * 2)


def mixed(x, w):
    """Whole tensors, and parts that are of other sizes on each process."""
    h = ((x @ w).tanh() @ w.t()).sin()
    part = h.redistribute(placements=[ROWS]).to_local()
    part = (part.exp() @ torch.ones(6, 30)).tanh().sum()
    return DTensor.from_local(part, x.device_mesh, [Partial()]) + (h * h).sum()


def check_budgets(mesh):
    """All processes cut a program alike: a budget is refused where their parts differ in size."""
    draw = torch.Generator().manual_seed(5)
    w = distribute_tensor(torch.randn(6, 8, generator=draw), mesh, [ROWS]).requires_grad_()
    inside = lambda x, w: checkpoint(mixed, x, w, use_reentrant=False)
    for rows in 8, 9, 1:
        x = torch.randn(rows, 6, generator=draw)
        x = distribute_tensor(x, mesh, [COLUMNS]).requires_grad_()
        gradients = lambda f, x=x: [
            *map(whole, torch.autograd.grad(whole(f(x, w)), (x, w))),
        ]
        wants = gradients(mixed)
        for f in jit(mixed, "eager"), jit(inside, "eager"):
            close(gradients(f), wants)
        for budget in "700B", "1200B", 0.5:
            f = jit(mixed, "eager", memory_budget=budget)
            if rows == 8:
                close(gradients(f), wants)
                continue
            with pytest.raises(PartitionError, match="otherwise on each process"):
                gradients(f)


def check_refused(mesh):
    x = distribute_tensor(torch.ones(4, 2), mesh, [ROWS]).requires_grad_()
    for words, call in (
        ("go to compiled functions", lambda: grad(lambda x: whole(x).sum())(x)),
        ("go to compiled functions", lambda: vmap(torch.sin)(x)),
        ("go to compiled functions", lambda: make_fx(torch.sin)(x)),
        ("go to compiled functions", lambda: jit(lambda x: jit(torch.sin)(x))(x)),
        ("go to compiled functions", lambda: vmap(jit(torch.sin))(x)),
        ("draws random numbers for a DTensor", lambda: jit(lambda x: torch.randint_like(x, 5))(x)),
        ("draws random numbers for a DTensor", lambda: jit(lambda x: F.dropout(x.t() @ x))(x)),
        ("a number was asked for", lambda: jit(lambda x: x * x.sum().item())(x)),
        ("a hook or a gradient", lambda: jit(lambda x: (x * 2).register_hook(print))(x)),
        ("a gradient of a DTensor", lambda: jit(lambda x: torch.autograd.grad(x.sum(), x))(x)),
        (r"under torch.func's transforms", lambda: torch.func.grad(jit(total))(x)),
        (r"under torch.func's transforms", lambda: torch.func.vmap(jit(torch.sin))(x)),
        (r"x.to_local\(\) gives it", lambda: jit(lambda x: x._local_tensor * 2)(x)),
        ("the Function Twice of a DTensor", lambda: jit(Twice.apply)(x)),
        (r"clone\(\) one of them", lambda: jit(doubled_part)(x.detach())),
        (r"clone\(\) one of them", lambda: jit(lambda x: doubled_part(x * 1))(x)),
        (r"clone\(\) one of them", lambda: jit(doubled_whole)(x.to_local().detach())),
    ):
        with pytest.raises(CaptureError, match=words):
            call()


def total(x):
    return x.sum()


def doubled_part(x):
    x.to_local().mul_(2)
    return x


def doubled_whole(part):
    mesh = init_device_mesh("cpu", (2,))
    DTensor.from_local(part, mesh, [ROWS]).redistribute(placements=[ROWS]).mul_(2)
    return part


def check_two_dimensions():
    """Parameters that are sharded for the data and for the features."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "features"))
    torch.manual_seed(0)
    x, plain = torch.randn(8, 8), layers()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    split = parallelize_module(copy.deepcopy(plain), mesh["features"], plan)
    ours = fully_shard(aot_module(split, "eager"), mesh=mesh["data"])
    mine = x[mesh["data"].get_local_rank() * 4 :][:4]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, ours)]
    for _ in range(2):
        for m, given, optimizer in zip((plain, ours), (x, mine), optimizers, strict=True):
            optimizer.zero_grad()
            m(given).square().mean().backward()
            optimizer.step()
    close([whole(p).detach() for p in ours.parameters()], [p.detach() for p in plain.parameters()])


def check_dtensors(count):
    if count == 4:
        return check_two_dimensions()
    mesh = init_device_mesh("cpu", (count,))
    check_functions(mesh)
    check_draws(mesh)
    check_budgets(mesh)
    check_refused(mesh)
    check_plans(mesh)
