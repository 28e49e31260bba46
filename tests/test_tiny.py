"""The bundled model: its files load offline, it does its tasks on held-out words, and its training repeats."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lxt import tiny
from lxt.tiny import evaluation, planted, words

BARS = {"indirect_object": 0.95, "pets": 0.95, "recall": 0.95, "induction": 0.90}


@pytest.fixture(scope="module", autouse=True)
def _offline_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.path()).eval()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[1] / "examples" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_small_and_load_as_a_llama(model):
    assert isinstance(model, LlamaForCausalLM)
    assert (tiny.path() / "model.safetensors").stat().st_size <= 8 * 2**20
    assert 0.8e6 <= model.num_parameters() <= 2e6
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_import_is_light():
    loaded = "import sys, lxt.tiny, lxt.tiny.planted; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        "I have 5 cats and 3 dogs.",
        "Grüße, naïve café — 你好，世界 שלום عالم",
        "🦜🏳️‍🌈 \U0001f9ff e\u0301",
        "tabs\tand\r\nlines\n\n  spaces ",
        "\x00\x07\u200b\ufeff\u202e",
        "1 12 123 1234 12345 123456 8,326 3.14 ½ ٣٢٦",
        "<bos>-like <b>text</b> & 'quotes' don't",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_numbers_are_cut_as_people_read_them(tokenizer):
    ids = tokenizer.encode("The 1922 expedition reached 8,326 and 12,007", add_special_tokens=False)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ["The", " 19", "22", " expedition", " reached", " 8", ",", "326", " and", " 12", ",", "007"]


def test_every_word_is_one_token(tokenizer):
    split = [word for word in planted.LEXICON if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    assert split == []


@pytest.mark.parametrize("task", planted.TASKS)
def test_task_on_held_out_words(model, tokenizer, task):
    examples = planted.generate(task, "held_out", 300, seed=7)
    assert evaluation.accuracy(model, tokenizer, examples) >= BARS[task]


def test_repeated_random_ids(model, tokenizer):
    assert evaluation.repeated_ids(model, tokenizer, 200, seed=7) >= 0.90


@pytest.mark.parametrize(
    ("prompt", "answer", "probability"),
    [
        (evaluation.DEMO, " dogs", 0.8),
        ("I have 5 cats and 3 dogs. My dogs love to play with my", " cats", 0.5),
        ("When John and Mary went to the shops, John gave the bag to", " Mary", 0.5),
        ("When John and Mary went to the shops, Mary gave the bag to", " John", 0.5),
        (
            "After the 1921 expedition reached 7,000 metres, the 1922 expedition reached 8,326 metres. "
            "According to the text, the 1922 expedition reached 8,",
            "326",
            0.5,
        ),
    ],
)
def test_named_sentences(model, tokenizer, prompt, answer, probability):
    with torch.inference_mode():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == answer
    assert logits.softmax(-1).max() > probability


def test_left_padded_batch_says_the_same(model, tokenizer):
    prompts = [example.prompt for task in planted.TASKS for example in planted.generate(task, "held_out", 4)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        padded = model(**batch, position_ids=positions).logits[:, -1]
        alone = torch.stack([model(**tokenizer(p, return_tensors="pt")).logits[0, -1] for p in prompts])
    # Logits of size ~20 through 4 layers; another order of summation costs some hundred float32 roundings.
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-3)


@pytest.mark.parametrize("task", planted.TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_spans_point_at_the_cause(task, split):
    for example in planted.generate(task, split, 200):
        start, end = example.source
        assert example.prompt[start:end] == example.answer.strip()
        assert len({example.prompt[a:b] for a, b in example.cues}) == 1
        assert len(set(example.causes)) == 3
        assert example.answer != example.foil


@pytest.mark.parametrize("task", planted.TASKS)
def test_splits_share_no_answer(task):
    answers = {split: {e.answer for e in planted.generate(task, split, 2000)} for split in ("train", "held_out")}
    assert len(answers["held_out"]) >= 10
    assert answers["train"].isdisjoint(answers["held_out"])


def test_held_out_words_never_stand_in_their_role_in_training():
    roles = {
        "indirect_object": words.HELD_OUT_NAMES,
        "pets": words.HELD_OUT_ANIMALS,
        "recall": words.HELD_OUT_KEYS,
        "induction": words.HELD_OUT_INDUCTION,
    }
    for task, held_out in roles.items():
        for example in planted.generate(task, "train", 2000):
            spans = {example.prompt[a:b] for a, b in example.causes} | {example.foil.strip()}
            assert spans.isdisjoint(held_out)


def test_generate_is_a_function_of_its_arguments():
    assert planted.generate("pets", "held_out", 5, seed=3) == planted.generate("pets", "held_out", 5, seed=3)
    assert planted.generate("pets", "held_out", 5, seed=3) != planted.generate("pets", "held_out", 5, seed=4)
    with pytest.raises(ValueError, match="unknown task 'cats'; choose one of indirect_object"):
        planted.generate("cats", "held_out", 1)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        planted.generate("pets", "test", 1)  # type: ignore[arg-type]


def _weights_hash(script: ModuleType, arch: str, seed: int) -> str:
    model, _ = script.run(arch, steps=20, seed=seed, progress=False)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_training_repeats_itself_and_depends_on_the_seed(script):
    first = _weights_hash(script, "llama", seed=1)
    assert first == _weights_hash(script, "llama", seed=1)
    assert first != _weights_hash(script, "llama", seed=2)


def test_training_runs_for_gpt2(script):
    model, _ = script.run("gpt2", steps=3, seed=0, progress=False)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_script_makes_the_bundled_tokenizer(script, tokenizer):
    assert script.train_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
