"""coverage(): what it says of an op is what the walkers do with it, for every op that made-up
arguments can call."""

import itertools
from functools import cache

import pytest
import torch

import aotfunc
from aotfunc.api.coverage import KINDS, TRANSFORMS, coverage, ops, step
from aotfunc.errors import AotfuncError
from aotfunc.transforms import batched_op, jvp, loops, vjp, walk
from aotfunc.transforms.rules.table import RULES

SHAPES = [(3, 3), (3,), (2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4, 4), (), (2, 3, 3, 2)]
INTEGERS = {"index", "indices", "target", "offsets", "lengths", "sorter"}


def guess(argument, shape, dtype, number):
    kind, name = str(argument.real_type), argument.name
    tensor = (
        torch.zeros(shape, dtype=torch.int64)
        if name in INTEGERS
        else torch.rand(shape).mul(4).to(dtype)
    )
    if name in ("mask", "condition"):
        tensor = tensor > 0.5
    return {
        "Tensor": tensor,
        "List[Tensor]": [tensor, tensor.clone()],
        "List[Optional[Tensor]]": [torch.zeros(2, dtype=torch.int64)],
        "int": number,
        "SymInt": number,
        "List[int]": [number] * max(len(shape) - 2, 1),
        "List[SymInt]": [number] * max(len(shape) - 2, 1),
        "float": 0.5,
        "number": number,
        "bool": False,
        "str": "sum",
        "List[bool]": [True] * 3,
        "List[number]": [1.0, 2.0],
    }.get(kind)


@cache
def call_of(op):
    """``(f, tensors)``: arguments that the op takes, and the op as a function of the tensors among
    them, or None."""
    schema = [
        a
        for a in op._schema.arguments
        if not a.has_default_value() or a.name in ("indices", "mask")
    ]
    for dtype, number, shape in itertools.product(
        (torch.float64, torch.int64, torch.complex128), (1, 0, 2, 3), SHAPES
    ):
        given = {a.name: guess(a, shape, dtype, number) for a in schema}
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
        lists = {
            k: v
            for k, v in given.items()
            if isinstance(v, list) and isinstance(v[0], torch.Tensor)
        }
        try:
            torch.manual_seed(0)
            op(**given)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
            NotImplementedError,
            AssertionError,
        ):
            continue
        leaves = [*tensors.values(), *(t for v in lists.values() for t in v)]

        def f(*values, given=given, tensors=tensors, lists=lists):
            rest = iter(values)
            new = {k: next(rest) for k in tensors} | {
                k: [next(rest) for _ in v] for k, v in lists.items()
            }
            return op(**(given | new))

        return f, leaves
    return None


@pytest.fixture
def taken(monkeypatch):
    """The step that was taken last for each op, as it happens."""
    steps = {}

    def noting(transform, module, name, kind, op_of):
        original = getattr(module, name)

        def noted(*args, **kwargs):
            steps[transform, op_of(*args)] = kind(*args) if callable(kind) else kind
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    def reverse(rule, op):
        return (
            "zero"
            if rule is vjp.no_slope
            else "rule"
            if op in RULES and rule is RULES[op].vjp
            else "derived"
        )

    def transposed(b, rule, op, *rest):
        return "transposed" if op in RULES and RULES[op].vjp is not None else "derived"

    noting("vjp", vjp, "as_arguments", reverse, lambda rule, op: op)
    noting("vjp", vjp, "reverse_by_parts", "decomposition", lambda b, n, *rest: n.target)
    noting("jvp", jvp, "jvp_make", "rule", lambda n: n.target)
    noting("jvp", jvp, "derived_tangents", "derived", lambda b, n, *rest: n.target)
    noting("jvp", jvp, "forward_by_transposition", transposed, lambda b, rule, op, *rest: op)
    noting("jvp", jvp, "forward_by_parts", "decomposition", lambda b, body, ts, args, op: op)
    noting("vmap", batched_op, "fragment", "rule", lambda walk, n: n.target)
    noting("vmap", batched_op, "derived_batch", "derived", lambda walk, b, n, *rest: n.target)
    noting("vmap", batched_op, "by_parts", "decomposition", lambda walk, b, n, *rest: n.target)
    noting("vmap", loops, "looped", "loop", lambda b, n, *rest: n.target)
    noting("vmap", loops, "looped_by_value", "loop", lambda b, n, *rest: n.target)
    return steps


