"""Modules as functions: the state of an ``nn.Module`` becomes arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call as functional_call
from torch.func import stack_module_state as stack_module_state

from ..errors import ArgumentError


def _emptied(model: nn.Module) -> nn.Module:
    """Return a copy of the module, as structure only: its tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(t, device="meta")
        memo[id(t)] = (
            nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def make_functional_with_buffers(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[Callable, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return ``(fmodel, params, buffers)``: ``fmodel(params, buffers, *args, **kwargs)`` computes
    ``model(*args, **kwargs)``.

    ``params`` and ``buffers`` are the model's own tensors in order of their names; with
    ``disable_autograd_tracking`` the parameters are detached.

    >>> fmodel, params, buffers = make_functional_with_buffers(nn.Linear(2, 1))
    >>> fmodel(params, buffers, torch.ones(3, 2)).shape
    torch.Size([3, 1])
    """
    params = tuple(p.detach() if disable_autograd_tracking else p for p in model.parameters())
    return FunctionalModuleWithBuffers(model), params, tuple(model.buffers())


class FunctionalModuleWithBuffers(nn.Module):
    """A module as a function of its state; ``stateless_model`` has it on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stateless_model = _emptied(model)
        self.param_names = tuple(n for n, _ in model.named_parameters())
        self.buffer_names = tuple(n for n, _ in model.named_buffers())

    def forward(
        self, params: Sequence[Tensor], buffers: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        state = dict(
            zip((*self.param_names, *self.buffer_names), (*params, *buffers), strict=True)
        )
        return functional_call(self.stateless_model, state, args, kwargs)


class FunctionalModule(FunctionalModuleWithBuffers):
    """A module without buffers as a function of its parameters."""

    def forward(self, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:  # type: ignore
        return super().forward(params, (), *args, **kwargs)


def make_functional(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[Callable, tuple[Tensor, ...]]:
    """Return ``(fmodel, params)`` with ``fmodel(params, *args, **kwargs)``; for a model without
    buffers.

    Raises ArgumentError if the model has buffers (see :func:`make_functional_with_buffers`).

    >>> fmodel, params = make_functional(nn.Linear(2, 1))
    >>> [g.shape for g in grad(lambda p: fmodel(p, torch.ones(3, 2)).sum())(params)]
    [torch.Size([1, 2]), torch.Size([1])]
    """
    if any(True for _ in model.buffers()):
        raise ArgumentError(
            "make_functional: the model has buffers; use make_functional_with_buffers"
        )
    _, params, _ = make_functional_with_buffers(model, disable_autograd_tracking)
    return FunctionalModule(model), params


def combine_state_for_ensemble(
    models: Sequence[nn.Module],
) -> tuple[Callable, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return ``(fmodel, params, buffers)`` of models of one architecture, each tensor stacked
    along a new dimension 0.

    ``vmap(fmodel, in_dims=(0, 0, None))(params, buffers, x)`` runs all models on ``x``. Raises
    ArgumentError for no models, models of different classes, or mixed training modes.

    >>> fmodel, *state = combine_state_for_ensemble([nn.Linear(2, 1) for _ in range(4)])
    >>> vmap(fmodel, in_dims=(0, 0, None))(*state, torch.ones(3, 2)).shape
    torch.Size([4, 3, 1])
    """
    if not models:
        raise ArgumentError("combine_state_for_ensemble: there are no models")
    if any(m.training != models[0].training for m in models):
        raise ArgumentError(
            "combine_state_for_ensemble: some models are in training mode and some are not"
        )
    if any(type(m) is not type(models[0]) for m in models):
        raise ArgumentError("combine_state_for_ensemble: the models must be of one class")
    fmodel, _, _ = make_functional_with_buffers(models[0])
    params = tuple(
        torch.stack([p.detach() for p in ps]).requires_grad_(ps[0].requires_grad)
        for ps in zip(*(m.parameters() for m in models), strict=True)
    )
    buffers = tuple(torch.stack(bs) for bs in zip(*(m.buffers() for m in models), strict=True))
    return fmodel, params, buffers


def replace_all_batch_norm_modules_(root: nn.Module) -> nn.Module:
    """Drop the running statistics of every batch norm in ``root``, in place: each then uses the
    batch it sees. Returns ``root``.

    >>> list(replace_all_batch_norm_modules_(nn.BatchNorm1d(2)).buffers())
    []
    """
    for m in root.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
            m.running_mean = m.running_var = m.num_batches_tracked = None
            m.track_running_stats = False
    return root
