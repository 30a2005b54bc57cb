"""Batching rules that one sample does not reach: every choice of mapped arguments, at
either end, and nested.

``vmap(..., strict=True)`` against a loop: no case may be a loop itself.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from aotfunc import check_grads, grad, jvp, vjp, vmap
from tests.inputs import f64
from tests.reference import assert_same, loop

aten = torch.ops.aten
B, D, C = 3, torch.float64, torch.complex128
INF = float("inf")


def whole(low, high, *shape):
    return torch.randint(low, high, shape)


def one_of(*rows):
    """One of these vectors."""
    return torch.tensor(rows)[torch.randint(len(rows), ())]


def pulled(f, *where):
    """``(*args, cotangent)`` -> the gradients of ``f`` for the arguments at ``where`` (default:
    the first)."""

    def run(*args):
        *args, g = args

        def of(*some):
            full = list(args)
            for i, x in zip(where or (0,), some):
                full[i] = x
            return f(*full)

        return vjp(of, *(args[i] for i in where or (0,)))[1](g)

    return run


def pushed(f):
    """``(*args, tangent)`` -> the tangent of ``f`` for that of the first argument."""
    return lambda x, *rest: jvp(lambda x: f(x, *rest[:-1]), (x,), (rest[-1],))[1]


CASES = {}


def case(name, f, make):
    """``make()`` draws the arguments of one sample."""
    CASES[name] = (f, make)


# embedding bags
# -------------------------------------------------------------------------------------------------

for mode, pad, last in itertools.product(("sum", "mean", "max"), (None, 1), (False, True)):
    bag = lambda w, i, o, mode=mode, pad=pad, last=last: F.embedding_bag(
        i, w, o, mode=mode, padding_idx=pad, include_last_offset=last
    )
    offsets = ([0, 2, 2, 6], [0, 1, 3, 6]) if last else ([0, 2, 2, 5], [0, 0, 3, 6])
    draw = lambda offsets=offsets: (f64(5, 3), whole(0, 5, 6), one_of(*offsets))
    case(f"embedding_bag {mode} {pad} {last}", bag, draw)
    # of which the kernel says less
    floats = lambda draw=draw: [x.float() if x.is_floating_point() else x for x in draw()]
    case(f"embedding_bag float32 {mode} {pad} {last}", bag, floats)
    case(
        f"embedding_bag vjp {mode} {pad} {last}",
        pulled(bag),
        lambda draw=draw, last=last: (*draw(), f64(4 - last, 3)),
    )
    case(
        f"embedding_bag jvp {mode} {pad} {last}",
        pushed(bag),
        lambda draw=draw: (*draw(), f64(5, 3)),
    )
weighted = lambda w, i, o, p: F.embedding_bag(
    i, w, o, mode="sum", per_sample_weights=p, padding_idx=2
)
weighted_draw = lambda: (f64(5, 3), whole(0, 5, 6), one_of([0, 2, 2], [0, 0, 3]), f64(6))
case("embedding_bag with weights", weighted, weighted_draw)
case(
    "embedding_bag with weights vjp", pulled(weighted, 0, 3), lambda: (*weighted_draw(), f64(3, 3))
)
case(
    "embedding_bag max_norm",
    lambda w, i: aten.embedding_renorm(w, i, 0.7, 2.0),
    lambda: (f64(5, 3), whole(0, 5, 4)),
)

# counting
# -------------------------------------------------------------------------------------------------

for low, high, bins in ((0, 0, 5), (-1, 1, 7), (-0.3, 0.7, 50), (1, 1, 3)):
    case(
        f"histc {low} {high}",
        lambda x, a=(bins, low, high): torch.histc(x, *a),
        lambda: (f64(40),),
    )
case("histc on edges", lambda x: torch.histc(x, 10, 0, 1), lambda: (whole(-1, 12, 60).to(D) / 10,))
case(
    "histc of nan",
    lambda x: torch.histc(x, 4, -1, 1),
    lambda: (torch.tensor([INF, float("nan"), 1.0, -INF]).to(D),),
)
case("histc of a matrix", lambda x: torch.histc(x.float(), 7), lambda: (f64(3, 4),))
for density in (False, True):
    how = {"density": density}
    case(
        f"histogram {how}",
        lambda x, h=how: torch.histogram(x, 6, **h),
        lambda: (whole(0, 15, 30).to(D) / 7,),
    )
    case(
        f"histogram range {how}",
        lambda x, w, h=how: torch.histogram(x, 10, range=(0.0, 1.0), weight=w, **h),
        lambda: (whole(-1, 12, 40).to(D) / 10, f64(40).abs()),
    )
    case(
        f"histogram bins {how}",
        lambda x, b, w, h=how: torch.histogram(x, b, weight=w, **h),
        lambda: (
            whole(-3, 3, 20).to(D),
            torch.tensor([-2.0, -1, 1, 2]).to(D) + whole(0, 2, 1),
            f64(20).abs(),
        ),
    )
    case(
        f"histogramdd {how}",
        lambda x, h=how: torch.histogramdd(x, [3, 4], **h),
        lambda: (f64(20, 2),),
    )
    case(
        f"histogramdd bins {how}",
        lambda x, a, b, h=how: torch.histogramdd(x, (a, b), **h),
        lambda: (f64(20, 2), f64(5).sort()[0], f64(4).sort()[0]),
    )
for dtype in (torch.float32, D, torch.int64):
    case(
        f"bincount {dtype}",
        lambda x, w: torch.bincount(x, w, minlength=9),
        lambda dtype=dtype: (whole(0, 9, 20), whole(0, 9, 20).to(dtype)),
    )

# losses
# -------------------------------------------------------------------------------------------------

REDUCTIONS = ("none", "mean", "sum")


def several(n):
    """Labels and their end mark, for one vector or for n."""
    labels = torch.stack([torch.randperm(5) for _ in range(n or 1)])
    labels[:, torch.randint(1, 5, ()).item()] = -1
    return labels if n else labels[0]


for n, reduction in itertools.product((None, 4), REDUCTIONS):
    lead = () if n is None else (n,)
    number = REDUCTIONS.index(reduction)
    of_loss = lambda lead=lead, reduction=reduction: f64(*(lead if reduction == "none" else ()))
    for p in (1, 2):
        one = lambda x, t, w, p=p, reduction=reduction: F.multi_margin_loss(
            x, t, p=p, margin=0.7, weight=w, reduction=reduction
        )
        draw = lambda lead=lead: (f64(*lead, 5), whole(0, 5, *lead), torch.rand(5, dtype=D))
        case(f"multi_margin_loss {n} {reduction} {p}", one, draw)
        back = lambda g, x, t, w, p=p, k=number: aten.multi_margin_loss_backward(
            g, x, t, p, 0.7, w, k
        )
        case(
            f"multi_margin_loss backward {n} {reduction} {p}",
            back,
            lambda draw=draw, of_loss=of_loss: (of_loss(), *draw()),
        )
    many = lambda x, t, reduction=reduction: F.multilabel_margin_loss(x, t, reduction=reduction)
    draw = lambda lead=lead, n=n: (f64(*lead, 5), several(n))
    case(f"multilabel_margin_loss {n} {reduction}", many, draw)
    case(
        f"multilabel_margin_loss vjp {n} {reduction}",
        pulled(many),
        lambda draw=draw, of_loss=of_loss: (*draw(), of_loss()),
    )

for reduction, infinity in itertools.product(REDUCTIONS, (False, True)):
    how = {"reduction": reduction, "zero_infinity": infinity}
    ctc = lambda x, t, a, b, how=how: F.ctc_loss(x, t, a, b, **how)
    fixed = lambda x, t, how=how: F.ctc_loss(x, t, (7, 6), (3, 2), **how)
    x = lambda: f64(7, 2, 5).log_softmax(-1)
    g = lambda reduction=reduction: f64(*((2,) if reduction == "none" else ()))
    draw = lambda x=x: (x(), whole(1, 5, 2, 3), whole(5, 8, 2), whole(1, 4, 2))
    flat = lambda x=x: (x(), whole(1, 5, 5), whole(5, 8, 2), one_of([3, 2], [1, 4], [5, 0]))
    case(f"ctc_loss {how}", ctc, draw)
    case(f"ctc_loss vjp {how}", pulled(ctc), lambda draw=draw, g=g: (*draw(), g()))
    case(f"ctc_loss in a vector {how}", ctc, flat)
    case(f"ctc_loss of numbers {how}", fixed, lambda x=x: (x(), whole(1, 5, 2, 3)))
    case(f"ctc_loss of numbers in a vector {how}", fixed, lambda x=x: (x(), whole(1, 5, 5)))
    case(
        f"ctc_loss of numbers vjp {how}",
        pulled(fixed),
        lambda x=x, g=g: (x(), whole(1, 5, 2, 3), g()),
    )
case(
    "ctc_loss of one",
    F.ctc_loss,
    lambda: (f64(7, 5).log_softmax(-1), whole(1, 5, 3), torch.tensor(7), torch.tensor(3)),
)

# distances, segments, pools
# -------------------------------------------------------------------------------------------

for p in (0.0, 1.0, 2.0, 3.0, INF):
    case(f"pdist {p}", lambda x, p=p: torch.pdist(x, p), lambda: (f64(4, 3),))
    case(f"pdist vjp {p}", pulled(lambda x, p=p: torch.pdist(x, p)), lambda: (f64(4, 3), f64(6)))
for by, initial in itertools.product(("sum", "mean", "max", "min", "prod"), (None, 1.5)):
    how = {"reduce": by, "initial": initial}
    lengths = lambda initial=initial: one_of(
        [2, 1 - (initial is not None), 3 + (initial is not None)], [1, 2, 3]
    )
    by_length = lambda x, n, how=how: torch.segment_reduce(x, lengths=n, **how)
    by_offset = lambda x, n, how=how: torch.segment_reduce(x, offsets=n, **how)
    inner = lambda x, n, how=how: torch.segment_reduce(x, lengths=n, axis=1, **how)
    offsets = lambda lengths=lengths: F.pad(lengths().cumsum(0), (1, 0))
    case(f"segment_reduce {how}", by_length, lambda n=lengths: (f64(6, 2), n()))
    case(f"segment_reduce offsets {how}", by_offset, lambda n=offsets: (f64(6, 2), n()))
    case(
        f"segment_reduce inside {how}",
        inner,
        lambda n=lengths: (f64(2, 6, 2), torch.stack([n(), n()])),
    )
    case(
        f"segment_reduce vjp {how}",
        pulled(by_length),
        lambda n=lengths: (f64(6, 2), n(), f64(3, 2)),
    )
for lead, (d, pool) in itertools.product(
    ((2,), ()), {2: F.fractional_max_pool2d, 3: F.fractional_max_pool3d}.items()
):
    both = lambda x, s, pool=pool: pool(x, 2, 3, _random_samples=s, return_indices=True)
    values = lambda x, s, both=both: both(x, s)[0]
    shape = (*lead, 3, *[7] * d)
    draw = lambda shape=shape, lead=lead, d=d: (
        f64(*shape),
        torch.rand((*(lead or (1,)), 3, d), dtype=D),
    )
    case(f"fractional_max_pool{d}d {lead}", both, draw)
    case(
        f"fractional_max_pool{d}d vjp {lead}",
        pulled(values),
        lambda draw=draw, lead=lead, d=d: (*draw(), f64(*lead, 3, *[3] * d)),
    )
    case(
        f"fractional_max_pool{d}d jvp {lead}",
        pushed(values),
        lambda draw=draw, shape=shape: (*draw(), f64(*shape)),
    )

# lists, other words, quantisation
# -------------------------------------------------------------------------------------

pair = lambda: (f64(2, 3).abs() + 0.1, f64(4).abs() + 0.1)
case(
    "foreach add",
    lambda a, b, c, d: torch._foreach_add([a, b], [c, d], alpha=2),
    lambda: (*pair(), *pair()),
)
case(
    "foreach addcmul",
    lambda a, b: torch._foreach_addcmul([a, b], [a, b], [b[:1], a[0, :1]], [2.0, 3.0]),
    pair,
)
case("foreach pow", lambda a, b: torch._foreach_pow(2.0, [a, b]), pair)
case("foreach maximum", lambda a, b: torch._foreach_maximum([a, b], [0.5, 1.0]), pair)
case("foreach norm", lambda a, b: torch._foreach_norm([a, b], 3), pair)
case("foreach zero", lambda a, b: aten._foreach_zero([a, b]), pair)
if hasattr(aten, "_foreach_clone"):  # new in PyTorch 2.13
    case("foreach clone", lambda a, b: aten._foreach_clone([a, b]), pair)
for f in (torch.linspace, torch.logspace):
    for steps in (0, 1, 2, 7):
        case(
            f"{f.__name__} {steps}",
            lambda a, b, f=f, n=steps: f(a, b, n, dtype=D),
            lambda: (f64(), f64()),
        )
    case(f"{f.__name__} from a number", lambda b, f=f: f(1.5, b, 5), lambda: (f64(),))
    case(f"{f.__name__} to a number", lambda a, f=f: f(a, 2.5j, 5, dtype=C), lambda: (f64(),))
case(
    "hash_tensor",
    lambda x: (torch.hash_tensor(x), torch.hash_tensor(x, (-1,), keepdim=True)),
    lambda: (f64(3, 4),),
)
case("conj_physical", torch.conj_physical, lambda: (torch.randn(4, dtype=C),))
case("hfft", torch.fft.hfft, lambda: (torch.randn(5, dtype=C),))
case(
    "conv_tbc",
    lambda x, w, b: torch.conv_tbc(x, w, b, 1),
    lambda: (f64(5, 2, 3), f64(3, 3, 4), f64(4)),
)
case(
    "slow_conv_dilated2d",
    lambda x, w, b: aten.slow_conv_dilated2d(x, w, [3, 3], b, [1, 1], [1, 1], [2, 2]),
    lambda: (f64(2, 7, 7), f64(4, 2, 3, 3), f64(4)),
)
case(
    "slow_conv_transpose3d",
    lambda x, w, b: aten.slow_conv_transpose3d(
        x, w, [3] * 3, b, [2] * 3, [1] * 3, [1] * 3, [1] * 3
    ),
    lambda: (f64(2, 2, 3, 3, 3), f64(2, 4, 3, 3, 3), f64(4)),
)
case(
    "_int_mm",
    aten._int_mm.default,
    lambda: (whole(-128, 127, 17, 8).to(torch.int8), whole(-128, 127, 8, 16).to(torch.int8)),
)
case(
    "_compute_linear_combination",
    aten._compute_linear_combination.default,
    lambda: (f64(3, 4, 4), f64(2, 3)),
)
case("glu_jvp", lambda x, t: aten.glu_jvp(F.glu(x, 1), x, t, 1), lambda: (f64(3, 4), f64(3, 4)))
case(
    "weight_norm vjp",
    pulled(torch._weight_norm, 0, 1),
    lambda: (f64(3, 2, 4), f64(3, 1, 1), f64(3, 2, 4)),
)
for kind, shape in ((0, (4, 4)), (1, (2, 4)), (2, (2, 3, 4, 4))):
    case(
        f"_masked_softmax {kind}",
        lambda x, m, kind=kind: aten._masked_softmax(x, m, -1, kind),
        lambda shape=shape: (f64(2, 3, 4, 4), torch.rand(shape) > 0.6),
    )
case(
    "fake_quantize",
    lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, -8, 7),
    lambda: (f64(3, 4).float(), torch.rand(1) + 0.1, whole(-3, 3, 1).int()),
)
for axis in (0, 1):
    case(
        f"fake_quantize channels {axis}",
        lambda x, s, z, axis=axis: torch.fake_quantize_per_channel_affine(x, s, z, axis, -8, 7),
        lambda axis=axis: (
            f64(3, 4).float(),
            torch.rand(3 + axis) + 0.1,
            whole(-3, 3, 3 + axis).int(),
        ),
    )
if hasattr(aten, "_upsample_lanczos2d_aa"):
    case(
        "lanczos",
        lambda x: aten._upsample_lanczos2d_aa(x, [3, 5], False),
        lambda: (f64(2, 3, 7, 7),),
    )

LSTM = torch.nn.LSTM(3, 4, 2, bidirectional=True)


def lstm(x, flat):
    """In float32, which oneDNN's layer takes; all weights in one vector."""
    weights, start = {}, 0
    for name, w in LSTM.named_parameters():
        weights[name] = flat[start : start + w.numel()].view(w.shape)
        start += w.numel()
    return torch.func.functional_call(LSTM, weights, (x,))[0]


