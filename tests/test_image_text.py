"""Text with images explained: tokens of both kinds in one row, pixels through the vision tower, prompts of any form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from equations import Float64
from PIL import Image
from relevances import state
from vision import IMAGE, READERS, SIZE, images, llava_processor, made_with_pillow, reader

import lxt
from lxt.attributor import Attributor
from lxt.imagegeometry import image_relevances
from lxt.imagepasses import ImagePass, ImageResult

EXACT = 1e-9  # float64 models whose norms and rotary tables stay in float32 outside Float64; inside, only rounding
PROMPT = "USER : <image> what is this ?"
each = pytest.mark.parametrize("name", READERS)


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def llava():
    """A Llava with its processor, in float32."""
    model, _ = reader("llava")
    return lxt.load(model.float(), llava_processor())


# The numbers


@each
def test_text_and_pixels_sum_to_the_logit(name):
    model, inputs = reader(name)
    with Float64():
        out = Attributor(model, rules="cp").attribute(inputs)
        with torch.no_grad():
            value = float(model(**inputs).logits[0, -1].max())
    is_text = inputs["input_ids"][0] != IMAGE
    text = float(out.relevance[0, is_text].sum())
    pixels, patches = (sum(float(getattr(image, part).sum()) for image in out.images) for part in ("pixels", "patches"))
    assert out.explained[0].value == pytest.approx(value, rel=EXACT)
    assert text + pixels == pytest.approx(value, rel=EXACT)
    assert text + patches == pytest.approx(value, rel=EXACT)
    assert abs(pixels) > 1e-3
    if name == "qwen3_vl":  # reads the image again in its first layers, which no token stands for
        assert abs(float(out.total) - value) > 1e-3
    else:
        assert float(out.total) == pytest.approx(value, rel=EXACT)


@each
def test_the_auditor_agrees_and_the_logits_are_unchanged(name):
    model, inputs = reader(name)
    with Float64():
        report = Attributor(model).attribute(inputs).check()
    assert report.ok
    assert report.forward_difference == 0
    assert report.audit_note == ""
    assert report.audit_difference is not None
    assert report.audit_difference < EXACT


def test_an_image_token_has_the_relevance_of_what_stands_there():
    """By hand: the projected features among the embeddings, into the language model alone."""
    model, inputs = reader("llava")
    with Float64():
        out = Attributor(model).attribute(inputs, target=9)
        ids = inputs["input_ids"]
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
            embeds[ids == IMAGE] = model.model.get_image_features(
                inputs["pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
            ).pooler_output[0]
        embeds.requires_grad_()
        with lxt.monkey_patch(model):
            model(inputs_embeds=embeds).logits[0, -1, 9].backward()
    expected = (embeds * embeds.grad).sum(-1).detach()
    torch.testing.assert_close(out.relevance, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(out.token_ids, ids)
    assert not out.special[0, ids[0] == IMAGE].any()


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "idefics3"])
def test_a_target_of_several_tokens_is_their_log_probability(name):
    model, inputs = reader(name, text=())
    tokens = inputs["input_ids"].shape
    cut = {key: value[:, :-1] for key, value in inputs.items() if value.shape == tokens}
    inputs |= cut  # the prompt ends in its image, and what follows is text
    longer = torch.cat([inputs["input_ids"], torch.tensor([[11, 12]])], 1)
    kinds = {key: torch.nn.functional.pad(value, [0, 2]) for key, value in inputs.items() if key.endswith("type_ids")}
    with Float64():
        out = Attributor(model).attribute(inputs, lxt.Target([11, 12, 13]))
        with torch.no_grad():
            full = {**inputs, **kinds, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
            logprobs = model(**full).logits[0, -3:].log_softmax(-1)
    assert out.relevance.shape == longer.shape
    assert out.explained[0].value == pytest.approx(float(logprobs[[0, 1, 2], [11, 12, 13]].sum()), rel=1e-7)


def test_prepared_batches_give_what_single_prompts_give():
    model, long = reader("llava", (7, 8, 9))
    _, short = reader("llava", (10,))
    pixels = images(2)

    def padded(inputs, left):
        return torch.nn.functional.pad(inputs, [2, 0] if left else [0, 2])

    with Float64():
        explainer = Attributor(model)
        singles = [
            explainer.attribute({**inputs, "pixel_values": pixels[row : row + 1]}, 9)
            for row, inputs in enumerate((long, short))
        ]
        for left in (True, False):
            batch = {
                key: torch.cat([long[key], padded(short[key], left)]) for key in ("input_ids", "attention_mask")
            } | {"pixel_values": pixels}
            out = explainer.attribute(batch, 9)
            for row, single in enumerate(singles):
                torch.testing.assert_close(out[row].relevance, single.relevance, rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(out[row].pixels, single.pixels, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="pass the prompts one by one"):
        explainer.attribute(batch, lxt.Target([11, 12]))


# Geometry


def test_flattened_patches_are_brought_back_to_the_picture():
    """Qwen's own processor takes the picture apart; what comes back must be the picture, resized as it was."""
    model, _ = reader("qwen2_vl")
    options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = made_with_pillow("Qwen2VLImageProcessor")(**options, size={"shortest_edge": 64, "longest_edge": 4096})
    prepared = processor(images=[photo(0), photo(1)], return_tensors="pt")
    grids = prepared["image_grid_thw"]
    ids = torch.tensor([[IMAGE] * (int(grids[0].prod()) // 4) + [5], [IMAGE] * (int(grids[1].prod()) // 4) + [5]])
    mask = torch.ones_like(ids).bool()
    batch = ImagePass({**prepared, "input_ids": ids}, [None, None], torch.zeros(2, 1), mask)  # type: ignore[list-item]
    pixels = prepared["pixel_values"]
    stem = torch.arange(len(pixels)).float().view(-1, 1, 1, 1)
    result = ImageResult(torch.zeros(2), torch.zeros(2), [], {"pixel_values": pixels}, stem, None, torch.zeros(2))
    found = image_relevances(batch, result, model, processor, 0)
    assert [image.row for image in found] == [0, 1]
    high, wide = (4 * int(length) for length in grids[0, 1:])
    for seed, image in enumerate(found):
        resized = np.asarray(photo(seed).resize((wide, high), Image.Resampling.BICUBIC)).astype(int)
        assert image.picture is not None
        assert np.abs(image.picture.numpy().astype(int) - resized).max() <= 2
    # patches are numbered in the order of the sequence: blocks of 2 × 2 that are merged later
    assert found[0].patches is not None
    assert found[0].patches[:2, :4].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_tiles_that_only_fill_up_are_left_out():
    model, inputs = reader("idefics3")
    tiles = torch.cat([inputs["pixel_values"], torch.zeros(1, 1, 3, SIZE, SIZE, dtype=torch.float64)], 1)
    with Float64():
        out = Attributor(model).attribute({**inputs, "pixel_values": tiles})
        plain = Attributor(model).attribute(inputs)
    assert len(out.images) == 2
    for one, other in zip(out.images, plain.images, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.patches, other.patches)


# Prompts


def test_texts_and_chats_go_through_the_processor(llava):
    asked = [{"type": "text", "text": "what is this ?"}]
    given = llava.attribute([{"role": "user", "content": [{"type": "image", "image": photo()}, *asked]}])
    beside = llava.attribute([{"role": "user", "content": [{"type": "image"}, *asked]}], images=photo())
    text = llava.attribute("USER : <image> what is this ? ASSISTANT :", images=[photo()])
    prepared = llava.processor(
        text=["USER : <image> what is this ? ASSISTANT :"], images=[photo()], return_tensors="pt"
    )
    for one in (beside, text, llava.attribute(prepared)):
        assert one.tokens == given.tokens
        assert torch.equal(one.relevance, given.relevance)
        assert torch.equal(one.pixels, given.pixels)
    assert given.tokens[0][1:4] == [" :", "<image>", "<image>"]


def test_several_prompts_have_their_own_images(llava):
    out = llava.attribute([PROMPT, "<image> cat"], images=[photo(0), photo(1)], target=["cat", "dog"])
    assert out.pixels.shape == (2, SIZE, SIZE)
    single = llava.attribute("<image> cat", images=photo(1), target="dog")
    assert torch.equal(out[1].relevance, single.relevance)
    assert torch.equal(out[1].pixels, single.pixels)
    assert out[1].explained == single.explained
    with pytest.raises(ValueError, match="2 prompts need a list with the images of each, got 1"):
        llava.attribute([PROMPT, PROMPT], images=[photo()])


def test_text_alone_is_explained_as_ever(llava):
    out = llava.attribute("what is this ?", target="cat")
    assert out.images == ()
    assert out.tokens[0] == ["what", " is", " this", " ?"]


def test_mistakes_are_said(llava):
    model, inputs = reader("llava")
    without_tokens = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": inputs["pixel_values"]}
    for explainer, given, says in (
        (llava, {"inputs": "what is this ?", "images": photo()}, "write '<image>' where it stands"),
        (llava, {"inputs": without_tokens}, "no place for its image"),
        (llava, {"inputs": "<image> what is this ?"}, "no image was given"),
        (llava, {"inputs": inputs, "images": photo()}, "hold the images already"),
        (lxt.load(model), {"inputs": PROMPT, "images": photo()}, "need the model's processor"),
        (lxt.load(model, llava.tokenizer), {"inputs": PROMPT, "images": photo()}, "need the model's processor"),
        (llava, {"inputs": [{"role": "user", "content": "what?"}], "images": photo()}, "no place in the messages"),
        (llava, {"inputs": [{"role": "user", "content": [{"type": "image"}] * 2}], "images": photo()}, "more image"),
        (llava, {"inputs": [1, 5, 6], "images": photo()}, "images go with a text"),
        (llava, {"inputs": photo()}, "images go with a text"),
        (llava, {"inputs": {**inputs, "pixel_values": [1]}}, "must be one float tensor"),
        (llava, {"inputs": {**inputs, "pixel_values": inputs["pixel_values"] * torch.inf}}, "NaN or inf"),
        (llava, {"inputs": inputs, "latents": "residual"}, "latents are read for text alone"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            explainer.attribute(**given)


def test_an_encoder_decoder_that_sees_is_refused():
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(), tf.BertConfig())
    with torch.device("meta"):
        model = tf.VisionEncoderDecoderModel(config)
    with pytest.raises(ValueError, match="monkey_patch"):
        lxt.load(model)


def test_pixels_behind_no_grad_are_said():
    model, inputs = reader("llava")
    tower = model.model.vision_tower
    forward = tower.forward
    tower.forward = torch.no_grad()(lambda *args, **kwargs: forward(*args, **kwargs))
    with pytest.raises(ValueError, match="don't depend on its pixel values"):
        Attributor(model).attribute(inputs)


def test_nothing_is_left_behind(llava):
    model, inputs = reader("gemma3")
    before = state(model)
    with Float64():
        out = Attributor(model).attribute(inputs)
        assert state(model) == before
        out.check()
        assert state(model) == before

        def wrong(logits):
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            Attributor(model).attribute(inputs, wrong)
    assert state(model) == before


def test_the_file_has_it_all(llava, tmp_path):
    out = llava.attribute([PROMPT, "<image> cat"], images=[photo(0), photo(1)])
    out.save(tmp_path / "out.safetensors")
    loaded = lxt.Attribution.load(tmp_path / "out.safetensors")
    assert torch.equal(loaded.relevance, out.relevance)
    assert torch.equal(loaded.pixels, out.pixels)
    assert loaded.tokens == out.tokens


def test_a_folder_brings_its_processor(llava, tmp_path):
    llava.model.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    out = lxt.load(tmp_path).attribute(PROMPT, images=photo(), target="cat")
    expected = llava.attribute(PROMPT, images=photo(), target="cat")
    torch.testing.assert_close(out.relevance, expected.relevance)
    torch.testing.assert_close(out.pixels, expected.pixels)


def test_a_processor_that_cannot_be_made_leaves_text(llava, tmp_path):
    llava.model.save_pretrained(tmp_path)
    llava.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="images can't be prepared, only text can be explained"):
        explainer = lxt.load(tmp_path)
    assert explainer.attribute("what is this ?", target="cat").tokens[0][0] == "what"
    with pytest.raises(ValueError, match="need the model's processor"):
        explainer.attribute(PROMPT, images=photo())
