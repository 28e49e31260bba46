"""`lxt label`, and the pages that it writes: complete, linked, and hostile text stays text."""

import json
import re
from html.parser import HTMLParser

import pytest
from small import a_tokenizer, llama

import lxt
from lxt.neurons.command import numbers
from lxt.neurons.running import label


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = ["My cats love my dogs.", "John gave the bag to Mary.", "I have 5 cats and 3 dogs. " * 20]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + "{\n")
    return path


def test_label_writes_a_folder_and_goes_on(run, corpus, tmp_path):
    out = tmp_path / "out"
    options = ["label", "tiny", "--corpus", corpus, "--layers", "1,3", "--top", 3, "--length", 40, "--out", out]
    options += ["--column", "body", "--batch-size", 2]
    status, _, err = run(*options)
    assert (status, err.count("\n")) == (1, 1)
    assert "corpus.jsonl, line 4: no valid JSON" in err
    assert "--skip-bad" in err
    status, printed, err = run(*options, "--skip-bad")
    assert status == 0, err
    assert {"layer", "neuron", "name", "AUROC"} <= set(re.findall(r"\w+", printed))
    assert "skipped 1 bad rows, the first: corpus.jsonl, line 4" in err
    assert "1 of 3 documents were cut into windows of 40 tokens" in err
    found = lxt.neurons.load(out)
    assert found.layers == [1, 3]
    assert len((out / "labels.jsonl").read_text().splitlines()) == 640
    assert found.manifest["counts"]["bad"] == 1
    assert ("no tables for pandas" in err) != (out / "contexts").is_dir()
    status, again, _ = run(*options, "--skip-bad", "--memory", "64GiB")
    assert (status, again) == (0, printed)
    status, printed, err = run(*options, "--skip-bad", "--latent", "head", "--out", tmp_path / "heads")
    assert status == 0, err
    assert "head" in printed
    assert lxt.neurons.load(tmp_path / "heads").count(3) == 4
    status, _, err = run(*options, "--skip-bad", "--batch-size", 3)
    assert status == 1
    assert "holds results of something else: batch_size was 2 and is now 3" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "of layer 9, and the model has the layers 0 to 3"),
        (["--layers", "a"], "layers are written as 3,7 or 0-5, not 'a'"),
        (["--latent", "value"], "'value' can't be labelled; those that can are: neuron, head"),
        (["--by", "size"], "by relevance or activation, not by 'size'"),
        (["--unit", "page"], "unknown unit 'page' of text files"),
        (["--target", "no such word"], "the target 'no such word' is"),
        (["--workers", "2"], "--workers is how many compute on Ray"),
        (["--column", "nothing"], "no field 'nothing'; it has 'body'"),
    ],
)
def test_errors_are_one_line(run, corpus, tmp_path, options, message):
    status, out, err = run("label", "tiny", "--corpus", corpus, "--out", tmp_path / "out", *options)
    assert status == 1
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_files_of_other_kinds_are_said(run, corpus, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("My cats love my dogs.")
    for name in ("b.csv", "b.json"):
        (folder / name).write_text("[]")
    options = ["--layers", "2", "--top", 1, "--length", 40]
    status, _, err = run("label", "tiny", "--corpus", folder, "--out", tmp_path / "out", *options)
    assert status == 0, err
    assert "left out 2 files of the folder that are no .jsonl, .parquet, .txt" in err
    assert "2 files left out" in (tmp_path / "out" / "index.html").read_text()
    status, _, err = run("label", "tiny", "--corpus", folder / "b.csv", "--out", tmp_path / "other", *options)
    assert (status, err.count("\n")) == (1, 1)
    assert "b.csv is no .jsonl, .parquet, .txt" in err


def test_no_corpus_there(run, tmp_path):
    status, _, err = run("label", "tiny", "--corpus", tmp_path / "nothing.txt", "--out", tmp_path / "out")
    assert status == 1
    assert "there is no file or folder" in err


def test_layers_as_they_are_written():
    assert numbers(None) is None
    assert numbers("3") == [3]
    assert numbers("3, 7") == [3, 7]
    assert numbers("0-2,5") == [0, 1, 2, 5]
    for wrong in ("", "a", "1-", "-1", "5-3"):
        with pytest.raises(ValueError, match="are written as 3,7 or 0-5"):
            numbers(wrong)


class Tags(HTMLParser):
    """All that is not text."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.data = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.data.append(data)


def parsed(path):
    tags = Tags()
    tags.feed(path.read_text())
    return tags


HOSTILE = "<script>alert(1)</script> \" onload='x' &amp; \u202egnp.exe \x00 \x1b[31m ]]> <!-- \u2066 é 猫"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "<img src=x onerror=y>.txt").write_text(f"{HOSTILE}\n{HOSTILE} {HOSTILE}\n")
    label(lxt.load(llama(), a_tokenizer()), folder, out=folder / "out", length=64)
    return folder / "out"


def test_hostile_text_stays_text(pages):
    allowed = {"html", "meta", "title", "style", "body", "h1", "h2", "p", "a", "table", "tr", "td", "th", "details"}
    allowed |= {"summary", "b", "span", "bdi", "mark", "head", "nav", "div", "thead", "tbody", "script"}
    for page in pages.glob("*.html"):
        text, tags = page.read_text(), parsed(page)
        assert set(tags.tags) <= allowed
        assert (
            tags.tags.count("script") == tags.tags.count("style") == 1
        )  # ours, which the policy knows by their hashes
        assert "default-src 'none'" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert any("<img src=x" in data for data in tags.data)  # the document's name, as text


def test_every_neuron_has_its_place_and_every_link_its_end(pages):
    ends, found = {}, []
    for page in pages.glob("*.html"):
        ends[page.name] = parsed(page)
        found += ends[page.name].ids if page.name != "index.html" else []
    assert len(found) == 3 * 48
    for tags in ends.values():
        for link in tags.links:
            name, _, anchor = link.partition("#")
            assert name in ends  # nothing from elsewhere
            assert not anchor or anchor in ends[name].ids
