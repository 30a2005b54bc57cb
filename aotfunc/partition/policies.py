"""Policies: which values may be saved for the backward, whatever there is room for.

A policy is a function from a node to a :class:`Verdict`. It says what *may* be saved; the memory
budget says how much of that is. A node stands for its value, or all values of an op with
several: ``node.target`` is the op, ``node.meta["val"]`` the signature, ``names(node)`` what
``checkpoint_name`` called it. Views are no values of their own. Policies of
this module are equal when they say the same, so a program that is captured again is found."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from torch.fx import Node

from ..debug import at, user_line
from ..errors import ArgumentError
from .cost import flops
from .ops import is_view


class Verdict(IntEnum):
    """What may become of a value that the backward needs."""

    #: it is not saved; draws, and what may run only once, are all the same
    RECOMPUTE = 0
    #: the partition chooses
    FREE = 1
    #: it is saved in the memory of the host, and not computed again
    OFFLOAD = 2
    #: it is saved, and not computed again
    SAVE = 3


Policy: TypeAlias = Callable[[Node], int]


def check_policy(policy: Policy | None) -> None:
    """Raise ArgumentError for a policy that cannot be a key of what is made for it."""
    try:
        hash(policy)
    except TypeError:
        raise ArgumentError(
            f"a policy must be hashable, not {policy!r}{at(user_line())}; make it a "
            "function, or give its class a __hash__"
        ) from None


def names(n: Node) -> set[str]:
    """Return the names that ``checkpoint_name`` gave to a node's value, a view or a part."""
    found = {n.meta["named"]} if "named" in n.meta else set()
    for user in n.users:
        if is_view(user) or user.target is operator.getitem:
            found |= names(user)
    return found


def nothing_saveable(n: Node) -> Verdict:
    """Let all be computed again from the inputs."""
    return Verdict.RECOMPUTE


def everything_saveable(n: Node) -> Verdict:
    """Let the partition choose among all values."""
    return Verdict.FREE


def save_dots(n: Node) -> Verdict:
    """Let results of matrix products, convolutions and attention be saved, nothing else."""
    return Verdict(flops(n) > 0)


def save_dots_no_batch(n: Node) -> Verdict:
    """Let results of matrix products without a batch dimension be saved, nothing else: in a
    network those with weights, and not the scores of attention."""
    name = getattr(n.target, "_opname", "")
    return Verdict(name in ("mm", "addmm", "mv", "addmv", "dot"))


@dataclass(frozen=True)
class _Named:
    names: frozenset[str]
    there: Verdict
    elsewhere: Verdict

    def __call__(self, n: Node) -> Verdict:
        return self.there if self.names & names(n) else self.elsewhere


def save_only_these(*names: str) -> Policy:
    """Let values of these names be saved, nothing else.

    >>> save_only_these("attn") == save_only_these("attn")
    True
    """
    return _Named(frozenset(names), Verdict.FREE, Verdict.RECOMPUTE)


def save_any_but_these(*names: str) -> Policy:
    """Let all values be saved but those of these names."""
    return _Named(frozenset(names), Verdict.RECOMPUTE, Verdict.FREE)


def must_save(*names: str) -> Policy:
    """Save the values of these names for good; the partition chooses among the others."""
    return _Named(frozenset(names), Verdict.SAVE, Verdict.FREE)


def offload(*names: str) -> Policy:
    """Copy the values of these names to the host's memory in the forward, and back right before
    the backward reads them first; on the CPU they are saved. The partition chooses among the
    others.

    >>> either(offload("attn"), save_dots) == either(offload("attn"), save_dots)
    True
    """
    return _Named(frozenset(names), Verdict.OFFLOAD, Verdict.FREE)


@dataclass(frozen=True)
class _Where:
    where: Callable[[Node], bool]

    def __call__(self, n: Node) -> Verdict:
        return Verdict.RECOMPUTE if self.where(n) else Verdict.FREE


def must_recompute(where: Callable[[Node], bool]) -> Policy:
    """Save no value for which ``where(node)`` holds; the partition chooses among the others."""
    return _Where(where)


@dataclass(frozen=True)
class _Picked:
    pick: Callable
    policies: tuple[Policy, ...]

    def __call__(self, n: Node) -> Verdict:
        return Verdict(self.pick(p(n) for p in self.policies))


def either(*policies: Policy) -> Policy:
    """Take the verdict of several policies that saves most."""
    return _Picked(max, policies)


def both(*policies: Policy) -> Policy:
    """Take the verdict of several policies that saves least.

    >>> both(save_dots, save_any_but_these("scores")) == both(save_dots, save_dots)
    False
    """
    return _Picked(min, policies)
