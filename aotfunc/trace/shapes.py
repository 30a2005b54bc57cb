"""What an op returns for given signatures, without running it: shapes, strides, dtypes, devices, memoised.

A tensor's signature (:class:`Sig`) is interned, so that signatures compare and hash by identity. An :class:`Instr` is
an op together with its literals and the signatures of its tensor arguments; it is interned too, so that a recorded
program is keyed by the identities of its instructions. Keys hold ``(type, value)`` for literals and floats by their
bits, since ``1 == 1.0 == True`` and ``-0.0 == 0.0`` in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..cache import Cache
from ..errors import CaptureError
from .modes import off

aten = torch.ops.aten


class Sig:
    """Shape, stride, dtype, device and storage offset of a tensor; interned, so ``is`` compares."""

    __slots__ = ("device", "dtype", "offset", "plain", "proto", "shape", "stride")

    def __init__(self, shape: tuple, stride: tuple, dtype: torch.dtype, device: torch.device, offset: int) -> None:
        self.shape, self.stride, self.dtype, self.device, self.offset = shape, stride, dtype, device, offset
        self.plain = offset == 0 and stride == contiguous_stride(shape)
        with torch._C._DisableTorchDispatch():
            self.proto = self.fresh()

    def fresh(self) -> Tensor:
        """A new meta tensor with this signature."""
        if not self.offset:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return torch.empty(self.extent, dtype=self.dtype, device="meta").as_strided(
            self.shape, self.stride, self.offset
        )

    @property
    def extent(self) -> int:
        """How many elements of the storage it reaches."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True) if n)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return self.proto.numel()

    @property
    def start(self) -> Sig:
        """The same at the beginning of a storage."""
        return self.moved(-self.offset)

    def moved(self, by: int) -> Sig:
        """The same, so many elements further on."""
        return make_sig(self.shape, self.stride, self.dtype, self.device, self.offset + by) if by else self

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def contiguous_stride(shape: tuple) -> tuple:
    """Strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


#: two equal signatures are not identical after one was forgotten: they only miss caches and rewritings
_sigs = Cache(1 << 14)


def make_sig(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, offset: int = 0) -> Sig:
    """The one signature with these values."""
    key = (shape, stride, dtype, device, offset)
    sig = _sigs.get(key)
    if sig is None:
        sig = Sig(tuple(shape), tuple(stride), dtype, device, offset)
        _sigs.put(key, sig)
    return sig


def sig_of(t: Tensor, device: torch.device | None = None) -> Sig:
    """The signature of a tensor (``device`` overrides: a meta tensor stands for one of that device)."""
    if t.layout is not torch.strided or t.is_quantized:
        raise CaptureError(f"only dense tensors can be captured, not one with layout {t.layout} and dtype {t.dtype}")
    return make_sig(t.shape, t.stride(), t.dtype, device or t.device, t.storage_offset())


class Slot(int):
    """The place of the i-th tensor in an instruction's argument template."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


@cache
class Facts:
    """What an overload's schema and tags say: which arguments it writes, what its returns alias, whether it draws."""

    def __init__(self, op: OpOverload) -> None:
        schema = op._schema
        arguments, returns = schema.arguments, schema.returns
        written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.writes = tuple(written)
        self.names = tuple(a.name for a in arguments)
        #: for each return, the argument that it *is* (written in place), or None
        self.same: tuple[int | None, ...] = tuple(
            next((i for i in written if arguments[i].alias_info.before_set == r.alias_info.before_set), None)
            if r.alias_info is not None and r.alias_info.is_write
            else None
            for r in returns
        )
        views = [r.alias_info for r in returns if r.alias_info is not None and not r.alias_info.is_write]
        #: the argument that the returns are views of, or None
        self.view_of: int | None = None
        if views and op is not aten.lift_fresh.default:  # a constant made inside is new on every run
            shared = views[0].before_set
            self.view_of = next(
                (i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.before_set & shared), 0
            )
        tags = op.tags
        self.random = torch.Tag.nondeterministic_seeded in tags
        self.reshapes = torch.Tag.inplace_view in tags
        self.dynamic = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
        self.accumulates = op in (torch.ops.aten.add_.Tensor, torch.ops.aten.sub_.Tensor)
        #: counts from where the storage begins, not from where its argument does
        self.strided = "as_strided" in op._schema.name
        self.pure = not (self.writes or self.strided) and self.view_of is None
        #: makes a tensor of no other's values: it may be told to require grad (`requires_grad=True`)
        self.factory = "pin_memory" in self.names or op is aten.lift_fresh.default
        self.returns_tensors = all("Tensor" in str(r.type) for r in returns)
        self.effect = (not returns and not written) or op.namespace == "aotfunc_effect"


