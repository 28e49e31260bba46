"""Tiny seeded float64 models that see, biases at zero, with inputs: image classifiers and image-text models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

SIZE, LABELS = 16, ("tabby cat", "dog", "car")
VOCABULARY, IMAGE = 64, 60
_NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_SEES = {**_VIT, "image_size": SIZE, "patch_size": 4, "initializer_range": 0.3}
_PLAIN = {name: value for name, value in _SEES.items() if name != "intermediate_size"}
_READS = {
    **{"vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, **_VIT},
    **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_SEES, **_NAMED)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**_SEES, **_NAMED)),
    "deit with teacher": lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**_SEES, **_NAMED)),
    "beit": lambda: tf.BeitForImageClassification(
        tf.BeitConfig(**_SEES, **_NAMED, layer_scale_init_value=0.5, use_relative_position_bias=True)
    ),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**_PLAIN, **_NAMED)),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(
            **{"image_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
            **{"window_size": 4, "initializer_range": 0.3, **_NAMED},
        )
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(
            **{"image_size": SIZE, "patch_size": 4, "depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
            **{"initializer_range": 0.3, "layer_scale_init_value": 0.5, **_NAMED},
        )
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **_NAMED)
    ),
}
GRIDS = {"swin": (8, 8), "resnet": (8, 8)}  # rows and columns of patches; the others have 4 × 4


def _zeroed(model: nn.Module) -> Any:
    model = model.double().eval()
    added = ("position_emb", "cls_token", "class_embedding", "distillation_token", "pos_embed", "embed_positions")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norm weights too: at 1 they hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("mm_input_projection_weight"):  # transformers starts it at zero
                parameter.normal_(std=0.3)
            if name.endswith("bias") or any(key in name for key in (*added, "query_tokens", "image_newline")):
                parameter.zero_()
    return model


def classifier(name: str = "vit") -> Any:
    torch.manual_seed(0)
    return _zeroed(CLASSIFIERS[name]())


def images(count: int = 2, seed: int = 1) -> Tensor:
    """Pixel values [count, 3, SIZE, SIZE]."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Image-text models: each maker gives a model, how many image tokens its prompt has, and its pixel inputs


def _llava() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = tf.CLIPVisionConfig(**_SEES, projection_dim=32)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**_READS), image_token_index=IMAGE, vision_feature_layer=-1
    )
    return tf.LlavaForConditionalGeneration(config), [16], {"pixel_values": images(1)}


def _llava_next() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = tf.CLIPVisionConfig(**_SEES, projection_dim=32)
    options = {"image_token_index": IMAGE, "vision_feature_layer": -1, "image_grid_pinpoints": [[16, 32], [32, 16]]}
    config = tf.LlavaNextConfig(vision_config=vision, text_config=tf.LlamaConfig(**_READS), **options)
    pixels = {"pixel_values": images(3)[None], "image_sizes": torch.tensor([[16, 32]])}
    return tf.LlavaNextForConditionalGeneration(config), [16 + 4 * 8 + 4], pixels


def _paligemma() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = tf.SiglipVisionConfig(**_SEES, projection_dim=32)
    options = {"image_token_index": IMAGE, "projection_dim": 32, "vocab_size": VOCABULARY}
    config = tf.PaliGemmaConfig(vision_config=vision, text_config=tf.GemmaConfig(**_READS), **options)
    return tf.PaliGemmaForConditionalGeneration(config), [16], {"pixel_values": images(1)}


def _gemma3() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    text = tf.Gemma3TextConfig(**_READS, query_pre_attn_scalar=8)
    options = {"mm_tokens_per_image": 4, "image_token_index": IMAGE}
    config = tf.Gemma3Config(text_config=text, vision_config=tf.SiglipVisionConfig(**_SEES), **options)
    return tf.Gemma3ForConditionalGeneration(config), [4], {"pixel_values": images(1)}


def _idefics3() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    options = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
    config = tf.Idefics3Config(vision_config=dict(_SEES), text_config=tf.LlamaConfig(**_READS), **options)
    return tf.Idefics3ForConditionalGeneration(config), [4, 4], {"pixel_values": images(2)[None]}


def _internvl() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = tf.InternVLVisionConfig(
        **{**_SEES, "image_size": [SIZE, SIZE], "patch_size": [4, 4]}, layer_scale_init_value=0.5
    )
    options = {"image_token_id": IMAGE, "downsample_ratio": 0.5}
    config = tf.InternVLConfig(vision_config=vision, text_config=tf.Qwen2Config(**_READS), **options)
    return tf.InternVLForConditionalGeneration(config), [4], {"pixel_values": images(1)}


def _blip2() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    former = {**_VIT, "vocab_size": VOCABULARY, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    text = tf.OPTConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "init_std": 0.3},
        **{"num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    )
    config = tf.Blip2Config(
        vision_config=dict(_SEES),
        qformer_config={**former, "initializer_range": 0.3},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return tf.Blip2ForConditionalGeneration(config), [4], {"pixel_values": images(1)}


def _qwen(model: type, config: type, vision: dict[str, Any]) -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    marks = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    options = {"depth": 2, "hidden_size": 32, "num_heads": 4, "initializer_range": 0.3, **_PATCHES, **vision}
    made = model(config(vision_config=options, text_config={**_READS, **_ROPE}, **marks))
    patches = torch.randn(24, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made, [6], {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 6]])}


def _qwen2_vl() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = {"embed_dim": 32, "mlp_ratio": 2}
    return _qwen(tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision)


def _qwen25_vl() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = {"intermediate_size": 40, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision)


def _qwen3_vl() -> tuple[nn.Module, list[int], dict[str, Tensor]]:
    vision = {"intermediate_size": 40, "out_hidden_size": 32, "num_position_embeddings": 16}
    return _qwen(tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, {**vision, "deepstack_visual_indexes": [0]})


READERS: dict[str, Callable[[], tuple[nn.Module, list[int], dict[str, Tensor]]]] = {
    "blip2": _blip2,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen25_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}


def reader(name: str = "llava", text: tuple[int, ...] = (7, 8, 9)) -> tuple[Any, dict[str, Any]]:
    """The model, and a prompt of its images and some words as the tensors that a processor would make."""
    torch.manual_seed(0)
    made, counts, pixels = READERS[name]()
    ids = [1, 5]
    for count in counts:
        ids += [*[IMAGE] * count, 6]
    tokens = torch.tensor([[*ids, *text]])
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels}
    kind = "mm_token_type_ids" if name.startswith("qwen") else "token_type_ids"
    if name in ("gemma3", "paligemma") or name.startswith("qwen"):
        inputs[kind] = (tokens == IMAGE).long() * (name != "paligemma")
    return _zeroed(made), inputs


# Processors, made without a download


WORDS = ("<unk>", "<s>", "what", "is", "this", "?", "cat", "dog", "USER", "ASSISTANT", ":")


def made_with_pillow(name: str) -> Any:
    """The image processor of that name that needs no torchvision; transformers renamed these in 5.2x."""
    return getattr(tf, f"{name}Pil", None) or getattr(tf, name)


def image_processor(size: int = SIZE) -> Any:
    return made_with_pillow("ViTImageProcessor")(size={"height": size, "width": size})


def llava_processor() -> Any:
    vocabulary = {word: index for index, word in enumerate(WORDS)} | {"<image>": IMAGE}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    images = made_with_pillow("CLIPImageProcessor")(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    template = (
        "{% for message in messages %}{{ message['role'] | upper }} : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
    )
    return tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
