"""Tools to describe state: the key, lines of the check, tensors with paths, facts to read."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor

from ...trace.kinds import is_dtensor
from ...trace.traced import Traced
from .keys import bits, is_value, tensor_facts
from .rates import Rate
from .reads import CLOSED, Names, library_of_module

NOTHING = object()
_GROWING = (list, set, dict, collections.deque)


class CheckLines:
    """The lines of a check, and the objects that they name."""

    lines: list[str]
    constants: dict[str, Any]

    def constant(self, x: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = x
        return name

    def require(self, expr: str, x: Any) -> None:
        """Require that ``expr`` is the object ``x``."""
        known = repr(x) if x is None or x is True or x is False else self.constant(x)
        self.lines.append(f"if {expr} is not {known}: return")


class Description(CheckLines):
    """A description in the making, by the names in ``names``."""

    def __init__(self, names: Names) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.paths: list[str] = []  # the variables that hold the tensors
        self.arrays: list[tuple[Any, bytes]] = []  # of NumPy, each with its content
        self.facts: list[tuple[str, Any]] = []  # what is guarded, for people
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.opaque: list[Any] = []  # guarded by identity
        #: dictionaries (of classes, too), lists and cells: the variable that holds each, and its
        #: content
        self.owners: list[tuple[Any, str, dict]] = []
        self.names = names
        #: whether attributes of any name are described: it is not known what reads them
        self.wide = False
        self.seen: dict[int, str] = {}
        self.rates: list[tuple[dict[str, Any], Rate]] = []  # with the optimizer's group
        self._groups: set[int] = set()  # ids of the optimizers' groups
        self.graded: set[int] = set()  # ids of the tensors whose gradients are described
        self._gradients: set[int] = set()  # ids of these, which have none themselves
        self.distinct: list[str] = []
        self.kept: list[Any] = []  # so that their ids stay their own
        self._classes: set[type] = set()
        self._bases: set[tuple[type, bool, bool]] = set()  # and the bases of these, by their kind
        self._globals: set[tuple[int, str]] = set()
        self._todo: list[tuple[Any, str, str]] = []
        self._static: dict[type, list[str]] = {}
        self._functions: set[str] = set()  # of torch.nn.functional
        self._modules = self._optimizers = self._parametrized = False

    def bind(self, expr: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expr}")
        return name

    def meet(self, x: Any, expr: str, label: str) -> None:
        """Describe ``x``, which ``expr`` yields: now if it is a plain value, later otherwise."""
        if is_plain(x):
            self.key += (x.__class__, by_bits(x))
            self.facts.append((label, x))
            self.require(expr, x)
            self.of_subclass(x, expr, label)
            return
        known = self.seen.get(id(x))
        if known is not None:
            self.key.append(known)
            self.lines.append(f"if {expr} is not {known}: return")
            return
        v = self.seen[id(x)] = self.bind(expr)
        self.kept.append(x)
        if isinstance(x, Tensor):
            facts = tensor_facts(x)
            self.key.append(facts)
            self.facts.append((label, facts))
            self.tensors.append(x)
            self.paths.append(v)
            graded = self.names.gradients and may_have_gradient(x)
            if graded or (x.__class__ is not Traced and x.__dict__):
                self._todo.append((x, v, label))
            if x.__class__ is Traced or not x.__dict__:  # it may get attributes
                self.owners.append((x.__dict__, f"{v}.__dict__", dict(x.__dict__)))
        else:
            self.key.append(v)
            self._todo.append((x, v, label))

    def rate(self, group: dict[str, Any], v: str, label: str) -> None:
        """Describe the learning rate of an optimizer's group as a tensor."""
        rate = Rate(group["lr"])
        self.rates.append((group, rate))
        facts = tensor_facts(rate.tensor)
        self.key.append(facts)
        self.facts.append((label, facts))
        self.tensors.append(rate.tensor)
        self.paths.append(self.bind(f"{self.constant(rate.now)}({v}['lr'])"))

    def may_grow(self, x: Any, expr: str) -> None:
        """Let a container that the code only adds to get tensors; it is not described."""
        if isinstance(x, list | dict | collections.deque):
            self.owners.append((x, expr, dict(x) if isinstance(x, dict) else dict(enumerate(x))))

    def of_subclass(self, x: Any, expr: str, label: str) -> None:
        """Describe the attributes, and the class, of a number, text or enum of a user's class."""
        if of_users_class(x):
            self.meet(type(x), f"type({expr})", label)
            self.meet(getattr(x, "__dict__", None), f"getattr({expr}, '__dict__', None)", label)


def is_plain(x: Any) -> bool:
    """Return whether this is a plain value, or a tuple of them without attributes."""
    return is_value(x) or (x.__class__ in (tuple, torch.Size) and all(map(is_bare, x)))


def is_bare(x: Any) -> bool:
    """Return whether there is no more to a plain value than what it is equal to."""
    return is_plain(x) and not of_users_class(x)


def may_have_gradient(x: Tensor) -> bool:
    """Return whether ``.backward()`` may give a tensor its ``.grad``."""
    plain = x.__class__ is not Traced and not is_dtensor(x)
    return plain and x.is_leaf and (x.is_floating_point() or x.is_complex())


def of_users_class(x: Any) -> bool:
    return not isinstance(x, tuple) and library_of_module(type(x).__module__) not in CLOSED


def by_bits(x: Any) -> Any:
    return tuple([(e.__class__, by_bits(e)) for e in x]) if isinstance(x, tuple) else bits(x)


def passing(x: Any) -> bool:
    """Return whether a value is only added to: a counter, or a list that grows."""
    full = getattr(x, "maxlen", None) is not None  # then what is added shifts the rest
    return isinstance(x, int | float | complex | str) or (type(x) in _GROWING and not full)
