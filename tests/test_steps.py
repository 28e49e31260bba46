"""Encoder-decoders: relevance of source and prefix at each decoder step, and their classifiers."""

import pytest
import torch
import transformers as tf
from equations import Float64
from models import absorbs_relevance
from small import a_tokenizer, assert_close, bert, llama, t5
from torch import nn

import lxt
from lxt.attributor import Attributor
from lxt.audit import audit
from lxt.encdec import FromIds
from lxt.show.steps import render

SOURCE, TARGET = [5, 6, 7, 8, 2], [9, 10, 11, 2]
_SIZE = {"vocab_size": 60, "d_model": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_BART = {
    **_SIZE,
    **{f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))},
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
    "scale_embedding": True,
    "num_labels": 3,
}  # fmt: skip
_T5 = {**_SIZE, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1, "num_labels": 3}
WRITERS = {
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, _T5),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, _BART),
    "mbart": (tf.MBartForConditionalGeneration, tf.MBartConfig, _BART),
    "pegasus": (tf.PegasusForConditionalGeneration, tf.PegasusConfig, _BART),
    "m2m_100": (tf.M2M100ForConditionalGeneration, tf.M2M100Config, _BART),
    "marian": (tf.MarianMTModel, tf.MarianConfig, _BART),
    "fsmt": (
        tf.FSMTForConditionalGeneration,
        tf.FSMTConfig,
        {**_BART, "langs": ["en", "de"], "src_vocab_size": 60, "tgt_vocab_size": 60},
    ),
}
CLASSIFIERS = {
    "bart": (tf.BartForSequenceClassification, tf.BartConfig, _BART),
    "mbart": (tf.MBartForSequenceClassification, tf.MBartConfig, _BART),
    "t5": (tf.T5ForSequenceClassification, tf.T5Config, _T5),
}
# float64 sums over 9 tokens, 32 dimensions and 4 layers
EXACT = 1e-10

each_writer = pytest.mark.parametrize("name", WRITERS)


