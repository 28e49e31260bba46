"""Trains the bundled model: a small Llama (or GPT-2) that recalls, copies and chooses, in plain transformers and torch.

    python examples/train_tiny.py --out out/tiny                     # the bundled files, again
    python examples/train_tiny.py --out out/tiny-gpt2 --arch gpt2

1. Generate text with `lxt.tiny.planted` and train a byte-level BPE tokenizer on it.
2. Train on repeats of a few random ids until the model copies, then on steps that mix all tasks: indirect objects,
   pets, recall, induction (of words, and of random ids) and stories. The answers weigh most in the loss; the other
   tokens of the text weigh a little, so that it stays a language model. A second stage, a third of the steps, puts
   random ids for most names, animals, keys and numbers, so that words outside the training lists work as well.
3. Measure every task on held-out words, and write the folder.

The same arguments give the same weights on the same kind of machine and version of torch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lxt.tiny import evaluation, planted, stories, words
from lxt.tiny.planted import Planted

CONTEXT = 256
SPECIAL = ("<pad>", "<bos>", "<eos>")
MERGES = 300  # for text outside the lexicon: the pieces of the generated text are whole tokens anyway
PIECES = "|".join(
    (
        r"(?<!\p{N}) ?(?:1\p{N}|20)(?=\p{N}{2}(?!\p{N}))",  # the century of a year: " 1922" is " 19" "22"
        r" ?\p{N}{1,2}(?!\p{N})",  # " 8,326" is " 8" "," "326"
        r"\p{N}{1,3}",
        r"'(?:s|t|re|ve|m|ll|d)\b",
        r" ?\p{L}[\p{L}\p{M}]*",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# How many sequences of each kind a step sees; each line is one padded forward.
PAIRS = {"pairs": 64}
SHORT = {"indirect_object": 14, "pets": 14, "drill": 14}
LONG = {"recall": 18, "induction": 4, "ids": 4, "story": 4}
# The second stage, for what is known by then but not yet of every word; recall is the hardest.
SHORT_LATER = {"indirect_object": 10, "pets": 10}
LONG_LATER = {"recall": 28, "induction": 4, "ids": 4, "story": 4}
# Copying is found soon on repeats of 2 to 6 ids and hardly at all on long ones: so it comes first, alone, and grows.
PAIRS_ONLY, PAIRS_GROW, PAIRS_END = 0.08, 0.04, 24  # shares of the steps, and the longest repeat
# In this share of the prompts random ids stand for the names, animals, numbers and keys. With the same few dozen words
# in every prompt a model learns the list of answers beside the way to them, and fails on words outside the list.
STRANGERS, STRANGERS_LATER = 0.5, 0.8
FIRST_PEAK, SECOND_PEAK = 3e-3, 1.5e-3  # learning rates of the two stages
ANSWER, DRILL, REPEATED, STORY, PROMPT = 1.0, 0.5, 0.2, 0.1, 0.03  # the weights of tokens in the loss


def train_tokenizer() -> PreTrainedTokenizerFast:
    rng = Random(0)
    corpus = [stories.story(rng) for _ in range(2000)]
    corpus += [example.prompt for task in planted.TASKS for example in planted.generate(task, "train", 500)]
    corpus += [f" {word}" for word in planted.LEXICON for _ in range(2)]
    corpus += [name for name in words.FEMALE + words.MALE for _ in range(2)]
    corpus = [re.sub(r"\d", "", text) for text in corpus]

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + MERGES,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)

    # With ignore_merges a piece that stands in the vocabulary is one token, merges or not: so every word of the
    # generated text is one, and every group of digits, which makes no number rarer than another.
    pieces = Counter(piece for text in corpus for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    whole = sorted(piece for piece, count in pieces.items() if count > 1)
    groups = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)] + [f"Ġ{n}" for n in range(100)]
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for token in (*whole, *groups):
        vocabulary.setdefault(token, len(vocabulary))
    state["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(arch: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Tied, since a token that was only ever read must be writable too: untied embeddings never learned to copy.
        "tie_word_embeddings": True,
        # Three times the usual: wide enough for a model this narrow to find the tasks at all.
        "initializer_range": 0.06,
    }
    if arch == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=128,
                n_layer=4,
                n_head=4,
                n_positions=CONTEXT,
                attn_pdrop=0,
                embd_pdrop=0,
                resid_pdrop=0,
                **shared,
            )
        )
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-6,
            **shared,
        )
    )
    begin_with_copying(model)
    return model


@torch.no_grad()
def begin_with_copying(model: LlamaForCausalLM) -> None:
    """Let training begin near an induction circuit (Olsson et al. 2022): the rest of it, and its use, are learned.

    Llama is slow to find one: it has no biases and its embeddings begin around zero, so no query or key is constant.
    1. The embeddings get a common offset. Head 0 of layer 0 turns it into a query and a key whose rotary phases agree
       at distance one, so that it looks at the token before, and moves 32 directions of that token to 32 others.
    2. Head 0 of layer 1 compares 16 of those with the same directions of its own token: it looks at what followed the
       earlier occurrences of the present token. They lie in the slow rotary dimensions, where distance hardly counts.
    Nothing is frozen.
    """
    layers: list[Any] = list(model.model.layers)
    first, second = layers[0].self_attn, layers[1].self_attn
    embedding: torch.Tensor = model.model.embed_tokens.weight
    size, half, scale = first.head_dim, first.head_dim // 2, math.sqrt(first.head_dim)
    for layer in layers:  # quiet at first, so that what is written below can be heard
        layer.self_attn.o_proj.weight *= 0.15
        layer.mlp.down_proj.weight *= 0.15
    offset = torch.randn(embedding.shape[1])
    embedding += model.config.initializer_range * offset
    direction = offset / offset.norm()
    # Orthogonal to the offset and to each other: of the token before (read), where it is put (written).
    basis = torch.linalg.qr(torch.cat([direction[:, None], torch.randn(len(offset), 2 * size)], 1)).Q
    read, written = basis[:, 1 : size + 1].T, basis[:, size + 1 :].T

    frequency = model.model.rotary_emb.inv_freq[:5]  # the fast ones: the others hardly tell one position from the next
    query, key = torch.zeros(size), torch.zeros(size)
    key[:5], query[:5], query[half : half + 5] = 1.0, frequency.cos(), -frequency.sin()
    # After the norm the offset is about 8 long: scores of 30, and 4 less at distances 0 and 2.
    strength = math.sqrt(30 * scale / 5) / 8
    first.q_proj.weight[:size] = strength * torch.outer(query, direction)
    first.k_proj.weight[:size] = strength * torch.outer(key, direction)
    first.v_proj.weight[:size] = read
    first.o_proj.weight[:, :size] = 0.25 * written.T  # as long as the token itself in the residual stream

    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    second.q_proj.weight[:size] = second.k_proj.weight[:size] = 0.0
    second.q_proj.weight[slow] = 2.2 * read[: len(slow)]  # scores of about 8 for the same token
    second.k_proj.weight[slow] = 2.2 * written[: len(slow)]


class Data:
    """Endless batches, a function of the seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.pad, self.bos, self.eos = (tokenizer.vocab[token] for token in SPECIAL)
        self.rng = Random(seed)
        self.later = False  # the second stage: more strangers, and in every role
        numbers = [f"{n:03d}" for n in range(1000) if words.held_out_number(n)]
        self.ids = self._allowed(words.HELD_OUT_INDUCTION)
        self.strangers = {
            "indirect_object": self._allowed(words.HELD_OUT_NAMES),
            "pets": self._allowed(words.HELD_OUT_ANIMALS),
            "recall": self._allowed((*words.HELD_OUT_KEYS, *numbers)),
        }

    def batch(self, kinds: dict[str, int], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and the loss weight of each id as a prediction target, padded on the right: [sequence, token]."""
        rows = [self._row(kind, longest) for kind, count in kinds.items() for _ in range(count)]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [self.pad] * (length - len(ids)) for ids, _ in rows])
        weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
        return ids, weights

    def _row(self, kind: str, longest: int) -> tuple[list[int], list[float]]:
        bos, eos = self.bos, self.eos
        if kind in ("pairs", "ids"):
            length = self.rng.randint(2, longest) if kind == "pairs" else self.rng.randint(7, 40)
            first = [self.rng.choice(self.ids) for _ in range(length)]
            return [bos, *first, *first], [0.0] * (length + 2) + [REPEATED] * (length - 1)
        if kind == "drill":
            return self._drill()
        if kind == "story":
            ids = [*self._encode(stories.story(self.rng)), eos]
            return [bos, *ids], [STORY] * (len(ids) + 1)
        example = planted.TASKS[kind](self.rng, "train")
        prompt, answer = self._encode(example.prompt), self._encode(example.answer)
        if kind == "induction":
            unknown = 2 + len(self._encode(example.prompt[: example.repeat_start].rstrip()))
            return [bos, *prompt, *answer], [0.0] * unknown + [REPEATED] * (len(prompt) + 2 - unknown)
        if self.rng.random() < (STRANGERS_LATER if self.later else STRANGERS):
            prompt, answer = self._estrange(example, prompt, answer)
        end = [*self._encode("."), eos]
        weights = [PROMPT] * (len(prompt) + 1) + [ANSWER] * len(answer) + [PROMPT] * len(end)
        return [bos, *prompt, *answer, *end], weights

    def _drill(self) -> tuple[list[int], list[float]]:
        """Recall with nothing else: key, words, value for each fact, and all again in another order; values are asked.

        The same words stand in every fact, so only the key tells the value, and it stands several tokens before.
        """
        count, between = self.rng.randint(2, 3), self.rng.randint(1, 5)
        drawn = self.rng.sample(self.strangers["recall"], 2 * count + between)
        facts, shared = list(zip(drawn[:count], drawn[count : 2 * count], strict=True)), drawn[2 * count :]
        ids, weights = [self.bos], [0.0]
        for asked in (False, True):
            for key, value in self.rng.sample(facts, count):
                ids += [key, *shared, value]
                weights += [0.0] * (between + 1) + [DRILL if asked else 0.0]
        return ids, weights

    def _estrange(self, example: Planted, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Put random ids for what is copied and what selects it: then there is only the structure to learn."""
        roles = [example.answer, example.foil, " " + example.prompt[slice(*example.cues[-1])]]
        if self.later:
            roles += [" " + example.prompt[slice(*span)] for span in example.rivals]
        # The last token: of a year, the half that tells it from others; of a number, the number without a space.
        known = {ids[-1] for role in roles if len(ids := self._encode(role)) == 1 or self.later}
        # A name that begins the text is another token than the same name later: such prompts stay as they are.
        foil = self._encode(example.foil)[0]
        if example.task != "recall" and (answer[0] not in prompt or prompt.count(foil) < 2):
            return prompt, answer
        new = dict(zip(sorted(known), self.rng.sample(self.strangers[example.task], len(known)), strict=True))
        return [new.get(i, i) for i in prompt], [new.get(i, i) for i in answer]

    def _allowed(self, held_out: Sequence[str]) -> list[int]:
        refused = {i for word in held_out for text in (word, f" {word}") for i in self._encode(text)}
        return [i for i in range(len(self.tokenizer)) if i not in refused | set(self.tokenizer.all_special_ids)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def loss_of(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # Padding stands on the right: no real token attends to it, so it needs no mask. The vocabulary is a third of the
    # model, so logits are taken only where the loss looks.
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    looked_at = weights[:, 1:] > 0
    logits = model.lm_head(hidden[looked_at])
    losses = functional.cross_entropy(logits, ids[:, 1:][looked_at], reduction="none")
    return (losses * weights[:, 1:][looked_at]).sum() / len(ids)


def train(model: PreTrainedModel, data: Data, steps: int, peak: float, progress: bool) -> None:
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = peak * min((step + 1) / 50, 0.02 + 0.98 * cosine)
        done = step / steps
        longest = 6 + int((PAIRS_END - 6) * max(0.0, done - PAIRS_GROW) / (PAIRS_ONLY - PAIRS_GROW))
        if data.later:
            kinds = (SHORT_LATER, LONG_LATER)
        else:
            kinds = (PAIRS,) if done < PAIRS_ONLY else (SHORT, LONG)
        losses = [loss_of(model, *data.batch(kind, longest)) for kind in kinds]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress and ((step + 1) % 50 == 0 or step + 1 == steps):
            seconds = time.perf_counter() - started
            found = "  ".join(f"{loss.item():.3f}" for loss in losses)
            line = (
                f"step {step + 1}/{steps}  losses {found}  {seconds:.0f} s, {seconds / (step + 1) * steps:.0f} in all"
            )
            print(line, end="   \r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    model.eval()


def run(arch: str, steps: int, seed: int, progress: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model, data = build(arch, tokenizer), Data(tokenizer, seed)
    first = round(steps * 2 / 3)
    train(model, data, first, FIRST_PEAK, progress)
    data.later = True
    train(model, data, steps - first, SECOND_PEAK, progress)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--arch", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--steps", type=int, default=3900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="part of what determines the weights, to the last bit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, tokenizer = run(args.arch, args.steps, args.seed)
    minutes = (time.perf_counter() - started) / 60
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )
    print(f"{args.arch}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {minutes:.1f} minutes on")
    print(f"{args.threads} threads with {versions}")
    for name, value in evaluation.report(model, tokenizer).items():
        print(f"{name:28} {value:.4f}")


if __name__ == "__main__":
    main()
