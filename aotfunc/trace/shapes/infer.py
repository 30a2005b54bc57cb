"""Infer the signatures of an op's results: by our rule, else by PyTorch's kernel on meta tensors,
else by a run on zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ...errors import CaptureError
from ..modes import device_generators, off
from .sig import Facts, Sig, contiguous_stride, fill, sig_of

aten = torch.ops.aten


_deterministic = torch._C._get_deterministic_algorithms


#: ops that are only recorded, never run -> their result signatures
TOLD: dict[OpOverload, Callable] = {}

#: op that fills with a number -> that argument's position
FILLS: dict[OpOverload, int] = {
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.fill_diagonal_.default), 1),
    **dict.fromkeys((aten.fill.Scalar, aten.fill_.Scalar), 1),
    **dict.fromkeys((aten.new_full.default, aten.constant_pad_nd.default), 2),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill_.Scalar), 2),
    **dict.fromkeys((aten.index_fill.int_Scalar, aten.index_fill_.int_Scalar), 3),
    **dict.fromkeys((aten.scatter.value, aten.scatter_.value), 3),
}


def infer(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """Return the signatures of the results: by our rule, else by PyTorch's kernel."""
    from .rules import by_rule

    if (told := TOLD.get(op)) is not None:
        return told(*fill(args, sigs))
    check_devices(op, sigs)
    outs = by_rule(op, args, kwargs, sigs)
    outs = by_kernel(op, args, kwargs, sigs) if outs is NotImplemented else outs
    if len(args) > (place := FILLS.get(op, len(args))):
        check_filling(args[place], outs.dtype)
    return outs


def check_filling(value: Any, dtype: torch.dtype) -> None:
    """Raise eager's RuntimeError for a number that the dtype does not hold: meta kernels take it,
    and so do rewritings and kernels of other backends."""
    with torch._C._DisableTorchDispatch(), off():
        torch.empty(0, dtype=dtype).fill_(value)


