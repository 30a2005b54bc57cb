"""The table of varied programs that capture must get right: name -> a builder of (function,
arguments)."""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.inputs import f32, f64

PROGRAMS = {}
NO_GRAD = set()  # writes to its inputs, or has nothing to differentiate
Pair = namedtuple("Pair", "left right")


def program(build=None, *, grad=True):
    if build is None:
        return lambda build: program(build, grad=grad)
    PROGRAMS[build.__name__] = build
    if not grad:
        NO_GRAD.add(build.__name__)
    return build


def module(net, *args, train=False):
    """A module as a function of its parameters and inputs."""
    net = net.double().train(train)
    params = {k: v.detach().clone() for k, v in net.named_parameters()}
    return lambda p, *xs: functional_call(net, p, xs), (params, *args)


# layers
# -------------------------------------------------------------------------------------------------


@program
def mlp():
    return module(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)),
        f64(3, 4),
    )


@program
def activations():
    layers = [
        nn.ELU(),
        nn.SELU(),
        nn.Mish(),
        nn.SiLU(),
        nn.Softplus(),
        nn.LeakyReLU(),
        nn.Hardswish(),
        nn.Sigmoid(),
    ]
    return (lambda x: torch.stack([layer(x) for layer in layers])), (f64(3, 4),)


@program
def glu_and_prelu():
    return module(nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.PReLU()), f64(3, 4))


@program
def conv_pool():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2)
    )
    return module(net, f64(2, 1, 8, 8))


@program
def conv1d_and_transposed():
    return module(
        nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.ConvTranspose1d(3, 2, 4, stride=2)),
        f64(2, 2, 9),
    )


@program
def conv3d_grouped():
    return module(nn.Conv3d(4, 4, 2, groups=2, bias=False), f64(1, 4, 3, 4, 3))


@program
def batch_norm_eval():
    return module(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), f64(2, 1, 6, 6))


@program
def batch_norm_without_statistics():
    return module(nn.BatchNorm1d(3, track_running_stats=False), f64(5, 3), train=True)


@program
def layer_group_instance_norm():
    net = nn.Sequential(
        nn.LayerNorm([4, 5, 5]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
    )
    return module(net, f64(2, 4, 5, 5))


@program
def rms_norm():
    return module(nn.RMSNorm(6), f64(3, 6))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.na(self.a(x)), inplace=True)
        y = self.nb(self.b(y))
        y += x
        return F.relu(y, inplace=True)


@program
def resnet_like():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return module(
        nn.Sequential(nn.Conv2d(1, 4, 3), Block(4), nn.MaxPool2d(2), Block(4), *head),
        f64(2, 1, 8, 8),
    )


@program
def lstm():
    net = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    return module(net, f64(2, 5, 3))


@program
def lstm_bidirectional():
    return module(nn.LSTM(3, 2, bidirectional=True), f64(4, 2, 3))


@program
def gru():
    return module(nn.GRU(3, 4), f64(5, 2, 3))


@program
def rnn_and_cells():
    cell, rnn = nn.LSTMCell(3, 4).double(), nn.RNN(4, 2).double()

    def f(x):
        h, c = torch.zeros(2, 4, dtype=x.dtype), torch.zeros(2, 4, dtype=x.dtype)
        steps = []
        for t in range(x.shape[0]):
            h, c = cell(x[t], (h, c))
            steps.append(h)
        return rnn(torch.stack(steps))[0]

    return f, (f64(3, 2, 3),)


@program
def embedding():
    return module(
        nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 2)),
        torch.tensor([[1, 0, 3], [3, 9, 9]]),
    )


@program
def transformer_layer():
    return module(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        f64(2, 5, 8),
        train=True,
    )


@program
def transformer_layer_eval_is_off_the_fast_path():
    return module(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), f64(2, 5, 8)
    )


@program
def transformer_decoder():
    return module(
        nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), f64(4, 2, 8), f64(3, 2, 8), train=True
    )


