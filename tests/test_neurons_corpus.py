"""Reading a corpus: every format, every kind of bad row, and windows that lose no token."""

import errno
import gzip
import json
import os
import random

import pytest
from small import a_tokenizer

from lxt.neurons.corpus import BadRow, Corpus
from lxt.neurons.windows import Counts, Reading, windows


def read(corpus):
    return [(document.name, document.text) for document in corpus.documents()]


def test_text_by_line_paragraph_and_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n \ntwo\nthree é\n\n\nfour".encode())
    assert read(Corpus(path)) == [("a.txt:1", "one"), ("a.txt:4", "two"), ("a.txt:5", "three é"), ("a.txt:8", "four")]
    assert read(Corpus(path, unit="paragraph")) == [
        ("a.txt:1", "one"),
        ("a.txt:4", "two\nthree é"),
        ("a.txt:8", "four"),
    ]
    assert read(Corpus(str(path), unit="file")) == [("a.txt", "one\r\n\n \ntwo\nthree é\n\n\nfour")]
    with pytest.raises(ValueError, match="unknown unit 'page' of text files; allowed: line, paragraph, file"):
        Corpus(path, unit="page")


def test_jsonl_and_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "one"}', "{", "[1]", '{"body": "x"}', '{"text": 5}', "", '{"text": "\\ud800"}', '{"text": ""}']
    path.write_bytes("\n".join(rows).encode() + b'\n{"text": "\xff"}\n{"text": "two"}')
    with pytest.raises(BadRow, match=r"a\.jsonl, line 2: no valid JSON .*skip bad rows \(skip_bad=True, --skip-bad\)"):
        read(Corpus(path))
    corpus = Corpus(path, skip_bad=True)
    for _ in range(2):  # counted anew each time
        assert read(corpus) == [("a.jsonl:1", "one"), ("a.jsonl:10", "two")]
        assert corpus.bad == 6
    assert corpus.first_bad[1:] == [
        "a.jsonl, line 3: list, not an object with the field 'text'",
        "a.jsonl, line 4: no field 'text'; it has 'body'",
        "a.jsonl, line 5: the field 'text' is int, not a text",
        "a.jsonl, line 7: the field 'text' isn't valid Unicode: character 0 is a lone surrogate",
    ]
    with pytest.raises(BadRow, match="line 1: no field 'body'; it has 'text'"):
        read(Corpus(path, column="body"))


def test_deep_json_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(BadRow, match="line 1: no valid JSON"):
        read(Corpus(path))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("three")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}))
    (tmp_path / "a.txt").write_text("two")
    (tmp_path / "notes.md").write_text("not read")
    corpus = Corpus(tmp_path)
    for _ in range(2):
        assert read(corpus) == [("a.jsonl:1", "one"), ("a.txt:1", "two"), ("b/x.txt:1", "three")]
        assert corpus.left_out == 1
    corpus.source = tmp_path / "a.txt"
    read(corpus)
    assert corpus.left_out == 0


@pytest.mark.parametrize("name", ["c.csv", "c.json", "c.txt.gz", "c"])
def test_a_file_of_another_kind_is_refused_before_anything_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_text('a,"text"\n')
    for reads in (Corpus.fingerprint, read):
        with pytest.raises(ValueError, match=rf"{name} is no \.jsonl, \.parquet, \.txt, which .* rename it to \.txt"):
            reads(Corpus(path))
    path.rename(tmp_path / "c.TXT")
    assert read(Corpus(tmp_path / "c.TXT")) == [("c.TXT:1", 'a,"text"')]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_corpus_is_an_error(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt holds no document with text"):
        read(Corpus(path))
    with pytest.raises(ValueError, match="of 0 texts holds no document"):
        read(Corpus([]))


def test_what_is_not_there_or_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nothing\.txt'; give one, or a dataset"):
        read(Corpus("nothing.txt"))
    with pytest.raises(ValueError, match=r"holds no \.jsonl, \.parquet, \.txt"):
        read(Corpus(tmp_path))
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(BadRow, match=r"a\.txt, line 1: no valid UTF-8"):
        read(Corpus(tmp_path))
    with pytest.raises(ValueError, match=r"holds no document with text \(1 bad rows were skipped, the first: a.txt"):
        read(Corpus(tmp_path, skip_bad=True))
    with pytest.raises(BadRow, match="text 1 of the list is int, not a text"):
        read(Corpus(["a", 5]))


def test_a_dataset_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"if it is a dataset of the hub: pip install 'lxt\[corpus\]'"):
        read(Corpus("owner/name"))


