"""Inputs: every accepted form becomes the same rows, tokens read like the text, and bad input is named."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lxt.inputs import Row, batches, context, offender, pads_left, prepare, read, task
from lxt.tokens import display

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my dogs"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a BOS that it adds itself and a chat template that writes it too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 330, "max_position_embeddings": 64, **SMALL, **options}))


@pytest.fixture(scope="module")
def model():
    return llama()


def test_text_is_tokenised_once_with_one_bos(model, tokenizer):
    (row,) = read(TEXT, model, tokenizer)
    assert list(row.ids) == tokenizer(TEXT)["input_ids"]
    assert row.ids.count(tokenizer.bos_token_id) == 1


def test_a_list_of_texts_is_a_row_each(model, tokenizer):
    assert read(["I have", "My cats"], model, tokenizer) == [
        *read("I have", model, tokenizer),
        *read("My cats", model, tokenizer),
    ]


def test_chats_go_through_the_template_with_one_bos(model, tokenizer):
    chat = [{"role": "user", "content": "I have 5 cats"}]
    (row,) = read(chat, model, tokenizer)
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row.ids) == "<s>[user] I have 5 cats\n[assistant]"
    assert read([chat, chat], model, tokenizer) == [row, row]


@pytest.mark.parametrize(
    "given", [[3, 4, 5], (3, 4, 5), torch.tensor([3, 4, 5]), [[3, 4, 5]], torch.tensor([[3, 4, 5]])]
)
def test_ids_need_no_tokenizer(model, given):
    assert read(given, model) == [Row((3, 4, 5))]


def test_a_list_of_id_tensors_is_a_row_each(model):
    assert read([torch.tensor([3]), torch.tensor([4, 5])], model) == [Row((3,)), Row((4, 5))]


def test_embeddings_are_taken_with_and_without_a_batch_dimension(model):
    embeds = torch.randn(2, 3, 16)
    assert [len(row) for row in read(embeds, model)] == [3, 3]
    assert torch.equal(read(embeds[0], model)[0].embeds, embeds[0])


def test_padding_is_on_the_left_with_positions_from_zero(model, tokenizer):
    prepared = prepare([Row((5, 6, 7)), Row((8,))], model, tokenizer)
    assert prepared.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prepared.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert prepared.token_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert prepared.labels[1][:2] == ["", ""]
    assert prepared.mask.tolist() == [[True] * 3, [False, False, True]]


def test_embeddings_come_from_calling_the_module(tokenizer):
    torch.manual_seed(0)
    options = {"vocab_size": 330, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **options))
    weight = gemma.get_input_embeddings().weight[5]
    prepared = prepare([Row((5,))], gemma, tokenizer)
    # Gemma scales its embeddings by sqrt(hidden) when the module is called.
    torch.testing.assert_close(prepared.embeds[0, 0], weight.detach() * 4.0)


def test_given_embeddings_are_followed_by_a_targets_tokens(model):
    given = torch.randn(2, 16)
    prepared = prepare([Row((5,), given), Row((1, 2, 3, 4))], model)
    embedding = model.get_input_embeddings()
    assert torch.equal(prepared.embeds[0, 1:3], given)
    assert torch.equal(prepared.embeds[0, 3], embedding(torch.tensor(5)).detach())
    assert prepared.token_ids is None
    assert prepared.labels[0] == ["", "0", "1", "5"]


def test_special_tokens_are_marked(model, tokenizer):
    assert prepare(read("My cats", model, tokenizer), model, tokenizer).special[0].tolist()[:2] == [True, False]
    numbers = llama(bos_token_id=3, eos_token_id=4)
    assert prepare([Row((3, 5, 4))], numbers).special.tolist() == [[True, False, True]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_without_its_mask_is_refused(model, tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", side  # the habit with GPT-2 and Llama
    encoded = tokenizer([TEXT, "cats"], padding=True, return_tensors="pt")
    assert len(read(encoded, model, tokenizer)[1]) < len(read(encoded, model, tokenizer)[0])
    with pytest.raises(ValueError, match=r"prompt 1 (begins|ends) with \d+ times the padding token"):
        read(encoded["input_ids"], model, tokenizer)
    lists = encoded["input_ids"].tolist()
    assert len(read(lists, model, tokenizer)[1]) == len(lists[1])  # whoever means it says it like this
    assert read(encoded["input_ids"][1:], model, tokenizer)  # nothing to be padded to


def test_which_models_are_padded():
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL))
    roberta = RobertaForCausalLM(RobertaConfig(vocab_size=50, is_decoder=True, **SMALL))
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4))
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert [pads_left(m) for m in (llama(), gpt2, bert, roberta, mamba, dynamic)] == [True, True] + [False] * 4


def test_batches_without_padding_hold_rows_of_one_length(model):
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL))
    rows = [Row((1, 2)), Row((1,)), Row((3, 4)), Row((5, 6))]
    assert batches(rows, bert) == [[1], [0, 2, 3]]
    assert batches(rows, bert, 2) == [[1], [0, 2], [3]]
    assert batches(rows, model) == [[0, 1, 2, 3]]
    assert batches(rows, model, 3) == [[1, 0, 2], [3]]


def test_causal_classifiers_without_a_padding_token_run_row_by_row():
    options = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
    rows = [Row((1, 2)), Row((3, 4))]
    assert batches(rows, LlamaForSequenceClassification(LlamaConfig(**options))) == [[0], [1]]
    padded = LlamaForSequenceClassification(LlamaConfig(pad_token_id=0, **options))
    assert batches(rows, padded) == [[0, 1]]


def test_tasks():
    assert task(llama()) == "causal"
    assert task(BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL))) == "sequence"
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    assert task(t5) == "seq2seq"
    with pytest.raises(ValueError, match="BertModel has no head"):
        task(BertModel(BertConfig(vocab_size=50, **SMALL)))


# How tokens read


@pytest.mark.parametrize(
    "text",
    [TEXT, "  two  spaces\n\ttab", "naïve café", "🙂 cats 👩‍👩‍👧", "שלום עולם", "日本語", "\x00\x07\u200f", "a" * 300],
)
def test_byte_level_tokens_read_like_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, special = display(ids, tokenizer)
    assert not any(special)
    assert b"".join(as_bytes(piece) for piece in shown) == text.encode()
    if text.isascii():
        assert "".join(shown) == text


def as_bytes(piece):
    """Undo the display of lone bytes."""
    if "<0x" not in piece:
        return piece.encode()
    head, _, rest = piece.partition("<0x")
    return head.encode() + bytes([int(rest[:2], 16)]) + as_bytes(rest[3:])


def test_leading_spaces_are_kept_and_lone_bytes_shown(tokenizer):
    shown, _ = display(tokenizer(" cats🙂", add_special_tokens=False)["input_ids"], tokenizer)
    assert shown == [" cats", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


def test_added_tokens_read_as_they_are(tokenizer):
    shown, special = display([0, 1], tokenizer)
    assert shown == ["<s>", "</s>"]
    assert special == [True, True]


def test_wordpieces_read_like_the_text():
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "cats", "."]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    shown, special = display([1, 5, 3, 4, 6, 2], fast)
    assert "".join(shown) == "[CLS] cats playing.[SEP]"
    assert special == [True, False, False, False, False, True]


def test_sentencepiece_tokens_read_like_the_text():
    pieces = ["<unk>", "<s>", "<0xF0>", "<0x9F>", "▁My", "▁cats", "nap", "▁"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")
    shown, _ = display([1, 4, 5, 6, 2, 3], fast)
    assert shown == ["<s>", "My", " cats", "nap", "<0xF0>", "<0x9F>"]


def test_ids_beyond_the_tokenizer_are_shown_as_ids(tokenizer):
    assert display([4000, 5], tokenizer)[0][0] == "<id 4000>"


def test_ids_are_their_own_labels_without_a_tokenizer():
    assert display([7, 12]) == (["7", "12"], [False, False])


# Bad input


def test_context_of_each_family(model):
    assert context(model) == 64
    assert context(RobertaForCausalLM(RobertaConfig(vocab_size=50, max_position_embeddings=20, **SMALL))) == 18
    assert (
        context(T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1))) is None
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "the text is empty"),
        ([], "inputs is an empty list"),
        ([[]], "a prompt is an empty list"),
        (["My", ""], "the text is empty"),
        (torch.zeros(0, dtype=torch.long), "the prompt has no tokens; give at least one"),
        (torch.zeros(1, 0, 16), "the prompt has no tokens"),
        ([3, 330], r"token id 330, and the vocabulary of LlamaForCausalLM has ids 0 to 329"),
        ([[3], [-1]], "prompt 1 holds the token id -1"),
        (list(range(65)), "the prompt has 65 tokens, and the context of LlamaForCausalLM is 64; shorten it"),
        (torch.zeros(1, 2, 3, 16), r"embeddings must be \[batch, token, hidden\].* got the shape \(1, 2, 3, 16\)"),
        (
            torch.zeros(1, 2, 16, dtype=torch.long),
            r"integers are token ids .* got torch.int64 of the shape \(1, 2, 16\)",
        ),
        (torch.zeros(1, 2, 15), r"embeddings of shape \(2, 15\), and LlamaForCausalLM takes \[token, 16\]"),
        (torch.tensor([[0.0] * 16, [float("nan")] * 16]), "NaN or inf in its embeddings, first at token 1"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ("\ud83d", "character 0 is the lone surrogate"),
    ],
)
def test_bad_input_is_named(model, tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        read(given, model, tokenizer)


@pytest.mark.parametrize("given", [3, None, {"ids": [3]}, [3.0], [3, "a"], [True], torch.ones(3).bool()])
def test_other_kinds_of_input_are_refused_with_what_is_allowed(model, tokenizer, given):
    with pytest.raises(TypeError, match="a list of strings, chat messages"):
        read(given, model, tokenizer)


def test_text_needs_a_tokenizer_and_chats_a_template(model, tokenizer):
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        read("My", model)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(ValueError, match="no chat template"):
        read([{"role": "user", "content": "hi"}], model, bare)
    bare.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="refuses the messages: no system role"):
        read([{"role": "system", "content": "hi"}], model, bare)


def test_weights_that_are_not_finite_are_named():
    broken = llama()
    assert "finite" in offender(broken)
    broken.model.embed_tokens.weight.data[7, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weight model\.embed_tokens\.weight holds NaN or inf"):
        prepare([Row((7,))], broken)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_batch_size_is_checked(model, size):
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
        batches([Row((1,))], model, size)
