"""A program as an ``fx.GraphModule`` that others can read, run and compile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node

from ..debug import Line
from ..graph import Program
from ..trace.emit import Builder, paused_gc
from ..trace.seeds import named_generators
from ..trace.shapes.sig import Sig
from ..trace.traced import quiet
from ..transforms.lower import EVERYTHING, lowered
from .specialised import Specialised

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
            # without the mode: its flags belong to the process, and a recording may be under way
            with quiet():
                fake = self.made[val] = FakeTensor(self.mode, val.fresh(), val.device)
        return fake


class LazyMode(FakeTensorMode):
    """A FakeTensorMode that is made when an op first runs under it: making one imports Dynamo,
    which takes seconds. Until then it answers what FakeTensors ask for when they are made."""

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
    """A node's metadata, made when it is read: FakeTensors and the text of the user's line."""

    __slots__ = ("fakes",)

    def __init__(self, meta: dict[str, Any], fakes: Fakes) -> None:
        dict.__init__(self, meta)
        self.fakes = fakes
        if isinstance(line := meta.get("line"), Line):
            dict.__setitem__(self, "stack_trace", line)

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if key == "val" and value.__class__ in (Sig, tuple):
            value = self.fakes.of(value)
        elif value.__class__ is Line and key == "line":
            value = str(value)
        elif isinstance(value, Line) and key == "stack_trace":
            file, name = value.code.co_filename, value.code.co_name
            value = f'  File "{file}", line {value.number}, in {name}\n    {value.text}'
        else:
            return value
        dict.__setitem__(self, key, value)
        return value

    def __iter__(self) -> Any:  # also keeps `{**meta}` from copying past __getitem__
        return iter(list(dict.keys(self)))

    def get(self, key: str, default: Any = None) -> Any:
        # dict.get would pass __getitem__ by
        return self[key] if key in self else default  # noqa: SIM401

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
    """Export the program as a module of its own: FakeTensors in ``meta["val"]``, names numbered
    anew.

    The placeholders of the last ``len(constants)`` inputs become attributes that hold these
    tensors. ``outputs(nodes) -> tree`` arranges the results (default: a flat tuple). ``dissolve``
    says what is removed, see :mod:`aotfunc.transforms.lower`. ``names`` are those of the first
    inputs (a cached program has its first capture's)."""
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
            attr = (
                f"_param_constant{i}"
                if isinstance(t, torch.nn.Parameter)
                else f"_tensor_constant{i}"
            )
            if isinstance(t, torch.nn.Parameter):
                root.register_parameter(attr, t)
            else:
                root.register_buffer(attr, t)
            inputs.append(
                b.make(
                    "get_attr",
                    attr,
                    (),
                    {},
                    placeholders[n_real + i].meta["val"],
                    name=attr.lstrip("_"),
                )
            )
        generators: dict[int, Node] = {}  # they have no literal
        for g in dict.fromkeys(named_generators(program.graph.nodes)):
            attr = f"_generator{len(generators)}"
            setattr(root, attr, g)
            generators[id(g)] = b.make("get_attr", attr, (), {}, None, name=attr.lstrip("_"))
        results = b.inlined(program, inputs)
        for n in b.graph.nodes if generators else ():
            n.args = tuple([generators.get(id(a), a) for a in n.args])
            n.kwargs = {k: generators.get(id(a), a) for k, a in n.kwargs.items()}
        tree = tuple(results) if outputs is None else outputs(b, inputs, results)
        graph = b.finish_tree(tree)
        for n in graph.nodes:
            # the node's own way looks itself up in tables
            object.__setattr__(n, "meta", Meta(n.meta, fakes))
    return Specialised(root, graph, name)
