"""A program as an ``fx.GraphModule`` that others can read, run and compile; and ``make_fx``, which makes one of a
function.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_unflatten

from .aliasing import Changes
from .debug import Line, entry, outside_dynamo
from .errors import ArgumentError
from .graph import Program, output_node
from .specialised import Specialised
from .trace.emit import Builder, paused_gc
from .trace.functionalize import dead_end, hidden_write
from .trace.instances import flatten_tree
from .trace.replay import named_generators
from .trace.shapes import Sig
from .trace.traced import quiet
from .trace.tree import Arguments
from .transforms.capture import parameter_names, record
from .transforms.decompose import decomposed
from .transforms.fresh import fresh
from .transforms.lower import EVERYTHING, lowered

aten = torch.ops.aten


class Fakes:
    """FakeTensors of one mode, one for each signature; they are shared and must not be changed."""

    def __init__(self) -> None:
        self.mode: Any = None
        self.made: dict[Sig, Tensor] = {}

    def of(self, val: Any) -> Any:
        if val.__class__ is not Sig:
            return tuple([self.of(v) for v in val]) if val.__class__ is tuple else val
        fake = self.made.get(val)
        if fake is None:
            if self.mode is None:
                self.mode = LazyMode()
            with quiet():  # without the mode: its flags belong to the process, and a recording may be under way
                fake = self.made[val] = FakeTensor(self.mode, val.fresh(), val.device)
        return fake


class LazyMode(FakeTensorMode):
    """A FakeTensorMode that becomes one when an op runs under it, because making one imports Dynamo, which takes
    seconds. Until then it knows what FakeTensors ask for when they are made.
    """

    _allow_unsafe_data_ptr_access = allow_meta = True

    def __init__(self) -> None:
        pass

    def become(self) -> None:
        object.__setattr__(self, "__class__", FakeTensorMode)
        self.__init__(allow_non_fake_inputs=True)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        self.become()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.become()
        setattr(self, name, value)


class Meta(dict):
    """A node's metadata that is made when it is read: FakeTensors and the text of the user's line."""

    __slots__ = ("fakes",)

    def __init__(self, meta: dict[str, Any], fakes: Fakes) -> None:
        dict.__init__(self, meta)
        self.fakes = fakes
        if (line := meta.get("line")) is not None:
            dict.__setitem__(self, "stack_trace", line)

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if key == "val" and value.__class__ in (Sig, tuple):
            value = self.fakes.of(value)
        elif value.__class__ is Line and key == "line":
            value = str(value)
        elif value.__class__ is Line and key == "stack_trace":
            value = f'  File "{value.code.co_filename}", line {value.number}, in {value.code.co_name}'
        else:
            return value
        dict.__setitem__(self, key, value)
        return value

    def __iter__(self) -> Any:  # also keeps `{**meta}` from copying past __getitem__
        return iter(list(dict.keys(self)))

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - dict.get would pass __getitem__ by

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self[key]
        return dict.pop(self, key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def values(self) -> Any:
        return [self[k] for k in self]

    def items(self) -> Any:
        return [(k, self[k]) for k in self]

    def copy(self) -> dict:
        return dict(self.items())

    __copy__ = copy

    def __reduce__(self) -> Any:
        return (dict, (self.copy(),))

    def __deepcopy__(self, memo: dict) -> dict:
        return copy.deepcopy(self.copy(), memo)


def graph_module(
    program: Program,
    name: str = "Graph",
    constants: Sequence[Tensor] = (),
    outputs: Any = None,
    dissolve: frozenset[str] = EVERYTHING,
    names: Sequence[str] = (),
) -> Specialised:
    """Export the program as a module of its own: FakeTensors in ``meta["val"]``, names numbered anew.

    The placeholders of the last ``len(constants)`` inputs become attributes that hold these tensors. ``outputs(nodes)
    -> tree`` arranges the results (default: a flat tuple). ``dissolve`` says what is removed, see
    :mod:`.transforms.lower`. ``names`` are those of the first inputs (a cached program has its first capture's).
    """
    program = lowered(program, dissolve)
    with paused_gc():
        b = Builder(merge=False)
        fakes = Fakes()
        root = torch.nn.Module()
        inputs = []
        placeholders = program.placeholders
        n_real = len(placeholders) - len(constants)
        for i, p in enumerate(placeholders):
            if i < n_real:
                label = names[i] if i < len(names) else p.name
                inputs.append(b.placeholder(label, p.meta["val"], role=p.meta.get("role")))
        for i, t in enumerate(constants):
            attr = f"_param_constant{i}" if isinstance(t, torch.nn.Parameter) else f"_tensor_constant{i}"
            if isinstance(t, torch.nn.Parameter):
                root.register_parameter(attr, t)
            else:
                root.register_buffer(attr, t)
            inputs.append(b.make("get_attr", attr, (), {}, placeholders[n_real + i].meta["val"], name=attr.lstrip("_")))
        generators: dict[int, Node] = {}  # they have no literal
        for g in dict.fromkeys(named_generators(program.graph.nodes)):
            attr = f"_generator{len(generators)}"
            setattr(root, attr, g)
            generators[id(g)] = b.make("get_attr", attr, (), {}, None, name=attr.lstrip("_"))
        results = list(b.splice(program.graph, inputs, program.outputs))
        for n in b.graph.nodes if generators else ():
            n.args = tuple([generators.get(id(a), a) for a in n.args])
            n.kwargs = {k: generators.get(id(a), a) for k, a in n.kwargs.items()}
        tree = tuple(results) if outputs is None else outputs(b, inputs, results)
        graph = b.finish_tree(tree)
        for n in graph.nodes:
            object.__setattr__(n, "meta", Meta(n.meta, fakes))  # the node's own way looks itself up in tables
    return Specialised(root, graph, name)


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
    """The function ``(*args, **kwargs) -> GraphModule``: what ``f`` does for these arguments, as readable aten code.

    The module is called as ``f`` is and returns ``f``'s tree; it is functional, but for final ``copy_``s where ``f``
    writes to its inputs. ``f`` is specialised to the arguments' shapes, dtypes, devices and Python values: the module
    raises ArgumentError for others, unless ``check_inputs`` is False. ``decomposition_table`` maps overloads to
    functions to use instead. ``tracing_mode``: "real" lets ``f`` ask for values, whose answers (a branch taken,
    ``.item()``) the module keeps for all inputs; "fake" does not. With ``verbose`` the code carries the user's lines as
    comments.
    Raises CaptureError where ``f`` cannot be captured, ArgumentError for ``tracing_mode="symbolic"``.

    >>> print(make_fx(lambda x: torch.sin(x) * 2)(torch.ones(3)).code.strip())
    def forward(self, x):
        sin = torch.ops.aten.sin.default(x);  x = None
        mul = torch.ops.aten.mul.Tensor(sin, 2);  sin = None
        return mul
    """
    if tracing_mode == "symbolic":
        raise ArgumentError(
            "make_fx: tracing_mode='symbolic' is not supported, as sizes are numbers of the graph: use 'real' or "
            "'fake', and call make_fx again for other sizes"
        )
    if tracing_mode not in ("real", "fake"):
        raise ArgumentError(f"make_fx: tracing_mode must be 'real' or 'fake', not {tracing_mode!r}")

    @entry
    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> fx.GraphModule:
        arguments = Arguments(args, kwargs)
        why_not = None if tracing_mode == "real" else f"make_fx(tracing_mode={tracing_mode!r}) captures without values"
        rec = record(f, arguments.leaves, arguments.rebuilt, why_not=why_not, name_of=parameter_names(f, arguments))
        program = fresh(rec.program(), rec.aliases)
        if decomposition_table:
            program = decomposed(program, decomposition_table)
        constants = rec.closed_over

        def outputs(b: Builder, inputs: list, results: list) -> Any:
            written: dict[Any, Node] = {}
            for index, new in zip(program.mutated, results[program.n_outputs :], strict=True):
                while isinstance(new, Node) and new.target in (hidden_write, dead_end, aten.detach.default):
                    new = new.args[1] if new.target is hidden_write else new.args[0]
                node = b.make("call_function", aten.copy_.default, (inputs[index], new), {}, inputs[index].meta["val"])
                written[results[program.n_outputs + len(written)]] = node
            for index, ops in Changes(rec).ops:
                for op, args, kw, _ in ops:
                    b.make("call_function", op, (inputs[index], *args), dict(kw), inputs[index].meta["val"])
            leaves = list(rec.leaves)
            for i, r in zip(rec.tensors, results[: program.n_outputs], strict=True):
                leaves[i] = r
            return leaves[0] if rec.spec is None else leaves

        gm = graph_module(
            program, getattr(f, "__name__", type(f).__name__), constants, outputs, EVERYTHING - {"marks"}, rec.names()
        )
        _as_called(gm, f, arguments, args, kwargs, rec)
        if check_inputs:
            names = [*argument_names(f, len(args)), *kwargs]
            gm.made_for_these(names, [*args, *kwargs.values()])
        if verbose:
            _with_lines(gm)
        return gm

    return wrapper


def argument_names(f: Callable, count: int) -> list[str]:
    """The names of the first ``count`` parameters of ``f``."""
    called = f.forward if isinstance(f, torch.nn.Module) else f
    try:
        names = [n for n, p in inspect.signature(called).parameters.items() if p.kind is not p.VAR_POSITIONAL]
    except (TypeError, ValueError):
        names = []
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]


def _as_called(gm: fx.GraphModule, f: Callable, arguments: Arguments, args: tuple, kwargs: dict, rec: Any) -> None:
    """Let the module take ``f``'s arguments and return ``f``'s tree."""
    plain_in = not kwargs and all(s is None for s in arguments.specs)
    out = output_node(gm.graph)
    if plain_in:
        if rec.spec is not None:
            out.args = (_literal_tree(out.args[0], rec.spec),)
            gm.recompile()
        return
    # every leaf is an argument, those that are not tensors too: they were specialised, and are ignored
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
            if isinstance(x, torch.Generator):  # unlike a number it is read, by reference
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
    """Generated code that takes a function's arguments; instances among them, too."""

    def process_inputs(self, *args: Any) -> Any:
        return flatten_tree(args)[0]


def _literal_tree(leaves: Any, spec: Any) -> Any:
    return tree_unflatten(list(leaves), spec)


def _with_lines(gm: fx.GraphModule) -> None:
    """Put the user's line behind each statement of the printed code."""
    gm.real_recompile()
    lines = {n.name: n.meta["line"] for n in gm.graph.nodes if n.meta.get("line")}
    shown = []
    for text in gm._code.splitlines():
        name = text.strip().split(" = ", 1)[0].split(":")[0]
        shown.append(f"{text}  # {lines[name]}" if name in lines and " = torch.ops." in text else text)
    gm._code = "\n".join(shown) + "\n"
