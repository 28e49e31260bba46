"""Other people's code around a patched model: hooks, replaced forwards, own modules. It counts, or is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
from models import build, checkpointed, inputs_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.models.llama import modeling_llama

import lxt
from lxt.attributor import Attributor
from lxt.mode import RuleMode, UnknownOperation
from lxt.patching import rules_of

IDS = [5, 9, 11, 30, 7]


def gradient(model: nn.Module, rules: str | None = "attnlrp") -> tuple[Tensor, Tensor]:
    """Logits and the embeddings' gradient, patched or not."""
    embeds = inputs_of("llama")["inputs_embeds"]
    handle = lxt.monkey_patch(model, rules) if rules else None
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    (found,) = torch.autograd.grad(logits[0, -1, 5], embeds)
    if handle:
        handle.remove()
    return logits.detach(), found


def test_a_trainable_module_in_a_hook_is_refused_and_a_frozen_one_counts() -> None:
    model, outside = build("llama"), nn.Linear(32, 32).double()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + outside(output))
    with pytest.raises(ValueError, match=r"'linear' .* trainable parameter of shape \(32, 32\)"):
        gradient(model)
    outside.requires_grad_(False)
    logits, _ = gradient(model)
    assert torch.equal(logits, gradient(model, None)[0])


def test_a_hook_on_the_last_layer_is_explained_with_it() -> None:
    model = build("llama")
    before = model(torch.tensor([IDS])).logits[0, -1, 3].item()

    def steer(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] += 5
        assert output.shape[1] == len(IDS)
        return output

    handle = model.model.layers[-1].mlp.register_forward_hook(steer)
    value = Attributor(model).attribute(IDS, target=3).explained[0].value
    assert value == pytest.approx(model(torch.tensor([IDS])).logits[0, -1, 3].item(), rel=1e-6)
    handle.remove()
    assert abs(value - before) > 1e-3


def test_a_hook_on_the_activation_runs() -> None:
    model = build("llama")
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 0.1)
    assert torch.equal(gradient(model)[0], gradient(model, None)[0])


def test_a_forward_that_a_user_put_there_runs() -> None:
    def mine(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(mine, layer.mlp)
    assert torch.equal(gradient(model)[0], gradient(model, None)[0])


def test_a_class_forward_that_a_user_put_there_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mine)
    model = build("llama")
    assert torch.equal(gradient(model)[0], gradient(model, None)[0])


def test_dropped_layers_and_paths_are_inactive() -> None:
    opt = build("opt").train()
    opt.model.decoder.layerdrop = 0.9
    embeds = inputs_of("opt")["inputs_embeds"]
    for model in (opt, checkpointed(opt)):
        with lxt.monkey_patch(model):
            logits = [model(inputs_embeds=embeds, use_cache=False).logits for _ in range(4)]
        assert all(torch.equal(logits[0], other) for other in logits)
        assert model.training
        assert model.model.decoder.layerdrop == 0.9

    config = BeitConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        drop_path_rate=0.9, num_labels=2,
    )  # fmt: skip
    beit, pixels = BeitForImageClassification(config).train(), torch.randn(2, 3, 16, 16, requires_grad=True)
    with lxt.monkey_patch(beit):
        assert torch.equal(beit(pixels).logits, beit(pixels).logits)
    assert all(module.training for module in beit.modules())


def test_layers_dropped_at_a_rate_of_the_configuration_run_all() -> None:
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, conv_dim=[8], conv_stride=[2],
        conv_kernel=[3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.9, mask_time_prob=0.5,
    )  # fmt: skip
    wav2vec2, sound = Wav2Vec2ForSequenceClassification(config).train(), torch.randn(1, 60)
    wav2vec2.freeze_feature_encoder()
    for model in (wav2vec2, checkpointed(wav2vec2)):
        with lxt.monkey_patch(model):
            logits = [model(sound.clone().requires_grad_()).logits for _ in range(6)]
        assert all(torch.equal(logits[0], other) for other in logits)
        assert model.wav2vec2.encoder.training
        assert model.wav2vec2.encoder.config is config
        assert config.layerdrop == 0.9