@program
def attention():
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return f, (f64(2, 2, 5, 4), f64(2, 2, 5, 4), f64(2, 2, 5, 4))


@program
def attention_with_a_mask():
    f = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)
    return f, (f64(2, 3, 4), f64(2, 5, 4), f64(2, 5, 4), torch.rand(3, 5) > 0.3)


@program
def multihead_attention():
    net = nn.MultiheadAttention(8, 2, batch_first=True).double()
    return (lambda x: net(x, x, x)), (f64(2, 3, 8),)


@program
def losses():
    def f(x, t, i):
        return {
            "mse": F.mse_loss(x, t),
            "l1": F.l1_loss(x, t, reduction="sum"),
            "huber": F.huber_loss(x, t),
            "smooth": F.smooth_l1_loss(x, t, reduction="none"),
            "ce": F.cross_entropy(x, i, label_smoothing=0.1),
            "nll": F.nll_loss(F.log_softmax(x, -1), i, ignore_index=1),
            "kl": F.kl_div(F.log_softmax(x, -1), F.softmax(t, -1), reduction="batchmean"),
            "bce": F.binary_cross_entropy_with_logits(x, t.sigmoid()),
            "cos": F.cosine_similarity(x, t),
        }

    return f, (f64(4, 3), f64(4, 3), torch.tensor([0, 1, 2, 1]))


@program
def interpolation_and_padding():
    def f(x):
        up = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return (
            F.pad(up, (1, 2, 0, 1), mode="reflect"),
            F.pad(x, (1, 1), value=2.0),
            F.pixel_shuffle(x, 2),
        )

    return f, (f64(1, 4, 3, 3),)


@program
def unfold_fold():
    return (lambda x: F.fold(F.unfold(x, 3).sin(), (5, 5), 3)), (f64(1, 2, 5, 5),)


@program
def pooling():
    f = lambda x: (
        F.avg_pool2d(x, 2),
        F.adaptive_avg_pool2d(x, 3),
        F.max_pool2d(x, 3, 2, 1),
        F.lp_pool2d(x.abs() + 1, 2, 2),
    )
    return f, (f64(2, 2, 6, 6),)


@program
def grid_sample():
    return (lambda x, g: F.grid_sample(x, g, align_corners=False)), (
        f64(1, 2, 4, 4),
        0.5 * f64(1, 3, 3, 2),
    )


# tensor algebra
# -------------------------------------------------------------------------------------------------


@program
def einsum():
    f = lambda a, b, c: (torch.einsum("bij,bjk,k->bi", a, b, c), torch.einsum("bii->b", b))
    return f, (f64(2, 3, 4), f64(2, 4, 4), f64(4))


@program
def tensordot_kron_outer():
    return (lambda a, b: (torch.tensordot(a, b, 1), torch.kron(a, b), torch.outer(a[0], b[0]))), (
        f64(2, 3),
        f64(3, 2),
    )


@program
def matmul_broadcast():
    return (lambda a, b, c: (a @ b, a @ c, c @ b, c @ c)), (
        f64(2, 3, 4),
        f64(2, 4, 3)[:, :, :3],
        f64(4),
    )


@program
def fft():
    f = lambda x: (
        torch.fft.rfft(x).abs(),
        torch.fft.irfft(torch.fft.rfft(x) * 2, n=6),
        torch.fft.fft2(x).real,
    )
    return f, (f64(3, 6),)


@program
def stft():
    f = lambda x: torch.stft(
        x, 8, 4, window=torch.hann_window(8, dtype=x.dtype), return_complex=True
    ).abs()
    return f, (f64(32),)


@program
def linalg_solve_and_det():
    f = lambda a, b: (
        torch.linalg.solve(a, b),
        torch.linalg.det(a),
        torch.linalg.inv(a),
        torch.linalg.slogdet(a)[1],
    )
    return f, (f64(3, 3) + 3 * torch.eye(3, dtype=torch.float64), f64(3, 2))


