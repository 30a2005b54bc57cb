"""Random programs that write to arguments, closed-over buffers and views of them, in view of
autograd and hidden from it: values, gradients, requires_grad and memory as in eager.
``AOTFUNC_FUZZ=N`` runs N programs."""

import random
from contextlib import nullcontext, suppress

import torch

from aotfunc import aot_function, jit
from tests.sweeps import seeds

VIEWS = [
    lambda t: t[0],
    lambda t: t[1:],
    lambda t: t.t(),
    lambda t: t.view(-1)[::2],
    lambda t: t[:, 1],
    lambda t: t.unsqueeze(0),
    lambda t: t.detach(),
    lambda t: t.data,
    lambda t: t[:],
    lambda t: t.diagonal(),
    lambda t: t.transpose(0, 1)[1],
]
WAYS = {
    "hidden": torch.no_grad,
    "data": nullcontext,
    "detached": nullcontext,
    "visible": nullcontext,
}


def add(t, s, n):
    t.add_(s)


def scale(t, s, n):
    t.mul_(0.5 + n)


def copy(t, s, n):
    t.copy_(s)


def turn(t, s, n):
    t.mul_(s.detach().cos())


def assign(t, s, n):
    if t.dim():
        t[0] = s.sum() * 0.1


def fill(t, s, n):
    t.fill_(n)


def program(seed):
    rng = random.Random(seed)
    kinds = ["view", "view", "new", *WAYS, "visible"]
    steps = [
        (
            rng.choice(kinds),
            rng.random(),
            rng.random(),
            rng.choice([add, scale, copy, turn, assign, fill]),
            rng.choice(VIEWS),
        )
        for _ in range(rng.randint(2, 8))
    ]
    results = rng.randrange(3)

    def f(x, y, buffer):
        values = [x, y, buffer]
        for n, (kind, u, v, write, view) in enumerate(steps):
            t, s = values[int(u * len(values))], values[int(v * len(values))]
            if kind == "new":
                values.append(t * 2 + 1)
            elif kind == "view":
                with suppress(RuntimeError, IndexError):  # of this rank there may be no such view
                    values.append(view(t))
            else:
                t = t.data if kind == "data" else t.detach() if kind == "detached" else t
                with WAYS[kind]():
                    write(t, s if s.shape == t.shape else s.sum(), n % 3)
        if results == 0:
            return [values[-1], sum(v.sum() for v in values)]
        return (
            [*values[3:][-2:], x.sin().sum()] if results == 1 else [(v * v).sum() for v in values]
        )

    return f


def outcome(seed, wrap):
    """What can be told of one call: values, flags, memory and gradients of the results and of what
    was written."""
    f, g = program(seed), torch.Generator().manual_seed(seed)
    leaves = [torch.rand(3, 3, generator=g).requires_grad_() for _ in range(2)]
    x = leaves[0] * 1
    y = leaves[1] * 1 if seed % 3 else x.detach() if seed % 2 else torch.rand(3, 3, generator=g)
    whole = torch.rand(4, 3, generator=g)
    buffer = whole[1:] if seed % 2 else torch.rand(3, 3, generator=g)
    outs = wrap(lambda x, y: f(x, y, buffer))(x, y) if seed % 5 == 0 else wrap(f)(x, y, buffer)
    tensors, storages = [*outs, x, y, buffer, whole], {}
    memory = [
        (
            storages.setdefault(t.untyped_storage().data_ptr(), len(storages)),
            t.storage_offset(),
            t.stride(),
        )
        for t in tensors
    ]
    losses = [(t * t).sum() for t in tensors if t.requires_grad]
    values = [t.detach().clone() for t in tensors]
    grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses else None
    return values, [t.requires_grad for t in tensors], memory, grads


def test_as_in_eager():
    wraps = [jit, lambda f: aot_function(f, "eager"), lambda f: jit(lambda *args: jit(f)(*args))]
    for seed in seeds(150):
        try:
            want = outcome(seed, lambda f: f)
        except RuntimeError:  # eager refuses the program
            continue
        got = outcome(seed, wraps[seed % 3])
        assert got[1:3] == want[1:3], seed
        for a, e in zip((*got[0], *(got[3] or ())), (*want[0], *(want[3] or ())), strict=True):
            assert (a is None) == (e is None), seed
            assert a is None or torch.allclose(a, e, rtol=1e-4, atol=1e-4, equal_nan=True), seed
