"""What random programs are made of: tables of statements, with holes that
``random_programs.Scope`` fills."""

from __future__ import annotations

Table = dict[str, tuple[int, list[str]]]

#: what is computed inside of the compiled function: kind -> (weight, templates); see
# ``Scope.hole`` for the holes
BODY: Table = {
    "compute": (
        26,
        [
            "{new} = torch.sin({x})",
            "{new} = {x} * {y}",
            "{new} = {x} + {y}",
            "{new} = {x} - {y}",
            "{new} = {x} @ {y}",
        ]
        + [
            "{new} = {x} * {number}",
            "{new} = {x} + {number}",
            "{new} = {x}.tanh()",
            "{new} = {x}.sum({dim})",
            "{new} = {x}.mean()",
        ]
        + [
            "{new} = {x}.softmax(-1)",
            "{new} = torch.where({x} > 0, {x}, {y})",
            "{new} = torch.cat([{x}, {y}])",
        ]
        + [
            "{new} = torch.stack([{x}, {y}])",
            "{new} = F.relu({x})",
            "{new} = {x}.clone()",
            "{new} = {x}.amax({dim})",
        ]
        + [
            "{new} = {x}.cumsum({dim})",
            "{new} = {x}.sort(-1).values",
            "{new} = F.linear({x}, {y})",
            "{new} = {x} + 0",
        ]
        + [
            "{new} = {x} * 1",
            "{new} = {x}.sum()",
            "{new} = torch.stack([{x}])[0]",
            "{new} = {x} / (1 + {y}.square())",
        ]
        + [
            "{new} = {x} * {same}.shape[0]",
            "{local} = {same} * 0.5",
            "{new} = sum({x}.unbind(0))",
        ],
    ),
    "module": (9, ["{new} = {module}({x})", "{new} = {module}({x}) + {x}"]),
    "view": (
        14,
        [
            "{new} = {x}[0]",
            "{new} = {x}[-1:]",
            "{new} = {x}[..., 1:]",
            "{new} = {x}.t()",
            "{new} = {x}.view(-1)",
        ]
        + [
            "{new} = {x}.reshape(-1)",
            "{new} = {x}.unsqueeze(0)",
            "{new} = {x}.squeeze()",
            "{new} = {x}.transpose(0, -1)",
            "{new} = {x}.diagonal()",
            "{new} = {x}.detach()",
        ]
        + [
            "{new} = {x}.unbind({dim})[0]",
            "{new} = {x}.chunk(2)[-1]",
            "{new} = {x}.flatten()",
            "{new} = {x}.mT",
        ]
        + [
            "{new} = {x}.expand(2, *{same}.shape)",
            "{new} = {x}.contiguous()",
            "{new} = {x}.to({same}.dtype)",
        ]
        + ["{new} = {x}[None]", "{new} = {x}[..., ::2]", "{new} = {any}.detach()"],
    ),
    "no-op view": (
        2,
        [
            "{new} = {x}[:]",
            "{new} = {x}.view_as({same})",
            "{new} = {x}.expand_as({same})",
            "{new} = {x}.view({same}.shape)",
        ],
    ),
    "write": (
        14,
        [
            "{x}.mul_({y})",
            "{x}.add_({y}, alpha=2)",
            "{x}.copy_({y})",
            "{x}.zero_()",
            "{x}[0] = {y}",
            "{x}[..., 0] = {number}",
        ]
        + [
            "{x}.tanh_()",
            "{local} += {y}",
            "{local} *= {number}",
            "{x}.clamp_(-1, 1)",
            "{x}[{same} > 0] = 0.5",
            "{x}.fill_({number})",
        ]
        + [
            "F.relu({x}, inplace=True)",
            "{x}.masked_fill_({same} < 0, 0.5)",
            "{x}.view(-1)[0] = 2.0",
            "{x}.sub_({y})",
        ]
        + [
            "torch.sin({x}, out={y})",
            "{x}.t().mul_({y}.clone())",
            "{x}[0].add_({y})",
            "{x}.lerp_({y}, 0.3)",
            "{any}.mul_(2)",
        ],
    ),
    # through .data only where nothing has been saved: eager derivatives would be of the value that
    # is there by then
    "hidden write": (
        5,
        [
            "{x}.detach().add_({y}.detach())",
            "{x}.detach().mul_({number})",
            "{x}.detach()[0].fill_({number})",
        ]
        + [
            "{new} = {x} + 0\n{made}.data.mul_({number})",
            "{new} = {x} + {y}\n{made}.data[0] = 1.0",
        ]
        + ["{new} = {x}.clone()\n{made}.data.copy_({y})", "{x}.detach().zero_()"],
    ),
    "state": (
        5,
        [
            "{state}.add_({x}.detach().mean())",
            "{state}.mul_({number})",
            "{state}.copy_({x}.detach())",
            "{state}.add_({x})",
        ]
        + [
            "{state}.lerp_({x}.detach(), 0.1)",
            "{state}.add_(1)",
            "{state}[0] = {x}.detach().sum()",
        ],
    ),
    "constant": (
        6,
        [
            "{new} = torch.tensor(0.0)",
            "{new} = torch.tensor([1.0, 2.0, 3.0])",
            "{new} = torch.zeros(3)",
        ]
        + [
            "{new} = torch.ones_like({x})",
            "{new} = {x}.new_tensor([0.5, 1.0, 2.0])",
            "{new} = torch.arange(3.0)",
        ]
        + [
            "{new} = torch.full((), {number})",
            "{new} = torch.eye(3)",
            "{new} = torch.as_tensor({number})",
        ]
        + [
            "{new} = torch.zeros_like({x})",
            "{new} = {x}.new_zeros(3)",
            "{new} = torch.tensor([0, 1])",
        ]
        + ["{new} = torch.empty_like({x}).fill_(0.5)", "{new} = torch.linspace(0, {number}, 3)"],
    ),
    "random": (
        5,
        ["{new} = torch.rand_like({x})", "{new} = F.dropout({x}, 0.5)", "{new} = torch.randn(3)"]
        + [
            "{new} = {x} * torch.bernoulli(torch.full_like({x}, 0.5))",
            "{new} = torch.empty_like({x}).uniform_()",
        ]
        + [
            "{new} = {x}[torch.randperm({same}.shape[0])]",
            "{new} = F.dropout({x}, {number}, training={flag})",
        ]
        + [
            "{new} = torch.normal(torch.zeros_like({x}), 0.5)",
            "{new} = torch.randint(0, 3, (2,))",
            "{x}.normal_()",
        ],
    ),
    "dtype": (
        4,
        [
            "{new} = {x} > 0",
            "{new} = ({x} * 3).long()",
            "{new} = {x}.argmax(-1)",
            "{new} = {x}.to(torch.float32)",
        ]
        + ["{new} = {x}.double()", "{new} = ({x} > 0).sum()", "{new} = {x}.to(torch.bfloat16)"]
        + [
            "{new} = {x} * {any}",
            "{new} = {x}[{int}.flatten()]",
            "{new} = torch.max({x}, -1).indices",
        ],
    ),
    "hook": (
        3,
        ["if {x}.grad_fn is not None:\n    {same}.register_hook(lambda g: g * 2)"]
        + ["if {x}.grad_fn is not None:\n    {same}.register_hook(lambda g: g.clamp(-0.5, 0.5))"]
        + ["if {x}.grad_fn is not None:\n    {same}.register_hook(lambda g: None)"]
        + [
            "if {x}.grad_fn is not None:\n    {same}.register_hook(lambda g: g * "
            "{y}.mean().detach())"
        ],
    ),
    "gradient": (
        3,
        [
            "if {x}.requires_grad:\n    {new} = torch.autograd.grad({same}.sin().sum(), {same}, "
            "create_graph=True)[0]"
        ]
        + [
            "{new} = {x}.detach().requires_grad_()",
            "{new} = {x} * (2 if {same}.requires_grad else 3)",
        ]
        + [
            "{new} = {x} * (2 if torch.is_grad_enabled() else 3)",
            "{new} = {x} * (2 if {same}.is_leaf else 3)",
        ]
        + ["if {x}.requires_grad:\n    {new} = torch.autograd.grad({same}.exp().sum(), {same})[0]"]
        + [
            "if {y}.requires_grad:\n    {new} = torch.autograd.grad(({same} ** 3).sum(), {same}, "
            "create_graph=True)[0]"
        ]
        + [
            "if {y}.requires_grad:\n    h = {same} * 2\n    {new} = torch.autograd.grad("
            "h.sin().sum(), [{same}, h], create_graph=True)[0]"
        ],
    ),
    "training": (
        2,
        [
            "({module}({x}.detach()) + 0.3).square().mean().backward()",
            "{module}({x}.detach()).exp().mean().backward()",
            "opt.step()",
            "opt.zero_grad()",
        ],
    ),
    "custom": (
        3,
        [
            "{new} = Cube.apply({x})",
            "{new} = Straight.apply({x})",
            "{new} = Twice.apply({x}, {y})[0]",
        ],
    ),
    "nested": (
        4,
        [
            "{new} = {inner}({x})",
            "{new} = compiled(lambda t: t.sin() * {y})({x})",
            "{new} = {inner}({x}) * {y}",
        ]
        + ["{new} = compiled(lambda t: (t * 2, t.detach() * 3, t[0]))({x})[0]"]
        + ["{new} = compiled({module})({x})", "compiled(lambda t: t.mul_(2))({x})"]
        + [
            "{new} = {x} + 0\ncompiled(lambda t: t.data.mul_(2))({made})",
            "{new} = compiled(lambda t: t.view(-1))({x})",
        ],
    ),
    "metadata": (
        2,
        [
            "{x}.unsqueeze_(0)",
            "{x}.t_()",
            "{x}.squeeze_()",
            "{x}.transpose_(0, -1)",
            "{x}.detach_()",
        ],
    ),
    "python": (
        3,
        [
            "{new} = {x} * cfg.beta",
            "{new} = {x} * table['beta']",
            "{new} = helper({x})",
            "{new} = {x} * cfg.items[0]",
        ]
        + [
            "if {flag}:\n    {local} = {same} * 2",
            "if {number} > 0.5:\n    {local} = {same} + 1",
            "{new} = cfg.act({x})",
        ]
        + ["{new} = cfg({x})", "{new} = functools.partial(torch.mul, {x})({number})"],
    ),
}

