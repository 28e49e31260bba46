"""A small Llama and a small GPT-2 as the papers write them, with their relevances: what the library is judged by.

The rules, one function each, are in equations_rules.py and can be imported from here. A model runs forward step by
step; every step remembers how its relevance goes back; then the one explained logit goes back through them all.

The models take a transformers model's `state_dict()` and `config`, one sequence of embeddings [token, hidden], and
run from position 0 under the causal mask. Their arithmetic is float64 throughout, transformers' is not: compare
under `Float64()`. The rotary frequencies are float32 numbers in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from equations_rules import (
    COEFFICIENTS,
    PRODUCT_SHARES,
    activation,
    add_rule,
    attention_shares,
    coefficient_gelu,
    coefficient_gelu_tanh,
    coefficient_mish,
    coefficient_quick_gelu,
    coefficient_relu,
    coefficient_relu2,
    coefficient_silu,
    coefficient_tanh,
    embedding_rule,
    identity_rule,
    layer_norm_rule,
    linear_epsilon_rule,
    linear_gamma_rule,
    matmul_rule,
    product_rule,
    ratio,
    softmax,
    softmax_rule,
)
from numpy import ndarray

from lxt.composites import Composite, Gamma
from lxt.coverage.precision import Float64

__all__ = [
    "COEFFICIENTS",
    "PRODUCT_SHARES",
    "Float64",
    "Flow",
    "Relevance",
    "activation",
    "add_rule",
    "attention_shares",
    "coefficient_gelu",
    "coefficient_gelu_tanh",
    "coefficient_mish",
    "coefficient_quick_gelu",
    "coefficient_relu",
    "coefficient_relu2",
    "coefficient_silu",
    "coefficient_tanh",
    "embedding_rule",
    "gpt2_relevance",
    "identity_rule",
    "layer_norm_rule",
    "linear_epsilon_rule",
    "linear_gamma_rule",
    "llama_relevance",
    "matmul_rule",
    "product_rule",
    "ratio",
    "softmax",
    "softmax_rule",
]

Back = Callable[[ndarray], ndarray]
"""The relevance of an operation's output -> the relevance of its input."""


class Flow:
    """Runs operations forward; each returns its output and the way back, and books what relevance is lost on it."""

    def __init__(self, composite: Composite):
        if composite.activation != "identity" or composite.norm != "identity":
            raise ValueError(
                f"the reference knows activation and norm 'identity', got {composite.activation!r} and "
                f"{composite.norm!r}; compare a gradient with torch.autograd instead"
            )
        self.composite = composite
        self.leaks = dict.fromkeys(("linear", "norm", "product", "attention", "softmax", "position"), 0.0)

    def book(self, kind: str, before: ndarray, *after: ndarray) -> None:
        self.leaks[kind] += float(before.sum() - sum(part.sum() for part in after))

    def linear(self, x: ndarray, weight: ndarray, bias: ndarray | None = None) -> tuple[ndarray, Back]:
        z = x @ weight.T if bias is None else x @ weight.T + bias
        rule = self.composite.linear

        def back(relevance: ndarray) -> ndarray:
            if isinstance(rule, Gamma):
                result = linear_gamma_rule(x, weight, bias, z, relevance, gamma=rule.gamma)
            else:
                result = linear_epsilon_rule(x, weight, z, relevance, epsilon=rule.epsilon)
            self.book("linear", relevance, result)
            return result

        return z, back

    def layer_norm(self, x: ndarray, weight: ndarray, bias: ndarray | None, epsilon: float) -> tuple[ndarray, Back]:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        y = weight * normed if bias is None else weight * normed + bias

        def back(relevance: ndarray) -> ndarray:
            result = layer_norm_rule(x, weight, bias, normed, y, relevance)
            self.book("norm", relevance, result)
            return result

        return y, back

    def attend(
        self, q: ndarray, k: ndarray, v: ndarray, scale: float
    ) -> tuple[ndarray, Callable[[ndarray], tuple[ndarray, ndarray, ndarray]]]:
        """Causal attention; q: [head, token, d_head], k, v: [key-value head, token, d_head], each shared by a group."""
        group = len(q) // len(k)
        keys, values = (np.repeat(x, group, axis=0) for x in (k, v))
        keys_t = keys.swapaxes(-1, -2)
        products = q @ keys_t
        future = np.triu(np.ones(products.shape[-2:], dtype=bool), 1)
        scores = np.where(future, -np.inf, products * scale)
        weights = softmax(scores)
        output = weights @ values

        def back(relevance: ndarray) -> tuple[ndarray, ndarray, ndarray]:
            shares_output, shares_scores = attention_shares(self.composite)
            r_weights, r_values = matmul_rule(weights, values, output, relevance, shares_output)
            self.book("attention", relevance, r_weights, r_values)
            r_scores = softmax_rule(scores, weights, r_weights, temperature=self.composite.softmax_temperature)
            self.book("softmax", r_weights, r_scores)
            r_q, r_keys_t = matmul_rule(q, keys_t, products, identity_rule(r_scores), shares_scores)
            self.book("attention", r_scores, r_q, r_keys_t)
            r_k, r_v = (
                r.reshape(*k.shape[:1], group, *k.shape[1:]).sum(1) for r in (r_keys_t.swapaxes(-1, -2), r_values)
            )
            return r_q, r_k, r_v

        return output, back


