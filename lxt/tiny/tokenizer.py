"""The tokenizer of the bundled model: byte-level BPE in which whole words and groups of digits are tokens.

Numbers are cut as people read them: " 8,326" is " 8" "," "326" and " 1922" is " 19" "22".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from lxt.tiny import planted, stories, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["train_tokenizer"]

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_PIECES = "|".join(
    (
        r"(?<!\p{N}) ?(?:1\p{N}|20)(?=\p{N}{2}(?!\p{N}))",  # the century of a year
        r" ?\p{N}{1,2}(?!\p{N})",
        r"\p{N}{1,3}",
        r"'(?:s|t|re|ve|m|ll|d)\b",
        r" ?\p{L}[\p{L}\p{M}]*",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_MERGES = 300  # for text outside the lexicon; the pieces of the generated text are whole tokens anyway


def train_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Train on generated text, then add the digit groups, all of them, so that no number is rare."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(_SPECIAL) + 256 + _MERGES,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    corpus = _corpus()
    tokenizer.train_from_iterator(corpus, trainer)

    # With ignore_merges a piece that stands in the vocabulary is one token, merges or not: so every word of the
    # generated text and every group of digits is one, and none of them is rarer than the other in being whole.
    pieces = Counter(piece for text in corpus for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    whole = sorted(piece for piece, count in pieces.items() if count > 1)
    groups = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)] + [f"Ġ{n}" for n in range(100)]
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for token in (*whole, *groups):
        vocabulary.setdefault(token, len(vocabulary))
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    """Stories, prompts and the lexicon, without digits."""
    rng = Random(0)
    texts = [stories.story(rng) for _ in range(2000)]
    texts += [example.prompt for task in planted.TASKS for example in planted.generate(task, "train", 500)]
    texts += [f" {word}" for word in planted.LEXICON for _ in range(2)]
    texts += [name for name in words.FEMALE + words.MALE for _ in range(2)]
    return [re.sub(r"\d", "", text) for text in texts]
