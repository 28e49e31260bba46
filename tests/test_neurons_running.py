"""Labelling as a run: the same to the last bit however blocks are computed, and nothing lost however it ends."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import a_tokenizer, bert, gpt2, llama
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lxt
from lxt.memory import resident
from lxt.neurons.fingerprint import model_fingerprint
from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.ranking import Top, merged, top_of
from lxt.neurons.results import Neurons
from lxt.neurons.running import label
from lxt.neurons.storing import Folder
from lxt.neurons.tables import available
from lxt.neurons.tally import SAMPLE, Tally, drawn
from lxt.neurons.windows import Window

WORDS = "I have 5 cats and 3 dogs My cats love to play with my dogs".split()


def texts(count=40):
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def explainer():
    return lxt.load(llama(), a_tokenizer())


OPTIONS = {"top": 4, "length": 16, "batch_size": 3, "block_size": 5, "layers": [0, 2]}


@pytest.fixture(scope="module")
def plain(explainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "out"
    return label(explainer, texts(), out=folder, **OPTIONS)


def tensors(found):
    return found.tally.tensors()


def assert_equal(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_blocks_makes_no_difference(explainer, plain, tmp_path, seed):
    def shuffled(function, blocks):
        waiting = list(blocks)
        random.Random(seed).shuffle(waiting)
        for block in waiting:
            yield block.number, function(block)

    found = label(explainer, texts(), out=tmp_path, compute=shuffled, **OPTIONS)
    assert_equal(found, plain)
    assert found.names == plain.names


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_goes_on(explainer, plain, tmp_path, stop):
    computed = []

    def stopping(function, blocks):
        for block in blocks:
            if len(computed) == stop:
                raise KeyboardInterrupt
            computed.append(block.number)
            yield block.number, function(block)

    def going_on(function, blocks):
        for block in blocks:
            computed.append(block.number)
            yield block.number, function(block)

    with pytest.raises(KeyboardInterrupt):
        label(explainer, texts(), out=tmp_path, compute=stopping, **OPTIONS)
    found = label(explainer, texts(), out=tmp_path, compute=going_on, **OPTIONS)
    assert_equal(found, plain)
    assert sorted(computed) == list(range(8))  # none twice


def test_folding_often_and_rarely_is_the_same(explainer, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("lxt.neurons.running._FOLD", 1)
    assert_equal(label(explainer, texts(), out=tmp_path, **OPTIONS), plain)


def test_a_finished_run_computes_nothing(explainer, plain):
    def never(function, blocks):
        raise AssertionError

    again = label(explainer, texts(), out=plain.folder.path, compute=never, by="activation", **OPTIONS)
    assert_equal(again, plain)
    loaded = lxt.neurons.load(plain.folder.path)
    assert loaded.by == "activation"
    assert loaded[2, 3] == again[2, 3]
    label(explainer, texts(), out=plain.folder.path, **OPTIONS)


def test_a_finished_run_writes_and_names_nothing(explainer, plain, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in plain.folder.path.rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr(Neurons, "name_all", None)
        patched.setattr("lxt.neurons.storing.write", None)
        again = label(explainer, texts(), out=plain.folder.path, **OPTIONS)
    assert_equal(again, plain)
    assert again.names == plain.names
    assert {path: path.stat().st_mtime_ns for path in plain.folder.path.rglob("*")} == before
    # what is missing, or was asked for in another way, is written
    (plain.folder.path / "labels.jsonl").unlink()
    assert label(explainer, texts(), out=plain.folder.path, **OPTIONS).names == plain.names
    named = label(explainer, texts(), out=plain.folder.path, explain=lambda contexts: "x", **OPTIONS)
    assert named[0, 0].label == "x"
    assert label(explainer, texts(), out=plain.folder.path, **OPTIONS).names == plain.names
    # or was written halfway: other names, and the pages and tables of before
    with monkeypatch.context() as patched:
        patched.setattr("lxt.neurons.page.pages", None)
        with pytest.raises(TypeError):
            label(explainer, texts(), out=plain.folder.path, by="activation", **OPTIONS)
    assert lxt.neurons.load(plain.folder.path).by == "activation"
    assert label(explainer, texts(), out=plain.folder.path, **OPTIONS).names == plain.names


def test_in_memory_is_the_same(explainer, plain):
    assert_equal(label(explainer, texts(), **OPTIONS), plain)


KILLED = """
import sys, time, torch
sys.path[:0] = {paths!r}
from test_neurons_running import OPTIONS, a_tokenizer, llama, lxt, texts
from lxt.neurons.running import label
torch.set_num_threads(1)