def _split_heads(x: ndarray, heads: int) -> ndarray:
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def _merge_heads(x: ndarray) -> ndarray:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


@dataclass(frozen=True)
class Relevance:
    """What a model's reference returns, in logits, for the sequence's T tokens.

    Attributes:
        logit: the explained logit; all relevance starts there.
        logits: [T, vocabulary], of the forward.
        input: [T, hidden], of the embeddings given.
        residual: [layers + 1, T]; 0 is what enters the first layer (GPT-2: with the positions added), l what leaves
            the l-th, the last one taken before the final norm.
        heads: [layers, T, head], at the input of the attention's output projection.
        neurons: [layers, T, d_mlp], at the input of the down projection.
        leaks: relevance that did not reach the input, by where it stayed: `linear` (biases, epsilon), `norm` (bias),
            `position` (learned positions), `softmax`, `product` and `attention` (shares that don't sum to one).
            logit = input.sum() + sum(leaks.values()).
    """

    logit: float
    logits: ndarray
    input: ndarray
    residual: ndarray
    heads: ndarray
    neurons: ndarray
    leaks: dict[str, float]


LayerBack = Callable[[ndarray], tuple[ndarray, ndarray, ndarray]]
"""Relevance of a layer's output -> of its input, of its heads, of its neurons."""


def _arrays(state: Mapping[str, torch.Tensor]) -> dict[str, ndarray]:
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in state.items()}


def _float64(embeds: Any) -> ndarray:
    array = embeds.detach().double().cpu().numpy() if isinstance(embeds, torch.Tensor) else np.asarray(embeds, float)
    if array.ndim != 2:
        raise ValueError(f"embeds must be one sequence, [token, hidden]; got shape {array.shape}: drop the batch axis")
    return array


def _explain(
    flow: Flow, layers: list[LayerBack], head: Back, logits: ndarray, position: int, token: int
) -> tuple[ndarray, dict[str, Any]]:
    """From the one explained logit back through the head and all layers: the relevance that entered the first."""
    start = np.zeros_like(logits)
    start[position, token] = logits[position, token]
    relevance = head(start)
    residual, heads, neurons = [embedding_rule(relevance)], [], []
    for layer in reversed(layers):
        relevance, in_heads, in_neurons = layer(relevance)
        residual.append(embedding_rule(relevance))
        heads.append(in_heads)
        neurons.append(in_neurons)
    inside = {"residual": residual, "heads": heads, "neurons": neurons}
    return relevance, {
        "logit": float(logits[position, token]),
        "logits": logits,
        "leaks": flow.leaks,
        **{name: np.stack(values[::-1]) for name, values in inside.items()},
    }