#: with a body of their own, of such statements as above
REGIONS = [
    "with torch.no_grad():",
    "with torch.enable_grad():",
    "with torch.set_grad_enabled({flag}):",
]
REGIONS += ["with torch.no_grad(), torch.enable_grad():", "if {flag}:", "for _ in range(2):"]
AUTOCAST = [
    "with torch.autocast('cpu', torch.bfloat16):",
    "with torch.autocast('cpu', enabled=False):",
]

#: attributes of a module that is drawn
ATTRIBUTES = [
    "self.lin = nn.Linear(3, 3)",
    "self.norm = nn.BatchNorm1d(3)",
    "self.drop = nn.Dropout(0.5)",
]
ATTRIBUTES += ["self.ln = nn.LayerNorm(3)", "self.act = nn.LeakyReLU(0.1)", "self.tied = self.lin"]
ATTRIBUTES += [
    "self.scale = 0.5",
    "self.on = True",
    "self.w = nn.Parameter(torch.randn(3))",
    "self.kept = torch.ones(3)",
]
ATTRIBUTES += [
    "self.register_buffer('buf', torch.zeros(3))",
    "self.seq = nn.Sequential(nn.Linear(3, 3), nn.Tanh())",
]

#: what the function closes over
OUTSIDE = [
    "w = torch.randn(3, requires_grad=True)",
    "c = torch.randn(3)",
    "buf = torch.zeros(3)",
    "k = 0.5",
]
OUTSIDE += [
    "flag = True",
    "lin = nn.Linear(3, 3)",
    "norm = nn.BatchNorm1d(3)",
    "drop = nn.Dropout(0.4)",
]
OUTSIDE += [
    "u = w * 2",
    "seq = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))",
    "ln = nn.LayerNorm(3)",
]
OUTSIDE += [
    "cfg = Config()",
    "table = {'beta': 0.5}",
    "v = w.detach()",
    "view = c[1:]",
    "i = torch.tensor([0, 1])",
]
OUTSIDE += [
    "inner = compiled(lambda t: t.tanh() * 0.7)",
    "lin = nn.Linear(3, 3, bias=False)",
    "frozen = lin.weight.detach()",
]
OUTSIDE += [
    "fast = compiled(lin)",
    "bn = compiled(norm)",
    "inner2 = compiled(lambda t: (t * c, t)[0])",
]