def test_a_dataset_is_streamed(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def load_dataset(name, split, streaming):
            asked.append((name, split, streaming))
            return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", Library)
    assert read(Corpus("owner/name:test")) == [("owner/name:0", "one"), ("owner/name:1", "two")]
    assert read(Corpus("owner/name"))
    assert asked == [("owner/name", "test", True), ("owner/name", "train", True)]


def test_parquet_without_the_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs pyarrow to be read: pip install 'lxt\[corpus\]'"):
        read(Corpus(tmp_path))


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    with pytest.raises(BadRow, match=r"a\.parquet, row 2: the column 'text' is NoneType, not a text"):
        read(Corpus(path))
    assert read(Corpus(path, skip_bad=True)) == [("a.parquet:1", "one"), ("a.parquet:3", "two")]
    with pytest.raises(ValueError, match="no column 'body'; it has text, n"):
        read(Corpus(path, column="body"))
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(OSError, match="no parquet file that can be read"):
        read(Corpus(path))


def test_the_fingerprint_is_of_content_and_way_of_reading(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.txt").write_text("text")
    assert Corpus(one).fingerprint() == Corpus(other).fingerprint()
    assert Corpus(one).fingerprint() != Corpus(one, unit="file").fingerprint()
    (other / "a.txt").write_text("next")
    assert Corpus(one).fingerprint() != Corpus(other).fingerprint()
    assert Corpus(["a", "b"]).fingerprint() != Corpus(["ab"]).fingerprint()


def test_windows_hold_every_token_once_and_never_two_documents():
    tokenizer, rng = a_tokenizer(), random.Random(0)
    texts = [" ".join(rng.choices(["cats", "dogs", "play"], k=rng.randint(1, 40))) for _ in range(30)]
    counts = Counts()
    found = list(windows(Corpus(texts), tokenizer, 9, counts))
    assert [window.number for window in found] == list(range(len(found)))
    assert all(2 <= len(window.ids) <= 9 and window.ids[0] == 0 for window in found)
    for number, text in enumerate(texts):
        own = [window for window in found if window.document == str(number)]
        ids = [token for window in own for token in window.ids[1:]]
        assert ids == tokenizer(text)["input_ids"][1:]
        starts = [0]
        for window in own[:-1]:
            starts.append(starts[-1] + len(window.ids) - 1)
        assert [window.start for window in own] == starts
    assert counts == Counts(30, sum(len(tokenizer(text)["input_ids"]) > 9 for text in texts), 0, len(found))


def test_documents_that_predict_nothing_are_counted():
    tokenizer = a_tokenizer()
    tokenizer._tokenizer.post_processor = None  # no special token, so a single token has nothing before it
    counts = Counts()
    found = list(windows(Corpus(["a", "ab c", "b"]), tokenizer, 8, counts))
    assert [window.document for window in found] == ["1"]
    assert (counts.documents, counts.too_short) == (3, 2)


def test_blocks_are_numbered_and_full_but_the_last():
    reading = Reading(Corpus(["cats and dogs"] * 7), a_tokenizer(), 30, 3)
    for _ in range(2):
        dealt = list(reading)
        assert [block.number for block in dealt] == [0, 1, 2]
        assert [len(block.windows) for block in dealt] == [3, 3, 1]
    reading.done = frozenset({0, 2})
    assert list(reading) == [dealt[1]]
    read = {"documents": 7, "cut": 0, "too_short": 0, "windows": 7}
    assert reading.counts == read | {"bad": 0, "first_bad": [], "files_left_out": 0}


def test_documents_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\xff\n")
    found = Corpus(path).documents()
    assert next(found).text == "one"  # the bad third row is not read yet
    assert next(found).text == "two"
    with pytest.raises(BadRow, match="line 3"):
        next(found)


def test_special_tokens_in_a_text_are_part_of_it():
    tokenizer, counts = a_tokenizer(), Counts()
    texts = ["<s><s>cats", "<s>" * 20, "cats</s>dogs"]
    found = list(windows(Corpus(texts), tokenizer, 6, counts))  # no text has so many in front that nothing fits
    for number, text in enumerate(texts):
        own = [window for window in found if window.document == str(number)]
        assert [window.prefix for window in own] == [1] * len(own)
        ids = tokenizer(text)["input_ids"][1:]
        assert [token for window in own for token in window.ids[1:]] == ids
        assert [window.start for window in own] == list(range(0, len(ids), 5))


def test_names_of_files_and_folders_may_be_any(tmp_path):
    name = os.fsdecode(b"\xff.TXT")
    try:
        (tmp_path / name).write_text("one")
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    (tmp_path / "b.JSONL").write_text('{"text": "two"}')
    assert read(Corpus(tmp_path)) == [("b.JSONL:1", "two"), ("\ufffd.TXT:1", "one")]
    assert Corpus(tmp_path).fingerprint()


def test_folders_that_cannot_be_read_are_no_empty_ones(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b").mkdir()
    real = os.scandir

    def refused(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match=r"Permission denied: .*b'"):
        read(Corpus(tmp_path))


def test_a_number_of_too_many_digits_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": ' + "9" * 5000 + '}\n{"text": "two"}')
    with pytest.raises(BadRow, match=r"a\.jsonl, line 1: no valid JSON"):
        read(Corpus(path))
    assert read(Corpus(path, skip_bad=True)) == [("a.jsonl:2", "two")]


def test_parquet_with_bytes_that_are_no_text_or_damaged(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = arrow.array([b"one", b"\xff", b"two"], arrow.binary())
    parquet.write_table(arrow.table({"text": arrow.Array.from_buffers(arrow.string(), 3, rows.buffers())}), path)
    with pytest.raises(BadRow, match=r"a\.parquet, row 2: the column 'text' has no valid UTF-8 at byte 0"):
        read(Corpus(path))
    assert read(Corpus(path, skip_bad=True)) == [("a.parquet:1", "one"), ("a.parquet:3", "two")]
    parquet.write_table(arrow.table({"text": [f"text {number}" for number in range(3000)]}), path)
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(byte ^ 0x5A for byte in content[200:2000])
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"a\.parquet can't be read after row 0 .*leave it out"):
        read(Corpus(path, skip_bad=True))


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(TypeError, match="a list of texts, not generator; it is read more than once"):
        Corpus(text for text in ["one"])
