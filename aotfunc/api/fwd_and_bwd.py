"""``fwd_and_bwd``: the two halves of a derivative as functions, residuals as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..capture.tree import Arguments, flatten, structure, unflatten
from ..debug import at, user_line
from ..errors import ArgumentError, CaptureError
from ..partition import min_cut_rematerialization_partition
from ..runtime.compiled import Compiled
from ..runtime.execute import as_function, new_layout
from ..runtime.pipeline import Compiler, Partition, Pipeline
from ..runtime.saved_trees import leaf_text, same_text
from ..runtime.specialised import leaf_facts
from ..trace.entering import entry
from ..transforms.activity import has_derivative
from ..transforms.fresh import fresh
from ..transforms.vjp import vjp as vjp_pass
from .call import Call, chosen_tree, positions


@entry
def fwd_and_bwd(
    f: Callable,
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    backend: str | Compiler = "auto",
    partition_fn: Partition = min_cut_rematerialization_partition,
    **kwargs: Any,
) -> tuple[Callable, Callable]:
    """Return ``(forward, backward)`` of ``f`` for arguments like these, compiled by ``backend``,
    cut by ``partition_fn``.

    ``forward(*args, **kwargs) -> (output, residuals)`` takes other values of the same trees,
    shapes, dtypes and Python values; the residuals are a tuple of tensors, to keep, to send or to
    stack. ``backward(residuals, cotangents)`` maps cotangents of the output, in its tree, to the
    gradient by argument ``argnums`` (a tuple of them for several). Both may be transformed, and
    batched residuals go into a batched backward. Raises CaptureError if ``f`` writes to an
    argument, ArgumentError if a differentiated leaf is no floating tensor, or for arguments,
    residuals and cotangents of other shapes.

    >>> forward, backward = fwd_and_bwd(lambda x: torch.sin(x), torch.zeros(2))
    >>> y, residuals = forward(torch.zeros(2))
    >>> backward(residuals, torch.ones(2))
    tensor([1., 1.])
    """
    arguments = Arguments(args, kwargs, f)
    call = Call("fwd_and_bwd", f, arguments, positions("fwd_and_bwd", arguments, argnums), False)
    call.check_tensors()
    if call.program.mutated:
        raise CaptureError(
            f"fwd_and_bwd: the function writes to an argument, or to what it closes over"
            f"{at(user_line())}; return the new value instead"
        )
    program, count = fresh(call.program, call.aliases), call.program.n_outputs
    live = [has_derivative(val) for val in program.vals]
    pipeline = Pipeline("fwd_and_bwd", backend, partition=partition_fn)
    joint = vjp_pass(program.flat(), call.wrt, live, fill=True)
    early, late = (half.program for half in pipeline.split(joint, count))
    run_early, run_late = (Compiled(as_function(half), pipeline) for half in (early, late))
    closed, spec, results = call.rec.closed_over, call.spec, program.vals
    kept = [p.meta["val"] for p in late.placeholders[: len(early.outputs) - count]]

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, tuple]:
        given = Arguments(args, kwargs, f)
        if given.key != arguments.key:
            known_args, known_kwargs = arguments.rebuilt(arguments.leaves)
            raise ArgumentError(
                f"forward: the arguments are {structure((args, kwargs))}, and were "
                f"{structure((tuple(known_args), known_kwargs))}{at(user_line())}"
            )
        tensors = []
        for k, (x, known) in enumerate(zip(given.leaves, arguments.leaves, strict=True)):
            if not isinstance(known, Tensor):
                number = isinstance(known, int | float | complex)
                fits = x is known or (same_text(x, known) if number else x == known)
            elif fits := same_facts(x, known):
                tensors.append(x)
            if not fits:
                raise ArgumentError(
                    f"forward: {given.said(k)} is {leaf_text(x)}, and was {leaf_text(known)}"
                    f"{at(user_line())}"
                )
        outs = run_early(*tensors, *closed)
        return unflatten(outs[:count], spec), tuple(outs[count:])

    def backward(residuals: Sequence[Any], cotangents: Any) -> Any:
        if len(residuals) != len(kept) or not all(map(same_facts, residuals, kept)):
            raise ArgumentError(
                f"backward: the residuals are {structure(residuals)}, and forward returns {kept}"
                f"{at(user_line())}"
            )
        leaves, given = flatten(cotangents)
        if given != spec or not all(map(same_facts, leaves, results)):
            raise ArgumentError(
                f"backward: the cotangents are {structure(cotangents)}, and the output is a tree "
                f"of {results}{at(user_line())}"
            )
        cts = [new_layout(c) for c, yes in zip(leaves, live, strict=True) if yes]
        grads = run_late(*residuals, *cts)
        return chosen_tree(arguments, argnums, grads)

    return forward, backward


def same_facts(x: Any, known: Any) -> bool:
    """Return whether a tensor has the shape, dtype and device of another, or of a signature."""
    return leaf_facts(x) == (tuple(known.shape), known.dtype, known.device)
