"""Small float32 language models, a tokenizer for them, and relevance as one would write it by hand."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lxt.patching import monkey_patch

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"
VOCABULARY, HEADS, LAYERS = 300, 4, 3
PROMPTS = [[1, 5, 6, 7, 8], [1, 9, 10], [1, 11, 12, 13, 14, 15, 16]]
# float32 sums over at most 7 tokens, 32 dimensions and 3 layers, in another order where rows are padded.
CLOSE = 1e-6


def a_tokenizer():
    """Byte-level BPE, trained on one sentence."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT + " dogs"] * 4,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", mask_token="[MASK]")


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    others = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}  # so that the layers do something
    return cls(LlamaConfig(**sizes | others | options)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
    )
    return OPTForCausalLM(config).eval()


def bert(cls, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
        **options,
    )
    return cls(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).eval()


def by_hand(model, ids, score, rules="attnlrp"):
    """Gradient × input in the patched model, all logits computed: [token]."""
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    with monkey_patch(model, rules):
        score(model(inputs_embeds=embeds).logits).backward()
    return (embeds.grad * embeds.detach()).sum(-1)[0]


def assert_close(got, expected, tolerance=CLOSE):
    """Relative to the size of the whole, since single entries may cancel."""
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 0