weights_of_lstm = lambda: f64(sum(w.numel() for w in LSTM.parameters())).float()
case("LSTM", lstm, lambda: (f64(5, 2, 3).float(), weights_of_lstm()))
case(
    "LSTM grad",
    lambda x, w: grad(lambda w: lstm(x, w).sin().sum())(w),
    lambda: (f64(5, 2, 3).float(), weights_of_lstm()),
)

# dimensions of size 1, whose strides say nothing and are read by some kernels all the same
# ----------------------------

segments_of_one = lambda x, n: torch.segment_reduce(x, "sum", lengths=n)
for shape in ((6, 1), (1, 2), (3,)):
    draw = lambda shape=shape: (f64(*shape), torch.tensor(shape[:1]))
    case(f"segment_reduce of one {shape}", segments_of_one, draw)
    case(
        f"segment_reduce vjp of one {shape}",
        pulled(segments_of_one),
        lambda draw=draw, shape=shape: (*draw(), f64(1, *shape[1:])),
    )
case(
    "LSTM of one",
    lambda x: torch.cat([t.flatten() for t in (LSTM(x)[0], *LSTM(x)[1])]),
    lambda: (f64(5, 1, 3).float(),),
)
case("LSTM without a batch", lambda x: LSTM(x)[0], lambda: (f64(5, 3).float(),))
ctc_of_one = lambda x, t, a, b: F.ctc_loss(x, t, a, b, reduction="none")
draw = lambda: (f64(7, 1, 5).log_softmax(-1), whole(1, 5, 1, 1), whole(5, 8, 1), whole(0, 2, 1))
case("ctc_loss of one label", ctc_of_one, draw)
case("ctc_loss vjp of one label", pulled(ctc_of_one), lambda draw=draw: (*draw(), f64(1)))
for mode in ("sum", "mean", "max"):
    bag_of_one = lambda w, i, o, mode=mode: F.embedding_bag(i, w, o, mode=mode)
    draw = lambda: (f64(3, 1), whole(0, 3, 1), torch.tensor([0]))
    case(f"embedding_bag of one {mode}", bag_of_one, draw)
    case(
        f"embedding_bag vjp of one {mode}",
        pulled(bag_of_one),
        lambda draw=draw: (*draw(), f64(1, 1)),
    )
