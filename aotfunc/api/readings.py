"""The Python that Dynamo reads in place of each transform, and the function that its graph runs.

A reading ``reads(func, args, kwargs, *options)`` is Python that Dynamo can read: it calls ``func``
on what :func:`enter` gives, and returns what :func:`leave` does. ``runs(transform, body, given,
more, *options)`` calls the transform on ``body``, which takes the tensors that entered and returns
``(outs, aux)``; its results are those of :func:`leave`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..debug import at, user_line
from ..errors import ArgumentError, CaptureError
from ..trace.traced import current
from .dynamo import enter, leave, node


def paired(template: Any, tree: Any, prefix: bool = False, exact: bool = False) -> list:
    """Return the leaves of ``tree`` at the positions of the leaves of ``template``; with
    ``prefix`` a leaf in place of a whole tree is repeated. Lists pair with tuples, but for
    ``exact`` trees."""
    if prefix and (tree is None or isinstance(tree, int)):
        return [tree] * len(tree_flatten(template)[0])
    if isinstance(template, dict) and isinstance(tree, dict) and template.keys() == tree.keys():
        return [x for k in template for x in paired(template[k], tree[k], prefix, exact)]
    if (
        isinstance(template, tuple | list)
        and isinstance(tree, type(template) if exact else tuple | list)
        and len(template) == len(tree)
    ):
        pairs = zip(template, tree, strict=True)
        return [x for a, b in pairs for x in paired(a, b, prefix, exact)]
    if isinstance(template, tuple | list | dict | None):
        raise ArgumentError("a tree does not have the structure of the one that it belongs to")
    return [tree]


def result_tensors(leaves: list) -> list[Tensor]:
    """Return the tensors among the leaves of a result. Other values must be plain."""
    for x in leaves:
        if not isinstance(x, Tensor | int | float | str | None):
            raise ArgumentError("a result is neither a tensor nor a plain value")
    return [x for x in leaves if isinstance(x, Tensor)]


def refilled(leaves: list, spec: Any, values: Sequence[Tensor]) -> Any:
    """Return a tree with ``values`` for its tensors."""
    feed = iter(values)
    return tree_unflatten([next(feed) if isinstance(x, Tensor) else x for x in leaves], spec)


def batched(
    func: Callable,
    args: tuple,
    kwargs: dict,
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *chunks: int,
    **options: Any,
) -> Any:
    """Return the readings of ``vmap`` and ``chunk_vmap``."""
    leaves, spec = tree_flatten(args)
    given, dims, entered, samples = [], [], [], []
    for x, d in zip(
        leaves,
        paired(args, in_dims if isinstance(in_dims, int) else tuple(in_dims), True),
        strict=True,
    ):
        if d is not None:
            given.append(x)
            dims.append(d)
            entered.append(enter(x.select(d, 0), False))
        samples.append(x if d is None else entered[-1])
    result = func(*tree_unflatten(samples, spec), **kwargs)
    leaves, spec = tree_flatten(result)
    outs, where = result_tensors(leaves), paired(result, out_dims, True)
    to = [d for x, d in zip(leaves, where, strict=True) if isinstance(x, Tensor)]
    if not all(isinstance(x, Tensor) or d is None for x, d in zip(leaves, where, strict=True)):
        raise ArgumentError(
            "vmap: the function must return tensors; out_dims=None lets other values pass"
        )
    size = given[0].size(dims[0])
    examples = [
        x if d is None else x.unsqueeze(d).repeat_interleave(size, d)
        for x, d in zip(outs, to, strict=True)
    ]
    how = (tuple(dims), tuple(to), randomness, *chunks)
    return refilled(leaves, spec, leave(examples, given, [], entered, outs, [], (how, options)))


def run_batched(
    vmap: Callable, body: Callable, given: list, more: list, how: tuple, options: dict
) -> Sequence[Tensor]:
    return vmap(lambda *samples: body(*samples)[0], *how, **options)(*given)


class StandInCall:
    """A call of ``f`` on stand-ins for the arguments ``argnums``."""

    def __init__(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        argnums: int | tuple[int, ...],
        has_aux: bool,
    ) -> None:
        self.one, self.has_aux = isinstance(argnums, int), has_aux
        chosen = (argnums,) if isinstance(argnums, int) else argnums
        self.given, self.spec = tree_flatten(tuple([args[i] for i in chosen]))
        self.entered = [enter(x, True) for x in self.given]
        replaced = list(args)
        for i, tree in zip(chosen, tree_unflatten(self.entered, self.spec), strict=True):
            replaced[i] = tree
        self.result, aux = func(*replaced, **kwargs), None
        if has_aux:
            self.result, aux = self.result
        self.outs, self.out_spec = tree_flatten(self.result)
        self.aux, self.aux_spec = tree_flatten(aux)

    def results(self, examples: list, more: list, *options: Any) -> tuple[list, tuple]:
        """Return stand-ins for ``examples``, and the auxiliary result if there is one."""
        aux = result_tensors(self.aux)
        values = leave([*examples, *aux], self.given, more, self.entered, self.outs, aux, options)
        count = len(examples)
        if not self.has_aux:
            return values[:count], ()
        return values[:count], (refilled(self.aux, self.aux_spec, values[count:]),)

    def chosen(self, values: list) -> Any:
        """Return ``values`` in the trees of the differentiated arguments."""
        trees = tree_unflatten(values, self.spec)
        return trees[0] if self.one else trees


def gradient(
    func: Callable, args: tuple, kwargs: dict, argnums: Any = 0, has_aux: bool = False
) -> Any:
    call = StandInCall(func, args, kwargs, argnums, has_aux)
    values, aux = call.results([x.clone() for x in call.entered], [])
    return (call.chosen(values), *aux) if has_aux else call.chosen(values)


def gradient_and_value(
    func: Callable, args: tuple, kwargs: dict, argnums: Any = 0, has_aux: bool = False
) -> Any:
    call = StandInCall(func, args, kwargs, argnums, has_aux)
    values, aux = call.results([*[x.clone() for x in call.entered], *call.outs], [])
    return call.chosen(values[:-1]), (values[-1], *aux) if has_aux else values[-1]


def run_gradient(grad: Callable, body: Callable, given: list, more: list) -> list:
    grads, aux = grad(scalar(body), tuple(range(len(given))), True)(*given)
    return [*grads, *aux]


def run_gradient_and_value(
    grad_and_value: Callable, body: Callable, given: list, more: list
) -> list:
    grads, (value, aux) = grad_and_value(scalar(body), tuple(range(len(given))), True)(*given)
    return [*grads, value, *aux]


def scalar(body: Callable) -> Callable:
    def call(*tensors: Tensor) -> tuple:
        (out,), aux = body(*tensors)
        return out, aux

    return call


def jacobian(
    func: Callable,
    args: tuple,
    kwargs: dict,
    argnums: Any = 0,
    has_aux: bool = False,
    **options: Any,
) -> Any:
    call = StandInCall(func, args, kwargs, argnums, has_aux)
    examples = [
        (x.sum() * 0).expand(*out.shape, *x.shape) for out in call.outs for x in call.entered
    ]
    values, aux = call.results(examples, [], options)
    n = len(call.given)
    blocks = [call.chosen(values[k * n : (k + 1) * n]) for k in range(len(call.outs))]
    result = tree_unflatten(blocks, call.out_spec)
    return (result, *aux) if has_aux else result


def run_jacobian(jac: Callable, body: Callable, given: list, more: list, options: dict) -> list:
    blocks, aux = jac(body, tuple(range(len(given))), has_aux=True, **options)(*given)
    return [*[x for block in blocks for x in block], *aux]


def pushed(jvp: Callable) -> Callable:
    """Return the reading of ``jvp``."""

    def push(
        func: Callable, primals: tuple, tangents: tuple, strict: bool, has_aux: bool
    ) -> tuple:
        call = StandInCall(func, primals, {}, tuple(range(len(primals))), has_aux)
        examples = [*call.outs, *[torch.zeros_like(x) for x in call.outs]]
        values, aux = call.results(examples, paired(primals, tangents), strict)
        n = len(call.outs)
        return (
            tree_unflatten(values[:n], call.out_spec),
            tree_unflatten(values[n:], call.out_spec),
            *aux,
        )

    def plain(
        func: Callable, primals: tuple, tangents: tuple, strict: bool, has_aux: bool
    ) -> tuple:
        return jvp(func, primals, tangents, strict=strict, has_aux=has_aux)

    def reads(
        func: Callable,
        primals: tuple,
        tangents: tuple,
        *,
        strict: bool = False,
        has_aux: bool = False,
    ) -> tuple:
        return node(jvp, push, run_push, plain, func, primals, tangents, strict, has_aux)

    return reads


def run_push(jvp: Callable, body: Callable, given: list, more: list, strict: bool) -> list:
    outs, tangents, aux = jvp(body, tuple(given), tuple(more), strict=strict, has_aux=True)
    return [*outs, *tangents, *aux]


def in_two_steps(linear: Callable, run_linear: Callable) -> Callable:
    """Return the readings of ``vjp`` or ``linearize``. Their linear function computes the value
    again, as its residuals are not known before the graph runs."""

    def decorate(transform: Callable) -> Callable:
        def reads(func: Callable, *primals: Any, has_aux: bool = False) -> tuple:
            def first(primals: tuple) -> tuple:
                call = StandInCall(func, primals, {}, tuple(range(len(primals))), has_aux)
                outs, aux = call.results(call.outs, [])
                return tree_unflatten(outs, call.out_spec), *aux

            def second(primals: tuple, vectors: tuple) -> Any:
                return linear(
                    StandInCall(func, primals, {}, tuple(range(len(primals))), has_aux),
                    primals,
                    vectors,
                )

            def plain_first(primals: tuple) -> tuple:
                out, _, *aux = transform(func, *primals, has_aux=has_aux)
                return out, *aux

            def plain_second(primals: tuple, vectors: tuple) -> Any:
                return transform(func, *primals, has_aux=has_aux)[1](*vectors)

            def fn(*vectors: Any) -> Any:
                return node(transform, second, run_linear, plain_second, primals, vectors)

            output, *aux = node(transform, first, run_value, plain_first, primals)
            return output, fn, *aux

        return reads

    return decorate


def run_value(transform: Callable, body: Callable, given: list, more: list) -> list:
    outs, _, aux = transform(body, *given, has_aux=True)
    return [*outs, *aux]


def read_pull(call: StandInCall, primals: tuple, cotangents: tuple) -> tuple:
    tree = cotangents[0] if len(cotangents) == 1 else cotangents
    return call.chosen(
        call.results([x.clone() for x in call.entered], paired(call.result, tree))[0]
    )


def run_pull(vjp: Callable, body: Callable, given: list, more: list) -> list:
    _, vjp_fn, aux = vjp(repeatable(body), *given, has_aux=True)
    return [*vjp_fn(tuple(more)), *aux]


def read_push(call: StandInCall, primals: tuple, tangents: tuple) -> Any:
    examples = [torch.zeros_like(x) for x in call.outs]
    return tree_unflatten(call.results(examples, paired(primals, tangents))[0], call.out_spec)


def run_push_again(linearize: Callable, body: Callable, given: list, more: list) -> list:
    _, jvp_fn, aux = linearize(repeatable(body), *given, has_aux=True)
    return [*jvp_fn(*more), *aux]


def repeatable(body: Callable) -> Callable:
    """Return ``body``, which runs twice. Refuse one that draws or writes to outside tensors."""

    def call(*tensors: Tensor) -> Any:
        result, trace = body(*tensors), current()
        assert trace is not None
        draws = any(r[0].facts.random for r in trace.records)
        if draws or any(root < len(trace.inputs) for root in trace.roots().written):
            raise CaptureError(
                "under torch.compile the function that vjp or linearize returns runs the "
                "differentiated function again, and this one "
                f"{'draws random numbers' if draws else 'writes to a tensor'}{at(user_line())}; "
                "use grad, jvp or jacrev, or call vjp outside of torch.compile"
            )
        return result

    return call


vjp_in_graph = in_two_steps(read_pull, run_pull)
linearize_in_graph = in_two_steps(read_push, run_push_again)
