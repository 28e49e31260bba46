"""The documentation: its links lead somewhere, its Python is Python, and the quickstart runs as it is printed."""

import ast
import re
from pathlib import Path

import pytest

import lxt

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_relative_links_lead_to_files(page):
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert not [target for target in targets if target and not (page.parent / target).exists()]


@each_page
def test_python_blocks_are_python_and_name_what_there_is(page):
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lxt":
                assert hasattr(lxt, node.attr), f"lxt.{node.attr}"


def test_the_quickstart_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    explainer = lxt.load("tiny")
    prompt = "My cats love to play with my"
    names = {
        "lxt": lxt,
        "other": prompt,
        "model": explainer.model,
        "ids": explainer.tokenizer(prompt, return_tensors="pt")["input_ids"],
    }
    blocks = BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 6
    for block in blocks:
        exec(block, names)
    assert names["relevance"].shape == names["ids"].shape
    assert {path.name for path in tmp_path.iterdir()} == {
        "layers.png",
        "out.html",
        "out.png",
        "out.pdf",
        "out.safetensors",
    }
    assert "dogs" in capsys.readouterr().out