pool_of_one = lambda x, s: F.fractional_max_pool2d(x, 2, 3, _random_samples=s, return_indices=True)
case(
    "fractional_max_pool2d of one",
    pool_of_one,
    lambda: (f64(1, 1, 7, 7), torch.rand(1, 1, 2, dtype=D)),
)
case("multi_margin_loss of one", F.multi_margin_loss, lambda: (f64(1, 5), whole(0, 5, 1)))


def close(name):
    single = any(word in name for word in ("LSTM", "fake", "matrix"))
    return {"rtol": 1e-4, "atol": 1e-5} if single else {"rtol": 1e-6, "atol": 1e-8}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop(name):
    f, make = CASES[name]
    whole_f = lambda *args: f(
        *(x.contiguous() for x in args)
    )  # some kernels misread strided vectors
    torch.manual_seed(0)
    masks = [m for m in itertools.product([True, False], repeat=len(make())) if any(m)]
    for k, mask in enumerate(masks):
        samples = [make() for _ in range(B)]
        at = -1 if k % 2 else 0
        args = [
            torch.stack(column, at) if m else column[0] for m, column in zip(mask, zip(*samples))
        ]
        dims = tuple(at if m else None for m in mask)
        assert_same(vmap(f, dims, strict=True)(*args), loop(whole_f, dims)(*args), **close(name))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [n for n in CASES if "True" not in n])