@program
def linalg_factorisations():
    def f(a):
        s = a @ a.t() + 3 * torch.eye(3, dtype=a.dtype)
        q, up = torch.linalg.qr(a)
        return (
            torch.linalg.cholesky(s),
            torch.linalg.eigvalsh(s),
            torch.linalg.svdvals(a),
            q @ up,
            torch.linalg.norm(a, 2),
        )

    return f, (f64(3, 3),)


@program
def matrix_exp_and_power():
    return (
        lambda a: (torch.linalg.matrix_exp(a), torch.linalg.matrix_power(a, 3), torch.trace(a))
    ), (f64(3, 3),)


@program
def statistics():
    f = lambda x: (
        x.mean(0),
        x.var(1),
        x.std(),
        x.median(),
        x.logsumexp(1),
        x.norm(dim=0),
        x.prod(1),
        torch.var_mean(x, 0),
    )
    return f, (f64(3, 5),)


@program
def sorting():
    f = lambda x: (
        *x.sort(1),
        *x.topk(2),
        x.kthvalue(2)[0],
        x.amax(1),
        *x.max(0),
        x.cummax(1)[0],
        x.argsort(0),
    )
    return f, (f64(3, 5),)


@program
def special_functions():
    f = lambda x: (
        torch.erf(x),
        torch.lgamma(x.abs() + 1),
        torch.digamma(x.abs() + 1),
        torch.special.i0(x),
        torch.special.expit(x),
        torch.atan2(x, x + 2),
    )
    return f, (f64(4),)


@program
def cumulative():
    f = lambda x: (x.cumsum(0), x.cumprod(1), x.logcumsumexp(1), torch.diff(x), torch.trapezoid(x))
    return f, (f64(3, 4),)


@program
def complex_numbers():
    f = lambda z: (
        (z * z.conj()).real,
        z.angle(),
        torch.view_as_real(z.exp()),
        torch.polar(z.abs(), z.imag),
        z.sum() * 2j,
    )
    return f, (torch.randn(4, dtype=torch.complex128),)


@program
def shapes():
    def f(x):
        a, b = x.chunk(2, 1)
        rolled = x.roll((1, -1), (0, 1)).flip(0)
        parts = x.split([1, 2], 0)
        return (
            torch.cat([a, b, *[p[:, :2] for p in parts]]),
            rolled.movedim(0, 1).reshape(2, -1),
            x.repeat(2, 1).tile(1, 2),
        )

    return f, (f64(3, 4),)


@program
def advanced_indexing():
    i = torch.tensor([0, 2, 2])
    f = lambda x: (
        x[i],
        x[:, i],
        x[i, i],
        x[..., None, 1:3],
        x[::2, ::3],
        x[i[:, None], i],
        x[None, i, None],
        x[-1],
    )
    return f, (f64(3, 4),)


@program
def gather_scatter():
    i = torch.tensor([[0, 1, 1], [2, 0, 2]])

    def f(x, s):
        return (
            x.gather(1, i),
            x.scatter(1, i, s),
            x.scatter_add(1, i, s),
            x.scatter_reduce(1, i, s, "amax"),
            x.index_add(1, i[0], s),
            x.index_select(0, i[:, 2] - 1),
            x.take_along_dim(i, 1),
            torch.where(x > 0, x, s.sum()),
        )

    return f, (f64(2, 3), f64(2, 3))


@program
def dtype_casts():
    f = lambda x, i: (
        x.float() * 2,
        x.to(torch.bfloat16).double(),
        x.long() + i,
        (x > 0).sum(),
        i / 2,
        x.type_as(i.float()),
    )
    return f, (f64(4), torch.arange(4))


