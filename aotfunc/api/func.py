"""The transforms as users call them, with torch.func's signatures: trees in, trees out.

Each call records ``f`` once, looks the transformed program up by the recording's key and runs it;
inside another transform the run is recorded in turn. So transforms nest to any depth, and no
result is ever stale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..capture.capture import as_called, capture, parameter_names
from ..capture.makers import (
    UNREAD,
    made_in,
    maker,
    of_derivatives,
    still_made,
    twins_in,
    with_makers,
)
from ..capture.tree import Arguments, flatten, in_order_of, unflatten
from ..errors import ArgumentError
from ..graph import Program
from ..runtime.aliasing import Changes, change_in_place, without_views
from ..runtime.anomaly import without_nan
from ..runtime.called import called
from ..runtime.constants import attached
from ..runtime.execute import execute, new_layout
from ..runtime.late_reads import check_memory, storages
from ..runtime.unseen import guard, unseen_in_transform
from ..trace.entering import entered, entry
from ..trace.kinds import ordinary_tensor
from ..trace.memory import version
from ..trace.modes import without_modes
from ..transforms.activity import has_derivative
from ..transforms.fresh import ANYTHING, fresh
from ..transforms.jvp import jvp as jvp_pass
from ..transforms.linearize import halve, linear_program
from ..transforms.unhooked import unhooked
from ..transforms.vjp import vjp as vjp_pass
from .call import Call, all_positions, chosen_tree, positions, primals_and_tangents, tensors_of
from .checks import Compilations, Gradients, Maps
from .dynamo import read_as, read_by_dynamo
from .readings import (
    gradient,
    gradient_and_value,
    linearize_in_graph,
    pushed,
    run_gradient,
    run_gradient_and_value,
    vjp_in_graph,
)
from .validated import validated

# ----- reverse mode ------------------------------------------------------------------------------


@validated(Gradients)
@read_by_dynamo(gradient_and_value, run_gradient_and_value)
def grad_and_value(
    func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable:
    """Return the function ``(*args) -> (gradient, value)`` of a scalar function; ``(gradient,
    (value, aux))`` with ``has_aux``.

    The gradient has the tree of the argument (a tuple of trees for a tuple ``argnums``), each leaf
    the shape and dtype of its primal. An argument that the output does not depend on gets zeros.
    Raises ArgumentError if a differentiated leaf is not a floating or complex tensor, or the
    output not a real tensor with zero dimensions. ``validate=True`` compares the first call with
    eager autograd and with differences, and raises ValidationError, as for the other transforms
    (``docs/errors.md``).

    >>> grad_and_value(lambda x: (x * x).sum())(torch.tensor([1.0, 2.0]))
    (tensor([2., 4.]), tensor(5.))
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        grads, value, aux = _gradient(
            "grad_and_value", func, argnums, has_aux, args, kwargs, value=True
        )
        return grads, (value, aux) if has_aux else value

    return wrapper


