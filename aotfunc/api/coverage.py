"""Tell which step of the look-up answers for each op, per transform: our rule, PyTorch's formula,
a decomposition, a loop, or nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch._ops import OpOverload

from ..trace.shapes.sig import Facts
from ..transforms import fallback
from ..transforms.rules.schema import tensor_args
from ..transforms.rules.table import entry_for
from ..transforms.vmap import TRANSPARENT

aten = torch.ops.aten

TRANSFORMS = ("vjp", "jvp", "vmap")
#: the steps, in the order of the look-up; the table has a column for each
KINDS = {
    "rule": "a rule of ours",
    "zero": "no derivative: integers, comparisons, factories",
    "transposed": "our reverse rule, transposed",
    "derived": "PyTorch's formula (or its transpose), traced on the single op",
    "decomposition": "what the op consists of",
    "loop": "one call per sample, with a LoopWarning",
    "none": "an error that names op, transform and line",
}

#: ops on tensors that are not dense, ops of one device, and ops of PyTorch's own tests
_ELSEWHERE = re.compile(
    r"sparse|coalesce|_co[ol]_|c?c?(col|row)_indices|_?(indices|values)(_copy)?$|_(bs|cs)[cr]"
    r"|_to_dense|dense_dim|spdiags|nested|jagged|padded|quant(?!ile)|qparams|per_channel|int[48]"
    r"|mkldnn|mps|cudnn|miopen|nnpack|cslt|_test_|_foobar|overrideable|_amp_|_fused_(ada|sgd)"
    r"|_philox|_scaled_(grouped_)?mm|_grouped_mm|_dyn_|_resize_output|_nnz|^dequantize"
    r"|^_?(set|resize|resize_as|to_dense|_pin_memory|is_pinned|_coalesced|_make_dual"
    r"|_fw_primal)(_copy)?$"
    r"|_transform_bias|_native_multi_head|_transformer_encoder|_masked_scale|_thnn_|_jagged"
    r"|_efficient_att|_flash_att"
)


@cache
def ops() -> tuple[OpOverload, ...]:
    """Return the overloads that a derivative or a batch can meet in a captured graph: those of
    aten that write to nothing, take and return tensors, and run on dense tensors of this build's
    CPU or GPU. Composite ops are left out: PyTorch decomposes them before they are recorded."""
    return tuple(sorted(_found(), key=str))


def _found() -> Iterator[OpOverload]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    here = ["CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"]
    here += ["CUDA"] if torch.cuda.is_available() else []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, full = name.partition("::")
        base, _, which = full.partition(".")
        if (
            namespace != "aten"
            or _ELSEWHERE.search(base)
            or has(name, "CompositeImplicitAutograd")
        ):
            continue
        if not any(has(name, key) for key in here):
            continue
        op = getattr(getattr(aten, base), which or "default")
        results = [str(r.type) for r in op._schema.returns]
        if not op._schema.is_mutable and tensor_args(op) and any("Tensor" in r for r in results):
            yield op


# ----- PyTorch's formulas ------------------------------------------------------------------------


@cache
def formulas() -> dict[str, dict[str, str]]:
    """Read PyTorch's table of derivatives: the entries of arguments and results by op."""
    import torchgen

    table: dict[str, dict[str, str]] = {}
    entry: dict[str, str] = {}
    path = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"
    for line in path.read_text().splitlines():
        if start := re.match(r"- name: ([\w.]+)\(", line):
            entry = table.setdefault(f"aten::{start[1]}", {})
        elif said := re.match(r"\s+([\w, ]+): (.*)", line):
            for name in said[1].split(","):
                entry.setdefault(name.strip(), said[2].strip("\"'"))
    return table


def said_of(op: OpOverload) -> tuple[dict[str, str], dict[str, str]]:
    """Return the entries of PyTorch's table for the op's tensor arguments (reverse mode) and its
    results (forward mode). Ops on lists have the formulas of the ops on their elements."""
    entry = formulas().get(op.name())
    if entry is None and op.name().startswith("aten::_foreach_"):
        base = op.name().partition("_foreach_")[2].partition(".")[0]
        entry = next(
            (e for name, e in formulas().items() if re.fullmatch(rf"aten::{base}(\..*)?", name)),
            None,
        )
    arguments = {op._schema.arguments[i].name for i in tensor_args(op)}
    given = {
        k: v
        for k, v in (entry or {}).items()
        if k not in ("dispatch", "Default", "output_differentiability")
    }
    known = {
        k: v
        for k, v in given.items()
        if not v.startswith(("not_implemented", "non_differentiable"))
    }
    # has no reverse formula
    one_for_all = op.name().startswith("aten::_foreach_") and op._overloadname == "Tensor"
    of_arguments = {k: v for k, v in known.items() if k in arguments and not one_for_all}
    return of_arguments, {k: v for k, v in known.items() if k not in arguments}


# ----- the look-up, without doing it -------------------------------------------------------------


def step(op: OpOverload, transform: str) -> str:
    """Return the step that answers for ``op`` under ``transform``, one of ``KINDS``: the walkers'
    first choice. (A rule may decline rare arguments, and a formula fail on some; then the next
    step is tried.)

    >>> step(torch.ops.aten.sin.default, "vjp")
    'rule'
    """
    if transform == "vmap":
        return _batching(op)
    entry = entry_for(op)
    if entry.nondiff or op is aten.detach.default:
        return "zero"
    if getattr(entry, transform) is not None:
        return "rule"
    if transform == "jvp" and entry.vjp is not None:
        return "transposed"
    if Facts(op).random:
        return "none"
    reverse, forward = said_of(op)
    if reverse or (transform == "jvp" and forward):
        return "derived"
    return "decomposition" if fallback.decomposition(op) is not None else "none"


def _batching(op: OpOverload) -> str:
    if entry_for(op).vmap is not None or op in TRANSPARENT:
        return "rule"
    if Facts(op).random:
        return "none"
    if Facts(op).dynamic:
        return "loop"
    if fallback.has_batching_rule(op):
        return "derived"
    return "decomposition" if fallback.decomposition(op) is not None else "loop"


def coverage() -> dict[str, dict[str, int]]:
    """Print and return the number of op overloads that each step of the look-up answers, per
    transform.

    The overloads are those that :func:`ops` lists: aten's functional, dense, not composite ones,
    differentiated or not. :func:`step` answers for a single op.

    >>> counts = coverage()  # doctest: +ELLIPSIS
    7... overloads of aten (functional, dense, not composite), PyTorch ...
    >>> counts["vmap"]["rule"] > 400
    True
    """
    counts = {t: Counter(step(op, t) for op in ops()) for t in TRANSFORMS}
    print(
        f"{len(ops())} overloads of aten (functional, dense, not composite), PyTorch "
        f"{torch.__version__}"
    )
    print(f"{'':14}" + "".join(f"{t:>8}" for t in TRANSFORMS))
    for kind, meaning in KINDS.items():
        print(f"{kind:14}" + "".join(f"{counts[t][kind]:8}" for t in TRANSFORMS) + f"  {meaning}")
    return {t: {kind: counts[t][kind] for kind in KINDS} for t in TRANSFORMS}