@program
def promotion():
    def f(i, x, y):
        return (
            i * x,
            i + 1.5,
            x * y,
            x + torch.tensor(1.0, dtype=torch.float64),
            i // 2,
            i > 1.5,
            x ** torch.tensor(2),
            2**i,
        )

    return f, (torch.arange(3), f32(3), f64(3))


@program
def factories():
    def f(x):
        n = x.shape[0]
        grid = torch.arange(n, dtype=x.dtype) + torch.linspace(0, 1, n, dtype=x.dtype)
        return (
            x * grid,
            torch.eye(n),
            torch.full((2,), 7),
            torch.tril(torch.ones(n, n)),
            torch.tensor([1.0, 2.0]),
            x.new_ones(2),
        )

    return f, (f64(4),)


@program
def a_tensor_of_python_numbers():
    return (lambda x: x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype) + torch.as_tensor(2.0)), (
        f64(3),
    )


# writing
# -------------------------------------------------------------------------------------------------


@program
def in_place_through_views_of_views():
    def f(x):
        y = x.clone()
        row = y.view(2, 6)[1]
        row[2:5].view(3, 1).squeeze_(1).mul_(2)
        y.t()[1] += 1
        y.diagonal()[0].neg_()
        return y, row * 3

    return f, (f64(4, 3),)


@program
def transpose_and_add():
    def f(x):
        y = x * 1
        y.t()[1] += 1
        return y

    return f, (f64(3, 3),)


@program
def slice_assignment():
    def f(x, v):
        y = torch.zeros(4, 4, dtype=x.dtype)
        y[1:3, ::2] = x
        y[0] = v
        y[..., -1] = y[:, 0] * 2
        y[3, 3] = 5
        return y

    return f, (f64(2, 2), f64(4))


@program
def masks():
    def f(x):
        y = x.clone()
        y[y > 0] = 2
        y[y < -1] = x.sum()
        y[torch.tensor([0, 1]), torch.tensor([1, 0])] = x.new_tensor([3.0, 4.0])
        y.masked_fill_(y < -1, 0.5)
        y.index_put_((torch.tensor([0, 0]),), x[:2], accumulate=True)
        return y

    return f, (f64(3, 3),)


@program
def read_through_an_older_view():
    def f(x):
        y = x.clone()
        first = y[0]
        y.mul_(3)
        seen = first + 0
        first.add_(1)
        y.exp_()
        return first * 2, seen, y

    return f, (f64(2, 3),)


@program
def out_arguments():
    def f(x):
        out, big = torch.empty_like(x), x.new_zeros(2, 3)
        torch.sin(x.detach(), out=out)
        torch.add(x.detach(), 1, out=big[0])
        return out, big

    return f, (f64(3),)


@program
def metadata_in_place():
    def f(x):
        y = x.clone()
        y.unsqueeze_(0).t_().squeeze_()
        y.transpose_(0, 0)
        return y * 2

    return f, (f64(3),)


@program
def accumulation_in_a_loop():
    def f(x):
        total, outs = x.new_zeros(()), []
        for i in range(4):
            total += x[i] * i
            outs.append(total.clone())
        return torch.stack(outs), total

    return f, (f64(4),)


@program
def copy_and_fill():
    def f(x):
        y = torch.empty(3, 3, dtype=torch.float32)
        y.copy_(x)  # broadcasts and casts
        y[1].fill_(2)
        y[2].zero_()
        return y.double() * x

    return f, (f64(3),)


@program(grad=False)
def writes_its_inputs():
    def f(x, y):
        x.mul_(2)
        y[1:] += x[1:]
        return x.sum() + y.sum()

    return f, (f64(3), f64(3))


@program(grad=False)
def writes_an_input_through_a_view():
    def f(x):
        v = x.view(-1)
        v[::2] = 0
        return v, x.t()

    return f, (f64(2, 3),)


@program(grad=False)
def batch_norm_training():
    net = nn.BatchNorm1d(3).double()
    names = [k for k, _ in net.named_buffers()]
    return (lambda x, *stats: functional_call(net, dict(zip(names, stats)), (x,))), (
        f64(5, 3),
        *[b.clone() for _, b in net.named_buffers()],
    )


