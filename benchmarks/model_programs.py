"""The networks of :mod:`benchmarks.models`: two layers each, with random parameters, in float32.

Those of ``transformers`` are there where it is installed. Dropout is off, so that every column
computes the same; a batch comes from one seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, WORDS = 256, 4, 1000


@dataclass(frozen=True)
class Network:
    """A network, a batch of inputs for it by their names, and the loss of what it returns.
    ``in_double``: the same in float64."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    loss: Callable[[Any], Tensor] = lambda out: out.loss
    batch: int = 4
    in_double: Callable[[nn.Module], nn.Module] = nn.Module.double


def networks(quick: bool = False) -> dict[str, Network]:
    length = 16 if quick else 64
    found = plain(length)
    if importlib.util.find_spec("transformers") is not None:
        found |= of_text(length) | of_images(32 if quick else 64) | of_sound(0.2 if quick else 0.5)
    return found


# ----- torch's own -------------------------------------------------------------------------------


def plain(length: int) -> dict[str, Network]:
    def sequence(batch: int) -> Tensor:
        return torch.randn(batch, length, WIDTH)

    return {
        "nn.Transformer": Network(
            lambda: nn.Transformer(
                WIDTH, HEADS, 2, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            ),
            lambda batch: {"src": sequence(batch), "tgt": sequence(batch)},
            squares,
        ),
        "nn.LSTM": Network(
            lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True),
            lambda batch: {"input": sequence(batch)},
            lambda out: squares(out[0]),
        ),
    }


def squares(out: Tensor) -> Tensor:
    return out.square().mean()


# ----- of transformers ---------------------------------------------------------------------------


def made(name: str, **config: Any) -> Callable[[], nn.Module]:
    """What makes the network ``name``, with this configuration."""

    def make() -> nn.Module:
        import transformers

        model = getattr(transformers, name)
        return model(model.config_class(**config)).train()

    return make


def tokens(length: int) -> Callable[[int], dict[str, Tensor]]:
    def inputs(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(4, WORDS, (batch, length))
        return {"input_ids": ids, "labels": ids.clone()}

    return inputs


def of_text(length: int) -> dict[str, Network]:
    text = tokens(length)
    ids = {"bos_token_id": 1, "eos_token_id": 2}  # without padding, which would be looked for
    width = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS}
    grouped = {**width, **heads, **ids, "num_key_value_heads": 2, "intermediate_size": 2 * WIDTH}
    return {
        "BERT": Network(
            made(
                "BertForMaskedLM",
                **{**width, **heads, "intermediate_size": 4 * WIDTH},
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            text,
        ),
        "GPT-2": Network(
            made(
                "GPT2LMHeadModel",
                **{"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS},
                **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **ids},
            ),
            text,
        ),
        "Llama": Network(made("LlamaForCausalLM", **grouped), text),
        "Qwen2": Network(made("Qwen2ForCausalLM", **grouped), text),
        "Mixtral": Network(
            made("MixtralForCausalLM", **grouped, num_local_experts=4), text, in_double=one_by_one
        ),
        "Mamba": Network(made("MambaForCausalLM", **width, **ids), text),
        "T5": Network(
            made(
                "T5ForConditionalGeneration",
                **{"vocab_size": WORDS, "d_model": WIDTH, "d_kv": WIDTH // HEADS},
                **{"num_heads": HEADS, "d_ff": 4 * WIDTH, "num_layers": 2, "dropout_rate": 0.0},
                decoder_start_token_id=0,
            ),
            text,
        ),
    }


def one_by_one(model: Any) -> nn.Module:
    """In float64, for which PyTorch has no product of groups: expert by expert."""
    model.set_experts_implementation("eager")
    return model.double()


def of_images(side: int) -> dict[str, Network]:
    def images(batch: int) -> dict[str, Tensor]:
        labels = torch.arange(batch) % 10
        return {"pixel_values": torch.randn(batch, 3, side, side), "labels": labels}

    def channels_last(batch: int) -> dict[str, Tensor]:
        x = torch.randn(batch, 3, side, side)
        return {"pixel_values": x.to(memory_format=torch.channels_last)}

    stages = {"hidden_sizes": [64, 128], "depths": [2, 2]}
    features = lambda out: squares(out.last_hidden_state) + out.pooler_output.mean()
    return {
        "ViT": Network(
            made(
                "ViTForImageClassification",
                **{"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS},
                **{"intermediate_size": 4 * WIDTH, "image_size": side, "patch_size": 8},
                **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
                num_labels=10,
            ),
            images,
        ),
        "ConvNeXt": Network(
            made("ConvNextForImageClassification", **stages, num_stages=2, num_labels=10), images
        ),
        "ResNet": Network(
            made("ResNetForImageClassification", **stages, embedding_size=32, num_labels=10),
            images,
        ),
        "ConvNeXt, features, channels last": Network(
            in_channels_last(made("ConvNextModel", **stages, num_stages=2)),
            channels_last,
            features,
        ),
        "ResNet, features, channels last": Network(
            in_channels_last(made("ResNetModel", **stages, embedding_size=32)),
            channels_last,
            features,
        ),
    }


def in_channels_last(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def of_sound(seconds: float) -> dict[str, Network]:
    samples, frames = int(16000 * seconds), int(200 * seconds)

    def audio(batch: int) -> dict[str, Tensor]:
        return {"input_values": torch.randn(batch, samples)}

    def spectrum(batch: int) -> dict[str, Tensor]:
        labels = torch.randint(4, WORDS, (batch, 16))
        return {"input_features": torch.randn(batch, 80, 2 * frames), "labels": labels}

    none = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return {
        "wav2vec2": Network(
            made(
                "Wav2Vec2ForCTC",
                **{"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS},
                **{"intermediate_size": 4 * WIDTH, "conv_dim": (64,) * 7, "vocab_size": 32},
                **{"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4},
                **{"layerdrop": 0.0, "apply_spec_augment": False, "hidden_dropout": 0.0},
                **{"feat_proj_dropout": 0.0, "final_dropout": 0.0},
                **{k: v for k, v in none.items() if k != "dropout"},
            ),
            audio,
            lambda out: squares(out.logits),
        ),
        "Whisper": Network(
            made(
                "WhisperForConditionalGeneration",
                **{"vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2},
                **{"decoder_layers": 2, "encoder_attention_heads": HEADS},
                **{"decoder_attention_heads": HEADS, "encoder_ffn_dim": 4 * WIDTH},
                **{"decoder_ffn_dim": 4 * WIDTH, "num_mel_bins": 80},
                **{"max_source_positions": frames, "max_target_positions": 64},
                **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                **{"decoder_start_token_id": 3, **none},
            ),
            spectrum,
        ),
    }