def build(cls: type, config: type, options: dict, zero_biases: bool = True) -> nn.Module:
    """Every parameter random; what absorbs relevance (biases, positions) is zero if asked for."""
    torch.manual_seed(0)
    model = cls(config(**{k: v for k, v in options.items() if config is not tf.FSMTConfig or k != "vocab_size"}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if zero_biases and absorbs_relevance(name):
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if zero_biases and ("embed_positions" in name or "final_logits_bias" in name):
                buffer.zero_()
    return model.double().eval()


@each_writer
def test_each_step_conserves_over_source_and_prefix(name):
    model = build(*WRITERS[name])
    for rules in ("cp", lxt.ATTN_LRP.but(attention="value_only")):
        with Float64():
            steps = Attributor(model, rules=rules).attribute_steps(SOURCE, TARGET)
        assert (steps.conservation - 1).abs().max() < EXACT
        assert steps.prefix_relevance[1:].tril().abs().max() > 0
        assert steps.source_relevance.abs().min() > 0


@each_writer
def test_nothing_ahead_of_a_step_is_relevant(name):
    model = build(*WRITERS[name], zero_biases=False)
    with Float64():
        steps = Attributor(model).attribute_steps(SOURCE, TARGET)
    assert steps.prefix_relevance.triu(1).abs().max() == 0


@each_writer
def test_the_forward_is_that_of_the_token_ids(name):
    """Marian, Pegasus and FSMT scale embeddings only where they look them up."""
    model = build(*WRITERS[name], zero_biases=False)
    ids = torch.tensor([SOURCE])
    with Float64():
        steps = Attributor(model).attribute_steps(SOURCE, TARGET)
        prefix = torch.tensor([[model.config.decoder_start_token_id, *TARGET[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=prefix, use_cache=False).logits[0]
    torch.testing.assert_close(steps.values, logits[range(4), TARGET], rtol=EXACT, atol=0)
    assert [prediction.id for prediction in steps.predictions] == logits.argmax(-1).tolist()


@each_writer
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_the_auditor_agrees_at_each_step(name, rules):
    model = build(*WRITERS[name], zero_biases=False)
    encoder, decoder = (
        getattr(side, "embed_tokens", None) or side.get_input_embeddings()
        for side in (model.get_encoder(), model.get_decoder())
    )
    prefix = torch.tensor([[model.config.decoder_start_token_id, *TARGET[:-1]]])
    with Float64():
        steps = Attributor(model, rules=rules).attribute_steps(SOURCE, TARGET)
        for step, token in enumerate(TARGET):
            inputs = {
                "inputs_embeds": encoder(torch.tensor([SOURCE])),
                "decoder_inputs_embeds": decoder(prefix),
                "input_ids": torch.tensor([SOURCE]),
                "decoder_input_ids": prefix,
                "use_cache": False,
            }
            found = audit(
                FromIds(model),
                inputs,
                lambda output, step=step, token=token: output.logits[0, step, token],
                rules,
                wrt=("inputs_embeds", "decoder_inputs_embeds"),
            )
            assert not found.unknown
            assert_close(steps.source_relevance[step], found.relevance["inputs_embeds"].sum(-1)[0], EXACT)
            assert_close(steps.prefix_relevance[step], found.relevance["decoder_inputs_embeds"].sum(-1)[0], EXACT)


@each_writer
def test_a_step_is_what_a_run_of_its_own_gives(name):
    """Later tokens of the target change nothing: the decoder is causal, and the graph is shared between steps."""
    model = build(*WRITERS[name], zero_biases=False)
    explainer = Attributor(model)
    with Float64():
        steps = explainer.attribute_steps(SOURCE, TARGET)
        for step in range(4):
            alone = explainer.attribute_steps(SOURCE, TARGET[: step + 1])
            assert len(alone) == step + 1
            assert_close(steps.source_relevance[step], alone.source_relevance[-1], EXACT)
            assert_close(steps.prefix_relevance[step, : step + 1], alone.prefix_relevance[-1], EXACT)
        out = explainer.attribute(SOURCE, target=TARGET[0])
    assert_close(out.relevance[0], steps.source_relevance[0], EXACT)
    assert out.explained[0].prefix == pytest.approx(float(steps.prefix_relevance[0].sum()), rel=1e-9)


def test_attribute_says_what_the_prefix_took():
    model = build(*WRITERS["bart"])
    explainer = Attributor(model, rules="cp")
    with Float64():
        out = explainer.attribute([SOURCE, [3, 4]], target=[9, 10])
        both = explainer.attribute(SOURCE, target=lxt.Target([9, 10], kind="logprob"))
        report = explainer.attribute(SOURCE, target=9).check()
    values = torch.tensor([one.value for one in out.explained])
    prefix = torch.tensor([one.prefix for one in out.explained])
    torch.testing.assert_close(out.total + prefix, values.double())
    torch.testing.assert_close(out.conservation, torch.ones(2).double())
    assert prefix.abs().min() > 1e-3 * values.abs().min()
    assert both.explained[0].prefix is not None
    assert report.ok
    assert any(leak.kind == "the decoder's own tokens" for leak in report.leaks)
    assert abs(report.rest) < 1e-6  # a norm's statistics are float32 in the report's own run


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_classifiers_read_the_source_twice(name, rules):
    model = build(*CLASSIFIERS[name], zero_biases=rules == "cp")
    prompts = [SOURCE, [9, 6, 7, 2], [3, 4, 8, 9, 2]]
    with Float64():
        out = Attributor(model, rules=rules).attribute(prompts, target=1)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            leaves: list[torch.Tensor] = []

            def hook(module, args, output, leaves=leaves):
                leaves.append(output.detach().requires_grad_())
                return leaves[-1]

            sides = (model.get_encoder(), model.get_decoder())
            handles = [side.get_input_embeddings().register_forward_hook(hook) for side in sides]
            with lxt.monkey_patch(model, rules):
                logits = model(input_ids=ids).logits
            for handle in handles:
                handle.remove()
            gradients = torch.autograd.grad(logits[0, 1], leaves)
            encoder, decoder = ((x * g).detach().sum(-1)[0] for x, g in zip(leaves, gradients, strict=True))
            expected = encoder + torch.cat([decoder[1:], decoder.new_zeros(1)])
            assert_close(out[row].relevance[0], expected, EXACT)
            assert out.explained[row].prefix == pytest.approx(float(decoder[0]), rel=1e-6)
            assert out.explained[row].value == pytest.approx(float(logits[0, 1]), rel=1e-9)
    if rules == "cp":
        assert (out.conservation - 1).abs().max() < EXACT


def test_a_classifier_needs_ids():
    model = build(*CLASSIFIERS["bart"])
    embeds = model.get_input_embeddings()(torch.tensor(SOURCE)).detach()
    with pytest.raises(ValueError, match="from text or token ids only"):
        Attributor(model).attribute(embeds)


def test_without_a_target_the_model_writes():
    model = build(*WRITERS["bart"], zero_biases=False)
    steps = Attributor(model).attribute_steps(SOURCE, max_new_tokens=5)
    ids = model.generate(torch.tensor([SOURCE]), num_beams=1, do_sample=False, max_new_tokens=5)[0].tolist()
    assert steps.prefix == [str(token) for token in ids[:-1]]
    assert steps.target == [str(token) for token in ids[1:]]
    assert [prediction.id for prediction in steps.predictions][1:-1] == ids[2:-1]  # the first and last may be forced
    again = Attributor(model).attribute_steps(model.get_input_embeddings()(torch.tensor(SOURCE)).detach(), ids[1:])
    assert_close(steps.source_relevance, again.source_relevance, EXACT)


def test_without_a_start_the_model_shifts_its_labels():
    model = build(*WRITERS["mbart"])
    model.config.decoder_start_token_id = None
    assert Attributor(model).attribute_steps(SOURCE, [9, 10, 2, 40]).prefix == ["40", "9", "10", "2"]


def test_kinds_are_explained():
    model = build(*WRITERS["t5"], zero_biases=False)
    explainer = Attributor(model)
    for kind in ("logit", "logprob", "prob", "centered"):
        steps = explainer.attribute_steps(SOURCE, TARGET, kind=kind)
        out = explainer.attribute(SOURCE, target=lxt.Target(TARGET[0], kind=kind))
        assert float(steps.values[0]) == pytest.approx(out.explained[0].value)
        assert_close(steps.source_relevance[0], out.relevance[0], 1e-6)
    with pytest.raises(ValueError, match="unknown kind 'odds'"):
        explainer.attribute_steps(SOURCE, TARGET, kind="odds")


def test_text_and_views(tmp_path):
    tokenizer = a_tokenizer()
    explainer = Attributor(t5(), tokenizer)
    steps = explainer.attribute_steps("I have 5 cats", " dogs play")
    labels = tokenizer(text_target=" dogs play")["input_ids"]
    assert len(steps) == len(labels) == len(steps.prefix) == len(steps.values)
    assert "".join(steps.source).endswith("I have 5 cats")

    from rich.console import Console

    for color in (None, "truecolor"):
        console = Console(width=60, color_system=color, force_terminal=color is not None)
        with console.capture() as printed:
            render(steps, console)
        text = printed.get()
        assert "source" in text
        assert "prefix" in text
        assert "cats" in text
    steps.to_html(tmp_path / "steps.html")
    assert "What speaks for each step?" in (tmp_path / "steps.html").read_text(encoding="utf-8")
    steps.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 5000
    assert steps.to_dict()["source_relevance"] == steps.source_relevance.tolist()

    one = steps[-1]
    assert one.tokens[0] == steps.source + steps.prefix
    assert float(one.total[0]) == pytest.approx(float(steps.total[-1]))
    assert len(list(steps)) == len(steps)
    with pytest.raises(IndexError, match="step 99 of"):
        steps[99]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([[3, 4], [5]], [7], "one prompt at a time"),
        ([3, 4], [], "no tokens"),
        ([3, 4], [99], "id 99 is out of range"),
        ([3, 4], "dogs", "needs a tokenizer"),
        ([3, 4], "", "empty string"),
    ],
)
def test_bad_input_is_named(source, target, message):
    model = build(*WRITERS["bart"])
    with pytest.raises(ValueError, match=message):
        Attributor(model).attribute_steps(source, target)
    with pytest.raises(TypeError, match="must be a string, token ids"):
        Attributor(model).attribute_steps([3, 4], 7.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_models_have_no_steps():
    for model in (llama(), bert(tf.BertForMaskedLM)):
        with pytest.raises(ValueError, match="is not an encoder-decoder"):
            Attributor(model).attribute_steps([3, 4], [5])
