"""Results of a compiled function that are no tensors: objects from outside by their paths, and
copies, one for each call, of those that it makes."""

from __future__ import annotations

import copy
import types
from collections import ChainMap, OrderedDict, UserDict, UserList
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_unflatten

from ...capture.captured import Captured
from ...capture.instances import CONTAINERS, Opened, containers, one_level, remade
from ...debug import at, user_line
from ...errors import CaptureError
from ...trace.holding import SHARED, holds_traced, slots_of
from ...trace.traced import Traced, attributes, current
from .description import is_plain
from .given import Snapshot
from .reads import CLOSED, library_of_module
from .state import State
from .stores import Place, finder, store

#: methods by which a class controls how its instances are made and copied
_COPYING = tuple(
    """
    __new__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __copy__ __deepcopy__ __getnewargs__
    __getnewargs_ex__
    """.split()
)
_OTHERWISE = (Tensor, nn.Module, types.FunctionType, types.MethodType)
#: containers of the library that keep their items in attributes
_WRAPPERS = (UserDict, UserList, ChainMap)


class Reference:
    """The stand-in for an object that exists at each call: ``kind`` "state" (``where``: a variable
    of the check), "arguments" (a container's number) or "stored" (a value's)."""

    def __init__(self, kind: str, where: Any) -> None:
        self.kind, self.where = kind, where


class Tagged:
    """A result ``t`` with the attributes that the function gave it in Python."""

    def __init__(self, t: Tensor, values: Sequence[Any], names: tuple[str, ...]) -> None:
        self.children, self.names = [t, *values], names


def tagged(children: Any, names: tuple[str, ...]) -> Tensor:
    t, *values = children
    t.__dict__.update(zip(names, values, strict=True))
    return t


register_pytree_node(Tagged, lambda x: (x.children, x.names), tagged)


class Keyed:
    """A dictionary with tensors as keys, or in them: each call has its own."""

    def __init__(self, x: dict) -> None:
        self.cls, self.children = type(x), [[*x], [*x.values()]]


register_pytree_node(
    Keyed, lambda x: (x.children, x.cls), lambda children, cls: cls(zip(*children, strict=True))
)


def has_tensor_keys(x: Any) -> bool:
    return isinstance(x, dict) and any(isinstance(k, Tensor) for k in tree_leaves([*dict.keys(x)]))


def recorded(result: Any, places: Sequence[Place], state: State, arguments: Snapshot) -> Any:
    """Return the record of a result, and of the values in ``places`` if there are any: references
    for objects of the state and for containers among the arguments."""
    known = {id(x): Reference("arguments", k) for k, x in enumerate(arguments.containers)}
    known.update((id(t), t) for t, _ in arguments.tensors)
    known.update(
        (id(x), Reference("state", state.seen[id(x)]))
        for x in state.kept
        if not isinstance(x, Tensor)
    )
    if not places:
        return referred(result, known)
    stored = {id(p.value): p.value for p in places}
    again = {
        i: Reference("stored", k)
        for k, (i, x) in enumerate(stored.items())
        if not isinstance(x, Tensor)
    }
    return referred(result, {**again, **known}), [referred(x, known) for x in stored.values()]


def referred(tree: Any, known: dict[int, Any]) -> Any:
    """Return the tree with references for the objects that are known; a container that is in it
    twice is one container in the new tree, too."""
    made, outside, around = dict(known), {*known}, set[int]()

    def new(x: Any) -> Any:
        if id(x) in made:
            return made[id(x)]
        if isinstance(x, Tensor):
            mine = x.__class__ is Traced and x.tracer is current()
            given = attributes(x) if mine else {}
            made[id(x)] = x  # it may be an attribute of its own
            if given:
                made[id(x)] = Tagged(x, [*map(new, given.values())], tuple(given))
            return made[id(x)]
        children, spec = one_level(x)
        if spec.is_leaf():
            opened = isinstance(x, dict | list) or holds_traced(x, outside)
            if not opened or id(x) in around or not is_record(x):
                return x
            children, spec = one_level(Opened(x))
        if spec.type is Opened or has_tensor_keys(x):
            around.add(id(x))
            found = Opened(x) if spec.type is Opened else keyed(x)
            found.children = [*map(new, found.children)]
            around.remove(id(x))
            made[id(x)] = found
        else:
            made[id(x)] = tree_unflatten([*map(new, children)], spec)
        return made[id(x)]

    try:
        return new(tree)
    finally:
        made.clear()  # a function that calls itself lives until the garbage collector comes


def keyed(x: Any) -> Keyed:
    if type(x) in (dict, OrderedDict):
        return Keyed(x)
    raise CaptureError(
        f"the function returns a {type(x).__name__} with tensors as keys{at(user_line())}; return "
        "a dict, or a list of pairs"
    )


def skeleton(tree: Any) -> Any:
    """Return the tree with a tensor that stands for each of its own, if a container is in it
    twice: one spec for both would make two of it."""
    found = [id(c) for c in containers(tree) if c != ()]
    if len({*found}) == len(found):
        return None
    made: dict[int, Any] = {}

    def bare(x: Any) -> Any:
        children, spec = one_level(x)
        if spec.is_leaf():
            return PLACE if isinstance(x, Tensor) else x
        if id(x) not in made:
            inner = [*map(bare, children)]
            if spec.type in (Opened, Tagged, Keyed):
                made[id(x)] = copy.copy(x)
                made[id(x)].children = inner
            else:
                made[id(x)] = tree_unflatten(inner, spec)
        return made[id(x)]

    return bare(tree)


