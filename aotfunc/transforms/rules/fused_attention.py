"""Rules of fused scaled-dot-product attention: the CPU, flash, memory-efficient and cuDNN kernels.

The gradient is each kernel's own backward op. Tangents and second derivatives are those of the
definition in ``attention.py``, which rules out dropout: no formula can know which entries the
kernel dropped. A batch goes into ``N``. The kernels differ in which arguments they have, and in
which order; their schemas say both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from .attention import cotangent, cotangent_of_cotangent, tangent, tangent_of_cotangent
from .batching import align, with_batch
from .schema import aten, call_op, tensor_args
from .table import jvp_of, vjp_of, vmap_of

cpu = aten._scaled_dot_product_flash_attention_for_cpu
cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
flash = aten._scaled_dot_product_flash_attention
flash_backward = aten._scaled_dot_product_flash_attention_backward
efficient = aten._scaled_dot_product_efficient_attention
efficient_backward = aten._scaled_dot_product_efficient_attention_backward
cudnn = aten._scaled_dot_product_cudnn_attention
cudnn_backward = aten._scaled_dot_product_cudnn_attention_backward

MASKS = ("attn_mask", "attn_bias")
#: the tensors that have ``N`` in front
FOLDED = ("grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp")


def undropped(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(
            "fused attention with dropout has no forward-mode or second derivative: pass "
            "dropout_p=0, or choose torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


# ----- the first derivative ----------------------------------------------------------------------


@vjp_of(cpu, diff_outputs=(0,))
def _(g, out, q, k, v, dropout_p, causal, mask, scale, *, needs):
    grads = cpu_backward(g[0], q, k, v, *out, dropout_p, causal, attn_mask=mask, scale=scale)
    of_mask = None
    if needs[3]:  # the kernel has none
        undropped(dropout_p)
        of_mask = cotangent(g[0], q, k, v, mask, causal, scale)[3]
    return *grads, of_mask


@vjp_of(flash, diff_outputs=(0,))
def _(g, out, q, k, v, dropout_p, causal, debug, scale):
    o, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = out
    saved = (o, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, seed, offset)
    return flash_backward(g[0], q, k, v, *saved, scale=scale)


@vjp_of(efficient, diff_outputs=(0,))
def _(g, out, q, k, v, mask, with_lse, dropout_p, causal, scale, *, needs):
    if not with_lse:  # the forward op kept nothing for its backward op
        undropped(dropout_p)
        return cotangent(g[0], q, k, v, mask, causal, scale)
    which = [bool(n) for n in needs]
    return efficient_backward(g[0], q, k, v, mask, *out, dropout_p, which, causal, scale=scale)


@vjp_of(cudnn, diff_outputs=(0,))
def _(g, out, q, k, v, mask, with_lse, dropout_p, causal, debug, scale, *, needs):
    if not with_lse or needs[3]:  # nothing was kept, or the backward op has no gradient for it
        undropped(dropout_p)
        return cotangent(g[0], q, k, v, mask, causal, scale)
    o, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = out
    saved = (o, lse, seed, offset, mask, cum_q, cum_k, max_q, max_k, dropout_p, causal)
    return *cudnn_backward(g[0], q, k, v, *saved, scale=scale), None


# ----- all others, from the definition -----------------------------------------------------------


class KernelCall:
    """The arguments of one call by their names."""

    def __init__(self, op: OpOverload, args: Sequence[Any]) -> None:
        names = [a.name for a in op._schema.arguments]
        self.args = dict(zip(names, args, strict=True))
        self.tensors = [names[i] for i in tensor_args(op)]
        self.mask = next((name for name in MASKS if name in names), None)

    def defined(self) -> tuple:
        """Return the arguments of the definition: ``(q, k, v, mask, causal, scale)``."""
        a = self.args
        undropped(a["dropout_p"])
        mask = a.get(self.mask)
        return a["query"], a["key"], a["value"], mask, a["is_causal"], a["scale"]

    def of_mask(self, each: Sequence[Any]) -> Any:
        """Return the mask's entry among the entries of each tensor."""
        return None if self.mask is None else each[self.tensors.index(self.mask)]

    def folded(self, batched: Sequence[bool], size: int) -> list[Any]:
        """Fold the batch into ``N``; a batched generator's state is the first sample's."""
        args = dict(self.args)
        for name, b in zip(self.tensors, batched, strict=True):
            if name in FOLDED:
                args[name] = with_batch(args[name], b, size).flatten(0, 1)
            elif name != self.mask and b:  # such as the state of the random generator
                args[name] = args[name].select(0, 0)
        if self.mask is not None:
            q, k = args["query"], args["key"]
            whole = (*q.shape[1:3], k.shape[2]) if self.wants_mask() else None
            n, b = q.shape[0] // size, self.of_mask(batched)
            args[self.mask] = folded_mask(args[self.mask], b, size, n, whole)
        return list(args.values())

    def wants_mask(self) -> bool:
        """Return whether the backward op is to compute the gradient of the mask."""
        return bool(self.args.get("grad_input_mask", (False,))[-1])