def test_with_blocks_nest() -> None:
    model = build("llama")
    attnlrp, cp, plain = (gradient(model, rules)[1] for rules in ("attnlrp", "cp", None))

    def now() -> Tensor:
        embeds = inputs_of("llama")["inputs_embeds"]
        return torch.autograd.grad(model(inputs_embeds=embeds, use_cache=False).logits[0, -1, 5], embeds)[0]

    with lxt.monkey_patch(model, "attnlrp") as outer:
        with lxt.monkey_patch(model, "cp"):
            assert torch.equal(now(), cp)
        assert outer.active
        assert torch.equal(now(), attnlrp)
    assert torch.equal(now(), plain)
    first = lxt.monkey_patch(model, "attnlrp")
    lxt.monkey_patch(model, "cp").remove()
    assert not first.active
    assert torch.equal(now(), plain)

    with lxt.monkey_patch(modeling_llama, "attnlrp"):
        with lxt.monkey_patch(modeling_llama, "cp"):
            assert torch.equal(now(), cp)
        assert torch.equal(now(), attnlrp)
    assert torch.equal(now(), plain)


def test_a_part_that_is_called_by_itself_has_the_rules() -> None:
    """A logit lens: the final norm of GPT-2 outside of its forward."""
    model, x = build("gpt2"), torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    norm = model.transformer.ln_f
    with lxt.monkey_patch(model):
        (found,) = torch.autograd.grad(model.lm_head(norm(x))[0, -1, 5], x)
    scale = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + norm.eps)
    frozen = (x - x.mean(-1, keepdim=True)) * scale.detach() * norm.weight + norm.bias
    (expected,) = torch.autograd.grad(model.lm_head(frozen)[0, -1, 5], x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


@dataclass
class Output:
    logits: Tensor


def test_a_foreign_function_behind_a_dataclass_is_seen() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(Doubled.apply(x))

    with lxt.monkey_patch(Model()) as handle, pytest.raises(UnknownOperation, match="Doubled"):
        handle._patch._model()(torch.randn(3, requires_grad=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_a_norm_with_weights_that_depend_on_the_input_is_refused(norm) -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with RuleMode(lxt.ATTN_LRP), pytest.raises(ValueError, match="depends on the input"):
        norm(x, (4,), x[0])


def test_gamma_does_not_skip_a_matrix_product() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(4, 3)
    rules = lxt.Composite(linear=lxt.Gamma(0.25))
    with RuleMode(rules), pytest.raises(ValueError, match="can't reach a linear map that is written as matmul"):
        x @ weight
    with RuleMode(rules.but(attention="value_only")):
        torch.softmax(x, -1).detach()  # a constant
        assert (torch.softmax(x @ x.T, -1) @ x).requires_grad  # attention's own products are none


def test_an_attribution_leaves_its_model_behind() -> None:
    out = Attributor(build("llama")).attribute(IDS)
    assert out.check().ok
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert torch.equal(other.relevance, out.relevance)
        with pytest.raises(RuntimeError, match="doesn't know its model"):
            other.check()


def test_rules_of_a_model_under_a_module_patch() -> None:
    model = build("llama")
    assert rules_of(model) is None
    with lxt.monkey_patch(modeling_llama, "cp"):
        assert rules_of(model) == lxt.CP_LRP
        with pytest.raises(ValueError, match="already patched with the rules 'cp'"):
            Attributor(model, rules="attnlrp").attribute(IDS)
    assert rules_of(model) is None


def test_a_classifier_is_not_asked_about_a_prompt_that_ends_in_padding() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=61, pad_token_id=2, **small)).eval()
    with pytest.raises(ValueError, match="ends in the padding token 2"):
        Attributor(model).attribute([5, 9, 2])
    assert Attributor(model).attribute([5, 9, 3]).relevance.shape == (1, 3)
