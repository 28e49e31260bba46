"""torch's own attention modules, which are one function to the mode until it enters them.

nn.MultiheadAttention is judged by the same attention written out in float64; the layers built on it by conservation
and by the auditor. Inference has a fast path of its own in torch, which computes a whole layer in one operation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lxt
from lxt.audit import audit
from lxt.composites import ATTN_LRP, CP_LRP, Composite

VALUE_ONLY = ATTN_LRP.but(attention="value_only", name="value only")
WIDE = ATTN_LRP.but(qkv=(0.5, 0.5, 1.0), name="wide")
WIDTH, HEADS, QUERIES, KEYS = 8, 2, 5, 4
CLOSE = 1e-12  # relative to the norm

PADDING = torch.tensor([[False] * KEYS, [False] * (KEYS - 1) + [True]])
CAUSAL = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "time first": {"batch_first": False},
    "own widths": {"kdim": 6, "vdim": 10},
    "learned key and value": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "no biases": {"bias": False},
    "both added, time first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
}
MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL},
    "additive, and padding": {
        "attn_mask": torch.linspace(-1, 1, QUERIES * KEYS, dtype=torch.float64).view(QUERIES, KEYS),
        "key_padding_mask": torch.zeros(2, KEYS, dtype=torch.float64).masked_fill(PADDING, -torch.inf),
    },
    "one for each head": {"attn_mask": torch.stack([CAUSAL, CAUSAL.flip(1), CAUSAL & False, CAUSAL])},
}


def randomised(module: nn.Module, zero_biases: bool = False) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.4)
            if zero_biases and "bias" in name:
                parameter.zero_()
    return module.eval()


def multihead(name: str = "plain", zero_biases: bool = False) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.5} | OPTIONS[name]
    return randomised(nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options), zero_biases)


class Attends(nn.Module):
    """Returns the first output of an attention, called by keywords."""

    def __init__(self, attention: nn.Module, **options: Any) -> None:
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.attention(**inputs, **self.options)
        return output[0] if isinstance(output, tuple) else output


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def given(name: str = "plain") -> dict[str, Tensor]:
    """query, key and value, [batch, token, width], or with time first."""
    options = OPTIONS[name]
    key, value = random(2, KEYS, options.get("kdim", WIDTH)), random(2, KEYS, options.get("vdim", WIDTH))
    inputs = {"query": random(2, QUERIES, WIDTH), "key": key, "value": value}
    first = options.get("batch_first", True)
    return {name: x if first else x.transpose(0, 1).contiguous() for name, x in inputs.items()}


def share(x: Tensor, factor: float) -> Tensor:
    return factor * x + (1 - factor) * x.detach()


def written(
    module: nn.MultiheadAttention, inputs: dict[str, Tensor], masks: dict[str, Tensor], shares: tuple[float, ...]
) -> Tensor:
    """The module's output, with `shares` on the gradients of the projected query, key and value."""
    query, key, value = (x if module.batch_first else x.transpose(0, 1) for x in inputs.values())
    weights = (
        module.in_proj_weight.chunk(3)
        if module.in_proj_weight is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + (0 if b is None else b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    batch, added = len(q), torch.zeros((), dtype=torch.float64)
    for mask in masks.values():
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
        if mask.dim() == 3:  # [batch * head, query, key]
            added = added + mask.unflatten(0, (batch, HEADS))
        elif mask.shape[0] == batch:  # [batch, key]
            added = added + mask[:, None, None]
        else:
            added = added + mask
    added = added.expand(batch, HEADS, QUERIES, KEYS)
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(batch, 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    added = F.pad(added, (0, k.shape[1] - KEYS))
    q, k, v = (
        share(x, factor).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x, factor in zip((q, k, v), shares, strict=True)
    )
    probabilities = torch.softmax(q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5 + added, -1)
    output = (probabilities @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    output = output if module.out_proj.bias is None else output + module.out_proj.bias
    return output if module.batch_first else output.transpose(0, 1)


def relevance(model: nn.Module, inputs: dict[str, Tensor], rules: Composite | None) -> tuple[dict[str, Tensor], Tensor]:
    """Input * gradient of a weighted sum of the outputs, and that sum; unpatched where `rules` is None."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    if rules is None:
        output = model(**leaves)
    else:
        with lxt.monkey_patch(model, rules):
            output = model(**leaves)
    value = target(output)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: (x * c).detach() for (name, x), c in zip(leaves.items(), gradients, strict=True)}, value.detach()


def target(output: Tensor) -> Tensor:
    return (output * random(*output.shape)).sum()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        assert (got[name] - expected[name]).norm() <= CLOSE * sum(x.norm() for x in expected.values())


def assert_conserves_and_audits(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    for rules in (CP_LRP, VALUE_ONLY, ATTN_LRP, WIDE):
        found, value = relevance(model, inputs, rules)
        torch.testing.assert_close(value, relevance(model, inputs, None)[1], rtol=1e-13, atol=1e-13)
        total = sum(x.sum() for x in found.values())
        assert (abs(total - value) < 1e-11 * abs(value)) == rules.conserves
        audited = audit(model, inputs, target, rules, wrt=tuple(inputs))
        assert audited.unknown == ()
        assert_same(found, audited.relevance)


# -- nn.MultiheadAttention


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_same_attention_written_out(name, masks, need_weights):
    attention, inputs = multihead(name), given(name)
    model = Attends(attention, need_weights=need_weights, **MASKS[masks])
    for rules, shares in ((ATTN_LRP, (0.25, 0.25, 0.5)), (CP_LRP, (0, 0, 1)), (WIDE, WIDE.qkv)):
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        by_hand = written(attention, leaves, MASKS[masks], shares)
        gradients = torch.autograd.grad(target(by_hand), list(leaves.values()))
        found, value = relevance(model.train(), inputs, rules)  # dropout is inactive under the patch
        torch.testing.assert_close(value, target(by_hand).detach(), rtol=1e-12, atol=1e-12)
        assert_same(found, {key: (x * c).detach() for (key, x), c in zip(leaves.items(), gradients, strict=True)})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["no mask", "additive, and padding"])
@pytest.mark.parametrize("name", OPTIONS)
def test_conserves_and_agrees_with_the_auditor(name, masks, need_weights):
    model = Attends(multihead(name, zero_biases=True), need_weights=need_weights, **MASKS[masks])
    assert_conserves_and_audits(model, given(name))


@pytest.mark.parametrize("average", [True, False])
def test_the_weights_that_it_returns_stay_what_they_were(average):
    attention, inputs = multihead(), given()
    plain = attention(**inputs, average_attn_weights=average)[1]
    with lxt.monkey_patch(attention):
        weights = attention(**inputs, average_attn_weights=average)[1]
    assert weights.shape == ((2, QUERIES, KEYS) if average else (2, HEADS, QUERIES, KEYS))
    torch.testing.assert_close(weights, plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("explained", [("query",), ("key",), ("value",), ("key", "value"), ("query", "value")])
@pytest.mark.parametrize("rules", [ATTN_LRP, WIDE], ids=lambda rules: rules.name)
def test_what_is_constant_leaves_its_share_to_its_partner(rules, explained):
    """Fused and written out in products, attention shares alike when some of its inputs aren't explained."""
    attention, inputs = multihead(), given()
    found = []
    for need_weights in (True, False):
        model = Attends(attention, need_weights=need_weights)
        leaves = {name: x.clone().requires_grad_(name in explained) for name, x in inputs.items()}
        with lxt.monkey_patch(model, rules):
            output = model(**leaves)
        wanted = [leaves[name] for name in explained]
        gradients = torch.autograd.grad(target(output), wanted, allow_unused=True, materialize_grads=True)
        found.append({name: (leaves[name] * c).detach() for name, c in zip(explained, gradients, strict=True)})
    assert_same(*found)


def test_one_sequence_without_a_batch():
    model = Attends(multihead(zero_biases=True), need_weights=False)
    assert_conserves_and_audits(model, {name: x[0] for name, x in given().items()})


def test_the_temperature_of_its_softmax():
    rules = ATTN_LRP.but(softmax_temperature=2.0)
    fused, eager = (Attends(multihead(), need_weights=need_weights) for need_weights in (False, True))
    assert_same(relevance(fused, given(), rules)[0], relevance(eager, given(), rules)[0])
    assert_same(relevance(eager, given(), rules)[0], audit(eager, given(), target, rules, tuple(given())).relevance)


# -- the layers built on it


def layer(norm_first: bool = True, activation: Any = "gelu", batch_first: bool = True) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 12, 0.5, activation, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )


def stack(norm_first: bool, batch_first: bool = True) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(
        layer(norm_first, batch_first=batch_first),
        2,
        norm=nn.LayerNorm(WIDTH, dtype=torch.float64),
        enable_nested_tensor=batch_first and not norm_first,
    )


LAYERS = {
    "norms first": lambda: layer(),
    "norms last, relu": lambda: layer(False, "relu"),
    "silu, time first": lambda: layer(activation=F.silu, batch_first=False),
    "encoder": lambda: stack(True),
    "encoder, norms last": lambda: stack(False),
    "encoder, time first": lambda: stack(False, batch_first=False),
}


@pytest.mark.parametrize("masks", ["no mask", "padding", "causal"])
@pytest.mark.parametrize("name", LAYERS)
def test_encoders_conserve_and_agree_with_the_auditor(name, masks):
    encoder, time_first = randomised(LAYERS[name](), zero_biases=True), "time first" in name
    stacked = isinstance(encoder, nn.TransformerEncoder)
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    options = {
        "no mask": {},
        "padding": {"src_key_padding_mask": torch.arange(QUERIES) >= torch.tensor([[5], [3]])},
        "causal": {"mask" if stacked else "src_mask": causal, "is_causal": True},
    }[masks]
    x = random(2, QUERIES, WIDTH)
    model = Attends(encoder, **options)
    assert_conserves_and_audits(model, {"src": x.transpose(0, 1).contiguous() if time_first else x})


def test_decoders_conserve_and_agree_with_the_auditor():
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 12, 0.5, "gelu", batch_first=True, dtype=torch.float64)
    inputs = {"tgt": random(2, QUERIES, WIDTH), "memory": random(2, KEYS, WIDTH)}
    assert_conserves_and_audits(Attends(randomised(decoder, zero_biases=True)), inputs)
    both = nn.Transformer(WIDTH, HEADS, 1, 1, 12, batch_first=True, dtype=torch.float64)
    inputs = {"src": random(2, KEYS, WIDTH), "tgt": random(2, QUERIES, WIDTH)}
    assert_conserves_and_audits(Attends(randomised(both, zero_biases=True)), inputs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_of_inference_gives_the_same_output(padded):
    """Without gradients torch runs a layer as one operation, over nested tensors where there is padding."""
    encoder, x = randomised(stack(norm_first=False)), random(2, QUERIES, WIDTH)
    padding = torch.arange(QUERIES) >= torch.tensor([[5], [3 if padded else 5]])
    plain = encoder(x.clone().requires_grad_(), src_key_padding_mask=padding)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
    assert (fast[padding] == encoder.norm.bias).all()  # so the fast path was taken: padding comes back as zeros
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with lxt.monkey_patch(encoder), mode():
            output = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(output[~padding], plain[~padding].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output[~padding], fast[~padding], rtol=1e-12, atol=1e-12)


def test_a_constant_input_does_not_take_the_fast_path_past_the_rules():
    """A tower whose input is constant, as of a second modality, stays constant, and what is explained stays right."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = stack(norm_first=False), stack(norm_first=True)

        def forward(self, src: Tensor) -> Tensor:
            return self.first(src) + self.second(torch.ones_like(src))

    model = randomised(Towers())
    found, _ = relevance(Attends(model), {"src": random(2, QUERIES, WIDTH)}, ATTN_LRP)
    alone, _ = relevance(Attends(model.first), {"src": random(2, QUERIES, WIDTH)}, ATTN_LRP)
    assert_same(found, alone)
