"""What each of several processes checks of programs that exchange tensors: ``python
tests/aot/processes.py RANK PROCESSES FILE``. They meet in the file."""

import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from aotfunc import grad, jit, jvp, linearize, vmap
from aotfunc.errors import CaptureError
from tests.sweeps import every

#: what each process computes of its value, and what all compute of all values; a normal run takes
#: each second one
TABLE = {
    "all_reduce": (
        lambda x: collectives.all_reduce(x.sin(), "sum", dist.group.WORLD),
        lambda xs: xs.sin().sum(0).expand_as(xs),
    ),
    "all_gather_tensor": (
        lambda x: collectives.all_gather_tensor(x.sin(), 1, dist.group.WORLD),
        lambda xs: torch.cat([*xs.sin()], 1).expand(len(xs), 4, -1),
    ),
    "broadcast": (
        lambda x: collectives.broadcast(x.sin(), 1, dist.group.WORLD),
        lambda xs: xs[1].sin().expand_as(xs),
    ),
    "all_gather_tensor_autograd": (
        lambda x: collectives.all_gather_tensor_autograd(x.sin(), 0, dist.group.WORLD),
        lambda xs: xs.sin().flatten(0, 1).expand(len(xs), -1, 2),
    ),
    "reduce_scatter_tensor_autograd": (
        lambda x: collectives.reduce_scatter_tensor_autograd(x.sin(), "sum", 0, dist.group.WORLD),
        lambda xs: xs.sin().sum(0).view(len(xs), -1, 2),
    ),
    "reduce_scatter_tensor": (
        lambda x: collectives.reduce_scatter_tensor(x.sin(), "sum", 0, dist.group.WORLD),
        lambda xs: xs.sin().sum(0).view(len(xs), -1, 2),
    ),
    "all_to_all_single_autograd": (
        lambda x: collectives.all_to_all_single_autograd(x.sin(), None, None, dist.group.WORLD),
        lambda xs: xs.sin().view(len(xs), len(xs), -1, 2).transpose(0, 1).reshape(xs.shape),
    ),
    "all_reduce_coalesced": (
        lambda x: sum(collectives.all_reduce_coalesced([x.sin(), x * x], "sum", dist.group.WORLD)),
        lambda xs: (xs.sin() + xs * xs).sum(0).expand_as(xs),
    ),
    "all_gather_into_tensor_coalesced": (
        lambda x: sum(
            collectives.all_gather_into_tensor_coalesced([x.sin(), x * x], dist.group.WORLD)
        ),
        lambda xs: (xs.sin() + xs * xs).flatten(0, 1).expand(len(xs), -1, 2),
    ),
    "all_to_all_single": (
        lambda x: collectives.all_to_all_single(x.sin(), None, None, dist.group.WORLD),
        lambda xs: xs.sin().view(len(xs), len(xs), -1, 2).transpose(0, 1).reshape(xs.shape),
    ),
}


def check_collectives(rank, count):
    for name in every(2, TABLE) if count == 2 else every(6, TABLE):
        f, whole = TABLE[name]  # four processes on two cores take their time
        ways = [lambda h: h, lambda h: jit(h, "eager")]
        check_collective(f, whole, rank, count, ways)
        if name == "all_reduce":
            check_collective(f, whole, rank, count, [lambda h: jit(h, "cpp")])


def check_collective(f, whole, rank, count, ways):
    """Values, both modes, batches and second order, of the sum over processes of each loss."""
    xs = torch.arange(count * 8.0).view(count, 4, 2)
    x, ts, batch = xs[rank], xs * 0.3 + 1, torch.stack([xs, xs + 1, xs * 2])
    loss, losses = (lambda x: f(x).square().sum()), (lambda xs: whole(xs).square().sum())
    squares = lambda g, of: lambda x: g(of)(x).square().sum()
    autograd, forward = torch.func.grad(losses), torch.func.jvp(whole, (xs,), (ts,))[1]
    second = torch.func.grad(squares(torch.func.grad, losses))(xs)
    close = torch.testing.assert_close
    for way in ways:
        close(way(f)(x), whole(xs)[rank])
        close(way(grad(loss))(x), autograd(xs)[rank])
        close(way(lambda x, t: jvp(f, (x,), (t,))[1])(x, ts[rank]), forward[rank])
        close(linearize(way(f), x)[1](ts[rank]), forward[rank])
        close(way(grad(squares(grad, loss)))(x), second[rank], rtol=1e-4, atol=1e-4)
        close(way(vmap(grad(loss)))(batch[:, rank]), torch.func.vmap(autograd)(batch)[:, rank])
        if way(f) is not f:  # PyTorch's own derivative of a broadcast is another one
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(way(loss)(leaf), leaf)
            close(g, autograd(xs)[rank])


