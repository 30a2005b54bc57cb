"""``checkpoint`` and ``checkpoint_name``: choose which values the backward recomputes and which it
may keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.utils.checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

from ..capture.checkpoints import name_value, recorded_region
from ..capture.deferred import calls_late
from ..partition.policies import Policy, check_policy
from ..trace.patches import recorder
from ..trace.traced import Traced

T = TypeVar("T")


def checkpoint(f: Callable | None = None, policy: Policy | None = None) -> Any:
    """Return ``f`` with values that the backward recomputes from the arguments, except draws,
    results, and values that ``policy`` (see :mod:`aotfunc.partition.policies`) lets be saved.

    It works inside every transform and compiled function. Outside of them it is
    ``torch.utils.checkpoint``, which saves nothing inside. Without ``f`` it is a decorator. Each
    policy that equals no earlier one makes another program.

    >>> from aotfunc import grad
    >>> from aotfunc.partition import save_dots
    >>> layer = checkpoint(lambda w, x: torch.tanh(x @ w), policy=save_dots)
    >>> grad(lambda w: layer(w, torch.ones(1, 2)).sum())(torch.zeros(2, 2))
    tensor([[1., 1.],
            [1., 1.]])
    """
    check_policy(policy)
    if f is None:
        return functools.partial(checkpoint, policy=policy)

    @functools.wraps(f)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        trace = recorder()
        if trace is None:
            return torch_checkpoint.checkpoint(f, *args, use_reentrant=False, **kwargs)
        calls_late(f)
        with recorded_region(trace, policy):
            return f(*args, **kwargs)

    return checkpointed


def checkpoint_name(x: T, name: str) -> T:
    """Return ``x``, a tensor or a tree of tensors, which policies know by this name: see
    :func:`aotfunc.partition.save_only_these`. The op that made ``x``, or wrote it last, gets the
    name; arguments of the captured function, which are kept anyway, get none.

    >>> checkpoint_name(torch.ones(2), "ones")
    tensor([1., 1.])
    """
    for leaf in tree_leaves(x):
        if isinstance(leaf, Traced):
            name_value(leaf, name)
    return x
