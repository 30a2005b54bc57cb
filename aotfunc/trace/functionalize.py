"""From a recording to a functional graph: nothing in it mutates and nothing aliases.

A recording that never writes is copied as it is. Otherwise every traced tensor is a *view*: a storage (its current
value is a node, and it counts versions) and a chain of view ops. A write to a view computes the storage's new value
through the inverses of the chain; a read through another view replays that view's chain on the current value.

Intent is made explicit, so that it survives every later rewriting: a value made under ``torch.no_grad()`` and read
outside passes through ``aten.detach``, and a write that autograd does not see becomes ``aotfunc.hidden_write(old,
new)``: the new value with the old derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError
from .emit import Builder
from .memory import part
from .records import flat
from .shapes import Facts, Instr, Sig, contiguous_stride, fill, sig_of
from .traced import Traced
from .tracer import Trace

aten = torch.ops.aten

_library = torch.library.Library("aotfunc", "DEF")
_library.define("hidden_write(Tensor old, Tensor new) -> Tensor")
_library.impl("hidden_write", lambda old, new: new.clone(), "CompositeExplicitAutograd")
_library.define("once(Tensor x) -> Tensor")
_library.impl("once", lambda x: x.clone(), "CompositeExplicitAutograd")
hidden_write = torch.ops.aotfunc.hidden_write.default
torch.library.register_autograd("aotfunc::hidden_write", lambda ctx, g: (g, None), lib=_library)
once = torch.ops.aotfunc.once.default  # an identity that refuses to be differentiated: @once_differentiable


class Storage:
    """What views share: the current value and its version; ``ref`` where it is an input or a lifted tensor."""

    __slots__ = ("cut", "node", "ref", "sig", "version")

    def __init__(self, node: Node, ref: int | None = None, cut: bool = False) -> None:
        self.node, self.version, self.ref = node, 0, ref
        self.sig: Sig = node.meta["val"]
        self.cut = cut  # made under no_grad


class Link(tuple):
    """One step of a view chain: ``(op, args after the tensor, kwargs, index among several outputs or None, val)``."""


class View:
    """A storage seen through a chain of view ops; remembers its node for the version it was read at."""

    __slots__ = ("chain", "node", "storage", "version")

    def __init__(self, storage: Storage, chain: tuple = (), node: Node | None = None) -> None:
        self.storage, self.chain = storage, chain
        self.node = storage.node if node is None and not chain else node
        self.version = storage.version if self.node is not None else -1

    @property
    def sig(self) -> Sig:
        return self.chain[-1][4] if self.chain else self.storage.sig


class Functionalizer:
    """Builds the functional graph of one recording; ``read`` and ``write`` are what recorded steps of other layers
    need.
    """

    def __init__(self, trace: Trace, builder: Builder, inputs: Sequence[Node], intent: bool = True) -> None:
        self.trace, self.b = trace, builder
        self.intent = intent  # False inside a derived rule: autograd's own detaches mean nothing
        self.env: dict[int, Any] = {}
        self.cut: set[int] = set()  # made under no_grad
        self.made_inside: set[Node] = set()  # constants that f makes anew on each run
        self.snapshots: list[list[Node]] = []  # arguments of the custom functions under way
        self.placeholders = list(inputs)
        refs = [*range(len(trace.inputs)), *(-1 - i for i in range(len(trace.lifted)))]
        self.mutates = trace.mutates
        self.number = len(trace.inputs)
        if not self.mutates:
            self.env.update(zip(refs, self.placeholders, strict=True))
        else:
            self._bind_storages(refs)

    def _bind_storages(self, refs: list[int]) -> None:
        places = self.trace.layout()
        groups: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            groups.setdefault(place.group, []).append(i)
        _, written = self.trace.roots()
        for members in groups.values():
            if not any(refs[i] in written for i in members):  # only read: each stands for itself
                for i in members:
                    self.env[refs[i]] = View(Storage(self.placeholders[i], refs[i]))
                continue
            sigs: dict[int, Sig] = {i: self.placeholders[i].meta["val"] for i in members}
            base = max(members, key=lambda i: (sigs[i].stride == contiguous_stride(sigs[i].shape), sigs[i].numel))
            storage = Storage(self.placeholders[base], refs[base])
            for i, sig in sigs.items():
                if i == base or (sig is sigs[base] and places[i] == places[base]):
                    self.env[refs[i]] = View(storage)
                    continue
                start = part(sigs[base], places[base], sig, places[i])
                if start is None:
                    raise CaptureError(
                        "some of the tensors that are written to, or their neighbours, overlap in memory and none of "
                        "them covers the others; pass the whole tensor and slice it inside, or clone them"
                    )
                link = strided(sigs[base], sig, start)
                self.env[refs[i]] = View(storage, (link,), self.placeholders[i])

    # ----- values -----------------------------------------------------------------------------------------------------

    def read(self, ref: int, grad: bool = True) -> Node:
        """The current value of a tensor; detached if it was made under no_grad and is read where gradients are on."""
        view = self.env[ref]
        if view.__class__ is View:
            storage = view.storage
            if view.version != storage.version:
                node = storage.node
                for link in view.chain:
                    node = forward(self.b, link, node)
                view.node, view.version = node, storage.version
            node = view.node
        else:
            node = view
        return self.detached(node) if grad and ref in self.cut and self.intent else node

    def detached(self, node: Node) -> Node:
        return self.b.node(aten.detach.default, (node,), {}, node.meta["val"])

    def bind(self, node: Node, grad: bool) -> int:
        """Give the next result of the recording its value."""
        ref = self.number
        self.number += 1
        cut = not grad and node.meta["val"].differentiable
        self.env[ref] = View(Storage(node, cut=cut)) if self.mutates else node
        if cut:
            self.cut.add(ref)
        return ref

    def alias(self, ref: int, base: int, links: Sequence[Link]) -> None:
        """Let a result share the memory of ``base``, seen through ``links``."""
        view = self.env[base]
        shared = View(view.storage, (*view.chain, *links), self.env[ref].node)
        shared.version = view.storage.version
        self.env[ref] = shared

    def write(self, ref: int, new: Node, grad: bool = True, line: Line | None = None) -> None:
        """Replace the value of a tensor, and with it that of every tensor which shares its storage."""
        view = self.env[ref]
        target = view.sig
        if any(s == 0 and n > 1 for s, n in zip(target.stride, target.shape, strict=True)):
            raise CaptureError(
                f"a write to an expanded tensor: several elements share memory; clone() it first{at(line)}"
            )
        new = self.fitted(new, target)
        storage = view.storage
        if grad and storage.cut:  # from here on it carries a derivative: that of what is written
            storage.node, storage.cut = self.detached(storage.node), False
            storage.version += 1
            self.cut -= {r for r, v in self.env.items() if v.storage is storage}
        bases = [storage.node]
        for link in view.chain[:-1]:
            bases.append(forward(self.b, link, bases[-1]))
        whole = new
        for link, base in zip(reversed(view.chain), reversed(bases), strict=False):
            whole = inverse(self.b, link, base, whole, line)
        whole = self.fitted(whole, storage.sig)
        hidden = not grad or any(link[0] is aten.detach.default for link in view.chain)
        if hidden and target.differentiable:
            whole = self.b.node(hidden_write, (storage.node, whole), {}, whole.meta["val"])
        storage.node = whole
        storage.version += 1
        if grad or not target.differentiable:
            view.node, view.version = new, storage.version

    def fitted(self, node: Node, sig: Sig) -> Node:
        """Cast and expanded as a write into a tensor of this signature does."""
        val: Sig = node.meta["val"]
        if val.dtype is not sig.dtype or val.device != sig.device:
            node = self.b.call(aten._to_copy.default, node, dtype=sig.dtype, device=sig.device)
        if val.shape != sig.shape:
            node = self.b.call(aten.expand.default, node, list(sig.shape))
        val = node.meta["val"]
        plain = sig.stride == contiguous_stride(sig.shape)
        if val.stride != sig.stride and (plain or 0 in val.stride):  # the written tensor keeps its layout
            node = self.b.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return node

    # ----- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for instr, refs, grad, region, line in self.trace.records:
            self.b.meta = {"line": line} if region is None else {"line": line, "region": region}
            if instr.__class__ is not Instr:
                instr.lower(self, refs, grad, line)
            elif instr.facts.writes:
                self._write(instr, refs, grad, line)
            elif self.mutates and instr.facts.view_of is not None and instr.op is not aten.lift_fresh.default:
                self._view(instr, refs, grad)
            else:
                nodes = [self.read(r, grad) for r in refs]
                self._results(self._call(instr, nodes), instr.outs, grad)
                if instr.op is aten.lift_fresh.default:
                    self.made_inside.add(nodes[0])
        self.b.meta = {}

    def _call(self, instr: Instr, nodes: list[Node]) -> Any:
        if not self.intent and instr.op is aten.detach.default:
            return nodes[0]
        if instr.op is aten._conj.default:
            return self.b.call(aten.conj_physical.default, *nodes)
        kwargs = {k: fill(v, nodes) for k, v in instr.kwargs.items()} if instr.kwargs else {}
        return self.b.node(instr.op, fill(instr.args, nodes), kwargs, instr.outs)

    def _results(self, out: Any, outs: Any, grad: bool) -> None:
        if outs.__class__ is Sig:
            self.bind(out, grad)
        elif isinstance(outs, tuple):
            for i, o in enumerate(outs):
                if flat(o):
                    self._results(self.b.item(out, i), o, grad)

    def _view(self, instr: Instr, refs: tuple, grad: bool) -> None:
        """A view shares the storage of its argument (the first tensor; view ops have no other)."""
        base = self.env[refs[0]]
        outs = instr.outs
        if not self.intent and instr.op is aten.detach.default:
            self.env[self.number] = View(base.storage, base.chain)
            self.number += 1
            return
        if outs is base.sig and instr.op in SAME_IF_EQUAL:  # `y[:]`
            self.env[self.number] = View(base.storage, base.chain)
            if refs[0] in self.cut or (not grad and outs.differentiable):
                self.cut.add(self.number)
            self.number += 1
            return
        each = [(None, outs)] if outs.__class__ is Sig else enumerate(outs)
        links = [linked(base.sig, instr.op, instr.args[1:], instr.kwargs, i, o) for i, o in each]
        for link in links:
            ref = self.number
            self.number += 1
            self.env[ref] = View(base.storage, (*base.chain, link))
            if refs[0] in self.cut or (not grad and link[4].differentiable):
                self.cut.add(ref)

    def _write(self, instr: Instr, refs: tuple, grad: bool, line: Line | None) -> None:
        op, facts = instr.op, instr.facts
        if facts.reshapes:
            view = self.env[refs[0]]
            twin = functional_twin(op, line)
            sig = instr.outs
            self.env[refs[0]] = View(view.storage, (*view.chain, Link((twin, instr.args[1:], instr.kwargs, None, sig))))
            return
        nodes = [self.read(r, grad) for r in refs]
        slots = [instr.args[i] if i < len(instr.args) else instr.kwargs[facts.names[i]] for i in facts.writes]
        written = [refs[int(s)] for slot in slots for s in (slot if isinstance(slot, list | tuple) else [slot])]
        special = WRITES.get(op)
        if special is not None:
            news = [special(self.b, *fill(instr.args, nodes), **{k: fill(v, nodes) for k, v in instr.kwargs.items()})]
        else:
            twin = functional_twin(op, line)
            news = self._twin_results(twin, instr, nodes)
        for ref, new in zip(written, news[-len(written) :], strict=True):
            self.write(ref, new, grad, line)
        # results that are not the written arguments themselves
        extra = news[: len(news) - len(written)] if len(news) > len(written) else []
        outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
        fresh = [o for o, same in zip(outs, facts.same, strict=False) if same is None]
        for new, o in zip(extra, fresh, strict=False):
            self._results(new, o, grad)

    def _twin_results(self, twin: OpOverload, instr: Instr, nodes: list[Node]) -> list:
        names = {a.name for a in twin._schema.arguments}
        ours = instr.op._schema.arguments
        args = [a for a, s in zip(instr.args, ours, strict=False) if s.name in names]
        kwargs = {k: v for k, v in instr.kwargs.items() if k in names}
        out = self.b.call(twin, *[fill(a, nodes) for a in args], **{k: fill(v, nodes) for k, v in kwargs.items()})
        if isinstance(out, Node) and isinstance(out.meta["val"], tuple):
            return [self.b.item(out, i) for i in range(len(out.meta["val"]))]
        return [out]

    def mutated(self) -> list[tuple[int, Node]]:
        """Inputs and lifted tensors that were written: ``(placeholder index, final value)``."""
        if not self.mutates:
            return []
        found = []
        refs = [*range(len(self.trace.inputs)), *(-1 - i for i in range(len(self.trace.lifted)))]
        for index, ref in enumerate(refs):
            view = self.env[ref]
            if view.storage.version and view.storage.ref == ref:
                found.append((index, view.storage.node))
        return found


def input_nodes(trace: Trace, builder: Builder, names: Sequence[str] = ()) -> list[Node]:
    """A placeholder for each input and each lifted tensor of a recording."""
    made = []
    for i, t in enumerate(trace.inputs):
        made.append(builder.placeholder(names[i] if i < len(names) else f"arg{i}", t.sig, role="primal"))
    for i, t in enumerate(trace.lifted):
        kind = "param" if isinstance(t, torch.nn.Parameter) else "const"
        made.append(builder.placeholder(f"{kind}{i}", t.sig if t.__class__ is Traced else sig_of(t), role=kind))
    return made


#: views that show the same tensor if their result has its signature
SAME_IF_EQUAL = (aten.slice.Tensor, aten.view.default, aten.alias.default)


# ----- views and their inverses ---------------------------------------------------------------------------------------


def forward(b: Builder, link: Link, node: Node) -> Node:
    op, args, kwargs, index, _ = link
    if op is aten.as_strided.default:
        node, args = in_memory(b, node, args)
    if op is aten._conj.default:
        op = aten.conj_physical.default
    out = b.call(op, node, *args, **kwargs)
    return out if index is None else b.item(out, index)


def linked(base: Sig, op: OpOverload, args: tuple, kwargs: dict, index: int | None, val: Sig) -> Link:
    """A view op on a tensor of signature ``base``."""
    if op is aten.as_strided.default:
        return strided(base, val, val.offset - base.offset)
    return Link((op, args, kwargs, index, val))


def strided(base: Sig, val: Sig, start: int) -> Link:
    """A view of the memory of ``base``, from an element counted from its first one on."""
    return Link((aten.as_strided.default, (list(val.shape), list(val.stride), start, base.stride), {}, None, val))


def in_memory(b: Builder, node: Node, args: tuple) -> tuple[Node, tuple]:
    """``as_strided``'s arguments for a value that has, or is given, the layout which the link counts in."""
    size, stride, start, layout = args
    if node.meta["val"].stride != layout:
        node = b.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        if node.meta["val"].stride != layout:
            raise CaptureError("as_strided of a tensor that is not contiguous cannot follow writes to it; clone() it")
    return node, (size, stride, start + node.meta["val"].offset)