def written(empty, call):
    """A function of what ``call`` writes into the tensor, or tensors, that ``empty`` makes."""

    def f(x):
        h = x.sin()
        out = empty(h)
        call(out, h if out is h else h.detach())
        return sum(o.cos().sum() * (i + 1) for i, o in enumerate(out)) + h.sum()

    return f


def ordered(x):
    """Two of a value in turn, one that nothing reads, and one that is waited for."""
    y = x.sin()
    dist.all_reduce(y, dist.ReduceOp.MAX)
    z = y * 2
    dist.broadcast(x * 3, 0)
    work = dist.all_reduce(y, async_op=True)
    work.wait()
    return (y * z).sum()


def polled(x):
    """A sum that is asked for until it is there, and taken from its future."""
    y = x.sin()
    work = dist.all_reduce(y, async_op=True)
    while not work.is_completed():
        pass
    return (y * work.get_future().wait()[0]).sum()


def logged(x):
    """A value that is shown, and summed in place out of autograd's sight."""
    with torch.no_grad():
        dist.all_reduce(mean := x.mean())
    dist.all_reduce(shown := (x * x).detach())
    return (x * mean).sin().sum() + shown.sum()


def argument(x):
    dist.broadcast(x, 1)
    return x.square().sum()


#: functions with collectives in place, of which a normal run takes each second one
IN_PLACE = {
    "all_reduce": written(lambda h: h, lambda out, h: dist.all_reduce(out)),
    "broadcast": written(lambda h: h, lambda out, h: dist.broadcast(out, 1)),
    "a view": written(lambda h: h, lambda out, h: dist.all_reduce(out[0], dist.ReduceOp.MIN)),
    "all_gather": written(
        lambda h: [torch.empty_like(h) for _ in range(2)], lambda out, h: dist.all_gather(out, h)
    ),
    "all_gather_into_tensor": written(
        lambda h: h.new_empty(8, 2), lambda out, h: dist.all_gather_into_tensor(out, h)
    ),
    "reduce_scatter_tensor": written(
        lambda h: h.new_empty(2, 2), lambda out, h: dist.reduce_scatter_tensor(out, h)
    ),
    "reduce_scatter": written(
        lambda h: h.new_empty(2, 2), lambda out, h: dist.reduce_scatter(out, [*h.split(2)])
    ),
    "all_to_all_single": written(torch.empty_like, lambda out, h: dist.all_to_all_single(out, h)),
    "ordered": ordered,
    "polled": polled,
    "logged": logged,
    "argument": argument,
}


def check_in_place(rank):
    """Values and what is written are eager's, and so are gradients: autograd does not see the
    writes. Those of a batch are those of each sample."""

    def gradients(f, x):
        """The gradient, and that of its square."""
        (g,) = torch.autograd.grad(f(x := x.clone().requires_grad_()), x, create_graph=True)
        return g.detach(), torch.autograd.grad(g.square().sum(), x)[0]

    close, xs = torch.testing.assert_close, torch.arange(16.0).view(2, 4, 2) * 0.3 + rank
    for name in every(2, IN_PLACE):
        f = IN_PLACE[name]
        second = grad(lambda x, f=f: grad(f)(x).square().sum())
        for backend in "eager", "cpp":
            x, y = xs[0].clone(), xs[0].clone()
            close(jit(f, backend)(x), f(y), msg=name)
            close(x, y, msg=name)
        expected = [gradients(f, x) for x in xs]
        close((grad(f)(xs[0].clone()), second(xs[0].clone())), expected[0], msg=name)
        close(vmap(f)(xs.clone()), torch.stack([f(x.clone()) for x in xs]), msg=name)
        close(vmap(second)(xs.clone()), torch.stack([g for _, g in expected]), msg=name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        grad(IN_PLACE["broadcast"])(torch.ones(4, 2))
        grad(logged)(torch.ones(4, 2))
    assert [str(w.message).split()[:2] for w in said] == [["torch.distributed's", "broadcast"]]


def check_refusals():
    for words, f in (
        ("torch.distributed's barrier", lambda x: dist.barrier()),
        ("torch.distributed's reduce", lambda x: dist.reduce(x, 0)),
        ("6 elements of torch.float32", lambda x: dist.all_gather_into_tensor(x, x)),
    ):
        with pytest.raises(CaptureError, match=words):
            jit(f)(torch.ones(3))


def main(rank, count, file):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=120),
    )
    check_collectives(rank, count)
    from .dtensors import check_dtensors  # imports much

    check_dtensors(count)
    from .fully_sharded import check_fully_sharded

    check_fully_sharded(rank, count)
    if count == 2:  # more processes train by the same collectives
        check_in_place(rank)
        check_refusals()
        from .sharded import check_training  # imports much

        check_training(rank, count)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
