"""What compiled functions refuse, each program with its message: ``python -m tests.refusals``
writes the table."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import cond, jit, vmap
from aotfunc.errors import AotfuncError

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"
TITLE = """# What is refused

Each program below is refused when it is first called, or its backward is, and the caller's
tensors and generators are as they were.
`python -m tests.refusals` runs them and writes this page; `tests/test_refusals.py` compares it.

| program | message |
| --- | --- |
"""


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def on(*args: Callable[[], torch.Tensor]) -> Callable:
    def decorate(f: Callable) -> Callable:
        return lambda compiler: compiler(f)(*[make() for make in args])

    return decorate


def backward_writes(ctx, g):
    (x,) = ctx.saved_tensors
    return g * x.mul_(2)


class WritesWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    backward = staticmethod(backward_writes)


def result_written(compiler):
    def f(x):
        b, y = x.detach() * 2, x.sin()
        y.register_hook(lambda g: g * b)
        return y * 1, b

    y, b = compiler(f)(torch.ones(3, requires_grad=True))
    b.add_(1)
    y.sum().backward()


def memory_replaced(compiler):
    x = leaf()
    y = compiler(lambda x: x.exp())(x)
    x.data = torch.zeros(3)
    y.sum().backward()


def variable_changed(compiler):
    x, scale = leaf(), 2.0

    y = compiler(lambda x: checkpoint(lambda v: v.exp() * scale, x, use_reentrant=False))(x)
    scale = 3.0
    y.sum().backward()


ones = lambda *shape: lambda: torch.ones(*shape or (3,))
leaf = lambda: torch.ones(3, requires_grad=True)
pair = lambda: torch.arange(6.0).view(2, 3)


def closed_over(make: Callable[[], object], f: Callable) -> Callable:
    """A function ``x -> f(c, x)`` that closes over ``c``."""

    def run(compiler: Callable) -> object:
        c = make()
        return compiler(lambda x: f(c, x))(torch.ones(3))

    return run


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn_then_seeded(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    x = x + torch.rand(3, generator=g)
    g.manual_seed(1)
    return x


def assigned(name: str) -> Callable:
    def f(c, x):
        setattr(c, name, x * 2)
        return x

    return f


def made_for_a_hook(x):
    seen = []
    x.register_hook(seen.append)
    return x * 2, seen


def assigned_to_argument(x):
    x.tag = x * 2
    return x


class Extended(torch.Tensor):
    def doubled(self):
        return self * 2


class Negated(torch.Tensor):
    def __add__(self, other):
        return super().__add__(-other)


def instance(cls: type) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(3).as_subclass(cls)


class Box:
    def __init__(self, kept=None):
        self.kept = kept


class Classless:
    def __getattribute__(self, name):
        return {"scale": 2.0}[name]


def hook_removed(x):
    y = x * 2
    hook = y.register_hook(lambda g: g)
    (g,) = torch.autograd.grad(y.sum(), x)
    hook.remove()
    return g


def hooked_and_shared(x):
    y = x * 2
    z = y.detach()
    y.register_hook(lambda g: g * 2)
    return y, z


def argument_changed_by_a_hook(compiler):
    def f(x, seen):
        y = x.exp()
        d = y.detach()
        y.register_hook(lambda g: (seen.append(g), g * d)[1])
        return y.sin()

    compiler(f)(leaf(), [])


def branch_hooked(compiler):
    y = compiler(lambda x: cond(torch.tensor(True), torch.exp, torch.exp, x))(x := leaf())
    y.register_hook(lambda g: g * 2)
    torch.autograd.grad(y.sum(), x, create_graph=True)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1, 1) * ctx.saved_tensors[0]


def call_and_gradient(compiler):
    body = lambda x: Clipped.apply(x).exp()
    y = compiler(lambda x: cond(torch.tensor(True), body, body, x))(x := leaf())
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (g.sum() + y.sum()).backward()


def hooked_outside():
    x = leaf()
    x.register_hook(lambda g: g * 2)
    return x


def reshaped_quietly(x):
    y = x * 2
    with torch.no_grad():
        y.unsqueeze_(0)
    return y


def leaf_with_gradient(x):
    w = torch.ones(3, requires_grad=True)
    (w * x).sum().backward()
    return w


def both_modes(x):
    with torch.inference_mode():
        y = x * 2
    return y, x * 3


def optimizer_inside(compiler):
    net = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), 0.1)

    def loss():
        net(torch.ones(3)).sum().backward()
        return net.weight.sum()

    compiler(lambda x: (optimizer.step(loss), x)[1])(torch.ones(3))


def hooked_parameter():
    w = parameter()
    w.register_post_accumulate_grad_hook(print)
    return w


PROGRAMS: dict[str, Callable] = {
    "`if x.sum() > 0`": on(ones())(lambda x: x if x.sum() > 0 else -x),
    "`x * c.item()`, `c` from outside": closed_over(
        lambda: torch.tensor(3.0), lambda c, x: x * c.item()
    ),
    "`x[:n]`, `n` a tensor from outside": closed_over(lambda: torch.tensor(2), lambda n, x: x[:n]),
    "`torch.add(x, x, alpha=c)`": closed_over(
        lambda: torch.tensor(2), lambda c, x: torch.add(x, x, alpha=c)
    ),
    '`f"{c}"`': closed_over(lambda: torch.tensor(2), lambda c, x: (f"{c}", x)[1]),
    "`x[w > 0]`": closed_over(ones(), lambda w, x: x[w > 0]),
    "`torch.rand(2).sum().item()`": on(ones())(lambda x: x * torch.rand(2).sum().item()),
    "`x.grad` of an argument": on(leaf)(lambda x: x if x.grad is None else x + x.grad),
    "`y.grad` of a `y` computed outside": closed_over(
        lambda: parameter() * 2, lambda y, x: x if y.grad is None else x + y.grad
    ),
    "`w.data = w.data.double()`": closed_over(
        parameter, lambda w, x: (setattr(w, "data", w.data.double()), x)[1]
    ),
    "`w.data = …` in a transform": closed_over(
        parameter, lambda w, x: vmap(lambda x: (setattr(w, "data", w.data * 2), x)[1])(x)
    ),
    "`w.grad = …` in a transform": closed_over(
        parameter, lambda w, x: vmap(lambda x: (setattr(w, "grad", w * x), x)[1])(x)
    ),
    "`w.requires_grad_(False)`": closed_over(parameter, lambda w, x: w.requires_grad_(False) * x),
    "`w.register_hook(…)`": closed_over(
        parameter, lambda w, x: (w.register_hook(print), w * x)[1]
    ),
    "`x.register_hook(seen.append)` of an argument, `seen` made inside": on(parameter)(
        made_for_a_hook
    ),
    "`x.data = y`, both arguments": on(ones(), ones())(
        lambda x, y: (setattr(x, "data", y), x * 2)[1]
    ),
    "`x.resize_(6)` of an argument": on(ones())(lambda x: x.resize_(6) * 2),
    "`x.untyped_storage().resize_(0)` of an argument": on(ones())(
        lambda x: (x * 2, x.untyped_storage().resize_(0))[0]
    ),
    "`c.untyped_storage().resize_(0)`, `c` from outside": closed_over(
        ones(), lambda c, x: (c * x, c.untyped_storage().resize_(0))[0]
    ),
    "`c.unsqueeze_(0)`, `c` from outside": closed_over(ones(), lambda c, x: c.unsqueeze_(0) * x),
    "`torch.sin(x, out=b)` of another shape": closed_over(
        ones(2), lambda b, x: torch.sin(x, out=b)
    ),
    "`z.real.add_(1)`, `z` a conjugated argument": on(lambda: (torch.ones(3) * 1j).conj())(
        lambda z: z.real.add_(1)
    ),
    "`x.expand(2, 3).add_(1)`": on(ones())(lambda x: x.expand(2, 3).add_(1)),
    "`x[:, 1:] = x[:, :-1]`": on(ones(2, 3))(lambda x: x[:, 1:].copy_(x[:, :-1])),
    "writes to overlapping arguments": lambda compiler: compiler(lambda a, b: a.add_(b.sum()))(
        *(lambda t: (t[:4], t[2:]))(torch.arange(6.0))
    ),
    "`torch.from_numpy(a).add_(x)`, `a` an array from outside": closed_over(
        lambda: np.ones(3), lambda a, x: torch.from_numpy(a).add_(x)
    ),
    "`t = torch.from_numpy(a)`, read after `a[0] = 1`": closed_over(
        lambda: np.zeros(3), lambda a, x: (lambda t: (a.fill(1), x * t)[1])(torch.from_numpy(a))
    ),
    "`t.add_(x)`, and `a` read, of which `t` was made": closed_over(
        lambda: (lambda a: (a, torch.from_numpy(a)))(np.ones(3)),
        lambda both, x: both[1].add_(x) * float(both[0][0]),
    ),
    "`n = y.numpy()`, then `y.add_(1)`": on(ones())(
        lambda x: (lambda y: (y.numpy(), y.add_(1)))(torch.tensor([1.0, 2.0]))[1] + x
    ),
    "`torch.from_dlpack(x)` of an argument": on(ones())(lambda x: torch.from_dlpack(x) * 2),
    "`xs.append(x)` of an argument": lambda compiler: compiler(
        lambda xs: (xs.append(xs[0]), xs[0] * 2)[1]
    )([torch.ones(3)]),
    "`y.backward()` onto an argument": on(leaf)(lambda x: ((x * x).sum().backward(), x)[1]),
    "`y.backward()` onto a parameter with a post-accumulate hook": closed_over(
        hooked_parameter, lambda w, x: ((w * x).sum().backward(), x)[1]
    ),
    "a backward that writes to what it saved": lambda compiler: (
        compiler(WritesWhatItSaved.apply)(leaf()).sum().backward()
    ),
    "`hook.remove()` inside, after a gradient": on(leaf)(hook_removed),
    "`y` with a hook, and `y.detach()`, as results": on(leaf)(hooked_and_shared),
    "`torch.autograd.grad(…, x)`, `x` with a hook": on(hooked_outside)(
        lambda x: torch.autograd.grad((x * x).sum(), x)[0].detach()
    ),
    "`y.unsqueeze_(0)` under `no_grad()`": on(leaf)(reshaped_quietly),
    "a reentrant checkpoint that writes to its argument": on(leaf)(
        lambda x: checkpoint(lambda v: v.mul_(2), x * 1, use_reentrant=True)
    ),
    "a write to what a checkpoint has read": on(leaf)(
        lambda x: (
            lambda b: (checkpoint(lambda v: v.sin() * b, x, use_reentrant=False), b.add_(1))[0]
        )(torch.ones(3))
    ),
    "a write, before the backward, to a result that a hook reads": result_written,
    "`x.data = y` between a call and its backward": memory_replaced,
    "`scale = 3.0`, which a checkpoint reads, between a call and its backward": variable_changed,
    "a hook that changes a list, an argument": argument_changed_by_a_hook,
    "a second derivative, `y` from `cond(…, torch.exp, …)` with a hook": branch_hooked,
    "a backward of `y` and of its gradient, `y` from `cond` of a Function that clips": (
        call_and_gradient
    ),
    "`x.register_hook(…)` in a checkpoint of `x`": on(leaf)(
        lambda x: checkpoint(
            lambda v: (v.register_hook(print), v.exp())[1], x, use_reentrant=False
        )
    ),
    "`saved_tensors_hooks` inside": on(leaf)(
        lambda x: (
            torch.autograd.graph.saved_tensors_hooks(print, print).__enter__() and x
        )  # refused as it is entered
    ),
    "`y.grad_fn.register_hook(…)`": on(leaf)(
        lambda x: ((x * 2).grad_fn.register_hook(print), x)[1]
    ),
    "`torch.manual_seed(0)`": on(ones())(lambda x: (torch.manual_seed(0), x * torch.rand(3))[1]),
    "`torch.initial_seed()`": on(ones())(lambda x: x + torch.initial_seed()),
    "`torch.Generator()` made inside": on(ones())(
        lambda x: x + torch.rand(3, generator=generator())
    ),
    "`g.manual_seed(1)` after a draw": closed_over(generator, drawn_then_seeded),
    "a generator as the result": on(ones())(lambda x: (v for v in x)),
    "a function made inside as the result": on(ones())(lambda x: lambda z, y=x * 2: z * y),
    "`d.keys()` as the result": closed_over(dict, lambda d, x: (x, d.keys())),
    "`c.kept = Box(x * 2)`": closed_over(Box, lambda c, x: (setattr(c, "kept", Box(x * 2)), x)[1]),
    "a checkpoint that draws, `preserve_rng_state=False`": on(leaf)(
        lambda x: checkpoint(
            nn.functional.dropout, x, use_reentrant=False, preserve_rng_state=False
        )
    ),
    "`increment_version(x)`": on(ones())(
        lambda x: (torch.autograd.graph.increment_version(x), x * 2)[1]
    ),
    "an argument of a subclass with another `__add__`": on(instance(Negated))(lambda x: x + 1),
    "`isinstance(x, Extended)` of an argument": on(instance(Extended))(
        lambda x: x * 2 if isinstance(x, Extended) else x
    ),
    "`(x * 2).doubled()`, a method of the argument's subclass": on(instance(Extended))(
        lambda x: (x * 2).doubled()
    ),
    "`x.tag = y` of an argument": on(ones())(assigned_to_argument),
    "an object without `__class__`": closed_over(Classless, lambda c, x: x * c.scale),
    "`optimizer.step()` of `LBFGS`, which decides by gradients": optimizer_inside,
    "a parameter made inside, and what depends on it": on(ones())(
        lambda x: (lambda p: (p, p * x))(nn.Parameter(torch.ones(3)))
    ),
    "a view of a leaf made inside": on(ones())(lambda x: torch.ones(3, requires_grad=True)[:2]),
    "a leaf made inside that has a `.grad`": on(ones())(leaf_with_gradient),
    "results made in and outside of `inference_mode()`": on(ones())(both_modes),
    "`torch.jit.trace` of a compiled function": lambda compiler: torch.jit.trace(
        compiler(lambda x: x * 2), (torch.ones(3),)
    ),
    "a lazy module that was never called": lambda compiler: compiler(nn.LazyLinear(3))(
        torch.ones(3)
    ),
    "a sparse argument": lambda compiler: compiler(lambda x: x * 2)(torch.eye(3).to_sparse()),
    "a compiler that fails": lambda compiler: jit(
        lambda x: x * 2, backend=lambda gm, inputs: 1 / 0
    )(torch.ones(3)),
    "an unknown backend": lambda compiler: jit(lambda x: x, backend="none")(torch.ones(3)),
}


def message(program: Callable, compiler: Callable) -> str:
    """What a program is refused with, without the line of this file. Raises AssertionError where
    it is not refused."""
    try:
        program(compiler)
    except AotfuncError as e:
        text = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    else:
        raise AssertionError("it is not refused")
    place = re.search(r" \(at refusals\.py:(\d+) in .*?: ", text)
    if place is None:
        return text
    line = linecache.getline(__file__, int(place[1])).strip()
    return text[: place.start()] + text[place.end() :].removeprefix(line).removeprefix(")")


def table() -> str:
    rows = [f"| {name} | {message(p, jit)} |" for name, p in PROGRAMS.items()]
    return TITLE + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table())
