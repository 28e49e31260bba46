"""The command line: what it prints and writes, and one line on stderr for whatever goes wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import lxt
from lxt.cli import main

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"


def test_version(run):
    assert run("--version") == (0, f"lxt {lxt.__version__}\n", "")


def test_without_arguments_there_is_help(run):
    status, out, err = run()
    assert status == 0
    assert all(command in out for command in ("attribute", "check", "models"))
    assert not err


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "lxt", "--version"], capture_output=True, text=True, check=False)
    assert result.stdout == f"lxt {lxt.__version__}\n"


def test_help_and_errors_load_nothing_heavy():
    code = (
        "import sys; from lxt.cli import main\n"
        "try: main(['attribute', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.endswith("set()\n"), result.stderr


def test_models_names_the_bundled_one_and_the_fused_architectures(run):
    status, out, _ = run("models")
    assert status == 0
    assert "tiny" in out
    assert {"llama", "gpt2", "bert"} <= set(out.split())


def test_attribute_shows_the_prediction_and_writes_what_is_asked_for(run, tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "png", "json", "safetensors")}
    flags = ["--html", files["html"], "--plot", files["png"], "--json", files["json"], "--save", files["safetensors"]]
    status, out, err = run("attribute", TEXT, *flags)
    assert status == 0
    assert "dogs" in out
    for path in files.values():
        assert f"written: {path}" in err
        assert path.stat().st_size > 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "<html" in files["html"].read_text(encoding="utf-8")
    saved = lxt.Attribution.load(files["safetensors"])
    (row,) = json.loads(files["json"].read_text(encoding="utf-8"))["rows"]
    assert row["tokens"] == saved.tokens[0]
    assert list(saved.latents) == ["residual"]  # the picture needs it


def test_a_picture_without_a_suffix_is_refused_before_a_model_is_loaded(run, tmp_path):
    status, _, err = run("attribute", TEXT, "--model", "/nowhere", "--plot", tmp_path / "picture")
    assert status == 1
    assert "--plot writes .png, .pdf or .svg" in err


def test_json_on_stdout_is_nothing_but_json(run):
    status, out, _ = run("attribute", TEXT, "--json", "-", "--target", " dogs", "--contrast", " cats")
    assert status == 0
    (row,) = json.loads(out)["rows"]
    assert len(row["relevance"]) == len(row["tokens"])


def test_options_reach_attribute(run):
    def row(*flags):
        status, out, err = run("attribute", TEXT, "--json", "-", *flags)
        assert status == 0, err
        return json.loads(out)

    plain, cp = row("--target", " dogs"), row("--target", " dogs", "--rules", "cp")
    assert (plain["rules"], cp["rules"]) == ("attnlrp", "cp")
    assert plain["rows"][0]["relevance"] != cp["rows"][0]["relevance"]
    assert row("--target", " dogs", "--kind", "logprob")["rows"][0]["explained"]["kind"] == "logprob"
    assert list(row("--latents", "head")["rows"][0]["latents"]) == ["head"]


def test_check_reports(run):
    status, out, _ = run("check", "tiny")
    assert status == 0
    assert "conserv" in out.lower()


def test_a_failed_check_is_a_status(run, monkeypatch):
    monkeypatch.setattr(lxt.Attribution, "check", lambda self: SimpleNamespace(ok=False))
    status, _, err = run("check", "tiny")
    assert status == 1
    assert not err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param([TEXT, "--model", "no/such-model-here"], "no/such-model-here", id="unknown model"),
        pytest.param([TEXT, "--rules", "lpr"], "attnlrp", id="unknown rules"),
        pytest.param([TEXT, "--latents", "brain"], "residual", id="unknown latent"),
        pytest.param([TEXT, "--kind", "odds"], "logprob", id="unknown kind"),
        pytest.param([""], "empty", id="empty text"),
        pytest.param(["a " * 10_000], "context", id="text longer than the context"),
        pytest.param([TEXT, "--target", " dogs", "--contrast", " dogs"], "dogs", id="contrast equal to target"),
        pytest.param([TEXT, "--target", " dogs and cats", "--kind", "logit"], "dogs", id="several tokens for one"),
        pytest.param([TEXT, "--dtype", "float12"], "float12", id="unknown dtype"),
        pytest.param([TEXT, "--device", "abacus"], "abacus", id="unknown device"),
        pytest.param([TEXT, "--html", "/dev/null/out.html"], "/dev/null/out.html", id="unwritable path"),
        pytest.param([TEXT, "--json", "/dev/null/out.json"], "/dev/null/out.json", id="unwritable json"),
        pytest.param([TEXT, "--colour", "red"], "--colour", id="unknown option"),
        pytest.param([], "text", id="no text"),
    ],
)
def test_an_error_is_one_line_and_a_status(run, arguments, named):
    status, _, err = run("attribute", *arguments)
    assert status not in (0, None)
    assert err.startswith("lxt: ")
    assert err.count("\n") == 1
    assert named in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown rules 'lpr'"):
        main(["attribute", TEXT, "--rules", "lpr", "--debug"])
