"""Our shape rules: exactly the meta kernels' answers, silence about invalid calls, and nothing
imported on the way."""

import itertools
import json
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import aotfunc
from aotfunc.errors import CaptureError
from aotfunc.trace.shapes import infer
from aotfunc.trace.shapes.instr import SIMPLE, encode
from aotfunc.trace.shapes.rules import by_rule, ordered_strides, shape_rule_for
from aotfunc.trace.shapes.sig import Facts, Sig, Slot, contiguous_stride, fill, make_sig, sig_of

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.complex64, torch.int64, torch.float16)
OTHERS = (*DTYPES, torch.float64, torch.int32, torch.bool, torch.bfloat16, torch.uint8)
LITERALS = (*SIMPLE, float)
#: families that have no rules, or whose samples are many and slow
SKIPPED = (
    "linalg",
    "fft",
    "sparse",
    "masked",
    "signal",
    "jiterator",
    "quant",
    "special",
    "_refs",
    "pool3d",
    "conv3d",
)


class Calls(TorchDispatchMode):
    """Keeps each aten call that a rule may answer, as a template and signatures."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            shape_rule_for(func) is not None and not Facts(func).dynamic
        ):  # of those no kernel says a shape
            key, sigs = [func], []

            def sink(t):
                sigs.append(sig_of(t))
                return Slot(len(sigs) - 1), sigs[-1]

            template = tuple(encode(a, key, sink) for a in args)
            key.append("**")
            ktemplate = {k: encode(v, key, sink) for k, v in kwargs.items()}
            if all(
                isinstance(x, LITERALS) for x in tree_leaves((template, list(ktemplate.values())))
            ):
                self.seen.setdefault(tuple(key), (func, template, ktemplate, tuple(sigs)))
        return func(*args, **kwargs)


def layouts(sample):
    """The sample as it is, transposed, channels last or at an offset, and expanded."""

    def changed(f):
        def one(t):
            return (
                f(t.detach()).requires_grad_(t.requires_grad) if t.layout is torch.strided else t
            )

        return tree_map_only(torch.Tensor, one, (sample.input, sample.args, sample.kwargs))

    def elsewhere(t):
        if t.ndim == 4:
            return t.contiguous(memory_format=torch.channels_last)
        return torch.cat([t, t])[t.shape[0] :] if t.ndim else t

    yield sample.input, sample.args, sample.kwargs
    yield changed(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t)
    yield changed(elsewhere)
    yield changed(lambda t: t[:1].expand_as(t) if t.numel() and t.ndim else t)


@pytest.fixture(scope="module")
def calls():
    """Calls of many ops and their derivatives, from OpInfo's samples in several dtypes and
    layouts."""
    mode, draw = Calls(), random.Random(0)
    warnings.simplefilter("ignore")
    for info in op_db:
        if any(word in info.name for word in SKIPPED):
            continue
        for dtype in [d for d in DTYPES if d in info.dtypes]:
            main = dtype is torch.float32
            grad = info.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
            try:
                # not info.sample_inputs, which walks the whole stack of a test for each sample
                generated = info.sample_inputs_func(info, "cpu", dtype, grad)
                samples = list(itertools.islice(generated, 8 if main else 1))
            except (
                RuntimeError,
                ValueError,
                TypeError,
            ):  # a sample generator that does not know the dtype
                continue
            for sample in draw.sample(samples, min(2 if main else 1, len(samples))):
                for x, args, kwargs in itertools.islice(layouts(sample), 4 if main else 1):
                    _run(mode, info.op, x, args, kwargs)
    return list(mode.seen.values())


def _run(mode, op, x, args, kwargs):
    """The op and its derivatives once; samples that this layout makes invalid are passed over."""
    try:
        with mode:
            outs = [
                o
                for o in tree_leaves(op(x, *args, **kwargs))
                if isinstance(o, torch.Tensor) and o.requires_grad
            ]
            ins = [
                t
                for t in tree_leaves((x, args, kwargs))
                if isinstance(t, torch.Tensor) and t.requires_grad
            ]
            if outs and ins:
                torch.autograd.grad(
                    outs, ins, [torch.ones_like(o) for o in outs], allow_unused=True
                )
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        pass


def by_kernel(op, args, kwargs, sigs):
    """PyTorch's answer, or its complaint."""
    try:
        return infer.by_kernel(op, args, kwargs, sigs)
    except TimeoutError:
        raise
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:100]}"


def refused(op, args, kwargs, sigs):
    """Whether the CPU's kernel refuses such tensors."""
    tensors = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype).fill_(1) for s in sigs]
    try:
        op(*fill(args, tensors), **{k: fill(v, tensors) for k, v in kwargs.items()})
    except RuntimeError:
        return True
    return False


def described(outs):
    """An answer with all that must agree; signatures print without strides."""
    if isinstance(outs, Sig):
        return tuple(outs.shape), tuple(outs.stride), outs.dtype, outs.device, outs.offset
    return [described(o) for o in outs] if isinstance(outs, tuple) else outs