def folded_mask(
    mask: Tensor | None, carries: bool, size: int, n: int, whole: Sequence[int] | None
) -> Tensor | None:
    """Return the mask of a folded batch of ``n``: it broadcasts to ``(N, H, L, S)`` from any rank,
    or is expanded to the shape ``whole``."""
    if mask is None or (not carries and not whole and (mask.dim() < 4 or mask.shape[0] == 1)):
        return mask
    mask = align(with_batch(mask, carries, size), 4)
    return mask.expand(size, n, *(whole or mask.shape[2:])).flatten(0, 1)


def unfolded(x: Any, size: int) -> Any:
    return x.unflatten(0, (size, -1)) if isinstance(x, Tensor) else x


def shared_value(x: Any, size: int) -> Any:
    """Return a value that all samples share, such as a generator's state, as a batch."""
    return x.expand(size, *x.shape) if isinstance(x, Tensor) else x


def forward_rules(op: OpOverload) -> None:
    """Register the tangent and the batch of ``op(q, k, v, ...) -> (out, logsumexp, ...)``."""

    @jvp_of(op)
    def _(tangents, out, *args):
        at = KernelCall(op, args)
        moved = tangent((*tangents[:3], at.of_mask(tangents)), *at.defined())
        return moved, *[None] * (len(out) - 1)

    @vmap_of(op)
    def _(*args, batched, size, randomness):
        at = KernelCall(op, args)
        if at.args["dropout_p"] and randomness == "same":
            raise NotImplementedError(
                "vmap of fused attention with dropout draws anew for each element: "
                'not randomness="same"'
            )
        out, lse, *others = call_op(op, at.folded(batched, size))
        return unfolded(out, size), unfolded(lse, size), *(shared_value(x, size) for x in others)


def backward_rules(op: OpOverload) -> None:
    """Register the rules of ``op(g, q, k, v, ...) -> gradients of (q, k, v[, mask])``."""

    @vjp_of(op)
    def _(cotangents, out, g, *args):
        at = KernelCall(op, (g, *args))
        of_scores = cotangents[3] if len(cotangents) > 3 else None
        *grads, of_mask = cotangent_of_cotangent((*cotangents[:3], of_scores), g, *at.defined())
        others: list[Any] = [of_mask if n == at.mask else None for n in at.tensors[4:]]
        return *grads, *others

    @jvp_of(op)
    def _(tangents, out, g, *args):
        at = KernelCall(op, (g, *args))
        *moved, of_scores = tangent_of_cotangent(
            (*tangents[:4], at.of_mask(tangents)), g, *at.defined()
        )
        if len(out) == 3:
            return tuple(moved)
        if of_scores is not None:
            of_scores = of_scores.sum_to_size(at.args[at.mask].shape) if at.wants_mask() else None
        return *moved, of_scores

    @vmap_of(op)
    def _(*args, batched, size):
        at = KernelCall(op, args)
        grads = [unfolded(x, size) for x in call_op(op, at.folded(batched, size))]
        if at.wants_mask():  # one gradient for each sample's mask
            shape = at.args[at.mask].shape[at.of_mask(batched) :]
            of_mask = grads[3].sum_to_size(size, *[1] * (4 - len(shape)), *shape)
            grads[3] = of_mask.reshape(size, *shape)
        return tuple(grads)


for _op in (cpu, flash, efficient, cudnn):
    forward_rules(_op.default)
for _op in (cpu_backward, flash_backward, efficient_backward, cudnn_backward):
    backward_rules(_op.default)
