"""Classes of arguments that are trees or values: their methods, and what these read, changed
between two calls."""

import dataclasses
import enum
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import register_pytree_node

from aotfunc import aot_function, jit
from tests.reference import assert_same

X = torch.arange(1.0, 5.0)
COMPILERS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}
RATE = {"k": 2.0}


@dataclasses.dataclass
class Data:
    t: torch.Tensor

    def scaled(self):
        return self.t * RATE["k"]


class Pair(NamedTuple):
    t: torch.Tensor
    u: torch.Tensor

    def scaled(self):
        return self.t * self.u * RATE["k"]


class Node:
    def __init__(self, t):
        self.t = t

    def scaled(self):
        return self.t * RATE["k"]


register_pytree_node(Node, lambda n: ([n.t], None), lambda children, _: Node(*children))


class Kind(enum.Enum):
    FIRST = [1.0]
    SECOND = [2.0]

    def scaled(self):
        return X * RATE["k"]


ARGUMENTS = {
    "dataclass": lambda: Data(X),
    "named tuple": lambda: Pair(X, X),
    "registered": lambda: Node(X),
    "in a list": lambda: [Data(X)],
    "enumeration": lambda: Kind.FIRST,
}


def scaled(a):
    return (a[0] if type(a) is list else a).scaled()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_methods_read(name, compiler, monkeypatch):
    f, argument = COMPILERS[compiler](scaled), ARGUMENTS[name]
    for k in (2.0, 3.0, 5.0, 2.0):
        monkeypatch.setitem(RATE, "k", k)
        assert_same(f(argument()), scaled(argument()))
    captures = f.captures
    f(argument())
    assert f.captures == captures == 3


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_method_that_is_replaced(name, compiler, monkeypatch):
    f, argument = COMPILERS[compiler](scaled), ARGUMENTS[name]
    assert_same(f(argument()), scaled(argument()))
    a = argument()
    monkeypatch.setattr(type(a[0] if type(a) is list else a), "scaled", lambda self: X * 7)
    assert_same(f(argument()), X * 7)


def test_values_and_attributes_of_members():
    class Option(enum.Enum):
        FIRST = [1.0]
        SECOND = [2.0]

    f = jit(lambda x, e: x * e.value[0] + getattr(e, "offset", 0.0))
    assert_same(f(X, Option.SECOND), X * 2)
    Option.SECOND.value[0] = 5.0
    assert_same(f(X, Option.SECOND), X * 5)
    Option.SECOND.offset = 3.0
    assert_same(f(X, Option.SECOND), X * 5 + 3)
    assert_same(f(X, Option.FIRST), X)
