"""Tiny sizes of types that hear: speech recognition and classification of sound."""

from __future__ import annotations

from typing import Any

from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids, without

__all__ = ["SPEECH"]


def _waves(count: int = 100) -> Any:
    return lambda model: {"input_values": normal(1, count)}


def _spectrogram(*shape: int) -> Any:
    return lambda model: {"input_features": normal(1, *shape)}


def _frozen(model: Any) -> None:
    """As these models are trained: the convolutions' output would be made to require grad, though it does already."""
    model.freeze_feature_encoder()


_CONVOLUTIONS = {
    "conv_dim": [8, 8],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
_SEAMLESS = Tiny(
    config={
        "speech_encoder_layers": 2,
        "speech_encoder_attention_heads": 4,
        "speech_encoder_intermediate_size": 40,
        "feature_projection_input_dim": 16,
        "adaptor_kernel_size": 3,
        "adaptor_stride": 2,
        "conv_depthwise_kernel_size": 3,
    },
    inputs=_spectrogram(20, 16),
)
_PARAKEET = {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}

SPEECH: dict[str, Tiny] = {
    "audio-spectrogram-transformer": Tiny(
        config={"max_length": 16, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
        inputs=lambda model: {"input_values": normal(1, 16, 16)},
    ),
    "data2vec-audio": Tiny(
        config=_CONVOLUTIONS | {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
        inputs=_waves(),
        prepare=_frozen,
    ),
    "hubert": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
    "sew": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
    "sew-d": Tiny(config=_CONVOLUTIONS | {"position_buckets": 4}, inputs=_waves(), prepare=_frozen),
    "unispeech": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
    "unispeech-sat": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
    "wav2vec2": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
    "wav2vec2-bert": Tiny(
        config={
            "feature_projection_input_dim": 16,
            "left_max_position_embeddings": 4,
            "right_max_position_embeddings": 2,
            "conv_depthwise_kernel_size": 3,
            "classifier_proj_size": 16,
        },
        inputs=_spectrogram(20, 16),
    ),
    "wav2vec2-conformer": Tiny(
        config=_CONVOLUTIONS | {"conv_depthwise_kernel_size": 3}, inputs=_waves(), prepare=_frozen
    ),
    "wavlm": Tiny(
        config=_CONVOLUTIONS | {"num_buckets": 8, "max_bucket_distance": 16}, inputs=_waves(), prepare=_frozen
    ),
    # the decoder alone, and what it would hear
    "causal/whisper": Tiny(
        inputs=lambda model: {"encoder_outputs": (normal(1, 16, 32),)}, sources=("embed_positions.weight",)
    ),
    "whisper": Tiny(
        config={"num_mel_bins": 8, "max_source_positions": 16, "classifier_proj_size": 16},
        inputs=_spectrogram(8, 32),
        sources=("embed_positions.weight",),
    ),
    "granite_speech5_ctc": Tiny(
        config={
            "encoder_config": {
                "context_size": 4,
                "num_mel_bins": 16,
                "conv_kernel_size": 3,
                "subsample_layers": [0],
                "num_key_value_heads": 4,
            }
        },
        inputs=_spectrogram(32, 64),
        prepare=without("out_mid.weight"),  # it mixes a softmax, that of the frames' characters, into the stream
    ),
    "lasr_ctc": Tiny(
        config={"encoder_config": {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 4}},
        inputs=_spectrogram(64, 16),
    ),
    "parakeet_ctc": Tiny(config={"encoder_config": _PARAKEET}, inputs=_spectrogram(64, 16)),
    "canary": Tiny(config={"encoder_config": _PARAKEET}, inputs=_spectrogram(64, 16)),
    "cohere_asr": Tiny(config={"encoder_config": _PARAKEET}, inputs=_spectrogram(64, 16)),
    "dia": Tiny(
        config={
            "decoder_config": {
                "num_channels": 3,
                "cross_hidden_size": 32,
                "cross_num_attention_heads": 4,
                "cross_num_key_value_heads": 4,
                "cross_head_dim": 8,
            },
            "delay_pattern": [0, 1, 2],
        },
        inputs=lambda model: {"input_ids": token_ids(9), "decoder_input_ids": token_ids(12, seed=1).view(1, 4, 3)},
    ),
    "kyutai_speech_to_text": Tiny(
        config={"codec_config": {"upsample_groups": 32, "codebook_size": 16, "num_filters": 4}, "num_codebooks": 3},
        inputs=lambda model: {"input_ids": token_ids(24).view(1, 6, 4), "decoder_input_ids": None},
    ),
    "moonshine_streaming": Tiny(config={"num_key_value_heads": 4}, inputs=_waves(2560)),
    "moonshine": Tiny(inputs=_waves(3000)),
    "pop2piano": Tiny(inputs=_spectrogram(8, 32)),
    "speech/seamless_m4t": _SEAMLESS,
    "speech/seamless_m4t_v2": _SEAMLESS,
    "speech-encoder-decoder": Tiny(
        config={"decoder": {"is_decoder": True, "add_cross_attention": True}}, inputs=_waves(), prepare=_frozen
    ),
    "speech_to_text": Tiny(config={"input_feat_per_channel": 8, "conv_channels": 16}, inputs=_spectrogram(24, 8)),
    "speecht5": Tiny(config=_CONVOLUTIONS, inputs=_waves(), prepare=_frozen),
}
