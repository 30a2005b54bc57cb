"""Make graph nodes fast: merge equal nodes and apply local rewritings as nodes are made.

``fx.Graph.create_node`` walks its arguments as a tree and names through regular expressions, 15 to
30 µs a node. The builder does the same bookkeeping directly; it knows private fields of
``fx.Graph``, as ``partition/split.py`` alone does too.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict

from ..graph import Program, kept_alive
from .collector import paused_gc as paused_gc
from .kernels import misread
from .shapes.instr import encode, env_key, intern, interned
from .shapes.sig import Facts, Sig, Slot, sig_of

#: a rewriting of one op: ``(builder, val, *args) -> Node | None`` (None: leave it)
Rewrite = Callable[..., Any]
#: a stand-in for a call in a copy of its graph: ``(builder, call, copies by node) -> nested
#: nodes``
Visit = Callable[["Builder", Node, dict[Node, Any]], Any]

_EMPTY = immutable_dict()
_aten = torch.ops.aten


def hashed(target: Any) -> Any:
    """Return what stands for a target in tables: for an op its C entry, which hashes in C."""
    return target._op if target.__class__ is OpOverload else target


def base_name(target: Any) -> str:
    """Return the name of a node of this target, before numbering."""
    if target.__class__ is not OpOverload:
        return getattr(target, "__name__", type(target).__name__).lower()
    name = _names.get(target._op)
    if name is None:
        name = _names[target._op] = target._schema.name.split("::")[-1].lstrip("_") or "op"
    return name


_names: dict[Any, str] = {}  # for ops only, which never go
#: names that have a meaning in the code of an fx.GraphModule
_BUILTIN = frozenset(
    (*dir(builtins), "self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree")
)


class Builder:
    """A graph under construction.

    ``rewrites`` maps a target, :func:`hashed`, to local rewriting rules. With ``merge`` (the
    default) equal pure nodes are made once. Unless the graph is ``final`` (it is not going to be
    differentiated), nodes stay apart where merging would change how gradients are added: casts,
    whose gradients are added in the dtype that they cast from, and values of few digits, whose
    copies and products with one stay, too."""

    def __init__(
        self,
        rewrites: Mapping[Any, Sequence[Rewrite]] | None = None,
        merge: bool = True,
        final: bool = False,
    ) -> None:
        self.graph = fx.Graph()
        self.rewrites = rewrites or {}
        self.merge, self.final = merge, final
        self.seen: dict[tuple, Node] = {}
        self.meta: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._used = self.graph._graph_namespace._used_names
        self._table = self.graph._find_nodes_lookup_table.table
        self._insert = self.graph._insert

    # ----- nodes ---------------------------------------------------------------------------------

    def name(self, base: str) -> str:
        count = self._counts.get(base, -1) + 1
        name = base if not count and base not in _BUILTIN else f"{base}_{max(count, 1)}"
        while name in self._used:
            count = max(count, 1) + 1
            name = f"{base}_{count}"
        self._counts[base] = max(count, 1) if base in _BUILTIN else count
        self._used.add(name)
        return name

    def make(
        self, op: str, target: Any, args: tuple, kwargs: dict, val: Any, name: str | None = None
    ) -> Node:
        """Append a node, neither rewritten nor merged."""
        name = self.name(base_name(target) if name is None else name)
        node = Node(self.graph, name, op, target, args, kwargs or _EMPTY, None)
        self._insert(node)
        self._table[op, target if op == "call_function" else None][node] = None
        self.graph._len += 1
        # assigning it would take the node out of the graph's lookup table and put it back
        node.meta["val"] = val
        node.meta.update(self.meta)
        return node

    def placeholder(self, name: str, val: Any, **meta: Any) -> Node:
        clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "arg"
        clean = clean if not clean[0].isdigit() else f"_{clean}"
        node = self.make("placeholder", clean, (), {}, val, name=clean)
        node.target = node.name
        node.meta.update(meta)
        return node

    def inputs(self, placeholders: Sequence[Node]) -> list[Node]:
        """Add placeholders like these."""
        return [
            self.placeholder(p.name, p.meta["val"], role=p.meta.get("role")) for p in placeholders
        ]

    def node(self, target: Any, args: tuple, kwargs: dict, val: Any, hooked: bool = False) -> Any:
        """Return the value of ``target(*args, **kwargs)``: rewritten, or an equal earlier node, or
        a new one. An op whose result is ``hooked`` stays apart: it saves that behind the hooks."""
        apart = hooked or not (self.merge and (self.final or not adds_apart(target, args, val)))
        call = hashed(target)
        for rewrite in self.rewrites.get(call, ()):
            better = rewrite(self, val, *args, **kwargs)
            if better is not None and not (apart and any(better is a for a in args)):
                return better
        if "draw" in self.meta and draw_op(target):  # copies of one draw, see jacobian.py
            drawn = ("draw", self.meta["draw"])
            if drawn not in self.seen:
                self.seen[drawn] = self.make("call_function", target, args, kwargs, val)
            return self.seen[drawn]
        if apart or not mergeable(target):
            return self.make("call_function", target, args, kwargs, val)
        key = node_key(call, args, kwargs, self.meta.get("again", self.meta.get("region")))
        if call in COMMUTATIVE and len(args) == 2 and not kwargs:
            x, y = args
            if (
                x.__class__ is Node
                and y.__class__ is Node
                and x.meta["val"] is y.meta["val"]
                and id(x) > id(y)
            ):
                key = (*key[:2], y, x)
        node = self.seen.get(key)
        if node is None:
            node = self.seen[key] = self.make("call_function", target, args, kwargs, val)
        return node

    def call(self, target: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Add a node as :meth:`node` does, with the inferred signature of its result."""
        return self.node(target, args, kwargs, infer_val(target, args, kwargs))

    def again(self, target: OpOverload, args: tuple, kwargs: dict, val: Any) -> tuple[tuple, Any]:
        """Return ``(args, signature)`` of a call on other strides or offsets than it was recorded
        with; arguments that the kernel would misread, or cannot view, are copied."""
        copy = lambda a, form: self.call(_aten.clone.default, a, memory_format=form)
        if copies := misread(
            target, [a.meta["val"] if a.__class__ is Node else None for a in args]
        ):
            args = tuple([copy(a, copies[i]) if i in copies else a for i, a in enumerate(args)])
        try:
            return args, infer_val(target, args, kwargs)
        except Exception:
            if Facts(target).dynamic:  # the shape depends on values: keep the recorded one
                return args, val
            if target not in VIEWS:
                raise
        args = (copy(args[0], torch.contiguous_format), *args[1:])
        return args, infer_val(target, args, kwargs)

    def reshape(self, x: Node, shape: Sequence[int]) -> Any:
        """Return a view of ``x`` in this shape, or a view of a copy if the strides allow none."""
        view = _aten.view.default
        args, val = self.again(view, (x, list(shape)), {}, None)
        return self.node(view, args, {}, val)

    def call_like(self, n: Node, env: Mapping[Node, Any], moved: bool = False) -> Any:
        """Return the copy of a call, on arguments from ``env``. Infer its signature anew if some
        have ``moved``, to other strides or offsets than it was recorded with."""
        args, kwargs, val = remap(n.args, env), remap_dict(n.kwargs, env), n.meta["val"]
        if moved and n.target is operator.getitem:
            val = args[0].meta["val"][args[1]]
        elif moved and isinstance(n.target, OpOverload):
            if any([displaced(i.meta["val"], env[i]) for i in n._input_nodes]):
                args, val = self.again(n.target, args, kwargs, val)
        return self.node(n.target, args, kwargs, val, not self.final and result_has_hooks(n))

    def item(self, node: Any, i: int) -> Any:
        """Return output ``i`` of a node that has several."""
        if node.__class__ is not Node:
            return node[i]
        return self.node(operator.getitem, (node, i), {}, node.meta["val"][i])

    # ----- graphs --------------------------------------------------------------------------------

    def copy(
        self, nodes: Iterable[Node], env: dict[Node, Any], visit: Visit | None = None
    ) -> None:
        """Copy nodes, and put the copies into ``env``; placeholders not in there become inputs.
        ``visit`` returns a stand-in for a call, or NotImplemented for its copy."""
        for n in nodes:
            if n.op == "placeholder" and n not in env:
                [env[n]] = self.inputs([n])
            elif n.op == "call_function":
                self.meta = carried(n)
                new = NotImplemented if visit is None else visit(self, n, env)
                env[n] = self.call_like(n, env) if new is NotImplemented else new
        self.meta = {}

    def splice(self, graph: fx.Graph, inputs: Sequence[Any], outputs: Any) -> Any:
        """Copy the nodes of ``graph``, its placeholders bound to ``inputs``; return ``outputs``
        mapped. Some inputs may have other strides or offsets than their placeholders."""
        env: dict[Node, Any] = {}
        moved = False
        feed = iter(inputs)
        kept = self.meta
        for n in graph.nodes:
            if n.op == "placeholder":
                env[n] = next(feed)
                moved = moved or displaced(n.meta["val"], env[n])
            elif n.op == "call_function":
                self.meta = {**kept, **carried(n)}
                if "region" in kept:
                    self.meta["region"] = kept["region"]
                env[n] = self.call_like(n, env, moved)
        self.meta = kept
        return remap(outputs, env)

    def inlined(self, program: Program, inputs: Sequence[Any]) -> list:
        """Copy a program into this graph; return its results, new values included."""
        return list(self.splice(program.graph, inputs, program.outputs))

    def finish(self, outputs: Sequence[Any]) -> fx.Graph:
        """End the graph with this flat tuple and drop dead nodes (draws and effects stay)."""
        return self.finish_tree(tuple(outputs))

    def finish_tree(self, tree: Any) -> fx.Graph:
        out = self.make("output", "output", (tree,), {}, None)
        del out.meta["val"]
        drop_dead(self.graph, out)
        return self.graph


