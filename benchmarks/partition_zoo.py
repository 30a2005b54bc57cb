"""Joint graphs to partition: PyTorch's own, of networks that differ in what there is to gain."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import functorch.compile as functorch
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table


class Block(nn.Module):
    """A transformer block, with attention written out or fused."""

    def __init__(self, d: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.norm, self.fused = heads, nn.LayerNorm(d), fused
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(x)


class Residual(nn.Module):
    """The block of a ResNet-18, with the statistics of the batch."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        stride = 1 if c == out else 2
        self.a, self.m = nn.Conv2d(c, out, 3, stride, 1, bias=False), batch_norm(out)
        self.b, self.n = nn.Conv2d(out, out, 3, 1, 1, bias=False), batch_norm(out)
        self.skip = nn.Identity() if c == out else nn.Conv2d(c, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.n(self.b(F.relu(self.m(self.a(x))))))


def batch_norm(c: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c, track_running_stats=False)


class Recurrent(nn.Module):
    """An LSTM, step by step."""

    def __init__(self, d: int, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = nn.Linear(2 * d, 4 * d), steps

    def forward(self, x: Tensor) -> Tensor:
        h = c = x
        for _ in range(self.steps):
            i, f, g, o = self.cell(torch.cat([x, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


def chain(x: Tensor) -> Tensor:
    for _ in range(30):
        x = x.sin() * 1.1
    return x.sum()


def per_sample(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The mean norm of per-sample gradients, which is differentiated in turn."""

    def loss(params: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return ((x @ params[0]).tanh() @ params[1]).square().sum()

    gw, gv = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))((w, v), x)
    return (gw.square().sum((1, 2)) + gv.square().sum((1, 2)) + 1).sqrt().mean()


def joint_graph(f: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """PyTorch's own joint graph of a scalar function, equal nodes merged."""
    found = []

    def spy(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found.append(copy.deepcopy(joint))
        return functorch.default_partition(joint, inputs, **options)

    nop = functorch.nop
    functorch.aot_function(f, nop, nop, partition_fn=spy, decompositions=select_decomp_table())(
        *inputs
    )
    return fx.GraphModule(found[0], fx_graph_cse(found[0].graph))


def of_module(net: nn.Module, *inputs: Tensor, **named: Tensor) -> fx.GraphModule:
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    tensors = [*inputs, *named.values(), *state.values()]

    def f(*args: Tensor) -> Tensor:
        left = iter(args)
        given = tuple(next(left) for _ in inputs)
        options = {name: next(left) for name in named}
        out = torch.func.functional_call(net, dict(zip(state, left, strict=True)), given, options)
        return out.sum() if isinstance(out, Tensor) else out["loss"]

    return joint_graph(f, *tensors)


def transformer(layers: int, fused: bool = False, d: int = 256) -> fx.GraphModule:
    blocks = nn.Sequential(*[Block(d, 4, fused) for _ in range(layers)])
    return of_module(blocks, torch.randn(4, 128, d))


def resnet() -> fx.GraphModule:
    widths = [16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [Residual(a, b) for a, b in zip([16, *widths], widths, strict=False)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), batch_norm(16), nn.ReLU()]
    return of_module(nn.Sequential(*stem, *blocks), torch.randn(8, 3, 32, 32))


def mlp() -> fx.GraphModule:
    layers = [m for _ in range(4) for m in (nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())]
    return of_module(nn.Sequential(*layers), torch.randn(256, 512))


def of_transformers(name: str, inputs: dict[str, Tensor], **config: Any) -> fx.GraphModule:
    import transformers

    model = getattr(transformers, name)
    return of_module(model(model.config_class(**config)).train(), **inputs)


def zoo(layers: int = 12) -> dict[str, Callable[[], fx.GraphModule]]:
    weights = [torch.randn(64, 64).requires_grad_(), torch.randn(64, 32).requires_grad_()]
    found = {
        "MLP, 4 layers": mlp,
        "chain of 30": lambda: joint_graph(chain, torch.randn(256, 1024).requires_grad_()),
        f"transformer, {layers}": lambda: transformer(layers),
        f"with fused attention, {layers}": lambda: transformer(layers, fused=True),
        "ResNet, 8 blocks": resnet,
        "LSTM, 16 steps": lambda: of_module(Recurrent(128, 16), torch.randn(64, 128)),
        "per-sample gradients": lambda: joint_graph(per_sample, *weights, torch.randn(128, 64)),
    }
    if importlib.util.find_spec("transformers") is None:
        print("without BERT, ViT, GPT-2 and Llama: transformers is not installed")
        return found
    return found | models_of_transformers()


def models_of_transformers() -> dict[str, Callable[[], fx.GraphModule]]:
    """BERT, ViT, GPT-2 and Llama, with random weights."""
    ids = torch.randint(4, 1000, (4, 64))
    text, words = {"input_ids": ids, "labels": ids}, {"vocab_size": 1000}
    # a mask of two dimensions would be asked for its values
    causal = {**text, "attention_mask": torch.ones(64, 64).tril().bool().expand(4, 1, 64, 64)}
    images = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.arange(4) % 2}
    heads = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    bert = heads | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt = {"n_embd": 128, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    four, two = {"num_hidden_layers": 4}, {"num_hidden_layers": 2, "use_cache": False}
    return {
        "BERT, 4 layers": lambda: of_transformers(
            "BertForMaskedLM", text, **words, **bert, **four
        ),
        "ViT, 4 layers": lambda: of_transformers(
            "ViTForImageClassification", images, **bert, **four, image_size=64, patch_size=8
        ),
        "GPT-2, 2 layers": lambda: of_transformers(
            "GPT2LMHeadModel", causal, **words, **gpt, **two
        ),
        "Llama, 2 layers": lambda: of_transformers(
            "LlamaForCausalLM", causal, **words, **heads, **two, num_key_value_heads=2
        ),
    }