def test_nested_equals_two_loops(name):
    """Both levels map everything, and each maps what the other does not."""
    f, make = CASES[name]
    torch.manual_seed(1)
    count = len(make())
    every = (True,) * count
    some = tuple(i % 2 == 0 for i in range(count))
    for outer, inner in [(every, every)] + (
        [(some, tuple(not m for m in some))] if count > 1 else []
    ):
        rows = [[make() for _ in range(2)] for _ in range(B)]
        args = []
        for i in range(count):
            column = [torch.stack([s[i] for s in row]) if inner[i] else row[0][i] for row in rows]
            args.append(torch.stack(column) if outer[i] else column[0])
        a, b = (tuple(0 if m else None for m in mask) for mask in (outer, inner))
        got = vmap(vmap(f, b, strict=True), a, strict=True)(*args)
        assert_same(got, loop(loop(f, b), a)(*args), **close(name))


def test_new_rules_derivatives():
    """Where a rule was written or an op opened for batching, its derivatives changed too."""
    torch.manual_seed(2)
    x, s = f64(2, 3, 7, 7), torch.rand(2, 3, 2, dtype=D)
    check_grads(lambda x: F.fractional_max_pool2d(x, 2, 3, _random_samples=s), (x,))
    check_grads(lambda a, b: torch.linspace(a, b, 5, dtype=D), (f64(), f64()))
    check_grads(lambda a: torch.logspace(a, 2.0, 5, dtype=D), (f64(),))
    mask = torch.rand(2, 3, 4, 4) > 0.6
    check_grads(lambda x: aten._masked_softmax(x, mask, -1, 2), (f64(2, 3, 4, 4),))
    lengths, targets = (torch.tensor([7, 6]), torch.tensor([3, 2])), whole(1, 5, 2, 3)
    check_grads(
        lambda z: F.ctc_loss(z.log_softmax(-1), targets, *lengths), (f64(7, 2, 5),), order=1
    )
    check_grads(
        lambda z: F.ctc_loss(z.log_softmax(-1), targets, (7, 6), (3, 2)), (f64(7, 2, 5),), order=1
    )