def displaced(planned: Any, x: Any) -> bool:
    """Return whether the value ``x`` has another offset or other strides than ``planned``."""
    sig = x.meta["val"] if x.__class__ is Node else None
    if sig is planned or sig.__class__ is not Sig or planned.__class__ is not Sig:
        return False
    return (sig.offset, sig.stride) != (planned.offset, planned.stride)


_CARRIED = ("line", "stack_trace", "region", "again", "draw", "named")


def carried(n: Node) -> dict[str, Any]:
    """Return the metadata that a copy of a node keeps: the user's line, its checkpointed region,
    that it runs once more on purpose, the number of its draw."""
    meta = n.meta
    if len(meta) == 2 and "line" in meta:  # as most have
        return {"line": meta["line"]}
    return {k: meta[k] for k in _CARRIED if k in meta}


def remap(a: Any, env: Mapping[Node, Any]) -> Any:
    """Return ``a`` with its nodes replaced."""
    cls = a.__class__
    if cls is Node:
        return env[a]
    if cls is tuple:
        return tuple([remap(x, env) for x in a])
    if isinstance(a, list):
        return [remap(x, env) for x in a]
    return a


def remap_dict(kwargs: dict, env: Mapping[Node, Any]) -> dict:
    return {k: remap(v, env) for k, v in kwargs.items()} if kwargs else _EMPTY