def mismatches(calls):
    """How many calls the rules answer, and where they differ from the kernels."""
    answered, wrong = 0, []
    for op, args, kwargs, sigs in calls:
        try:
            ours = by_rule(op, args, kwargs, sigs)
        except RuntimeError:  # the CPU's kernels refuse what meta kernels take
            if not refused(op, args, kwargs, sigs):
                wrong.append(f"{op}{args}{kwargs} of {[described(s) for s in sigs]}: refused")
            continue
        if ours is NotImplemented:
            continue
        answered += 1
        theirs = by_kernel(op, args, kwargs, sigs)
        if ours is not theirs and described(ours) != described(theirs):
            inputs = [described(s) for s in sigs]
            wrong.append(
                f"{op}{args}{kwargs} of {inputs}: {described(ours)}, not {described(theirs)}"
            )
    return answered, wrong


def test_the_rules_answer_as_the_kernels_do(calls):
    answered, wrong = mismatches(calls)
    assert not wrong, "\n".join([f"{len(wrong)} of {answered}", *wrong[:20]])
    assert answered > 4000 and len({c[0] for c in calls}) > 200


def test_type_promotion_and_strides_of_binary_ops():
    draw = random.Random(1)
    aten = torch.ops.aten
    ops = (
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.maximum.default,
        aten.eq.Tensor,
        aten.atan2.default,
    )

    def operand(shape):
        order = draw.choice([list(range(len(shape))), draw.sample(range(len(shape)), len(shape))])
        strides, step = [0] * len(shape), 1
        for d in reversed(order):
            strides[d] = step
            step *= max(shape[d], 1)
        if draw.random() < 0.3:
            strides = [0 if draw.random() < 0.5 else s for s in strides]
        return make_sig(
            tuple(shape), tuple(strides), draw.choice(OTHERS), CPU, draw.choice((0, 3))
        )

    calls = []
    for _ in range(3000):
        whole = [draw.choice((0, 1, 2, 3, 4, 5)) for _ in range(draw.choice((0, 1, 2, 3, 4)))]
        second = [n if draw.random() < 0.8 else 1 for n in whole[draw.choice((0, 0, 0, 1)) :]]
        if draw.random() < 0.3:
            calls.append(
                (
                    draw.choice(ops),
                    (Slot(0), draw.choice((2, 2.5, True, 1j))),
                    {},
                    (operand(whole),),
                )
            )
        else:
            second = draw.choice((second, second, []))
            calls.append(
                (draw.choice(ops), (Slot(0), Slot(1)), {}, (operand(whole), operand(second)))
            )
    answered, wrong = mismatches(calls)
    assert not wrong, "\n".join([f"{len(wrong)} of {answered}", *wrong[:20]])
    assert answered > 1500


def test_strides_of_joined_tensors():
    draw = random.Random(3)
    calls = []
    for _ in range(2000):
        shape = [draw.choice((1, 2, 3)) for _ in range(draw.choice((2, 3, 4, 5, 6)))]
        sigs, dims = [], range(len(shape))
        for _ in range(2):
            order = draw.choice([dims, [0, *dims[2:], 1], draw.sample(dims, len(dims))])
            strides = ordered_strides(tuple(shape), tuple(order))
            sigs.append(make_sig(tuple(shape), strides, torch.float32, CPU, 0))
        sigs = draw.choice((sigs, [sigs[0], sigs[0]]))
        for op, n in (
            (torch.ops.aten.cat.default, len(shape)),
            (torch.ops.aten.stack.default, len(shape) + 1),
        ):
            calls.append((op, ([Slot(0), Slot(1)], draw.randrange(-n, n)), {}, tuple(sigs)))
    answered, wrong = mismatches(calls)
    assert not wrong, "\n".join([f"{len(wrong)} of {answered}", *wrong[:20]])
    assert answered > 2000


def changed_sig(sig, draw):
    """Another dtype, or another shape."""
    shape, kind = list(sig.shape), draw.random()
    if kind < 0.4:
        return make_sig(sig.shape, sig.stride, draw.choice(OTHERS), sig.device, sig.offset)
    if kind < 0.7 and shape:
        i = draw.randrange(len(shape))
        shape[i] = max(0, shape[i] + draw.choice((-1, 1, 2, -shape[i])))
    elif kind < 0.85 and shape:
        shape.pop(draw.randrange(len(shape)))
    else:
        shape.insert(draw.randrange(len(shape) + 1), draw.choice((1, 2, 3)))
    return make_sig(
        tuple(shape), contiguous_stride(tuple(shape)), sig.dtype, sig.device, sig.offset
    )


def changed_literal(a, draw):
    """Now and then another number."""
    if isinstance(a, list | tuple):
        return type(a)(changed_literal(x, draw) for x in a)
    if type(a) is int and abs(a) < 1 << 40:
        return a + draw.choice((0, 0, 0, 0, 1, -1, 3))
    return draw.choice((a, a, -a, 0.0)) if type(a) is float else a


