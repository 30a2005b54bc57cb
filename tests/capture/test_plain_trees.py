"""Trees of plain containers are flattened as PyTorch does, and made again as they were."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from aotfunc.capture.plain_trees import flatten_plain, maker_of

Pair = namedtuple("Pair", "a b")
t = torch.ones(2)
PLAIN = [
    t,
    None,
    3,
    [],
    {},
    (),
    (t,),
    [t, 1.5, "a", None],
    {"b": t, "a": [t, (1, True)]},
    ({"it's": {"\n": t}}, [[], [{}]]),
    {"a": (), "b": {"a": ()}},
]
OTHERS = [{1: t}, {True: t}, OrderedDict(a=t), Pair(t, t), torch.Size([2]), [object()], {"a": {2}}]


def same(a, b):
    """The same containers, keys in the same order, with the very leaves."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b


@pytest.mark.parametrize("tree", PLAIN, ids=str)
def test_as_pytorch_does(tree):
    for _ in range(2):
        leaves, spec = flatten_plain(tree)
        expected, expected_spec = tree_flatten(tree)
        assert same(leaves, expected) and spec == expected_spec
        assert same(maker_of(spec)(leaves), tree) and same(tree_unflatten(leaves, spec), tree)


def test_trees_that_differ_have_specs_that_do():
    specs = [flatten_plain(tree)[1] for tree in PLAIN]
    for i, a in enumerate(specs):
        for j, b in enumerate(specs):
            assert (a == b) is (tree_flatten(PLAIN[i])[1] == tree_flatten(PLAIN[j])[1])


@pytest.mark.parametrize("tree", OTHERS, ids=lambda x: type(x).__name__)
def test_other_kinds_are_left_to_pytorch(tree):
    assert flatten_plain(tree) is flatten_plain([tree]) is None