def slow(function, blocks):
    for block in blocks:
        with open({log!r}, "a") as log:
            log.write(f"{{block.number}}\\n")
        found = function(block)
        time.sleep(0.1)
        yield block.number, found

label(lxt.load(llama(), a_tokenizer()), texts(), out={out!r}, compute=slow, **OPTIONS)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_again_and_again_it_repeats_at_most_one_block_each_time(plain, tmp_path):
    tests = Path(__file__).parent
    out, log = tmp_path / "out", tmp_path / "log"
    log.touch()
    (tmp_path / "run.py").write_text(KILLED.format(paths=[str(tests), str(tests.parent)], log=str(log), out=str(out)))
    kills = 0
    for _ in range(20):
        started = len(log.read_text().split())
        run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.DEVNULL)
        while run.poll() is None and len(log.read_text().split()) < started + 3:
            time.sleep(0.005)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        if run.wait() == 0:
            break
    assert run.returncode == 0
    assert kills >= 2
    computed = [int(number) for number in log.read_text().split()]
    assert set(computed) == set(range(8))
    assert len(computed) <= 8 + kills
    assert_equal(lxt.neurons.load(out), plain)


def test_a_folder_of_something_else_is_refused(explainer, plain):
    folder = plain.folder.path
    with pytest.raises(ValueError, match=r"something else: top was 4 and is now 5\. Choose another"):
        label(explainer, texts(), out=folder, **OPTIONS | {"top": 5})
    with pytest.raises(ValueError, match="corpus was"):
        label(explainer, texts(41), out=folder, **OPTIONS)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="model was"):
        label(lxt.load(other, a_tokenizer()), texts(), out=folder, **OPTIONS)
    with pytest.raises(ValueError, match=r"rules was .*product='uniform'.* and is now .*product='stop_gate'"):
        label(lxt.load(llama(), a_tokenizer(), rules="cp"), texts(), out=folder, **OPTIONS)


def test_the_fingerprint_is_of_weights_and_configuration():
    one, other = llama(), llama()
    assert model_fingerprint(one) == model_fingerprint(other)
    assert model_fingerprint(one) != model_fingerprint(llama().bfloat16())
    assert model_fingerprint(one) != model_fingerprint(llama(rms_norm_eps=1e-3))


def test_wherever_a_disk_is_full_nothing_is_corrupt_and_the_run_goes_on_later(explainer, plain, tmp_path, monkeypatch):
    """Every write of a run fails once: of blocks, of the tally, of the manifest, of names, tables and pages."""
    real, written = os.fsync, itertools.count()
    options = OPTIONS | {"layers": [0]}
    monkeypatch.setattr(os, "fsync", lambda descriptor: (next(written), real(descriptor))[1])
    whole = label(explainer, texts(20), out=tmp_path / "whole", **options)
    for fails in range(next(written)):
        out, count = tmp_path / str(fails), itertools.count()

        def full(descriptor, fails=fails, count=count):
            if next(count) == fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device\); make room there .*blocks are kept"):
            label(explainer, texts(20), out=out, **options)
        assert not list(out.rglob(".lxt-*"))
        monkeypatch.setattr(os, "fsync", real)
        assert_equal(label(explainer, texts(20), out=out, **options), whole)
        loaded = lxt.neurons.load(out)
        assert loaded.names == whole.names
        names = {path.relative_to(out) for path in out.rglob("*")}
        assert names == {path.relative_to(whole.folder.path) for path in whole.folder.path.rglob("*")}


