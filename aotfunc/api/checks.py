"""The references with which ``validate=True`` compares the first result of each transform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..capture.tree import Arguments, flatten, unflatten
from ..errors import ArgumentError
from ..graph import Program, dependents
from ..trace.entering import entry
from ..trace.nested import with_items
from ..trace.shapes.sig import floating
from .batch import batch_size, broadcast_prefix, input_dims
from .rehearse import leaves_behind, pulled, rehearsed, widened
from .validate import Validation, call_node, dot, node_values


class Derivatives(Validation):
    """Base of the transforms that differentiate. Random weights make one number of an op."""

    def alone(self, n: Node, values: dict[Node, Any]) -> None:
        xs = [values[i] for i in n.all_input_nodes]
        places = [k for k, x in enumerate(xs) if floating(x)]

        def weighted(*some: Tensor) -> Tensor:
            whole = with_items(xs, places, some)
            generator, total = torch.Generator().manual_seed(1), torch.zeros(())
            for y in filter(floating, tree_leaves(call_node(n, *whole))):
                w = torch.randn(y.shape, generator=generator, dtype=widened(y.dtype)).to(y)
                total = total + (y * w).sum().real
            return total

        self.of_number(weighted, tuple([xs[k] for k in places]))

    def of_number(self, f: Callable, xs: tuple) -> None:
        """Compare the derivative of a function of tensors to a number."""
        raise NotImplementedError


class Gradients(Derivatives):
    """``grad``, ``grad_and_value``, ``jacrev``, ``jacfwd``."""

    def check(self, result: Any) -> None:
        both = self.has_aux or self.name == "grad_and_value"
        derivative, rest = result if both else (result, ())
        blocks, count = flatten(derivative)[0], len(self.wrt)
        want = [*(self.run.outs if self.name == "grad_and_value" else ()), *self.run.aux]
        self.equal("the value", flatten(rest)[0], want)
        got = []
        for i, x in enumerate(self.run.pulled[:count]):
            rows = [widened(block) for block in blocks[i::count]]
            rows = rows if "grad" in self.name else [r.conj() for r in rows]
            pairs = zip(self.cotangents(()), rows, strict=True)
            sums = [torch.tensordot(w.to(r.dtype), r, w.dim()) for w, r in pairs]
            got.append(sum(sums[1:], sums[0]).to(x.dtype))
        self.derivative(got, self.run.pulled[:count], self.wide.pulled[:count], self.along)

    def of_number(self, f: Callable, xs: tuple) -> None:
        self.again(f, tuple(range(len(xs))))(*xs)


class Maps(Derivatives):
    """``vjp``, ``linearize``, ``jvp``, which also take the arguments of the function. The maps
    that the first two return are compared on random vectors."""

    tangents: Any = None

    def first(self, f: Callable, *args: Any, **options: Any) -> Any:
        given = args
        if self.name == "jvp":
            given, self.tangents = self.options["primals"], self.options["tangents"]
        made = lambda *_: self.transform(f, *args, **options)
        return entry(self.compared)(made, given, {})

    def directions(self, xs: Sequence[Tensor]) -> list[Tensor]:
        if self.tangents is not None:
            return [widened(t) for t in flatten(self.tangents)[0]]
        return super().directions(xs)

    def check(self, result: Any) -> None:
        output, linear, *aux = result
        outs, spec = flatten(output)
        near, wide, count = self.run, self.wide, len(self.wrt)
        self.equal("the output", [*outs, *flatten(aux)[0]], [*near.outs, *near.aux])
        w = iter(self.cotangents(()))
        if self.name == "vjp":
            given = [next(w).to(x.dtype) if floating(x) else torch.zeros_like(x) for x in outs]
            got = flatten(linear(unflatten(given, spec)))[0]
            return self.derivative(got, near.pulled[:count], wide.pulled[:count], self.along)
        if self.name == "linearize":
            leaves = list(self.arguments.leaves)
            for k, d in zip(self.wrt, self.d, strict=True):
                leaves[k] = d.to(leaves[k].dtype)
            linear = linear(*self.arguments.rebuilt(leaves)[0])
        pairs = zip(flatten(linear)[0], outs, strict=True)
        parts = [dot(next(w), t) for t, x in pairs if floating(x)]
        wants = [self.along(run.pulled) for run in (near, wide)]
        size = max(sum(p[1] for p in parts), *[w[1] for w in wants])
        found, want, more = (
            [torch.tensor(x)] for x in (sum(p[0] for p in parts), *[w[0] for w in wants])
        )
        return self.derivative(found, want, more, lambda x: (float(x[0]), size), size)

    def of_number(self, f: Callable, xs: tuple) -> None:
        args = (xs, tuple(map(torch.randn_like, xs))) if self.name == "jvp" else xs
        self.again(f, *args)


class Batches(Validation):
    """``vmap``, ``chunk_vmap``."""

    derives = False

    def expect(self) -> None:
        how = self.options
        if how["randomness"] == "different" or how.get("axis_name") is not None:
            raise ArgumentError(
                f"{self.name}(validate=True): samples that draw different numbers, or share an "
                "axis_name, cannot be compared with a loop over them"
            )
        args, _ = self.arguments.rebuilt(self.arguments.leaves)
        self.dims = input_dims(how["in_dims"], tuple(args), self.arguments)
        self.size = batch_size(self.arguments, self.dims)
        if not self.size:
            raise ArgumentError(f"{self.name}(validate=True): the batch has no samples to compare")
        super().expect()

    def differentiated(self) -> list[int]:
        return []

    def sample(self, i: int, leaves: Sequence[Any]) -> list[Any]:
        pairs = zip(leaves, self.dims, strict=True)
        return [x if d is None else x.select(d, i) for x, d in pairs]

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function for each sample. Its writes to arguments stay."""
        leaves, found = Arguments(args, kwargs).leaves, []
        for i in range(self.size):
            given, named = self.arguments.rebuilt(self.sample(i, leaves))
            with self.outside.kept(), rehearsed(spared=leaves):
                result = self.f(*given, **named)
                found.append([x.clone() for x in flatten(result)[0] if isinstance(x, Tensor)])
        outs, spec = flatten(result)
        places = self.options["out_dims"]
        flat = (
            [places] * len(outs)
            if isinstance(places, int)
            else broadcast_prefix(places, unflatten(outs, spec), "out_dims")
        )
        flat = [d for d, x in zip(flat, outs, strict=True) if isinstance(x, Tensor)]
        return [
            xs[0] if d is None else torch.stack(xs, d)
            for d, xs in zip(flat, zip(*found, strict=True), strict=True)
        ]

    def check(self, result: Any) -> None:
        outs = [x for x in flatten(result)[0] if isinstance(x, Tensor)]
        self.equal("the result", outs, self.run.outs, self.wide.outs)

    def values(self) -> tuple[Program, dict[Node, Any]]:
        leaves = self.arguments.leaves
        program, inputs = self.captured(self.sample(0, leaves))
        envs = []
        for i in range(self.size):
            own = [x for x in self.sample(i, leaves) if isinstance(x, Tensor)]
            envs.append(node_values(program, [*own, *inputs[len(own) :]]))
        tensors = (d for d, x in zip(self.dims, leaves, strict=True) if isinstance(x, Tensor))
        batched = [p for p, d in zip(program.placeholders, tensors, strict=False) if d is not None]
        self.batched = dependents(program.graph, batched)
        return program, {
            n: torch.stack([env[n] for env in envs])
            if n in self.batched and isinstance(x, Tensor)
            else x
            for n, x in envs[0].items()
        }

    def alone(self, n: Node, values: dict[Node, Any]) -> None:
        dims = tuple([0 if i in self.batched else None for i in n.all_input_nodes])
        if any(d == 0 for d in dims):
            made = self.again(functools.partial(call_node, n), dims, 0, self.options["randomness"])
            made(*[values[i] for i in n.all_input_nodes])


class Compilations(Validation):
    """``jit``, ``aot_function``, ``functionalize``."""

    derives = nests = False

    def differentiated(self) -> list[int]:
        leaves = self.arguments.leaves if torch.is_grad_enabled() else []
        return [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]

    def more(self, outs: Sequence[Any], roots: Sequence[Tensor]) -> list[Tensor]:
        return leaves_behind(outs, roots)

    def check(self, result: Any) -> None:
        outs = flatten(result)[0]
        self.equal("the result", outs, self.run.outs, self.wide.outs)
        wrt = [*[self.arguments.leaves[k] for k in self.wrt], *(self.closed or ())]
        got = pulled(outs, wrt, self.cotangents(()))
        self.derivative(got, self.run.pulled, self.wide.pulled, self.along)

    def alone(self, n: Node, values: dict[Node, Any]) -> None:
        xs = [values[i].detach().clone() for i in n.all_input_nodes]
        if torch.is_grad_enabled():
            xs = [x.requires_grad_() if floating(x) else x for x in xs]
        self.again(functools.partial(call_node, n), *self.how[0], **self.how[1])(*xs)
