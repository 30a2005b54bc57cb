"""``make_fx``: a function as a graph module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_unflatten

from ..capture.calls import hidden_writes
from ..capture.capture import argument_names, capture, parameter_names
from ..capture.instances import flatten_tree
from ..capture.tree import Arguments
from ..debug import outside_dynamo
from ..errors import ArgumentError
from ..graph import Program, output_node
from ..runtime.aliasing import ops_in_place
from ..runtime.graph_module import graph_module
from ..trace.emit import Builder
from ..trace.entering import entry
from ..trace.marks import dead_end, hidden_write
from ..trace.node_views import storage_root
from ..transforms.decompose import decomposed
from ..transforms.fresh import copy_of, fresh
from ..transforms.lower import EVERYTHING
from .operators import with_operators

aten = torch.ops.aten


@outside_dynamo
def make_fx(
    f: Callable,
    decomposition_table: dict | None = None,
    tracing_mode: str = "real",
    *,
    check_inputs: bool = True,
    verbose: bool = False,
    **_: Any,
) -> Callable[..., fx.GraphModule]:
    """Return the function ``(*args, **kwargs) -> GraphModule`` that captures ``f`` for these
    arguments as readable aten ops.

    The module is called as ``f`` is and returns ``f``'s tree; it is functional, except for final
    ``copy_``s if ``f`` writes to its inputs. ``f`` is specialised to the arguments' shapes,
    dtypes, devices and Python values: the module raises ArgumentError for others, unless
    ``check_inputs`` is False. ``decomposition_table`` maps overloads to functions to use instead.
    ``tracing_mode``: "real" lets ``f`` ask for values, whose answers (a branch taken, ``.item()``)
    the module keeps for all inputs; "fake" does not. With ``verbose`` the code has the user's
    lines as comments. Raises CaptureError if ``f`` cannot be captured, ArgumentError for
    ``tracing_mode="symbolic"``.

    >>> print(make_fx(lambda x: torch.sin(x) * 2)(torch.ones(3)).code.strip())
    def forward(self, x):
        sin = torch.ops.aten.sin.default(x);  x = None
        mul = torch.ops.aten.mul.Tensor(sin, 2);  sin = None
        return mul
    """
    if tracing_mode == "symbolic":
        raise ArgumentError(
            "make_fx: tracing_mode='symbolic' is not supported, as sizes are numbers of the "
            "graph: use 'real' or 'fake', and call make_fx again for other sizes"
        )
    if tracing_mode not in ("real", "fake"):
        raise ArgumentError(
            f"make_fx: tracing_mode must be 'real' or 'fake', not {tracing_mode!r}"
        )

    @entry
    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> fx.GraphModule:
        arguments = Arguments(args, kwargs)
        why_not = (
            None
            if tracing_mode == "real"
            else f"make_fx(tracing_mode={tracing_mode!r}) captures without values"
        )
        rec = capture(
            f,
            arguments.leaves,
            arguments.rebuilt,
            why_not=why_not,
            name_of=parameter_names(f, arguments),
        )
        program = fresh(rec.program(), rec.aliases)
        if decomposition_table:
            program = decomposed(program, decomposition_table)
        constants = rec.closed_over

        def outputs(b: Builder, inputs: list, results: list) -> Any:
            news = written_values(b, program, inputs, results[program.n_outputs :])
            hidden = hidden_writes(program)
            for index, new, quiet in zip(program.mutated, news, hidden, strict=True):
                x, val = inputs[index], inputs[index].meta["val"]
                real = [*rec.trace.origins, *constants][index]
                if quiet and (real.requires_grad or real.is_inference()):  # as in x.data.copy_()
                    x = b.make("call_function", aten.detach.default, (x,), {}, val)
                b.make("call_function", aten.copy_.default, (x, new), {}, val)
            for index, ops in ops_in_place(rec):
                for op, args, kw, _ in ops:
                    b.make(
                        "call_function",
                        op,
                        (inputs[index], *args),
                        dict(kw),
                        inputs[index].meta["val"],
                    )
            # a graph would make a tuple of a shape
            leaves = [
                b.make("call_function", torch.Size, (tuple(x),), {}, x)
                if isinstance(x, torch.Size)
                else x
                for x in rec.leaves
            ]
            for i, r in zip(rec.tensors, results[: program.n_outputs], strict=True):
                leaves[i] = r
            return leaves[0] if rec.spec is None else leaves

        gm = graph_module(
            program,
            getattr(f, "__name__", type(f).__name__),
            constants,
            outputs,
            kept := EVERYTHING - {"marks"},
            rec.names(),
        )
        with_operators(gm, kept)
        _as_called(gm, f, arguments, args, kwargs, rec)
        if check_inputs:
            names = [*argument_names(f, len(args)), *kwargs]
            gm.made_for_these(names, [*args, *kwargs.values()])
        if verbose:
            _with_lines(gm)
        return gm

    return wrapper


def written_values(
    b: Builder, program: Program, inputs: Sequence[Node], news: Sequence[Any]
) -> list[Any]:
    """Return the values to write to inputs: copies of those that another write changes first."""
    targets = {inputs[i] for i in program.mutated}
    found = []
    for index, new in zip(program.mutated, news, strict=True):
        while isinstance(new, Node) and new.target in (
            hidden_write,
            dead_end,
            aten.detach.default,
        ):
            new = new.args[1] if new.target is hidden_write else new.args[0]
        if new is not inputs[index] and storage_root(new) in targets:
            new = copy_of(b, new)
        found.append(new)
    return found


def _as_called(
    gm: fx.GraphModule, f: Callable, arguments: Arguments, args: tuple, kwargs: dict, rec: Any
) -> None:
    """Make the module take ``f``'s arguments and return ``f``'s tree."""
    plain_in = not kwargs and all(s is None for s in arguments.specs)
    out = output_node(gm.graph)
    if plain_in:
        if rec.spec is not None:
            out.args = (tree_unflatten(list(out.args[0]), rec.spec),)
            gm.recompile()
        return
    # every leaf is an argument; those that are not tensors were specialised and are ignored
    graph = gm.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    feed = iter(placeholders)
    first = next(iter(graph.nodes))
    last = None
    for x in arguments.leaves:
        if isinstance(x, Tensor):
            p = next(feed)
        else:
            with graph.inserting_before(first) if last is None else graph.inserting_after(last):
                p = graph.placeholder("static")
            p.meta["val"] = x
            if isinstance(x, torch.Generator):  # it is read by reference, unlike a number
                for n in graph.find_nodes(op="get_attr"):
                    if getattr(getattr(gm, n.target), "_cdata", None) == x._cdata:
                        n.replace_all_uses_with(p)
                        graph.erase_node(n)
        last = p
    in_spec = flatten_tree((tuple(args), kwargs))[1]
    out_spec = rec.spec if rec.spec is not None else None
    arg_names = [*argument_names(f, len(args)), *kwargs]
    if out_spec is not None and not isinstance(out.args[0], list | tuple):
        out.args = ([out.args[0]],)
    graph.set_codegen(AsCalled(_PyTreeInfo(arg_names, in_spec, out_spec)))
    gm.recompile()


class AsCalled(_PyTreeCodeGen):
    """Generate code that takes a function's arguments, instances among them too."""

    def process_inputs(self, *args: Any) -> Any:
        return flatten_tree(args)[0]


def _with_lines(gm: fx.GraphModule) -> None:
    """Put the user's line behind each statement of the printed code."""
    gm.real_recompile()
    lines = {n.name: n.meta["line"] for n in gm.graph.nodes if n.meta.get("line")}
    shown = []
    for text in gm._code.splitlines():
        name = text.strip().split(" = ", 1)[0].split(":")[0]
        shown.append(
            f"{text}  # {lines[name]}" if name in lines and " = torch.ops." in text else text
        )
    gm._code = "\n".join(shown) + "\n"