#: the function's parameters, and what a call passes for them
SIGNATURES = [
    ("x", "x"),
    ("x, y", "x, y"),
    ("x, y", "x, x"),
    ("x, y, z", "x, y, z"),
    ("x, pair", "x, (y, z)"),
]
SIGNATURES += [
    ("x, d", "x, {'a': y}"),
    ("x, n", "x, n"),
    ("x, y=None", "x, y=y"),
    ("*xs", "x, y"),
    ("x, m", "x, m"),
]

#: tensors to pass
ARGUMENTS = [
    "{arg} = torch.randn(2, 3)",
    "{arg} = torch.randn(2, 3, requires_grad=True)",
    "{arg} = torch.randn(3)",
]
ARGUMENTS += ["{arg} = torch.randn(2, 3, requires_grad=True) * 1", "{arg} = torch.randn(3, 2).t()"]
ARGUMENTS += ["{arg} = torch.randn(2, 6)[:, ::2]", "{arg} = torch.randn(3, requires_grad=True)"]
ARGUMENTS += ["{arg} = torch.randn(3, 3, requires_grad=True)", "{arg} = torch.randn(2, 3)[0]"]
ALIASES = [
    "{arg} = {other}",
    "{arg} = {other}[0]",
    "{arg} = {other}.view(-1)",
    "{arg} = {other}.detach()",
]
ALIASES += [
    "{arg} = {other}.t()",
    "{arg} = {other}[:, 1:]",
    "{arg} = {other} * 1",
    "{arg} = {other}.detach().clone()",
]