def floating(x):
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def outcome(op, transform, taken):
    """The step that is taken for made-up arguments; None where they do not get as far as the op's
    rule."""
    made = call_of(op)
    if made is None:
        return None
    f, leaves = made
    wrt = [i for i, x in enumerate(leaves) if floating(x)]

    def of_floats(*values):
        full = list(leaves)
        for i, v in zip(wrt, values, strict=True):
            full[i] = v
        outs = f(*full)
        return [o for o in torch.utils._pytree.tree_leaves(outs) if floating(o)]

    primals = [leaves[i] for i in wrt]
    taken.clear()
    walk._fragments.clear()
    found = []
    try:
        if transform == "vmap":
            aotfunc.vmap(f, randomness="same")(*(torch.stack([x, x]) for x in leaves))
        elif not wrt or not of_floats(*primals):
            return None
        elif transform == "vjp":
            out, pull = aotfunc.vjp(of_floats, *primals)
            found = pull([torch.ones_like(o) for o in out])
        else:
            found = aotfunc.jvp(
                of_floats, tuple(primals), tuple(torch.ones_like(x) for x in primals)
            )[1]
    except AotfuncError as e:
        nothing = (
            "no rule of ours",
            "draws random numbers and has no",
        )  # else a rule's own refusal
        return "none" if f"{op}" in str(e) and any(text in str(e) for text in nothing) else None
    except (RuntimeError, IndexError):  # made-up arguments that a formula does not bear
        return None
    if (transform, op) in taken:
        return taken[transform, op]
    return "zero" if found and not any(x.any() for x in found) else None


#: kernels that crash on made-up arguments
FRAGILE = ("batch_norm",)
#: PyTorch's formula is there and cannot be used: the next step answers
NEXT_STEP = {("jvp", "aten._weight_norm_interface.default")}
CASES = [
    *(("vjp", kind) for kind in ("rule", "zero", "derived", "decomposition", "none")),
    *(
        ("jvp", kind)
        for kind in ("rule", "zero", "transposed", "derived", "decomposition", "none")
    ),
    *(("vmap", kind) for kind in ("rule", "derived", "decomposition", "loop")),
]


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.limit(120)
@pytest.mark.parametrize(("transform", "kind"), CASES)
def test_what_it_says_is_what_happens(transform, kind, taken):
    """For two dozen ops of each kind, spread over all of them."""
    candidates = [
        op
        for op in ops()
        if step(op, transform) == kind and not any(w in str(op) for w in FRAGILE)
    ]
    candidates = [op for op in candidates if (transform, str(op)) not in NEXT_STEP]
    stride = max(1, len(candidates) // 60)
    seen = {}
    for op in candidates[::stride]:
        if len(seen) < 24 and (done := outcome(op, transform, taken)) is not None:
            seen[str(op)] = done
    assert len(seen) >= min(6, len(candidates) // 2), (
        f"of {len(candidates)} only {seen} could be called"
    )
    assert not {op: done for op, done in seen.items() if done != kind}


def test_the_table(capsys):
    counts = coverage()
    printed = capsys.readouterr().out
    assert list(counts) == list(TRANSFORMS)
    for transform, by_kind in counts.items():
        assert sum(by_kind.values()) == len(ops())
        assert by_kind == {
            kind: sum(step(op, transform) == kind for op in ops()) for kind in KINDS
        }
    assert all(kind in printed for kind in KINDS)
    assert counts["vmap"]["loop"] <= 15, "an op that could be batched runs in a loop now"


@pytest.mark.parametrize(
    ("op", "transform", "kind"),
    [
        (torch.ops.aten.sin.default, "vjp", "rule"),
        (torch.ops.aten.eq.Tensor, "jvp", "zero"),
        (torch.ops.aten.unique_dim.default, "vmap", "loop"),
        (torch.ops.aten._pdist_backward.default, "vjp", "decomposition"),
    ],
)
def test_a_single_op(op, transform, kind):
    assert step(op, transform) == kind