def draw_op(target: Any) -> bool:
    return target.__class__ is OpOverload and Facts(target).random


def mergeable(target: Any) -> bool:
    """Return whether two equal calls may be one: not draws, effects, nor uninitialised memory."""
    if target.__class__ is OpOverload:
        mine = _mergeable.get(target._op)
        if mine is None:
            facts = Facts(target)
            mine = not (
                facts.random or facts.effect or facts.writes or "empty" in target._schema.name
            )
            _mergeable[target._op] = mine
        return mine
    return target is operator.getitem


_mergeable: dict[Any, bool] = {}


def result_has_hooks(n: Node) -> bool:
    """Return whether a result of this op has hooks."""
    for u in n.users:
        item = u.target is operator.getitem
        if result_has_hooks(u) if item else getattr(u.target, "hooked", False) and u.args[0] is n:
            return True
    return False


def adds_apart(target: Any, args: Sequence[Any], val: Any) -> bool:
    """Return whether two equal calls must stay two, as merging them would change the dtype or the
    order in which the gradients of their results are added: casts, and values of few digits."""
    if val.__class__ is Sig and val.dtype in (torch.bfloat16, torch.float16):
        return True
    if target is not _aten._to_copy.default or args[0].__class__ is not Node:
        return False
    sig = args[0].meta["val"]
    return sig.dtype is not val.dtype and sig.differentiable and val.differentiable


#: views that not every layout allows
VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default)
COMMUTATIVE = frozenset((_aten.add.Tensor._op, _aten.mul.Tensor._op))


def node_key(call: Any, args: tuple, kwargs: dict, region: Any) -> tuple:
    key: list = [call, region]
    for a in args:
        _key_part(a, key)
    for k, v in kwargs.items():
        key.append(k)
        _key_part(v, key)
    return tuple(key)


def _key_part(a: Any, key: list) -> None:
    cls = a.__class__
    if cls is Node:
        key.append(a)
    elif cls is float:
        key.append(a.hex())
    elif cls is complex:
        key += (cls, a.real.hex(), a.imag.hex())
    elif isinstance(a, list | tuple):
        key.append("[")
        for x in a:
            _key_part(x, key)
        key.append("]")
    else:
        key += (cls, a)


def drop_dead(graph: fx.Graph, out: Node) -> None:
    """Drop dead code in one sweep from the back."""
    for n in reversed(list(graph.nodes)):
        if (
            n.users
            or n is out
            or n.op in ("placeholder", "output")
            or (n.op == "call_function" and kept_alive(n))
        ):
            continue
        erase(graph, n)


def erase(graph: fx.Graph, n: Node) -> None:
    for i in list(n._input_nodes):
        i.users.pop(n, None)
    graph._find_nodes_lookup_table.remove(n)
    n._remove_from_list()
    n._erased = True
    graph._len -= 1


def infer_val(target: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Return the signature(s) of what an op returns for nodes and literals."""
    key: list = [target._op]
    sigs: list[Sig] = []

    def sink(n: Any) -> tuple:
        sig = n.meta["val"] if n.__class__ is Node else sig_of(n)
        sigs.append(sig)
        return Slot(len(sigs) - 1), sig

    template = tuple([encode(a, key, sink) for a in args])
    ktemplate = {}
    for k, v in kwargs.items():
        key.append(k)
        ktemplate[k] = encode(v, key, sink)
    key.append(env_key())
    frozen = tuple(key)
    instr = interned(frozen) or intern(frozen, target, template, ktemplate, tuple(sigs))
    return instr.outs