def _rotation(config: Any, length: int, d_head: int) -> ndarray:
    """RoPE as what it is, a linear map for each position: [token, d_head, d_head]."""
    rope = config.rope_parameters
    # In float32, by torch, as transformers makes them: numpy's power may differ in the last bit.
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head))
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original / (2 * math.pi / frequencies)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / factor + blend * frequencies
    elif rope["rope_type"] != "default":
        raise ValueError(f"no reference for rope_type {rope['rope_type']!r}; there are default, linear and llama3")
    angle = np.arange(length)[:, None] * frequencies.double().numpy()
    cos, sin = (np.apply_along_axis(np.diag, -1, f(angle)) for f in (np.cos, np.sin))
    return np.concatenate([np.concatenate([cos, -sin], -1), np.concatenate([sin, cos], -1)], -2)


def _llama_layer(
    flow: Flow, w: Callable[[str], Any], config: Any, h: ndarray, rotation: ndarray
) -> tuple[ndarray, LayerBack]:
    def linear(name: str, x: ndarray) -> tuple[ndarray, Back]:
        return flow.linear(x, w(f"{name}.weight"), w(f"{name}.bias"))

    def rms_norm(name: str, x: ndarray) -> ndarray:
        return w(f"{name}.weight") * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)

    def rotate(x: ndarray) -> ndarray:
        return (rotation @ x[..., None])[..., 0]

    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    normed = rms_norm("input_layernorm", h)
    (q, q_back), (k, k_back), (v, v_back) = (linear(f"self_attn.{name}_proj", normed) for name in "qkv")
    q, k, v = _split_heads(q, n_heads), _split_heads(k, n_kv), _split_heads(v, n_kv)
    q_rotated, k_rotated = rotate(q), rotate(k)
    mixed, attend_back = flow.attend(q_rotated, k_rotated, v, q.shape[-1] ** -0.5)
    attention, o_back = linear("self_attn.o_proj", _merge_heads(mixed))
    middle = h + attention
    normed = rms_norm("post_attention_layernorm", middle)
    (gate, gate_back), (up, up_back) = (linear(f"mlp.{name}_proj", normed) for name in ("gate", "up"))
    mlp, down_back = linear("mlp.down_proj", activation(config.hidden_act, gate) * up)
    output = middle + mlp

    def back(relevance: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        r_middle, r_mlp = add_rule(middle, mlp, output, relevance)
        neurons = down_back(r_mlp)
        r_gate, r_up = product_rule(neurons, PRODUCT_SHARES[flow.composite.product])
        flow.book("product", neurons, r_gate, r_up)
        r_middle = r_middle + identity_rule(gate_back(identity_rule(r_gate)) + up_back(r_up))
        r_h, r_attention = add_rule(h, attention, middle, r_middle)
        mixed_back = _split_heads(o_back(r_attention), n_heads)
        r_q, r_k, r_v = attend_back(mixed_back)
        r_q, r_k = (linear_epsilon_rule(x, rotation, z, r) for x, z, r in ((q, q_rotated, r_q), (k, k_rotated, r_k)))
        r_normed = sum(f(_merge_heads(r)) for f, r in ((q_back, r_q), (k_back, r_k), (v_back, r_v)))
        return r_h + identity_rule(r_normed), mixed_back.sum(-1).T, neurons

    return output, back


def llama_relevance(
    state: Mapping[str, torch.Tensor],
    config: Any,
    embeds: Any,
    target_position: int,
    target_token: int,
    composite: Composite,
) -> Relevance:
    """Relevance of one logit of a LlamaForCausalLM.

    The composite's linear rule holds for every nn.Linear, the head's included, and not for the rotary embedding.
    """
    weights, flow, h = _arrays(state), Flow(composite), _float64(embeds)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotation = _rotation(config, len(h), d_head)
    layers, stream = [], h
    for i in range(config.num_hidden_layers):
        stream, back = _llama_layer(
            flow, lambda name, i=i: weights.get(f"model.layers.{i}.{name}"), config, stream, rotation
        )
        layers.append(back)
    normed = weights["model.norm.weight"] * stream
    normed = normed / np.sqrt((stream**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    tied = config.tie_word_embeddings
    logits, head = flow.linear(normed, weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
    relevance, rest = _explain(flow, layers, lambda r: identity_rule(head(r)), logits, target_position, target_token)
    return Relevance(input=relevance, **rest)


def _gpt2_layer(
    flow: Flow, w: Callable[[str], Any], config: Any, h: ndarray, scale: float
) -> tuple[ndarray, LayerBack]:
    def conv1d(name: str, x: ndarray) -> tuple[ndarray, Back]:
        return flow.linear(x, w(f"{name}.weight").T, w(f"{name}.bias"))

    def layer_norm(name: str, x: ndarray) -> tuple[ndarray, Back]:
        return flow.layer_norm(x, w(f"{name}.weight"), w(f"{name}.bias"), config.layer_norm_epsilon)

    normed, ln_1_back = layer_norm("ln_1", h)
    qkv, qkv_back = conv1d("attn.c_attn", normed)
    q, k, v = (_split_heads(x, config.n_head) for x in np.split(qkv, 3, axis=-1))
    mixed, attend_back = flow.attend(q, k, v, scale)
    attention, proj_back = conv1d("attn.c_proj", _merge_heads(mixed))
    middle = h + attention
    normed, ln_2_back = layer_norm("ln_2", middle)
    hidden, fc_back = conv1d("mlp.c_fc", normed)
    mlp, down_back = conv1d("mlp.c_proj", activation(config.activation_function, hidden))
    output = middle + mlp

    def back(relevance: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        r_middle, r_mlp = add_rule(middle, mlp, output, relevance)
        neurons = down_back(r_mlp)
        r_middle = r_middle + ln_2_back(fc_back(identity_rule(neurons)))
        r_h, r_attention = add_rule(h, attention, middle, r_middle)
        mixed_back = _split_heads(proj_back(r_attention), config.n_head)
        r_qkv = np.concatenate([_merge_heads(r) for r in attend_back(mixed_back)], axis=-1)
        return r_h + ln_1_back(qkv_back(r_qkv)), mixed_back.sum(-1).T, neurons

    return output, back


def gpt2_relevance(
    state: Mapping[str, torch.Tensor],
    config: Any,
    embeds: Any,
    target_position: int,
    target_token: int,
    composite: Composite,
) -> Relevance:
    """Relevance of one logit of a GPT2LMHeadModel; embeds come without positions, which take their share of the sum."""
    weights, flow, h = _arrays(state), Flow(composite), _float64(embeds)
    positions = weights["transformer.wpe.weight"][: len(h)]
    start = h + positions
    layers, stream = [], start
    for i in range(config.n_layer):
        scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        scale = scale / (i + 1) if config.scale_attn_by_inverse_layer_idx else scale
        stream, back = _gpt2_layer(
            flow, lambda name, i=i: weights.get(f"transformer.h.{i}.{name}"), config, stream, scale
        )
        layers.append(back)
    weight, bias = weights["transformer.ln_f.weight"], weights.get("transformer.ln_f.bias")
    normed, norm_back = flow.layer_norm(stream, weight, bias, config.layer_norm_epsilon)
    tied = config.tie_word_embeddings
    logits, head = flow.linear(normed, weights["transformer.wte.weight" if tied else "lm_head.weight"])
    relevance, rest = _explain(flow, layers, lambda r: norm_back(head(r)), logits, target_position, target_token)
    at_input, at_positions = add_rule(h, positions, start, relevance)
    flow.leaks["position"] += float(at_positions.sum())
    return Relevance(input=at_input, **rest)