@validated(Gradients)
@read_by_dynamo(gradient, run_gradient)
def grad(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """Return the gradient of a scalar function with respect to the arguments ``argnums``;
    ``(gradient, aux)`` with ``has_aux``.

    Shapes and errors as in :func:`grad_and_value`.

    >>> grad(lambda x: torch.sin(x).sum())(torch.zeros(2))
    tensor([1., 1.])
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        grads, _, aux = _gradient("grad", func, argnums, has_aux, args, kwargs, value=False)
        return (grads, aux) if has_aux else grads

    return wrapper


def _gradient(
    name: str, func: Callable, argnums: Any, has_aux: bool, args: tuple, kwargs: dict, value: bool
) -> tuple[Any, Any, Any]:
    arguments = Arguments(args, kwargs, func)
    call = Call(name, func, arguments, positions(name, arguments, argnums), has_aux)
    call.check_scalar()
    base, first = call.program, 0 if value else 1

    def make() -> Program:
        have = [i == 0 for i in range(base.n_outputs)]
        joint = vjp_pass(
            base, call.wrt, have, ones=True, fill=True, keep=range(first, base.n_outputs)
        )
        shared = [(i - first, r) for i, r in call.aliases if i >= first]
        made = [*made_in(base)[first : base.n_outputs], *[UNREAD] * len(call.wrt)]
        return with_makers(
            fresh(unhooked(joint), shared), made, [k - first for k in twins_in(base)]
        )

    program = call.derived((value, call.aliases), make)
    outs = execute(program, call.inputs)
    kept = len(outs) - len(call.wrt)
    grads = without_nan(program, call.inputs, outs[kept:])
    if value and outs[0].__class__ is Tensor and outs[0].requires_grad:
        if program.once("saved", lambda: is_only_saved(program)):
            guard(outs[:1], grads, name)
    _, *aux = call.results(outs[:kept], first)
    return (
        chosen_tree(arguments, argnums, grads),
        outs[0] if value else None,
        aux[0] if aux else None,
    )


def _halves(
    joint: Program, call: Call, n_late: int, base: Program | None = None
) -> tuple[Program, Program, list[int]]:
    """Cut a joint program by its late inputs; the early results have memory of their own. They are
    those of ``base``, or nothing is computed from them."""

    def make() -> Any:
        early, late, direct = halve(joint, call.program.n_outputs, n_late)
        residuals = ((i, ANYTHING) for i in range(call.program.n_outputs, early.n_outputs))
        early = fresh(early, [*call.aliases, *residuals])
        if base is None:
            early = with_makers(early, [UNREAD] * call.program.n_outputs)
        else:
            names = still_made(base, early, made_in(base))
            early = with_makers(early, names, twins_in(base))
        return early, of_derivatives(late), direct

    return joint.derived(("halves",), make)


def residual_places(forward: Program, count: int) -> list[int]:
    """Return the place of each residual, which follow the ``count`` results: that of the result if
    it is one, as its op makes it in eager mode."""
    outs, made = forward.outputs, made_in(forward)
    first = {outs[k]: k for k in range(count) if maker(outs[k]) == made[k]}
    return [first.get(outs[k], k) for k in range(count, forward.n_outputs)]


def is_only_saved(program: Program) -> bool:
    """Return whether eager saves the first result, a value, and no gradient reads it here."""
    unseen = unseen_in_transform(program).get(0)
    return unseen is not None and unseen.saved and len(program.outputs[0].users) == 1


def saved_elsewhere(forward: Program, count: int) -> list[int]:
    """Return which of the ``count`` results eager saves, and no residual is."""
    residuals = residual_places(forward, count)
    unseen = unseen_in_transform(forward).items()
    return [k for k, u in unseen if u.saved and k < count and k not in residuals]


@validated(Maps)
@read_as(vjp_in_graph)
def vjp(func: Callable, *primals: Any, has_aux: bool = False) -> tuple:
    """Return ``(output, vjp_fn)``, or ``(output, vjp_fn, aux)``: ``vjp_fn(cotangents)`` maps
    cotangents of the output to a tuple of cotangents of the primals.

    ``vjp_fn`` takes one tree like the output, or its parts as separate arguments; it may be called
    often, and under ``vmap``. Raises ArgumentError for non-floating primals, or cotangents unlike
    the output.

    >>> out, vjp_fn = vjp(torch.sin, torch.zeros(2))
    >>> vjp_fn(torch.ones(2))
    (tensor([1., 1.]),)
    """
    if not primals:
        raise ArgumentError("vjp: there is nothing to differentiate: no primals were given")
    arguments, everything = Arguments(primals, {}, func), tuple(range(len(primals)))
    call = Call("vjp", func, arguments, all_positions("vjp", arguments), has_aux)
    call.check_tensors()
    base, n_out, spec = call.program, call.n_out, call.spec
    vals = base.once("vals", lambda: base.vals)
    have = base.once(
        ("have", n_out),
        lambda: tuple([i < n_out and has_derivative(v) for i, v in enumerate(vals)]),
    )
    joint = call.derived((have,), lambda: unhooked(vjp_pass(base, call.wrt, have, fill=True)))
    forward, backward, direct = _halves(joint, call, sum(have), base)
    outs = called(forward, call.inputs)
    # a residual that is a result is that tensor: its hooks act on what is computed from it
    residuals = [
        outs[i] for i in forward.once("residuals", lambda: residual_places(forward, len(vals)))
    ]
    residuals += [call.inputs[i] for i in direct]
    versions, memory = list(map(version, residuals)), storages(residuals)
    dtype = torch.get_default_dtype()
    output, *aux = call.results(outs[: base.n_outputs])

    @entered
    def vjp_fn(*cotangents: Any, **_: Any) -> tuple:
        # torch.func's retain_graph and create_graph have no meaning here
        while len(cotangents) > 1 and isinstance(cotangents[-1], bool | None):
            cotangents = cotangents[:-1]
        if len(cotangents) == 1 and (
            spec is None or isinstance(cotangents[0], type(output)) or n_out != 1
        ):
            tree = cotangents[0]
        else:
            tree = tuple(cotangents)
        cts, ct_spec = flatten(in_order_of(output, tree))
        cts = list(map(ordinary_tensor, cts))
        if len(cts) != n_out or ((spec is None) != (ct_spec is None) and n_out != 1):
            raise ArgumentError(
                f"vjp_fn: expected cotangents like the output ({n_out} tensors), got {len(cts)}"
            )
        given = []
        for i, (c, v) in enumerate(zip(cts, vals[:n_out], strict=True)):
            if not isinstance(c, Tensor) or tuple(c.shape) != v.shape:
                shape = list(c.shape) if isinstance(c, Tensor) else type(c).__name__
                raise ArgumentError(
                    f"vjp_fn: cotangent {i} must have the output's shape {list(v.shape)}, not "
                    f"{shape}"
                )
            if c.is_complex() and not v.dtype.is_complex:
                raise ArgumentError(f"vjp_fn: cotangent {i} is complex, and the output is real")
            if have[i]:
                given.append(new_layout(c if c.dtype is v.dtype else c.to(v.dtype)))
        check_memory(residuals, memory, "vjp")
        for r, before in zip(residuals, versions, strict=True):
            if version(r) != before:
                raise ArgumentError(
                    "vjp_fn: an input of vjp was modified in place after the call; clone it before"
                )
        with without_modes(dtype):
            grads = execute(backward, inputs := [*residuals, *given])
            if any(g.__class__ is Tensor and g.requires_grad for g in grads):
                hidden = forward.once("saved", lambda: saved_elsewhere(forward, len(vals)))
                guard([outs[k] for k in hidden], grads, "vjp")
            return chosen_tree(arguments, everything, without_nan(backward, inputs, grads))

    return output, vjp_fn, *aux


# ----- forward mode ------------------------------------------------------------------------------


@validated(Maps)
@read_as(pushed)
def jvp(
    func: Callable, primals: Any, tangents: Any, *, strict: bool = False, has_aux: bool = False
) -> tuple:
    """Return ``(output, output tangent)``, or ``(output, output tangent, aux)``: the directional
    derivative along ``tangents``.

    ``primals`` and ``tangents`` are tuples of equal trees; the tangent has the output's tree,
    shapes and dtypes (zeros for integer outputs). Raises ArgumentError if they do not match, for
    integer primals, and with ``strict`` if an output does not depend on the primals.

    >>> jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    arguments, flat_tangents = primals_and_tangents("jvp", primals, tangents, func)
    call = Call("jvp", func, arguments, range(len(flat_tangents)), has_aux)
    call.check_tensors()
    base, wrt, n_out = call.program, call.wrt, call.n_out
    if strict:
        bare = call.derived((False,), lambda: jvp_pass(base, wrt, zeros=False))
        if any(t is None for t in bare.outputs[base.n_outputs : base.n_outputs + n_out]):
            raise ArgumentError("jvp(strict=True): an output does not depend on the primals")
    program = call.derived(
        (n_out, call.aliases),
        lambda: of_derivatives(fresh(linear_program(base, wrt, n_out), call.aliases)),
    )
    inputs = [*tensors_of(arguments), *flat_tangents, *call.rec.closed_over]
    outs = execute(program, inputs)
    output, *aux = call.results(outs[: base.n_outputs])
    pushed = attached(base, wrt, call.inputs, outs[base.n_outputs :])
    return output, unflatten(pushed, call.spec), *aux


@validated(Maps)
@read_as(linearize_in_graph)
def linearize(func: Callable, *primals: Any, has_aux: bool = False) -> tuple:
    """Return ``(output, jvp_fn)``: the function's value and its linear map at ``primals``;
    ``jvp_fn(*tangents)`` does only the linear work.

    ``func`` is evaluated once. ``jvp_fn`` may be called often, nested, differentiated and batched.
    Raises ArgumentError for non-floating primals, or tangents unlike the primals.

    >>> out, jvp_fn = linearize(torch.sin, torch.zeros(2))
    >>> jvp_fn(torch.ones(2))
    tensor([1., 1.])
    """
    if not primals:
        raise ArgumentError("linearize: no primals were given")
    arguments = Arguments(primals, {}, func)
    call = Call("linearize", func, arguments, all_positions("linearize", arguments), has_aux)
    base, wrt, n_out = call.program, call.wrt, call.n_out
    joint = call.derived((n_out,), lambda: linear_program(base, wrt, n_out))
    early, late, direct = _halves(joint, call, len(wrt))
    outs = execute(early, call.inputs)
    residuals = [*outs[base.n_outputs :], *(call.inputs[i] for i in direct)]
    output, *aux = call.results(outs[: base.n_outputs])
    dtype = torch.get_default_dtype()

    @entered
    def jvp_fn(*tangents: Any) -> Any:
        _, flat = primals_and_tangents("jvp_fn", primals, tangents, func)
        with without_modes(dtype):
            pushed = execute(late, [*residuals, *flat])
        return unflatten(attached(base, wrt, call.inputs, pushed), call.spec)

    return output, jvp_fn, *aux


# ----- functionalize -----------------------------------------------------------------------------


@validated(Compilations)
def functionalize(func: Callable, *, remove: str = "mutations") -> Callable:
    """Return ``func`` without intermediate mutation: the same results, and the same final values
    of mutated arguments.

    Views are always removed with the mutations (``remove`` is accepted for compatibility:
    "mutations" or "mutations_and_views").

    >>> print(make_fx(functionalize(lambda x: x.clone().mul_(2)))(torch.ones(2)).code.strip())
    def forward(self, x):
        mul = torch.ops.aten.mul.Tensor(x, 2);  x = None
        return mul
    """
    if remove not in ("mutations", "mutations_and_views"):
        raise ArgumentError(
            f"functionalize: remove must be 'mutations' or 'mutations_and_views', not {remove!r}"
        )

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs, func)
        names = parameter_names(func, arguments)
        rec = capture(
            as_called(func), arguments.leaves, arguments.rebuilt, numbers=True, name_of=names
        )
        program, views = without_views(rec)
        inputs, changes = [*tensors_of(arguments), *rec.closed_over], Changes(rec)
        with rec.gradients():
            outs = execute(program, changes.before(inputs) if changes else inputs)
            outs = outs if views is None else views(*inputs, *outs)
        change_in_place(changes.ops, inputs)
        return rec.results(outs)

    return func if is_dynamo_compiling() else entry(wrapper, func)