def inverse(b: Builder, link: Link, base: Node, new: Node, line: Line | None) -> Node:
    """The value of ``base`` after what the link sees of it became ``new``."""
    op, args, kwargs, index, _ = link
    rule = INVERSES.get(op)
    if op is aten.as_strided.default:
        base, args = in_memory(b, base, args)
    if rule is None:
        return scatter(b, link, base, new)
    return rule(b, base, new, index, *args, **kwargs)


def scatter(b: Builder, link: Link, base: Node, new: Node) -> Node:
    """The inverse of any view at all: look through it at the numbers of the elements, and put there."""
    sig: Sig = base.meta["val"]
    numbers = b.call(aten.arange.default, sig.numel, device=sig.device)
    where = forward(b, link, b.call(aten.view.default, numbers, list(sig.shape)))
    return b.call(aten.put.default, base, where, new)


def reshaped(b: Builder, base: Node, new: Node, *_: Any, **__: Any) -> Node:
    shape = list(base.meta["val"].shape)
    try:
        return b.call(aten.view.default, new, shape)
    except RuntimeError:
        return b.call(aten.view.default, b.call(aten.clone.default, new, memory_format=torch.contiguous_format), shape)


def _permuted(b: Builder, base: Node, new: Node, index: Any, dims: Sequence[int]) -> Node:
    back = [0] * len(dims)
    for i, d in enumerate(dims):
        back[d] = i
    return b.call(aten.permute.default, new, back)


