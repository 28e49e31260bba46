"""Coverage: a sample of types is proven, faults are noticed, limits hold, a run goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lxt import rules
from lxt.cli import main
from lxt.coverage.build import built
from lxt.coverage.command import selected
from lxt.coverage.proof import Record, prove, versions
from lxt.coverage.reasons import REASONS
from lxt.coverage.report import as_markdown, counts, write
from lxt.coverage.runner import Limits, read_records, run
from lxt.coverage.shrink import VOCABULARY, shrunk
from lxt.coverage.subjects import SAMPLE, TASKS, Subject, all_subjects

SUBJECTS = {subject.key: subject for subject in all_subjects()}
LLAMA = Subject("causal", "llama", "LlamaForCausalLM")


@pytest.mark.parametrize("key", sorted(SAMPLE))
def test_a_sample_that_touches_every_mechanism_is_proven(key: str) -> None:
    if key not in SUBJECTS:
        pytest.skip(f"this transformers has no {key}")
    record = prove(SUBJECTS[key])
    if "as older versions of transformers do" in record.error:
        pytest.skip(record.error)
    assert record.proven, record.reasons()
    assert record.reach > 0.5  # relevance went through the model, and not along one token's residual stream only


def test_the_unpatched_gradient_is_no_proof() -> None:
    assert prove(LLAMA).control > 0.05


def test_a_wrong_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.scale_gradient
    monkeypatch.setattr(rules, "scale_gradient", lambda x, factor: right(x, factor * (1 + 1e-4)))
    found = prove(SUBJECTS["causal/olmo"])
    assert any("auditor" in reason for reason in found.reasons())


def test_a_differentiated_norm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "layer_norm", torch.nn.functional.layer_norm)
    found = prove(SUBJECTS["causal/phi"])
    assert any("Σ relevance" in reason for reason in found.reasons())


def test_every_type_of_the_mappings_is_a_subject() -> None:
    from transformers.models.auto import modeling_auto

    for task in ("causal", "masked", "sequence", "seq2seq", "image", "image-text", "audio"):
        assert {s.type for s in SUBJECTS.values() if s.task == task} == set(getattr(modeling_auto, TASKS[task]))
    assert len(SUBJECTS) == len(all_subjects())  # keys are unique
    assert SAMPLE <= set(SUBJECTS) or "5.23" not in versions()


def test_the_shrinker_keeps_a_layer_of_each_kind_and_gives_every_special_token_its_own_id() -> None:
    from transformers import CONFIG_MAPPING

    config = shrunk(CONFIG_MAPPING["gemma3_text"])
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types)
    llava = shrunk(CONFIG_MAPPING["llava"])
    assert llava.text_config.hidden_size < 64
    assert llava.vision_config.hidden_size < 64
    text = llava.text_config
    ids = [llava.image_token_id, text.bos_token_id, text.eos_token_id]
    assert len(set(ids)) == len(ids)
    assert max(ids) < VOCABULARY


def test_a_built_model_has_no_biases_and_no_weight_at_one() -> None:
    model = built(SUBJECTS["causal/gpt2"])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert not (parameter == 1).any()


# the runner


def _proven(subject: Subject) -> Record:
    return _record(subject)


def _record(subject: Subject, **fields: object) -> Record:
    names = ("cp", "attnlrp, softmax stopped", "attnlrp")
    done = Record(subject.task, subject.type, subject.architecture, "done", logits=0.0, versions=versions())
    found = replace(done, conservation=dict.fromkeys(names[:2], 0.0), audit=dict.fromkeys(names, 0.0))
    return replace(found, **fields)


def _misbehaving(subject: Subject) -> Record:
    if subject.type == "hangs":
        time.sleep(60)
    if subject.type == "dies":
        os._exit(7)
    if subject.type == "greedy":
        hoard = [bytearray(2**20) for _ in range(1024)]
        time.sleep(60 + len(hoard))
    return _record(subject)


def _subjects(*types: str) -> list[Subject]:
    return [Subject("causal", name, "Model") for name in types]


def test_a_run_outlives_subjects_that_hang_die_or_take_all_memory(tmp_path: Path) -> None:
    limits = Limits(seconds=15, memory=900 * 2**20)
    subjects = _subjects("hangs", "dies", "greedy", "good")
    found = run(subjects, tmp_path / "records.jsonl", workers=4, limits=limits, work=_misbehaving)
    reasons = {record.type: " ".join(record.reasons()) for record in found}
    assert list(reasons) == ["hangs", "dies", "greedy", "good"]
    assert "more than 15 s" in reasons["hangs"]
    assert "exit status 7" in reasons["dies"]
    assert "GiB of memory" in reasons["greedy"]
    assert reasons["good"] == ""


def test_a_run_goes_on_after_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    run(_subjects("first", "second"), path, work=_proven)
    path.write_text(path.read_text() + '{"task": "causal", "type": "cut sh')  # killed while writing
    tried: list[str] = []
    found = run(
        _subjects("first", "second", "third"), path, done=lambda record: tried.append(record.type), work=_proven
    )
    assert tried == ["third"]
    assert [record.type for record in found] == ["first", "second", "third"]
    assert len(read_records(path)) == 3


def test_records_of_other_versions_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    run(_subjects("first"), path, work=_proven)
    path.write_text(path.read_text().replace(versions(), "torch 1.0, transformers 1.0"))
    tried: list[str] = []
    run(_subjects("first"), path, done=lambda record: tried.append(record.type), work=_proven)
    assert tried == ["first"]


# the report


def test_the_report_shows_marks_reasons_and_counts(tmp_path: Path) -> None:
    good, late, early = _subjects("good", "late", "early")
    records = [
        _record(good),
        _record(late, audit={"cp": float("nan")}),
        replace(_record(early), stage="build", error="a | <b>", conservation={}, audit={}, logits=None),
    ]
    page, numbers = write(records, tmp_path / "docs" / "table.md")
    rows = {line.split("|")[1].strip(): line for line in page.read_text().splitlines() if line.startswith("| `")}
    assert "| ✓ |" in rows["`good`"]
    assert "| ~ |" in rows["`late`"]
    assert "the auditor differs by nan" in rows["`late`"]
    assert "| ✗ |" in rows["`early`"]
    assert "a \\| &lt;b>" in rows["`early`"]
    assert counts(records) == [("causal", 1, 3)]
    assert numbers.read_text().count('"proven": true') == 1
    assert "| 1 | 3 |" in as_markdown(records)


BARS = {"causal": 184, "masked": 48, "sequence": 120, "seq2seq": 34, "image": 38, "image-text": 80}


def test_the_committed_table_is_what_was_measured_and_what_the_readme_says() -> None:
    root = Path(__file__).parent.parent
    rows = json.loads((root / "docs" / "architectures.json").read_text(encoding="utf-8"))
    records = [Record.from_dict(row) for row in rows]
    assert as_markdown(records) == (root / "docs" / "architectures.md").read_text(encoding="utf-8")
    for task, proven, _ in counts(records):
        assert proven >= BARS.get(task, 0), task
    unproven = {record.key for record in records if not record.proven}
    assert unproven == set(REASONS)  # each has its reason, and no reason is out of date
    total = f"{len(records) - len(unproven)} of {len(records)}"
    assert total in (root / "README.md").read_text(encoding="utf-8")


# what is asked for


def test_unknown_tasks_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'translation'; allowed: causal"):
        selected(["translation"], [], sample=False)
    with pytest.raises(ValueError, match=r"transformers has no type my_llama"):
        selected([], ["my_llama"], sample=False)


def test_the_command_line_lists_and_fails_where_something_is_not_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as listed:
        main(["coverage", "--task", "causal", "--type", "llama", "--list"])
    assert listed.value.code == 0
    assert capsys.readouterr().out == "causal/llama\n"
    files = ["--records", str(tmp_path / "r"), "--report", str(tmp_path / "a.md")]
    with pytest.raises(SystemExit) as proven:
        main(["coverage", "--type", "gpt2", "--task", "causal", *files])
    assert proven.value.code == 0
    assert "`gpt2` | ✓" in (tmp_path / "a.md").read_text()
