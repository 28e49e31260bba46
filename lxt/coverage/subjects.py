"""The subjects: which types of transformers are tried, in which task, with which class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SAMPLE", "TASKS", "Subject", "all_subjects"]


@dataclass(frozen=True, order=True)
class Subject:
    """One model class of one type.

    Attributes:
        task: a key of TASKS.
        type: `config.model_type`, as transformers' mappings have it.
        architecture: the model's class in transformers.
    """

    task: str
    type: str
    architecture: str

    @property
    def key(self) -> str:
        """What records are filed under: "causal/llama"."""
        return f"{self.task}/{self.type}"


# Task -> the name of transformers' mapping. Where a later mapping adds no type to an earlier one's, the class differs
# in its head only, and the types it shares are left out: see `_ADDED_TO`.
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
_TEXT = ("causal", "masked", "sequence", "seq2seq")
_ADDED_TO = {"token": _TEXT, "question": _TEXT, "ctc": ("audio",), "speech": ("seq2seq",)}

# One subject or two for each mechanism; the tests run these.
SAMPLE = frozenset(
    """causal/llama causal/gpt2 causal/gpt_neox causal/gemma3_text causal/bloom causal/falcon causal/phi3 causal/cohere
    causal/qwen3_moe causal/gpt_oss causal/deepseek_v3 causal/mamba causal/mamba2 causal/jamba causal/rwkv
    causal/qwen3_next causal/kimi_linear causal/recurrent_gemma causal/xlstm masked/bert masked/deberta-v2 masked/fnet
    masked/modernbert sequence/roberta seq2seq/t5 seq2seq/bart image/vit image/swin image/convnext image/resnet
    image-text/llava image-text/qwen2_5_vl audio/wav2vec2 audio/whisper""".split()
)


def all_subjects() -> list[Subject]:
    """Every subject, task by task, in the order of transformers' mappings."""
    return [subject for task in TASKS for subject in _of_task(task)]


def _of_task(task: str) -> Iterator[Subject]:
    from transformers.models.auto import modeling_auto

    known = {name for other in _ADDED_TO.get(task, ()) for name in getattr(modeling_auto, TASKS[other])}
    for name, architecture in getattr(modeling_auto, TASKS[task]).items():
        if name not in known:
            # a type with several classes for a task (teachers, kinds of preprocessing) is tried with its first
            yield Subject(task, name, architecture if isinstance(architecture, str) else architecture[0])