# derivatives inside
# -------------------------------------------------------------------------------------------------


@program
def autograd_grad_inside():
    def f(x):
        (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        return g * x

    return f, (f64(3).requires_grad_(),)


@program
def autograd_grad_of_a_fresh_leaf():
    def f(x):
        w = (x.detach() * 2).requires_grad_()
        (g,) = torch.autograd.grad((w.sin() * x.detach()).sum(), w)
        return g + x

    return f, (f64(3),)


@program
def torch_func_inside():
    f = lambda x: (
        torch.func.vmap(torch.func.grad(lambda y: (y**3).sum()))(x),
        torch.func.jacrev(torch.sin)(x[0]),
    )
    return f, (f64(2, 3),)


@program
def torch_func_jvp_and_hessian_inside():
    f = lambda x: (
        torch.func.jvp(torch.sin, (x,), (x,)),
        torch.func.hessian(lambda y: (y**3).sum())(x),
    )
    return f, (f64(3),)


@program
def double_backward_inside():
    def f(x):
        y = (x**4).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        return y, g, h

    return f, (f64(3).requires_grad_(),)


# trees, modes
# -------------------------------------------------------------------------------------------------


@program
def trees():
    def f(p, xs):
        y = p.left["w"] @ xs[0] + p.right
        return {"y": y, "pair": Pair(y.sum(), [xs[1], None, 3, "a", (True, 2.5)])}

    return f, (Pair({"w": f64(2, 3)}, f64(2)), [f64(3), f64(1)])


@program
def python_numbers():
    f = lambda x, n, s, flag, mode: (x * n + s).sum() if flag and mode == "sum" else x
    return f, (f64(3), 3, 0.5, True, "sum")


@program
def nothing_done():
    return (lambda x, y: (y, x, x)), (f64(3), f64(2))


@program
def autocast():
    def f(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
            z = (y.float() @ w).sum()
        return y, z, x @ w

    return f, (f32(2, 3), f32(3, 3))


@program
def branches_on_shapes():
    f = lambda x: x.sum(0) if x.dim() == 2 and len(x) > 2 and x.is_floating_point() else x
    return f, (f64(3, 2),)


@program
def randomness():
    def f(x):
        noise = torch.randn(3, dtype=x.dtype)
        return (
            F.dropout(x * noise, 0.5, training=True) + torch.rand_like(x),
            torch.randperm(4),
            torch.bernoulli(x.sigmoid()),
        )

    return f, (f64(3),)


@program(grad=False)
def integers_and_bits():
    f = lambda i: (i % 3, i // 2, i << 1, i & 3, ~i, i == 2, i.cumsum(0), i.float().int())
    return f, (torch.arange(5),)


@program
def channels_last():
    net = nn.Conv2d(2, 3, 3).double().to(memory_format=torch.channels_last)
    return (lambda x: (F.relu(net(x)), x.contiguous())), (
        f64(2, 2, 5, 5).to(memory_format=torch.channels_last),
    )


@program
def strided_inputs():
    return (lambda x, y: (x + y, x.contiguous(), (x * 2).t().view(-1), x.flatten())), (
        f64(4, 3).t(),
        f64(3, 8)[:, ::2],
    )


@program
def expanded_inputs():
    return (lambda x: (x + 1, x.sum(0), x.clone())), (f64(1, 3).expand(4, 3),)


@program
def empty_tensors():
    return (lambda x: (x.sum(0), torch.cat([x, x]), x @ x.t(), x.new_zeros(0))), (f64(0, 3),)


@program
def a_dict_of_parameters_updated():
    def f(params, x):
        loss = (params["w"] * x + params["b"]).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}

    return f, ({"w": f64(3).requires_grad_(), "b": f64(3).requires_grad_()}, f64(3))
