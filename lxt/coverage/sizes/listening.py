"""Tiny sizes of language models that listen: a prompt with audio tokens, whose embeddings come from an audio tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids, without

__all__ = ["LISTENING"]

Inputs = Callable[[Any], dict[str, Any]]


def _heard(bins: int, frames: int, mask: str | None = "input_features_mask", count: int | None = None) -> Inputs:
    """A spectrogram, and a prompt with as many audio tokens as it gives; `mask` names the mask of its frames."""

    def inputs(model: Any) -> dict[str, Any]:
        heard: dict[str, Any] = {"input_features": normal(1, bins, frames)}
        if mask is not None:
            heard[mask] = torch.ones(1, frames, dtype=torch.long)
        found = count
        if found is None:
            with torch.no_grad():
                embedded = model.get_audio_features(**heard).pooler_output
            found = embedded.numel() // embedded.shape[-1]
        return heard | _prompt(model, found)

    return inputs


def _spectrogram(*shape: int, mask: str = "attention_mask") -> dict[str, Tensor]:
    return {"input_features": normal(1, *shape), mask: torch.ones(1, max(shape), dtype=torch.long)}


def _prompt(model: Any, count: int) -> dict[str, Tensor]:
    """Six tokens of text around the audio tokens."""
    ids = token_ids(6 + count)
    ids[0, 2 : 2 + count] = model.config.audio_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_WHISPER = {"max_source_positions": 16, "num_mel_bins": 8}
_TABLE = ("embed_positions.weight",)  # sinusoids, or learned: added whole
_GRANITE = Tiny(
    config={
        "encoder_config": {
            "input_dim": 16,
            "hidden_dim": 32,
            "dim_head": 8,
            "output_dim": 12,
            "context_size": 4,
            "max_pos_emb": 8,
            "conv_kernel_size": 3,
        },
        "projector_config": {"encoder_hidden_size": 32},
        "downsample_rate": 2,
        "window_size": 4,
    },
    inputs=lambda model: _prompt(model, 6) | {"input_features": normal(1, 10, 16)},
    prepare=without("out_mid.weight"),  # it mixes a softmax, that of the frames' characters, into the stream
    sources=("projector.query",),
)


_TOKENIZER = {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "kernel_size": 3}

LISTENING: dict[str, Tiny] = {
    "audioflamingo3": Tiny(config={"audio_config": _WHISPER}, inputs=_heard(8, 32), sources=_TABLE),
    "fun_asr_nano": Tiny(
        config={
            "audio_config": {"num_mel_bins": 4, "num_stacked_frames": 2, "fsmn_kernel_size": 3},
            "adaptor_config": {"intermediate_size": 8},
        },
        inputs=lambda model: _prompt(model, 8) | _spectrogram(8, 8, mask="input_features_mask"),
    ),
    "glmasr": Tiny(
        config={"audio_config": {"num_mel_bins": 8, "intermediate_size": 128, "num_key_value_heads": 4}},
        inputs=_heard(8, 32),
    ),
    "granite_speech": _GRANITE,
    "granite_speech_plus": _GRANITE,
    "moss_transcribe_diarize": Tiny(
        config={"audio_config": _WHISPER, "audio_merge_size": 2}, inputs=_heard(8, 32, count=8), sources=_TABLE
    ),
    "musicflamingo": Tiny(config={"audio_config": _WHISPER}, inputs=_heard(8, 32, count=8), sources=_TABLE),
    "nemo_speechlm": Tiny(
        config={
            "audio_config": {
                "asr_config": {"num_mel_bins": 8, "num_key_value_heads": 4},
                "diarization_config": {
                    "audio_config": {"num_mel_bins": 8, "num_key_value_heads": 4},
                    "head_config": {"audio_hidden_size": 32},
                },
            },
            "word_timestamp_config": {"num_key_value_heads": 4, "blank_token_id": 100},
        },
        inputs=lambda model: _prompt(model, 4) | _spectrogram(32, 8, mask="input_features_mask"),
    ),
    "qwen2_audio": Tiny(
        config={"audio_config": _WHISPER},
        inputs=_heard(8, 32, mask="feature_attention_mask", count=8),
        sources=_TABLE,
    ),
    "qwen3_asr": Tiny(
        config={
            "audio_config": {
                "num_mel_bins": 8,
                "downsample_hidden_size": 4,
                "n_window": 50,
                "n_window_infer": 100,
                "output_dim": 32,
            }
        },
        inputs=_heard(8, 200),
        prepare=without("positional_embedding"),
    ),
    "vibevoice": Tiny(
        config={"audio_config": _TOKENIZER, "semantic_model_config": _TOKENIZER},
        inputs=lambda model: (
            _prompt(model, 6)
            | {"input_values": normal(1, 1, 24), "padding_mask": torch.ones(1, 24, dtype=torch.long), "sample": False}
        ),
        sources=("multi_modal_projector.linear_1",),
    ),
    "vibevoice_asr": Tiny(
        config={
            "acoustic_tokenizer_encoder_config": _TOKENIZER,
            "semantic_tokenizer_encoder_config": _TOKENIZER,
            "acoustic_tokenizer_chunk_size": 16,
        },
        inputs=lambda model: _prompt(model, 6) | {"input_values": normal(1, 1, 24), "sample": False},
        # the model runs its tokenizers of sound without gradients: relevance ends at what they say
        sources=("acoustic_linear_1", "semantic_linear_1"),
    ),
    "voxtral": Tiny(
        config={"audio_config": _WHISPER | {"intermediate_size": 128}, "audio_token_id": 100},
        inputs=_heard(8, 32, mask=None),
        sources=_TABLE,
    ),
    "voxtral_realtime": Tiny(
        config={"audio_config": {"num_mel_bins": 8}, "downsample_factor": 2},
        inputs=lambda model: {"input_features": normal(1, 8, 36)},
    ),
}
