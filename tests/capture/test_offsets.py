"""Where in a storage a tensor begins makes no other program, unless the program counts from there,
or writes."""

import pytest
import torch

from aotfunc import (
    aot_function,
    functionalize,
    grad,
    hessian,
    jacrev,
    jit,
    jvp,
    linearize,
    vjp,
    vmap,
)
from aotfunc.capture import captured
from tests.functions import Square


@pytest.fixture
def made(monkeypatch):
    """The programs that are made meanwhile."""
    found = []
    build = captured.Captured._build
    monkeypatch.setattr(
        captured.Captured, "_build", lambda self, memory: found.append(1) or build(self, memory)
    )
    return found


table = torch.randn(12, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
z = table.to(torch.complex128) + 1j * table.flip(0)


def loss(x):
    return ((x[1:] @ x.t()).tanh() * x[0]).square().mean() + x.view(2, 8)[
        1, 3:
    ].sum() * x.diagonal()[2]


compiled_loss = jit(loss)

#: functions of an argument that lies somewhere in a larger tensor
FUNCTIONS = {
    "grad": lambda x: grad(loss)(x),
    "closed over": lambda x: grad(lambda w: loss(x * w))(torch.ones(4, dtype=x.dtype)),
    "hessian": lambda x: hessian(loss)(x),
    "vjp": lambda x: vjp(torch.sin, x.t())[1](x)[0],
    "jvp": lambda x: jvp(loss, (x,), (x,))[1],
    "jvp, turned": lambda x: jvp(
        lambda x: x.t().reshape(-1) * x.view(-1), (x.t().contiguous(),), (x.t(),)
    )[1],
    "linearize": lambda x: linearize(loss, x)[1](x),
    "vmap": lambda x: vmap(lambda r: r[1:].sum() + r.view(2, 2).t().reshape(-1), in_dims=1)(x),
    "vmap of grad": lambda x: vmap(grad(lambda r: (r[1:] * r[0]).sum().sin()))(x),
    "nested": lambda x: grad(
        lambda x: (grad(lambda y: (y[1:] * x[0, 1:] ** 2).sum())(x[2]) * x[3]).sum()
    )(x),
    "views of views": lambda x: grad(
        lambda y: vmap(lambda r: r[1:])(y)[2:].t()[1:].reshape(-1).prod()
    )(x),
    "functionalize": lambda x: functionalize(lambda x: x.view(-1)[2:].unfold(0, 3, 2))(x),
    "Function": lambda x: grad(lambda x: Square.apply(x[1:]).sum())(x),
    "a value": lambda x: grad(lambda x: (x * x if (x.abs() >= 0).all() else x).sum())(x),
    "torch.autograd.grad": lambda x: vmap(lambda r: torch.autograd.grad((r * r).sum(), r)[0])(
        x.requires_grad_()
    ),
    "jit": jit(lambda x: (x[1:] @ x.t(), x.diagonal())),
    "aot_function": aot_function(loss),
    "jit inside": lambda x: grad(compiled_loss)(x),
}


def somewhere(i):
    return (table[i], table.view(-1)[3 * i : 3 * i + 16].view(4, 4))[i % 2]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_program_for_all_places(name, made):
    f = FUNCTIONS[name]
    for i in range(2):
        f(somewhere(i).detach())
    count = len(made)
    for i in range(2, 8):
        got, want = f(somewhere(i).detach()), f(somewhere(i).detach().clone())
        torch.testing.assert_close(got, want)
    assert len(made) == count


@pytest.mark.parametrize("way", [lambda f: f, jit])
def test_tangents_are_laid_out_alike_wherever_the_primal_begins(way):
    f = lambda x: x.t().reshape(-1) * 2 + x.t().contiguous().view(-1)
    for p in (
        table[0].t(),
        table[1].t(),
        table[1],
        table[1, :, 1:3],
        table[:4, 1].t(),
        table[2, 1].expand(4, 4),
    ):
        for t in (
            torch.ones(4, 4, dtype=p.dtype),
            torch.ones(4, 4, dtype=p.dtype).t(),
            table[3],
            table[3].t(),
            p,
        ):
            t = t[:, : p.shape[1]]
            want = torch.func.jvp(f, (p.contiguous(),), (t.contiguous(),))[1]
            torch.testing.assert_close(way(lambda p, t: jvp(f, (p,), (t,))[1])(p, t), want)
            torch.testing.assert_close(way(lambda p, t: linearize(f, p)[1](t))(p, t), want)


def test_complex_rows(made):
    f = lambda x: vjp(lambda x: x.conj()[1:] * x[1:], x)[1](x[1:])[0]
    f(z[1])
    count = len(made)
    for x in z[2:5]:
        torch.testing.assert_close(f(x), f(x.clone()), rtol=0, atol=0)
    assert len(made) == count


#: what an absolute place in the storage, or a write, makes of a part of a buffer
ABSOLUTE = {
    "as_strided": lambda x: x.as_strided((2,), (2,), x.storage_offset() + 1) * 2,
    "as_strided of a view": lambda x: x[1:].as_strided((2,), (1,), x.storage_offset() + 2).sin(),
    "as_strided from where it begins": lambda x: x[2:].as_strided((2,), (1,)).sin(),
    "of a nested result": lambda x: (
        functionalize(lambda x: x[1:])(x).as_strided((2,), (1,), x.storage_offset() + 1) ** 2
    ),
    "inside": lambda x: vmap(
        lambda s: (x.as_strided((2,), (1,), x.storage_offset() + 2) * s).sin()
    )(x[:2]).sum(0),
    "copy": lambda x: torch.as_strided_copy(x, (2,), (1,), x.storage_offset() + 1) * x[0],
    "scatter": lambda x: (
        torch.as_strided_scatter(x, x[:2] * 3, (2,), (1,), x.storage_offset() + 1) * x
    ),
    "the number": lambda x: x * x.storage_offset(),
    "a write": lambda x: (x.view(2, -1)[1].mul_(x[0]), x * x)[1],
}


#: autograd's own derivative of these is not there, or wrong (as_strided_scatter's in 2.13)
VALUES = ("a write", "scatter")


@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("way", [functionalize, jit, aot_function])
def test_what_counts_from_the_beginning_of_the_storage(name, way):
    f = ABSOLUTE[name]
    compiled = way(f)
    for start in (0, 5, 0, 9, 17):
        part = lambda whole, start=start: whole.view(-1)[start : start + 6]
        mine, theirs, leaf = (
            table[:3].clone(),
            table[:3].clone(),
            table[:3].clone().requires_grad_(),
        )
        torch.testing.assert_close(compiled(part(mine)), f(part(theirs)))
        torch.testing.assert_close(mine, theirs)
        if name not in VALUES:
            f(part(leaf * 1)).sum().backward()
            torch.testing.assert_close(
                grad(lambda x: compiled(x).sum())(part(mine)), part(leaf.grad)
            )
            torch.testing.assert_close(jacrev(compiled)(part(mine)).sum(0), part(leaf.grad))


def test_overlapping_arguments_at_other_places():
    def f(whole, part):
        whole.mul_(2)
        return whole + part

    for wrapped in (functionalize(f), jit(f)):
        for start, shift in ((0, 0), (2, 0), (2, 1), (5, 4), (7, 1)):
            mine, theirs = torch.arange(20.0), torch.arange(20.0)
            parts = lambda t, s=start, d=shift: (t[s : s + 8], t[s + d])
            assert torch.equal(wrapped(*parts(mine)), f(*parts(theirs)))
            assert torch.equal(mine, theirs)


def test_a_compiled_result_that_shows_an_argument():
    """Inductor's results may be memory of an argument: a view of it, wherever that begins."""
    f = jit(lambda x: (x.view(2, 8)[1:], x * 2), backend="inductor")
    for i in range(3):
        shown, _ = f(table[i])
        assert (
            torch.equal(shown, table[i].view(2, 8)[1:])
            and shown.data_ptr() == table[i].view(2, 8)[1:].data_ptr()
        )
    assert f.captures == 1