def _part(b: Builder, base: Node, new: Node, dim: int, start: int, length: int) -> Node:
    return b.call(aten.slice_scatter.default, base, new, dim, start, start + length)


def _split(b: Builder, base: Node, new: Node, index: int, sizes: Any, dim: int = 0) -> Node:
    if isinstance(sizes, int):
        total = base.meta["val"].shape[dim]
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    return _part(b, base, new, dim, sum(sizes[:index]), sizes[index])


def _call(op: OpOverload) -> Any:
    return lambda b, base, new, index, *args, **kwargs: b.call(op, new, *args, **kwargs)


def _scattered(op: OpOverload) -> Any:
    return lambda b, base, new, index, *args, **kwargs: b.call(op, base, new, *args, **kwargs)


INVERSES: dict[OpOverload, Any] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten._reshape_alias.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        reshaped,
    ),
    **dict.fromkeys(
        (aten.alias.default, aten.detach.default, aten.lift_fresh.default), lambda b, base, new, index: new
    ),
    aten.select.int: _scattered(aten.select_scatter.default),
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    aten.diagonal.default: _scattered(aten.diagonal_scatter.default),
    aten.as_strided.default: _scattered(aten.as_strided_scatter.default),
    aten.t.default: _call(aten.t.default),
    aten.transpose.int: _call(aten.transpose.int),
    aten.permute.default: _permuted,
    aten._conj.default: _call(aten.conj_physical.default),
    aten._neg_view.default: _call(aten.neg.default),
    aten.view_as_real.default: lambda b, base, new, index: b.call(aten.view_as_complex.default, new),
    aten.view_as_complex.default: lambda b, base, new, index: b.call(aten.view_as_real.default, new),
    aten.view.dtype: lambda b, base, new, index, dtype: b.call(aten.view.dtype, new, base.meta["val"].dtype),
    aten.unbind.int: lambda b, base, new, index, dim=0: b.call(aten.select_scatter.default, base, new, dim, index),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.expand.default: lambda b, base, new, index, *a, **k: new,  # a write to a truly expanded view was refused
}