def test_calls_that_were_tampered_with_are_answered_alike_or_not_at_all(calls):
    draw = random.Random(2)
    tampered = []
    for op, args, kwargs, sigs in draw.sample(calls, 4000):
        if "_backward" in op.name() or op.name().startswith(
            "aten::_"
        ):  # their kernels do not look at what they get
            continue
        sigs = list(sigs)
        if sigs:
            i = draw.randrange(len(sigs))
            sigs[i] = changed_sig(sigs[i], draw)
        if draw.random() < 0.4:
            args = tuple(changed_literal(a, draw) for a in args)
        tampered.append((op, args, kwargs, tuple(sigs)))
    answered, wrong = mismatches(tampered)
    assert not wrong, "\n".join([f"{len(wrong)} of {answered}", *wrong[:20]])
    assert answered > 1000


FRESH = """
import json, sys
import torch
import aotfunc
import aotfunc
from aotfunc.errors import CaptureError
from aotfunc.trace.shapes import infer

already = [m for m in ("torch._dynamo", "sympy") if m in sys.modules]
nn, F = torch.nn, torch.nn.functional
asked = []
kernel = infer.by_kernel
infer.by_kernel = lambda op, *rest: (asked.append(str(op)), kernel(op, *rest))[1]

def chain(x):
    for _ in range(3):
        x = torch.tanh(torch.sin(x) * 1.1 + 0.3)
    return x.sum()

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2, self.out = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)) + x)
        y = F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1)
        return F.cross_entropy(self.out(y), torch.tensor([0, 2]))

def loss_of(m, reduce=lambda y: y.mean()):
    return lambda p, x: reduce(torch.func.functional_call(m, p, (x,)))

def parameters(m):
    return {n: p.detach() for n, p in m.named_parameters()}

mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
block = Block()
programs = {
    "chain": (aotfunc.grad(chain), torch.randn(4, 5)),
    "mlp": (aotfunc.grad(loss_of(mlp)), parameters(mlp), torch.randn(3, 8)),
    "layer": (aotfunc.grad(loss_of(layer)), parameters(layer), torch.randn(2, 6, 16)),
    "block": (
        aotfunc.grad(loss_of(block, lambda y: y)),
        parameters(block),
        torch.randn(2, 4, 8, 8),
    ),
}
report = {}
for name, (f, *args) in programs.items():
    asked.clear()
    f(*args)
    report[name] = sorted(set(asked))
after = [m for m in ("torch._dynamo", "sympy") if m in sys.modules]
print(json.dumps({"already": already, "after": after, "asked": report}))
"""

#: C++ on meta, and without a rule for that reason; views are too
QUICK = {
    *("clone", "_to_copy", "copy_", "lift_fresh", "_unsafe_view", "bernoulli", "bernoulli_"),
    *("zeros", "ones", "full", "empty", "new_zeros", "scalar_tensor"),
}


def test_a_fresh_process_captures_without_dynamo_and_sympy():
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["already"] == [], "importing torch or aotfunc brings them in"
    assert report["after"] == []
    for program, ops in report["asked"].items():
        for name in ops:
            op = getattr(getattr(torch.ops.aten, name.split(".")[1]), name.split(".")[2])
            assert Facts(op).view_of is not None or name.split(".")[1] in QUICK, (
                f"{program}: {name} has no rule"
            )


ELSEWHERE = {
    "add": lambda x, y: x + y,
    "mm": lambda x, y: x @ y,
    "linear": lambda x, y: torch.nn.functional.linear(x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "gather": lambda x, y: x.gather(0, (y > 0).long()),
    "index_select": lambda x, y: x.index_select(0, y.view(-1).long()),
    "a factor": lambda x, y: x * y.sum(),
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("transform", ["jit", "grad", "make_fx", "vmap"])
def test_tensors_on_two_devices_are_refused(name, transform):
    """Some of PyTorch's CPU kernels do not look, and compute with memory that is not there."""
    x, y, f = torch.randn(3, 3), torch.ones(3, 3, device="meta"), ELSEWHERE[name]
    call = {
        "jit": lambda: aotfunc.jit(f)(x, y),
        "grad": lambda: aotfunc.grad(lambda x: f(x, y).sum())(x),
        "make_fx": lambda: aotfunc.make_fx(f)(x, y),
        "vmap": lambda: aotfunc.vmap(f, (0, None))(x[None], y),
    }[transform]
    with pytest.raises(CaptureError, match="tensors on cpu and meta: move them to one device"):
        call()


def test_a_number_on_the_cpu_goes_with_any_device():
    y = torch.ones(3, device="meta")
    assert aotfunc.jit(lambda y, c: y * c)(y, torch.tensor(2.0)).device.type == "meta"
    assert aotfunc.jit(lambda y, i: y[i])(y, torch.tensor([0, 1])).device.type == "meta"
    assert aotfunc.jit(lambda y, x: y.copy_(x))(y, torch.randn(3)).device.type == "meta"


@pytest.mark.parametrize(
    "write", [torch.Tensor.square_, lambda t: t.pow_(3), lambda t: t.polygamma_(1)]
)
def test_a_write_whose_functional_overload_takes_other_arguments(write):
    """The first call asks, and an op that is given the wrong arguments asks for a tensor's
    text."""
    aotfunc.clear_caches()
    x = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(aotfunc.jit(lambda x: write(x.clone()))(x), write(x.clone()))