LIMITED = """
import resource, sys
from lxt.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a file is cut off there, as on a disk that gets full
sys.argv[1:] = ["label", "tiny", "--corpus", sys.argv[1], "--out", sys.argv[2], "--layers", "3", "--top", "2"]
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_a_file_that_is_cut_off_is_one_line_on_stderr(tmp_path):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("\n".join(texts()))
    command = [sys.executable, "-c", LIMITED, corpus, out]
    root = str(Path(__file__).parent.parent)
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "cannot write the results (File too large); make room there" in run.stderr
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["manifest.json"]
    with pytest.raises(ValueError, match="not finished"):
        lxt.neurons.load(out)


def test_of_a_model_larger_than_its_memory_the_results_and_the_fingerprint_are_the_same(tmp_path):
    pytest.importorskip("accelerate")
    names = ("plain", "other")
    for name, change in zip(names, (0.0, 1e-3), strict=True):
        model = llama()
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] += change
        model.save_pretrained(tmp_path / name)
        a_tokenizer().save_pretrained(tmp_path / name)
    little = {"memory": resident() + 2**26}
    with pytest.warns(UserWarning, match="read from disk"):
        offloaded, other = (lxt.load(str(tmp_path / name), **little) for name in names)
    assert "disk" in offloaded.model.hf_device_map.values()
    plain = lxt.load(str(tmp_path / "plain"))
    assert_equal(label(offloaded, texts(), out=tmp_path / "out", **OPTIONS), label(plain, texts(), **OPTIONS))
    assert model_fingerprint(offloaded.model) == model_fingerprint(plain.model) != model_fingerprint(other.model)
    with pytest.raises(ValueError, match="model was"):
        label(other, texts(), out=tmp_path / "out", **OPTIONS)


def test_what_was_deleted_or_damaged_is_written_again(explainer, plain):
    folder = plain.folder.path
    names = ["index.html", "labels.jsonl", "vocabulary.json", *(("contexts", "neurons") if available() else ())]
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()
        label(explainer, texts(), out=folder, **OPTIONS)
        assert (folder / name).exists()
    (folder / "labels.jsonl").write_text("{")
    assert label(explainer, texts(), out=folder, **OPTIONS).names == plain.names


def test_results_in_the_folder_of_the_corpus_are_not_read(explainer, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(texts(3)))
    once, again = (label(explainer, tmp_path, out=tmp_path / "out", **OPTIONS) for _ in range(2))
    assert_equal(once, again)
    assert again.manifest["counts"]["documents"] == 3


@pytest.mark.parametrize("name", ["manifest.json", "index.html", "vocabulary.json"])
def test_files_of_other_programs_stay(explainer, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"is no manifest of `lxt label`|holds another .*; choose another folder"):
        label(explainer, texts(2), out=tmp_path, **OPTIONS)
    assert (tmp_path / name).read_text() == "{}"
    (tmp_path / name).unlink()
    label(explainer, texts(2), out=tmp_path, **OPTIONS)  # the refused run doesn't hold the folder


def test_two_runs_of_one_folder_are_refused(explainer, tmp_path):
    held = Folder(tmp_path, {"top": 1})
    with pytest.raises(OSError, match="another run"):
        label(explainer, texts(), out=tmp_path, **OPTIONS)
    held.close()


def test_damaged_and_foreign_folders(explainer, plain, tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        lxt.neurons.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="no manifest"):
        lxt.neurons.load(tmp_path)
    manifest = json.loads((plain.folder.path / "manifest.json").read_bytes())
    del manifest["counts"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not finished"):
        lxt.neurons.load(tmp_path)
    (tmp_path / "block-00000000.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"block-00000000.safetensors is damaged .*delete it"):
        label(explainer, texts(), out=tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "of layer 3, and the model has the layers 0 to 2"),
        ({"layers": [-1]}, "layers are counted from 0.* got -1"),
        ({"top": 0}, "top must be a whole number >= 1, got 0"),
        ({"length": 1}, "length must be a whole number >= 2, got 1"),
        ({"length": 1000}, "the context of LlamaForCausalLM is 64"),
        ({"length": 2}, "windows of 2 tokens leave 1 beside the 1 special"),
        ({"latent": "residual"}, "'residual' can't be labelled; those that can are: neuron, head"),
        ({"by": "size"}, "by relevance or activation, not by 'size'"),
        ({"targets": ["cats and dogs"]}, r"the target 'cats and dogs' is \d+ tokens"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [300]}, "the target 300 is no token: the model's ids are 0 to 299"),
        ({"layers": []}, "layers is empty"),
        ({"layers": 2}, r"layers are a list such as \[3, 7\], or None for all, got 2"),
    ],
)
def test_wrong_arguments_say_so(explainer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        label(explainer, texts(2), out=tmp_path / "out", **OPTIONS | options)


def test_models_without_next_tokens_are_refused():
    from transformers import BertForMaskedLM

    with pytest.raises(ValueError, match="predicts no next tokens"):
        label(lxt.load(bert(BertForMaskedLM), a_tokenizer()), texts(2))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        label(lxt.load(gpt2()), texts(2))


def test_layers_without_neurons_are_said():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    counts = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **counts, vocab_size=300, num_experts=4, mlp_only_layers=[0, 2])
    ).eval()
    with pytest.raises(ValueError, match=r"not known for layer 1 .* have one: layers=\(0, 2\)"):
        label(lxt.load(model, a_tokenizer()), texts(2))
    assert label(lxt.load(model, a_tokenizer()), texts(2), layers=[0, 2]).layers == [0, 2]


def test_neurons_of_experts_alone_lead_to_heads():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, vocab_size=300)).eval()
    with pytest.raises(ValueError, match=r"each of its experts has one.* Label heads: latent='head', --latent head$"):
        label(lxt.load(model, a_tokenizer()), texts(2))
    assert label(lxt.load(model, a_tokenizer()), texts(2), latent="head").count(0) == 2


def test_numbers_that_are_not_finite_are_refused():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        label(lxt.load(model, a_tokenizer()), texts(2))


def test_of_all_windows_only_ranked_ones_and_a_sample_are_kept():
    def tally(numbers):
        score = torch.tensor([[float(number)] for number in numbers])
        top = top_of(score, torch.zeros_like(score, dtype=torch.int32), numbers, 1, 1)
        tops = {(0, kind, sign): top for kind in KINDS for sign in SIGNS}
        moments = {(0, kind): torch.zeros(3, 1) for kind in KINDS}
        return Tally.named(tops, moments, torch.ones(4), [Window(n, f"é {n}", n, (1, n)) for n in numbers])

    total, size = 2000, 100
    parts = [tally(list(range(start, start + size))) for start in range(0, total, size)]
    whole = parts[0]
    for part in parts[1:]:
        whole = Tally.of(whole.then(part).tensors())
    sample = sorted(range(total), key=drawn)[:SAMPLE]
    assert [window.number for window in whole.windows] == sorted({*sample, total - 1})
    assert whole.windows[-1] == Window(total - 1, f"é {total - 1}", total - 1, (1, total - 1))
    # drawn evenly: of the 20 parts each has its share, 12.8 of 256, within 4 standard deviations of the binomial
    shares = [sum(number // size == part for number in sample) for part in range(20)]
    assert all(abs(share - 12.8) <= 4 * 3.5 for share in shares)


def rank(rows, k, sign):
    """A top of [(score, window, position)], by Python's sort."""
    rows = sorted((-score * sign, window, place) for score, window, place in rows if score * sign > 0)[:k]
    rows = [(-score * sign, window, place) for score, window, place in rows]
    return rows + [(0.0, -1, 0)] * (k - len(rows))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(10))
def test_merging_in_any_order_and_grouping_gives_the_sorted_whole(seed, sign):
    rng, k = random.Random(seed), 4
    neurons, windows = 3, 13
    table = [[(float(rng.randint(-2, 2)), w, rng.randint(0, 9)) for w in range(windows)] for _ in range(neurons)]
    numbers, tops = list(range(windows)), []
    rng.shuffle(numbers)
    while numbers:
        size = rng.randint(1, 4)
        part, numbers = sorted(numbers[:size]), numbers[size:]
        score = torch.tensor([[row[w][0] for row in table] for w in part])
        place = torch.tensor([[row[w][2] for row in table] for w in part])
        tops.append(top_of(score, place, part, k, sign))
    while len(tops) > 1:
        one, other = (tops.pop(rng.randrange(len(tops))) for _ in range(2))
        tops.append(merged(one, other, k, sign))
    assert isinstance(tops[0], Top)
    for neuron, row in enumerate(table):
        columns = (tops[0].score, tops[0].window, tops[0].position)
        assert list(zip(*(column[neuron].tolist() for column in columns), strict=True)) == rank(row, k, sign)