def by_kernel(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """Return the signatures of the results by the op's meta kernel; by a run on zeros if it has
    none, does not know the layout, or would import half of PyTorch."""
    device = output_device(op, kwargs, sigs)
    args = tuple([no_generator(a) for a in args])
    kwargs = {k: no_generator(v) for k, v in kwargs.items()}
    with torch._C._DisableTorchDispatch(), off(), torch.no_grad():
        if better_tried(op, sigs):
            try:
                return signatures(_on_zeros(op, args, kwargs, sigs), device)
            except (RuntimeError, IndexError):
                pass  # the op refuses zeros: ask the meta kernel
        metas = [s.proto if Facts(op).pure else s.fresh() for s in sigs]
        try:
            outs = op(
                *fill(args, metas), **{k: fill(v, metas) for k, v in kwargs.items()} | _on_meta(op)
            )
        except (NotImplementedError, RuntimeError) as e:
            # the fake implementation of a custom op asks for such a size
            if "data-dependent shape" in str(e):
                Facts(op).dynamic = True
            missing = isinstance(e, NotImplementedError) or "fake impl" in str(e)
            if not missing and (Facts(op).dynamic or sum(s.numel for s in sigs) >= AFFORDABLE):
                raise
            # try a run: it may take arguments that the meta kernel refuses; else its error is
            # eager's
            outs = _on_zeros(op, args, kwargs, sigs)
    return signatures(outs, device)


def no_generator(a: Any) -> Any:
    """Replace the user's generator by None: inference must not draw from it."""
    return None if isinstance(a, torch.Generator) else a


#: most elements of zeros on which an op is tried
AFFORDABLE = 1 << 22


#: ops whose results have strides, or are empty, as only the device's kernel knows
DEVICE_DECIDES = tuple(
    """
    linalg_ _linalg_ _fft_ multi_margin_loss multilabel_margin_loss nonzero_static mkldnn_rnn_layer
    _embedding_bag _embedding_bag_forward_only
    """.split()
)
#: ops to which zeros are indices out of bounds, or a failed assertion, which kernels on a GPU do
#: not survive
NOT_OF_ZEROS = (
    "lu_unpack linalg_lu_solve linalg_ldl_solve multinomial _functional_assert_async".split()
)


def better_tried(op: OpOverload, sigs: tuple) -> bool:
    """Return whether to run the device's kernel on zeros before asking the meta kernel. Meta
    kernels often do not know which strides, empty statistics or dimensions a device gives its
    results; those written in Python import half of PyTorch."""
    name = plain_name(op)
    facts, affordable = Facts(op), sum(s.numel for s in sigs) < AFFORDABLE
    if name in NOT_OF_ZEROS or facts.effect or by_values(op, sigs):
        return False
    if op.namespace == "aten" and affordable:
        if facts.pure and any(s.stride != contiguous_stride(s.shape) for s in sigs):
            return True
        if sigs and facts.view_of is None and python_meta(op):
            return True
    if name.startswith(("convolution", "_native_batch_norm_legit", "rrelu_with_noise")):
        return any(not s.plain for s in sigs) or name.endswith("no_training")
    return name.startswith(DEVICE_DECIDES)


def by_values(op: OpOverload, sigs: tuple) -> bool:
    """Return whether the result's shape depends on values; by integer indices it does not."""
    masks = any(s.dtype in (torch.bool, torch.uint8) for s in sigs[1:])
    return Facts(op).dynamic and (op is not aten.index.Tensor or masks)


#: composed of ops with such kernels
MADE_OF_SUCH = "rot90 _trilinear constant_pad_nd randint_like mish_backward _conj_physical".split()


@cache
def python_meta(op: OpOverload) -> bool:
    """Return whether the op's meta kernel is written in Python, or composed of such kernels. It
    imports sympy and often Dynamo, seconds in a fresh process."""
    if plain_name(op) in MADE_OF_SUCH:
        return True
    entries = torch._C._dispatch_dump(op.name()).splitlines()
    return any(e.startswith("Meta: registered at") and ".py:" in e for e in entries)


def _on_meta(op: OpOverload) -> dict:
    """Call a factory with meta as its device argument."""
    return (
        {"device": torch.device("meta")}
        if any(a.name == "device" for a in op._schema.arguments)
        else {}
    )


def _on_zeros(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """Run an op without a meta kernel once on zeros; cache the result signatures."""
    if by_values(op, sigs):
        raise CaptureError(f"the shape of {op}'s result depends on the values of its arguments")
    real = [zeros_at(s) for s in sigs]
    generators = device_generators()
    states = [g.get_state() for g in generators]
    try:
        with torch.enable_grad():  # with outputs that only a backward reads
            return op(*fill(args, real), **{k: fill(v, real) for k, v in kwargs.items()})
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


def zeros_at(s: Sig) -> Tensor:
    """Return zeros of this signature, offset included."""
    memory = torch.zeros(s.extent, dtype=s.dtype, device=s.device)
    return memory.as_strided(s.shape, s.stride, s.offset)


def output_device(op: OpOverload, kwargs: dict, sigs: tuple) -> torch.device:
    """Return the device of an op's results: its ``device`` argument, else that of its tensors
    (0-dim CPU tensors follow the others)."""
    if plain_name(op) in MIXES:
        return sigs[0].device
    if (asked := kwargs.get("device")) is not None:
        return torch.device(asked)
    here = [s.device for s in sigs]
    return next((d for d in here if d.type != "cpu"), here[0] if here else torch.device("cpu"))


def plain_name(op: OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


#: ops whose indices may lie on the CPU, or that copy from anywhere
MIXES = frozenset(
    """
    copy copy_ index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put
    """.split()
)


def check_devices(op: OpOverload, sigs: tuple) -> None:
    """Refuse tensors on several devices, which some meta kernels accept; 0-dim ones may."""
    here = {s.device for s in sigs if s.shape or s.device.type != "cpu"}
    if len(here) > 1 and op.namespace == "aten" and plain_name(op) not in MIXES:
        raise CaptureError(
            f"{plain_name(op)} was given tensors on {' and '.join(sorted(map(str, here)))}: move "
            "them to one device"
        )


def signatures(outs: Any, device: torch.device | None = None) -> Any:
    """Return a result with signatures in place of tensors and tuples in place of lists."""
    if isinstance(outs, Tensor):
        return sig_of(outs, device)
    if isinstance(outs, list | tuple):
        return tuple(signatures(o, device) for o in outs)
    return outs