class Instr:
    """An op with its literals and argument signatures, and what it returns: interned. ``anywhere`` is that of the same
    call at the beginning of every storage, where that makes a difference to the signatures alone; ``number`` the dtype
    with which a Python number among its arguments may be a tensor.
    """

    __slots__ = ("anywhere", "args", "facts", "kwargs", "made", "number", "op", "outs", "sigs")

    def __init__(
        self, op: OpOverload, args: tuple, kwargs: dict, sigs: tuple, outs: Any, anywhere: Instr | None = None
    ) -> None:
        self.op, self.args, self.kwargs, self.sigs, self.outs = op, args, kwargs, sigs, outs
        self.facts = Facts(op)
        self.anywhere = anywhere
        self.number: torch.dtype | None = None
        self.made: list[Sig] | None = None  # see records.result_sigs

    def __repr__(self) -> str:
        return f"{self.op}{self.args}"


_memo = Cache(1 << 15)
#: the instruction for a key, or None
interned = _memo.get

SIMPLE = frozenset(
    (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
)


def env_key() -> tuple:
    """The global settings that shape inference depends on."""
    return (torch.get_default_dtype(), _deterministic())


_deterministic = torch._C._get_deterministic_algorithms


def encode(a: Any, key: list, sink: Any) -> Any:
    """Append ``a`` to the key, tensors through ``sink(tensor) -> Sig``; return the template."""
    cls = a.__class__
    if cls in SIMPLE:
        key += (cls, a)
        return a
    if cls is float:
        key.append(a.hex())
        return a
    if cls is complex:
        key += (cls, a.real.hex(), a.imag.hex())
        return a
    if isinstance(a, Tensor) or cls.__name__ == "Node":
        slot, sig = sink(a)
        key.append(sig)
        return slot
    if isinstance(a, list | tuple):
        key.append("[")
        result = [encode(x, key, sink) for x in a]
        key.append("]")
        return result if cls is not tuple else tuple(result)
    if isinstance(a, torch.Generator):
        key += (cls, id(a))
        return a
    if isinstance(a, float | int | str):  # numpy scalars, enums
        key += (cls, repr(a))
        return a
    if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise CaptureError(f"symbolic sizes are not captured yet: got {a}")
    key += (cls, id(a))
    return a


def intern(key: tuple, op: OpOverload, args: tuple, kwargs: dict, sigs: tuple, outs: Any = None) -> Instr:
    """The instruction for this key, made (its outputs inferred, unless given) if it is new."""
    facts, anywhere = Facts(op), None
    if any(s.offset for s in sigs) and not facts.strided and not facts.writes:
        there = tuple([k.start if k.__class__ is Sig else k for k in key])
        anywhere = interned(there) or intern(there, op, args, kwargs, tuple([s.start for s in sigs]), outs)
        outs = outs if facts.view_of is None else moved(anywhere.outs, sigs[0].offset)
    if outs is None:
        outs = infer(op, args, kwargs, sigs)
    instr = Instr(op, args, kwargs, sigs, outs, anywhere)
    _memo.put(key, instr)
    return instr


def moved(outs: Any, by: int) -> Any:
    """Views of a tensor, if that lay so many elements further on."""
    return outs.moved(by) if outs.__class__ is Sig else tuple([moved(o, by) for o in outs])


def fill(template: Any, values: Any) -> Any:
    """The template with each slot replaced by its value."""
    cls = template.__class__
    if cls is Slot:
        return values[template]
    if cls is list:
        return [fill(x, values) for x in template]
    if cls is tuple:
        return tuple(fill(x, values) for x in template)
    return template


#: the signatures of what ops return that are only recorded, and never run
TOLD: dict[OpOverload, Callable] = {}


def infer(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """The signatures of the outputs: by our own rule, else as PyTorch says."""
    from .infer import by_rule

    if (told := TOLD.get(op)) is not None:
        return told(*fill(args, sigs))
    check_devices(op, sigs)
    outs = by_rule(op, args, kwargs, sigs)
    return by_kernel(op, args, kwargs, sigs) if outs is NotImplemented else outs


def by_kernel(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """The signatures of the outputs, from the op's meta kernel; from a run on zeros where it has none, does not know
    the layout, or would have to import half of PyTorch.
    """
    device = output_device(op, kwargs, sigs)
    args = tuple([no_generator(a) for a in args])
    kwargs = {k: no_generator(v) for k, v in kwargs.items()}
    with torch._C._DisableTorchDispatch(), off(), torch.no_grad():
        if better_tried(op, sigs):
            try:
                return signatures(_on_zeros(op, args, kwargs, sigs), device)
            except (RuntimeError, IndexError):
                pass  # zeros are no good argument for this op: let the meta kernel answer
        metas = [s.proto if Facts(op).pure else s.fresh() for s in sigs]
        try:
            outs = op(*fill(args, metas), **{k: fill(v, metas) for k, v in kwargs.items()} | _on_meta(op, kwargs))
        except (NotImplementedError, RuntimeError) as e:
            if "data-dependent shape" in str(e):  # the fake implementation of a custom op asks for such a size
                Facts(op).dynamic = True
            missing = isinstance(e, NotImplementedError) or "fake impl" in str(e)
            if not missing and (Facts(op).dynamic or sum(s.numel for s in sigs) >= AFFORDABLE):
                raise
            outs = _on_zeros(op, args, kwargs, sigs)  # it may take what the meta kernel refuses; if not, eager says so
    return signatures(outs, device)


def no_generator(a: Any) -> Any:
    """Nothing is drawn from the user's for a signature, and some meta kernels take none."""
    return None if isinstance(a, torch.Generator) else a


#: elements of zeros on which an op may be tried
AFFORDABLE = 1 << 22


#: ops whose results the device's kernel lays out, or leaves empty, as no meta kernel says
DEVICE_DECIDES = ("linalg_", "_linalg_", "_fft_", "multi_margin_loss", "multilabel_margin_loss", "nonzero_static") + (
    ("_embedding_bag", "_embedding_bag_forward_only")
)
#: zeros are indices out of bounds to them, or a failed assertion, which kernels on a GPU do not survive
NOT_OF_ZEROS = {"lu_unpack", "linalg_lu_solve", "linalg_ldl_solve", "multinomial", "_functional_assert_async"}


def better_tried(op: OpOverload, sigs: tuple) -> bool:
    """Whether the device's kernel, on zeros, is a better witness than the meta kernel: where the strides (or empty
    statistics, or the dimensions of a single loss) of the results depend on the device in ways that meta kernels do not
    know, for unusual layouts they often do not; and where the meta kernel is written in Python.
    """
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
    """Whether the result's shape depends on values, for arguments of these signatures: with indices it does not."""
    masks = any(s.dtype in (torch.bool, torch.uint8) for s in sigs[1:])
    return Facts(op).dynamic and (op is not aten.index.Tensor or masks)


#: composed of ops with such kernels
MADE_OF_SUCH = {"rot90", "_trilinear", "constant_pad_nd", "randint_like", "mish_backward", "_conj_physical"}


@cache
def python_meta(op: OpOverload) -> bool:
    """Whether the op's meta kernel is written in Python, or made of such: it imports sympy and often Dynamo, seconds
    in a fresh process.
    """
    if plain_name(op) in MADE_OF_SUCH:
        return True
    entries = torch._C._dispatch_dump(op.name()).splitlines()
    return any(e.startswith("Meta: registered at") and ".py:" in e for e in entries)


def _on_meta(op: OpOverload, kwargs: dict) -> dict:
    """Factories take their device as an argument: on meta they must be told so."""
    return {"device": torch.device("meta")} if any(a.name == "device" for a in op._schema.arguments) else {}


def _on_zeros(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """The stated fall-back for ops without a meta kernel: run once on zeros of the right shape, keep the signature."""
    if by_values(op, sigs):
        raise CaptureError(f"the shape of {op}'s result depends on the values of its arguments")
    real = [zeros_at(s) for s in sigs]
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [g.get_state() for g in generators]
    try:
        return op(*fill(args, real), **{k: fill(v, real) for k, v in kwargs.items()})
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


def zeros_at(s: Sig) -> Tensor:
    """Zeros with this signature, the offset included."""
    reach = s.offset + 1 + sum((n - 1) * step for n, step in zip(s.shape, s.stride, strict=True))
    memory = torch.zeros(reach if s.numel else s.offset, dtype=s.dtype, device=s.device)
    return memory.as_strided(s.shape, s.stride, s.offset)


def output_device(op: OpOverload, kwargs: dict, sigs: tuple) -> torch.device:
    """The device of an op's results: asked for, or that of its tensors (0-dim CPU tensors follow the others)."""
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
    ("copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
)


def check_devices(op: OpOverload, sigs: tuple) -> None:
    """Refuse tensors on several devices, which some meta kernels do not look at; 0-dim CPU tensors go with any."""
    here = {s.device for s in sigs if s.shape or s.device.type != "cpu"}
    if len(here) > 1 and op.namespace == "aten" and plain_name(op) not in MIXES:
        raise CaptureError(
            f"{plain_name(op)} was given tensors on {' and '.join(sorted(map(str, here)))}: move them to one device"
        )


def signatures(outs: Any, device: torch.device | None = None) -> Any:
    """A result with its tensors replaced by signatures; lists become tuples."""
    if isinstance(outs, Tensor):
        return sig_of(outs, device)
    if isinstance(outs, list | tuple):
        return tuple(signatures(o, device) for o in outs)
    return outs