#: between two calls: kind -> (weight, templates)
BETWEEN: Table = {
    "arguments": (5, [*ARGUMENTS, *ALIASES]),
    "weights": (
        4,
        [
            "with torch.no_grad():\n    {param}.mul_(0.9)",
            "{param}.data.add_(0.1)",
            "{param}.data = {same}.data * 0.9",
        ]
        + [
            "{param}.data = torch.randn_like({same})",
            "opt.step()",
            "opt.step()",
            "opt.zero_grad()",
            "opt.step()",
        ]
        + [
            "opt.zero_grad(set_to_none=False)",
            "{m}.load_state_dict({{n: t * 0.5 for n, t in {m}.state_dict().items()}})",
        ]
        + [
            "{lin}.weight = nn.Parameter(torch.randn(3, 3))",
            "{lin}.weight.data[0] = 1.0",
            "{lin}.bias = None",
        ]
        + [
            "{param}.requires_grad_(False)",
            "{param}.requires_grad_(True)",
            "{m}.requires_grad_(False)",
            "{m}.zero_grad()",
        ],
    ),
    "state": (
        4,
        [
            "c = torch.randn(3)",
            "c.fill_(0.3)",
            "c[0] = 2.0",
            "buf.zero_()",
            "buf = torch.ones(3)",
            "c = torch.randn(2, 3)",
        ]
        + [
            "w = torch.randn(3, requires_grad=True)",
            "w = torch.randn(3)",
            "u = w * 3",
            "i.copy_(torch.tensor([1, 0]))",
        ]
        + [
            "{m}.buf = torch.ones(3)",
            "{m}.buf.fill_(0.2)",
            "{m}.kept = torch.randn(3)",
            "{m}.running_mean.zero_()",
        ]
        + [
            "c = buf",
            "buf = c",
            "w.data = torch.ones(3)",
            "w.grad = None",
            "c.data = torch.ones(3)",
            "c = None",
        ],
    ),
    "python": (
        4,
        [
            "{m}.eval()",
            "{m}.train()",
            "k = 0.7",
            "k = 2",
            "flag = not flag",
            "{m}.scale = 0.3",
            "{m}.on = not {m}.on",
        ]
        + [
            "{m}.p = 0.1",
            "cfg.beta = 2.0",
            "table['beta'] = 0.3",
            "n = 3",
            "n = 0.5",
            "{m}.momentum = 0.3",
            "{m}.eps = 0.01",
        ]
        + [
            "cfg.items[0] = 5.0",
            "cfg.act = torch.tanh",
            "{m}.negative_slope = 0.4",
            "Config.gain = 3.0",
            "{m}.act = nn.Tanh()",
        ],
    ),
    "hooks": (
        2,
        [
            "{m}.register_forward_hook(lambda m, args, out: out * 2)",
            "h = {m}.register_forward_hook(lambda m, a, o: o + 1)",
        ]
        + ["h.remove()", "{m}.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))"]
        + [
            "{m}.register_full_backward_hook(lambda m, gi, go: tuple(g if g is None else g * 2 "
            "for g in gi))"
        ]
        + [
            "h = {m}.register_full_backward_pre_hook(lambda m, go: (go[0] * 3,))",
            "if x._base is None:\n    x.register_hook(lambda g: g * 2)",
        ]
        + [
            "if {out}.grad_fn is not None:\n    {same}.register_hook(lambda g: g * 2)",
            "w.register_hook(lambda g: g + 1)",
            "{out}.retain_grad()",
        ],
    ),
    "results": (
        3,
        [
            "{result}.detach().add_(1)",
            "{result}.mul_(2)",
            "{result}.zero_()",
            "with torch.no_grad():\n    {result}.add_(1)",
            "x = {out}",
        ]
        + [
            "{result}.unsqueeze_(0)",
            "y = {out}",
            "x = {result}.detach()",
            "{unwritten out}.requires_grad_()",
            "x = {result}.detach().clone()",
        ]
        + [
            "c = {result}.detach()",
            "x.data.mul_(0.5)",
            "with torch.no_grad():\n    x.mul_(0.5)",
            "x.mul_(1.5)",
            "del {outs}",
        ],
    ),
}

