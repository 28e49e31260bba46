"""Tiny seeded models of every architecture that has a patch map, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

HIDDEN, TOKENS, VOCABULARY = 32, 7, 61
_COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
_DECODER = _COMMON | {
    "vocab_size": VOCABULARY,
    "intermediate_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = _COMMON | {
    "vocab_size": VOCABULARY,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
}


@dataclass(frozen=True)
class Example:
    """A model and how to call it: `inputs` maps the names of differentiable inputs to their shapes."""

    build: Callable[[str], nn.Module]
    inputs: dict[str, tuple[int, ...]]
    logit: Callable[[Tensor], Tensor]


def _causal(model: type, config: type, **options: object) -> Example:
    return Example(
        lambda attention: model(config(**_DECODER | options, attn_implementation=attention)),
        {"inputs_embeds": (1, TOKENS, HIDDEN)},
        lambda logits: logits[0, -1, 5],
    )


def _classifier(model: type, config: type) -> Example:
    return Example(
        lambda attention: model(config(**_ENCODER, attn_implementation=attention)),
        {"inputs_embeds": (1, TOKENS, HIDDEN)},
        lambda logits: logits[0, 1],
    )


def _moe(attention: str) -> nn.Module:
    options = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_DECODER | options, attn_implementation=attention))
    model.set_experts_implementation("eager")
    return model


def _t5(attention: str) -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            initializer_factor=1.0,
            attn_implementation=attention,
        )
    )


def _vit(attention: str) -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            **_COMMON, intermediate_size=40, image_size=16, patch_size=8, num_labels=3, attn_implementation=attention
        )
    )


_GQA = {"num_key_value_heads": 2, "head_dim": 8}
EXAMPLES: dict[str, Example] = {
    "llama": _causal(tf.LlamaForCausalLM, tf.LlamaConfig, num_key_value_heads=2),
    "mistral": _causal(tf.MistralForCausalLM, tf.MistralConfig, num_key_value_heads=2, sliding_window=4),
    "qwen2": _causal(tf.Qwen2ForCausalLM, tf.Qwen2Config, num_key_value_heads=2),
    "qwen3": _causal(tf.Qwen3ForCausalLM, tf.Qwen3Config, **_GQA),
    "qwen3_moe": Example(_moe, {"inputs_embeds": (1, TOKENS, HIDDEN)}, lambda logits: logits[0, -1, 5]),
    "gemma2": _causal(tf.Gemma2ForCausalLM, tf.Gemma2Config, **_GQA, query_pre_attn_scalar=8),
    "gemma3": _causal(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, **_GQA, query_pre_attn_scalar=8),
    "phi3": _causal(tf.Phi3ForCausalLM, tf.Phi3Config, num_key_value_heads=2),
    "gpt2": _causal(tf.GPT2LMHeadModel, tf.GPT2Config),
    "gpt_neox": _causal(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig),
    "opt": _causal(tf.OPTForCausalLM, tf.OPTConfig, ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=32),
    "bert": _classifier(tf.BertForSequenceClassification, tf.BertConfig),
    "roberta": _classifier(tf.RobertaForSequenceClassification, tf.RobertaConfig),
    "t5": Example(
        _t5,
        {"inputs_embeds": (1, TOKENS, HIDDEN), "decoder_inputs_embeds": (1, 3, HIDDEN)},
        lambda logits: logits[0, -1, 5],
    ),
    "vit": Example(_vit, {"pixel_values": (1, 3, 16, 16)}, lambda logits: logits[0, 1]),
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt")


def build(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, zero_biases: bool = False
) -> nn.Module:
    """The model in eval mode, every parameter random (norm weights too: at 1 they hide mistakes)."""
    torch.manual_seed(0)
    with skipping_what_transformers_lacks():
        model = EXAMPLES[name].build(attention).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if zero_biases and absorbs_relevance(key):
                parameter.zero_()
    return model.to(dtype)


@contextmanager
def skipping_what_transformers_lacks() -> Iterator[None]:
    """Skips the test where this version of transformers has no such attention for the model."""
    try:
        yield
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(str(error).split(" yet.")[0])


def skip_unless_it_runs(run: Callable[[], object]) -> None:
    """Skips the test where torch and transformers can't do it by themselves: old ones lack kernels, or have bugs."""
    try:
        run()
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        if isinstance(error, ValueError) and "does not support setting experts" not in str(error):
            raise
        pytest.skip(f"without lxt: {str(error).splitlines()[0][:100]}")


def absorbs_relevance(name: str) -> bool:
    """Biases and what is added to embeddings: learned positions, token types, the class token."""
    added = ("wpe", "embed_positions", "position_embeddings", "token_type_embeddings", "cls_token")
    return name.endswith("bias") or any(key in name for key in added)


def inputs_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs that require grad."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for key, shape in EXAMPLES[name].inputs.items()
    }


def checkpointed(model: nn.Module, options: dict[str, bool] | None = None) -> nn.Module:
    """The model with gradient checkpointing on; transformers renamed the call in 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or {"use_reentrant": False})
    return model