PLACE = torch.empty(0)


def is_record(x: Any) -> bool:
    """Return whether an object is what its attributes and items hold, by how its class is
    copied. A tuple's class makes it with its items (``__new__``)."""
    cls = type(x)
    base = next(c for c in (*CONTAINERS, *_WRAPPERS, object) if issubclass(cls, c))
    made = ("__new__", "__getnewargs__") if base is tuple else ()
    own = [n for n in _COPYING if getattr(cls, n, None) is not getattr(base, n, None)]
    return (
        {*made}.issuperset(own)
        and not has_tensor_keys(x)
        and (base in CONTAINERS or hasattr(x, "__dict__"))
        and not slots_of(cls)
        and not isinstance(x, (*SHARED, *_OTHERWISE))
        and (cls in _WRAPPERS or library_of_module(cls.__module__) not in CLOSED)
    )


class Finish:
    """A call's last part: puts tensors where the function binds them, fills the result."""

    def __init__(
        self,
        rec: Captured,
        state: State,
        places: Sequence[Place],
        titled: Callable[[], str],
        shared: Any,
    ) -> None:
        """Follow the result; ``shared`` is its skeleton, if there is one."""
        self.shared = shared
        result, values = rec.spec.children() if places else (rec.spec, None)  # type: ignore
        self.spec, self.values, self.count = result, values, result.num_leaves if result else 0
        numbers = {k: n for n, k in enumerate(dict.fromkeys(id(p.value) for p in places))}
        self.keys = [(p.key, numbers[id(p.value)], p.grows) for p in places]
        self.references = [(i, x) for i, x in enumerate(rec.leaves) if x.__class__ is Reference]
        known = {id(x) for x in state.kept if not isinstance(x, (*SHARED, types.FunctionType))}
        others = [
            (i, x) for i, x in enumerate(rec.leaves) if not isinstance(x, Tensor | Reference)
        ]
        memo = Memo(known)
        self.copies = [(i, pristine(x, memo, titled)) for i, x in others if not immutable(x)]
        held = {v: x for x in state.kept if (v := state.seen[id(x)])}
        names = [x.where for _, x in self.references if x.kind == "state"]
        self.find = finder(state, [*[state.owners[p.owner][1] for p in places], *names])
        #: what ``find`` would have found at the capture; the state may be another one already
        self.found: list | None = [
            *[state.owners[p.owner][0] for p in places],
            *[held[n] for n in names],
        ]

    def __bool__(self) -> bool:
        return bool(self.keys or self.references or self.copies or self.shared is not None)

    def __call__(self, leaves: list, f: Callable, objects: Sequence[Any], arguments: tuple) -> Any:
        """Return the result, made of the leaves that the program gives."""
        first, self.found = self.found, None
        found = first or self.find(f, objects)
        outside, given = iter(found[len(self.keys) :]), None
        memo: dict[int, Any] = {}  # an object that is there twice is copied once
        for i, x in self.copies:
            leaves[i] = copy.deepcopy(x, memo)
        later = []
        for i, x in self.references:
            if x.kind == "state":
                leaves[i] = next(outside)
            elif x.kind == "arguments":
                given = containers(arguments) if given is None else given
                leaves[i] = given[x.where]
            else:
                later.append((i, x.where))
        values = (
            tree_unflatten(leaves[self.count :], self.values) if self.values is not None else ()
        )
        for i, k in later:
            leaves[i] = values[k]
        if self.shared is None:
            result = tree_unflatten(leaves[: self.count], self.spec)
        else:
            result = remade(self.shared, iter(leaves[: self.count]), {})
        for owner, (key, number, grows) in zip(found, self.keys, strict=False):
            if grows and first is None:
                owner.append(values[number])
            else:
                store(owner, key, values[number])
        return result


# ----- objects that a function makes -------------------------------------------------------------


def immutable(x: Any) -> bool:
    """Return whether it makes no difference that all calls return the same object."""
    if isinstance(x, types.FunctionType):
        return not holds_traced(x, set())
    return isinstance(x, SHARED) or (is_plain(x) and not getattr(x, "__dict__", None))


class Memo(dict):
    """The memo of deepcopy; it must not hold objects ``known`` outside."""

    def __init__(self, known: set[int]) -> None:
        self.known = known

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self.known:
            raise CaptureError("it refers to an object that is there outside of the function")
        return dict.get(self, key, default)


def pristine(x: Any, memo: Memo, titled: Callable[[], str]) -> Any:
    """Return a copy of an object that the function has made; each call gets a new one."""
    same = "which would be the same object at every call"
    if holds_traced(x, memo.known):
        raise CaptureError(
            f"{titled()} returns a {type(x).__name__} that holds tensors, {same}; return a "
            "dataclass, or a tuple or dictionary of the tensors"
        )
    try:
        return copy.deepcopy(x, memo)
    except Exception as e:
        raise CaptureError(
            f"{titled()} returns a {type(x).__name__}, {same} and cannot be copied ({e}); return "
            "what is in it as a tuple or dictionary"
        ) from e
