"""Short documents: what ways to batch them cost, in processor time, interleaved in one process, medians.

    python tests/bench/packing.py [--layers 6 --hidden 512 --documents 64 --rounds 5]

rows of 8   sorted by length, eight at a time.
as it is    as `lxt label` batches them: split where padding and the batches' own cost are least together.
packed      several documents in a row of 512 tokens, with a block-diagonal mask and positions that restart.
alone       one document at a time, without padding.
"""

import argparse
import random
import statistics
import time
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lxt
from lxt.inputs import Row, batches
from lxt.neurons.measuring import measured
from lxt.neurons.scoring import Scorer, _groups
from lxt.neurons.windows import Block, Window

LENGTH, VOCABULARY, BATCH = 512, 8192, 8


class Tokenizer:
    """Windows come as ids here, so all that is asked for are the special ones."""

    all_special_ids = (1,)


def bins(lengths: list[int]) -> list[list[int]]:
    """Documents dealt into rows, the longest first, each into the first row that has room."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = (row for row in found if sum(lengths[j] for j in row) + lengths[i] <= LENGTH)
        row = next(room, None)
        if row is None:
            found.append([i])
        else:
            row.append(i)
    return found


def packed(scorer: Scorer, documents: list[tuple[int, ...]]) -> None:
    """One forward and one backward of the packed rows, measured as by `lxt label` (but each row as one window)."""
    model, rows = scorer.explainer.model, bins([len(ids) for ids in documents])
    width = max(sum(len(documents[i]) for i in row) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    owner = torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        at = 0
        for i in row:
            there = slice(at, at + len(documents[i]))
            ids[number, there] = torch.tensor(documents[i])
            positions[number, there] = torch.arange(len(documents[i]))
            owner[number, there] = i
            at = there.stop
    allowed = (owner[:, :, None] == owner[:, None]) & torch.ones(width, width).tril().bool()
    mask = torch.zeros(allowed.shape).masked_fill(~(allowed | torch.eye(width).bool()), torch.finfo().min)[:, None]
    with scorer.explainer.context(scorer.explainer._patch, "off"):
        for s in (slice(start, start + BATCH) for start in range(0, len(rows), BATCH)):
            embeds = model.get_input_embeddings()(ids[s]).detach().requires_grad_()
            arguments = {"attention_mask": mask[s], "position_ids": positions[s], "use_cache": False}
            with measured(scorer.places(), owner[s] >= 0) as found:
                logits = model(inputs_embeds=embeds, **arguments).logits
                inside = (owner[s, 1:] == owner[s, :-1]) & (owner[s, 1:] >= 0)
                following = logits[:, :-1].gather(-1, ids[s, 1:, None]).squeeze(-1)
                torch.autograd.grad(following.masked_fill(~inside, 0).sum(), found.lowest)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"layers": 6, "hidden": 512, "documents": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=asked.hidden,
        intermediate_size=int(asked.hidden * 2.75),
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.hidden // 64,
        num_key_value_heads=max(asked.hidden // 128, 1),
    )
    model = LlamaForCausalLM(config).eval()
    explainer = lxt.Attributor(model)
    explainer.tokenizer = Tokenizer()
    scorer = Scorer(explainer, tuple(range(asked.layers)), 20, BATCH, LENGTH)
    lengths = [min(max(int(rng.lognormvariate(3.2, 0.7)), 4), 200) for _ in range(asked.documents)]
    documents = [tuple(rng.randrange(2, VOCABULARY) for _ in range(length)) for length in lengths]
    block = Block(0, tuple(Window(i, str(i), 0, ids) for i, ids in enumerate(documents)))
    rows = [Row(ids) for ids in documents]
    ways = {
        "rows of 8": batches(rows, model, BATCH),
        "as it is": _groups(rows, model, LENGTH, BATCH),
        "packed": None,
        "alone": [[i] for i in range(len(rows))],
    }
    times = {name: [] for name in ways}
    for round_ in range(asked.rounds + 1):
        for name, groups in ways.items():
            start = time.process_time()
            if groups is None:
                packed(scorer, documents)
            else:
                with mock.patch("lxt.neurons.scoring._groups", return_value=groups):
                    scorer(block)
            if round_:  # the first warms up
                times[name].append(time.process_time() - start)
    tokens = sum(lengths)
    print(f"{len(lengths)} documents, {tokens} tokens, median {statistics.median(lengths):.0f}")
    for name, groups in ways.items():
        if groups is None:
            padded = len(bins(lengths)) * LENGTH
        else:
            padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
        ratio = statistics.median(one / base for one, base in zip(times[name], times["rows of 8"], strict=True))
        print(f"{name:10} {ratio:.2f}   {statistics.median(times[name]):6.2f} s   padding {padded / tokens - 1:.0%}")


if __name__ == "__main__":
    main()