#: after a call, what autograd is asked for
DERIVATIVES = ["loss({outs}).backward()", "loss({outs}).backward()", "loss({out}).backward()"]
DERIVATIVES += [
    "loss({outs}).backward(retain_graph=True)",
    "loss({outs}).backward(inputs=[{leaf}])",
]
DERIVATIVES += [
    "grads = torch.autograd.grad(loss({outs}), [{leaf}], allow_unused=True, retain_graph=True)"
]
DERIVATIVES += ["grads = torch.autograd.grad(loss({outs}), [{leaf}, {leaf}], allow_unused=True)"]
SECOND = [
    "grads = torch.autograd.grad(loss({outs}), [{leaf}], create_graph=True, allow_unused=True)"
]
SECOND += ["loss(grads).backward()"]

CALLS = ["{outs} = f({args})"] * 12 + ["with torch.no_grad():\n    {outs} = f({args})"] * 2
CALLS += ["with torch.inference_mode():\n    {outs} = f({args})"] * 0 + [
    "{outs} = checkpoint(f, {args}, use_reentrant=False)"
]

HEADER = """\
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""

#: what statements may use, where they do
LIBRARY = {
    "Cube": """\
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g
""",
    "Straight": """\
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g * 0.5
""",
    "Twice": """\
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return x * 2, y + 1

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return None if g is None else g * 2, None if h is None else h * x.sum()
""",
    "Config": """\
class Config:
    gain = 1.5

    def __init__(self):
        self.beta, self.items, self.act = 0.5, [2.0, 3.0], torch.sin

    def __call__(self, x):
        return x * self.beta * self.gain
""",
    "helper": """\
def helper(x):
    return x * 0.9
""",
    "loss": """\
def loss(results):
    total = torch.zeros(())
    for i, t in enumerate(torch.utils._pytree.tree_leaves(results)):
        if isinstance(t, torch.Tensor) and t.requires_grad:
            total = total + (t * (i + 1)).sin().sum()
    return total
""",
}
