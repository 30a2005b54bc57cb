"""The storages and views of traced tensors in a recording that writes.

Every traced tensor is a *view*: a storage (its current value is a node, and it counts versions)
and a chain of view ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ..errors import CaptureError
from .emit import Builder
from .memory import MemoryPlace, offset_inside
from .shapes.sig import Sig
from .views import Link, replay_view, strided_link


class Memory:
    """Memory that storages with separate derivatives share: its version, and its last writer."""

    __slots__ = ("first", "version", "writer")

    def __init__(self, first: Storage) -> None:
        self.version, self.first, self.writer = 0, first, first


class Storage:
    """What views share: a current value, for a version of the memory.

    ``ref`` is the input or lifted tensor that shows it through ``chain``. A detached tensor begins
    another storage of the same memory."""

    __slots__ = ("chain", "cut", "memory", "node", "ref", "shown", "sig", "version", "written")

    def __init__(
        self, node: Node, ref: int | None = None, cut: bool = False, memory: Memory | None = None
    ) -> None:
        self.node, self.ref = node, ref
        self.memory = memory or Memory(self)
        self.version, self.written = self.memory.version, False
        self.sig: Sig = node.meta["val"]
        self.cut = cut  # made under no_grad
        self.chain: tuple[Link, ...] = ()
        self.shown: dict[int, tuple[int, Node]] = {}

    def seen_through(self, b: Builder, link: Link, node: Node) -> Node:
        """Return ``node`` seen through a view's link, as one node for all its views."""
        version, found = self.shown.get(id(link), (None, node))
        if version != self.version:
            found = replay_view(b, link, node)
            self.shown[id(link)] = self.version, found
        return found


class View:
    """A storage seen through a chain of views, and its node at the version last read."""

    __slots__ = ("chain", "node", "storage", "version")

    def __init__(self, storage: Storage, chain: tuple = (), node: Node | None = None) -> None:
        self.storage, self.chain = storage, chain
        self.node = storage.node if node is None and not chain else node
        self.version = storage.version if self.node is not None else -1

    @property
    def sig(self) -> Sig:
        return self.chain[-1][4] if self.chain else self.storage.sig


def covered(
    sigs: dict[int, Sig], places: Sequence[MemoryPlace], base: int, i: int
) -> tuple[Link, ...]:
    """Return the links from the input ``base`` to ``i`` inside of it, or refuse them."""
    if i == base or (sigs[i] is sigs[base] and places[i][:3] == places[base][:3]):
        return ()
    start = offset_inside(sigs[base], places[base], sigs[i], places[i])
    if start is None:
        raise CaptureError(
            "some of the tensors that are written to, or their neighbours, overlap in memory and "
            "none of them covers the others; pass the whole tensor and slice it inside, or clone "
            "them"
        )
    return (strided_link(sigs[base], sigs[i], start),)
