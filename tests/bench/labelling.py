"""What labelling costs beyond attribution itself: ratios of processor times, interleaved in one process, medians.

    python tests/bench/labelling.py [--layers 12 --hidden 1024 --length 256 --rounds 5]

attribute   explainer.attribute of the same windows in the same batches, for the last prediction of each: what an
            attribution of one prediction of each window costs. Computes the logits of one position only.
all         forward under the rules and backward of the sum of all next tokens' logits, nothing read: what one
            attribution of everything costs.
label       a block as `lxt label` computes it: the same, with all neurons measured and ranked.
stored      the same, and the block written to disk and folded.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lxt
from lxt.inputs import Row, prepare
from lxt.neurons.scoring import Scorer
from lxt.neurons.storing import Folder
from lxt.neurons.windows import Block, Window


class Tokenizer:
    """Windows come as ids here, so all that is asked for are the special ones."""

    all_special_ids = (1,)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"layers": 12, "hidden": 1024, "length": 256, "windows": 4, "batch": 2, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.hidden,
        intermediate_size=int(asked.hidden * 2.75),
        num_hidden_layers=asked.layers,
        num_attention_heads=max(asked.hidden // 64, 1),
        num_key_value_heads=max(asked.hidden // 128, 1),
    )
    model = LlamaForCausalLM(config).eval()
    explainer = lxt.Attributor(model)
    explainer.tokenizer = Tokenizer()
    scorer = Scorer(explainer, tuple(range(asked.layers)), 20, asked.batch, asked.length)
    ids = torch.randint(2, asked.vocabulary, (asked.windows, asked.length)).tolist()
    block = Block(0, tuple(Window(i, str(i), 0, tuple(row)) for i, row in enumerate(ids)))
    plain = lxt.Attributor(model)

    def attribute() -> None:
        plain.attribute(ids, target=5, batch_size=asked.batch)

    def everything() -> None:
        with explainer.context(explainer._patch, "off"):
            for start in range(0, asked.windows, asked.batch):
                rows = [Row(tuple(row)) for row in ids[start : start + asked.batch]]
                prepared = prepare(rows, model)
                embeds = prepared.embeds.requires_grad_()
                logits = model(inputs_embeds=embeds, **prepared.arguments(model)).logits
                explained = scorer._explained(logits, prepared.mask, rows)
                torch.autograd.grad(explained, embeds)

    def label() -> None:
        scorer(block)

    def stored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            results = Folder(folder, {})
            results.add(0, scorer(block))
            results.fold()
            results.close()

    cases = {"attribute": attribute, "all": everything, "label": label, "stored": stored}
    times = {name: [] for name in cases}
    for round_ in range(asked.rounds + 1):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if round_:  # the first warms up
                times[name].append(time.process_time() - start)
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["all"], strict=True)]
        low, high = min(ratios), max(ratios)
        print(f"{name:10} {statistics.median(values):7.2f} s   {statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