# ----- writes ---------------------------------------------------------------------------------------------------------


def _filled(b: Builder, x: Node, value: Any) -> Node:
    if isinstance(value, Node):
        return value
    return b.call(aten.full_like.default, x, value)


def _filled_diagonal(b: Builder, x: Node, value: Any, wrap: bool = False) -> Node:
    rows, columns = x.meta["val"].shape
    if wrap and rows > columns:
        raise CaptureError("fill_diagonal_(wrap=True) of a tall matrix has no functional form here")
    line = b.call(aten.diagonal.default, x)
    return b.call(aten.diagonal_scatter.default, x, b.call(aten.full_like.default, line, value))


#: in-place ops whose functional form has another name
WRITES: dict[OpOverload, Any] = {
    aten.copy_.default: lambda b, x, source, non_blocking=False: source,
    aten.zero_.default: lambda b, x: _filled(b, x, 0),
    aten.fill_.Scalar: _filled,
    aten.fill_.Tensor: _filled,
    aten.fill_diagonal_.default: _filled_diagonal,
    aten._index_put_impl_.default: lambda b, x, indices, values, accumulate=False, unsafe=False: b.call(
        aten.index_put.default, x, indices, values, accumulate
    ),
    aten.normal_.default: lambda b, x, *a, **k: b.call(aten.normal_functional.default, x, *a, **k),
    aten.bernoulli_.float: lambda b, x, p=0.5, generator=None: b.call(aten.bernoulli.p, x, p, generator=generator),
    aten.relu_.default: lambda b, x: b.call(aten.relu.default, x),
}


@cache
def _twin(op: OpOverload) -> OpOverload | None:
    """The overload that returns what ``op`` writes: same arguments, without the trailing underscore or the ``out``s."""
    if op in (aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default):
        return aten.rrelu_with_noise_functional.default
    name = op._schema.name.split("::")[1]
    namespace = getattr(torch.ops, op.namespace)
    out_form = all(a.kwarg_only or not (a.alias_info and a.alias_info.is_write) for a in op._schema.arguments)
    packet = getattr(namespace, name if out_form else name.removesuffix("_"), None)
    if packet is None:
        return None
    wanted = [
        (a.name, str(a.type)) for a in op._schema.arguments if not (out_form and a.alias_info and a.alias_info.is_write)
    ]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if Facts(candidate).writes:
            continue
        has = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if has == wanted or [t for _, t in has] == [t for _, t in wanted]:
            return candidate
    return None


def functional_twin(op: OpOverload, line: Line | None) -> OpOverload:
    twin = _twin(op)
    if twin is None:
        raise CaptureError(f"{op} writes to its argument and has no functional form{at(line)}; use an op that returns")
    return twin
