"""Image classifiers explained: pixels and patches conserve, the auditor agrees, and whatever is given is understood."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equations import Float64
from PIL import Image
from relevances import state
from vision import CLASSIFIERS, GRIDS, LABELS, SIZE, classifier, image_processor, images

import lxt
from lxt.attributor import Attributor
from lxt.imagerelevance import ImageRelevance

EXACT = 1e-9  # float64; relevance of hundreds of pixels cancels, and what is compared with is of the order of 1
GAMMA = lxt.ATTN_LRP.but(linear=lxt.Gamma(0.25), attention="value_only")

each = pytest.mark.parametrize("name", CLASSIFIERS)


def photo(seed: int = 0, mode: str = "RGB") -> Image.Image:
    noise = np.random.RandomState(seed).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


# The numbers


@each
@pytest.mark.parametrize("rules", [lxt.CP_LRP, GAMMA], ids=["cp", "gamma"])
def test_pixels_and_patches_sum_to_the_logit(name, rules):
    model = classifier(name)
    with Float64():
        out = Attributor(model, rules=rules).attribute(images(), target=1)
        logits = model(pixel_values=images()).logits[:, 1]
    assert out.pixels.shape == (2, SIZE, SIZE)
    assert out.patches.shape == (2, *GRIDS.get(name, (4, 4)))
    for sums in (out.pixels.sum((1, 2)), out.patches.sum((1, 2)), out.total):
        torch.testing.assert_close(sums, logits.detach(), rtol=EXACT, atol=EXACT)
    assert [explained.value for explained in out.explained] == pytest.approx(logits.tolist(), rel=EXACT)


@each
def test_the_auditor_agrees_and_the_logits_are_unchanged(name):
    with Float64():
        report = Attributor(classifier(name)).attribute(images()).check()
    assert report.ok
    assert report.forward_difference == 0
    assert report.audit_note == ""
    assert report.audit_difference is not None
    assert report.audit_difference < EXACT


def test_a_biased_convolution_keeps_its_share_from_the_pixels_alone():
    """Patches are read behind the convolution: they have its bias, the pixels don't."""
    model = classifier()
    model.vit.embeddings.patch_embeddings.projection.bias.data.normal_()
    with Float64():
        out = Attributor(model, rules="cp").attribute(images())
        assert out.check().leaks[0].amount == pytest.approx(float(out.patches.sum() - out.pixels.sum()), rel=1e-6)
    values = torch.tensor([explained.value for explained in out.explained], dtype=torch.float64)
    torch.testing.assert_close(out.patches.sum((1, 2)), values, rtol=EXACT, atol=EXACT)
    assert not torch.allclose(out.pixels.sum((1, 2)), values, rtol=1e-3)


def test_equals_gradient_times_input_by_hand():
    model, pixels = classifier(), images().requires_grad_()
    with Float64(), lxt.monkey_patch(model):
        model(pixel_values=pixels).logits[:, 2].sum().backward()
    with Float64():
        out = Attributor(model).attribute(images(), target="car")
    torch.testing.assert_close(out.pixels, (pixels * pixels.grad).sum(1).detach(), rtol=EXACT, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_a_batch_gives_what_single_calls_give(name):
    explainer, targets = Attributor(classifier(name)), [0, None, "dog"]
    with Float64():
        out = explainer.attribute(images(3), targets)
        parted = explainer.attribute(images(3), targets, batch_size=2)
        for row, target in enumerate(targets):
            single = explainer.attribute(images(3)[row], target)
            torch.testing.assert_close(out[row].pixels, single.pixels, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(out[row].patches, single.patches, rtol=1e-6, atol=1e-9)
            assert out[row].explained[0].label == single.explained[0].label
    torch.testing.assert_close(out.pixels, parted.pixels, rtol=1e-6, atol=1e-9)
    assert [image.row for image in parted.images] == [0, 1, 2]


def test_a_contrast_is_the_difference():
    explainer = Attributor(classifier())
    with Float64():
        cat, dog = (explainer.attribute(images(), name).pixels for name in ("tabby cat", "dog"))
        both = explainer.attribute(images(), "tabby cat", contrast="dog")
    torch.testing.assert_close(both.pixels, cat - dog, rtol=1e-6, atol=1e-9)
    assert both.explained[0].label == "'tabby cat' − 'dog'"
    assert both.explained[0].position is None


def test_tokens_are_patches_row_by_row():
    with Float64():
        out = Attributor(classifier()).attribute(images())
    assert out.tokens[0][:5] == ["0,0", "0,1", "0,2", "0,3", "1,0"]
    assert torch.equal(out.relevance.view(2, 4, 4), out.patches)
    assert out.predictions[0].token in LABELS
    assert out.token_ids is None
    assert len(out[1].images) == 1


def test_a_model_without_a_convolution_has_its_image_as_one_token(monkeypatch):
    model = classifier()
    monkeypatch.setattr("lxt.imagepasses._CONVOLUTIONS", ())
    with Float64():
        out = Attributor(model, rules="cp").attribute(images())
    assert out.tokens == [["image"], ["image"]]
    torch.testing.assert_close(out.relevance[:, 0], out.pixels.sum((1, 2)), rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="there are no patches"):
        print(out.patches)


# What is accepted


def test_a_picture_is_what_its_processor_makes_of_it(tmp_path):
    model, processor = classifier(), image_processor()
    explainer = lxt.load(model, processor)
    photo().save(tmp_path / "photo.png")
    pixels = processor(images=photo(), return_tensors="pt")["pixel_values"]
    expected = explainer.attribute(pixels).pixels
    given = [photo(), [photo()], np.asarray(photo()), np.asarray(photo())[None], tmp_path / "photo.png", pixels[0]]
    for one in (*given, {"pixel_values": pixels}, processor(images=photo(), return_tensors="pt")):
        assert torch.equal(explainer.attribute(one).pixels, expected)
    shown = explainer.attribute(photo()).images[0].picture
    resized = np.asarray(photo().resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(shown.numpy().astype(int) - resized).max() <= 1


def test_channels_are_made_three():
    explainer = lxt.load(classifier(), image_processor())
    grey = explainer.attribute(photo(mode="L")).pixels
    assert torch.equal(explainer.attribute(photo(mode="L").convert("RGB")).pixels, grey)


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        ("a cat", TypeError, "got the text 'a cat' where ViTForImageClassification needs an image"),
        (["a cat"], TypeError, r"pathlib\.Path"),
        (torch.randn(2, 1, SIZE, SIZE), ValueError, r"have 1 channels.*takes \[batch, 3, height, width\]"),
        (torch.randn(2, SIZE, SIZE, 3), ValueError, "movedim"),
        (torch.randn(SIZE, SIZE), ValueError, r"\[channel, height, width\]"),
        (torch.full((1, 3, SIZE, SIZE), torch.nan), ValueError, "NaN or inf"),
        (torch.zeros(0, 3, SIZE, SIZE), ValueError, "no image"),
        (torch.randn(1, 3, 8, 8), ValueError, "doesn't match model"),
        (np.zeros((SIZE, SIZE)), ValueError, "three dimensions"),
        (np.zeros((SIZE, SIZE, 4), np.uint8), ValueError, "has 4 channels"),
        (np.zeros((3, SIZE, SIZE), np.uint8), ValueError, r"channels first; .*image.transpose\(1, 2, 0\)"),
        ([], ValueError, "empty list"),
        (3, TypeError, "got int where"),
        ({"input_ids": 3}, TypeError, "'pixel_values'"),
        (Path("nowhere.png"), FileNotFoundError, "no image at"),
        ([torch.randn(3, 16, 16), torch.randn(3, 16, 8)], ValueError, "different sizes, 16×16, 16×8"),
    ],
)
def test_what_is_no_image_is_said(inputs, error, says):
    with pytest.raises(error, match=says):
        lxt.load(classifier(), image_processor()).attribute(inputs)


def test_other_mistakes_are_said():
    explainer = lxt.load(classifier(), image_processor())
    with pytest.raises(ValueError, match="image processor, which scales"):
        lxt.load(classifier()).attribute(photo())
    with pytest.raises(ValueError, match="did you mean 'tabby cat'"):
        explainer.attribute(photo(), "tabby")
    with pytest.raises(ValueError, match="classes 0 to 2"):
        explainer.attribute(photo(), 3)
    with pytest.raises(TypeError, match="classifies images and reads no text"):
        explainer.attribute("what is this?", images=photo())
    with pytest.raises(ValueError, match="latents are read for text alone"):
        explainer.attribute(photo(), latents="residual")
    with pytest.raises(ValueError, match="batch_size"):
        explainer.attribute(photo(), batch_size=0)


def test_pillow_missing_names_the_extra(monkeypatch, tmp_path):
    explainer = lxt.load(classifier(), image_processor())
    photo().save(tmp_path / "photo.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"lxt\[vision\]"):
        explainer.attribute(tmp_path / "photo.png")


@pytest.mark.parametrize("given", [{"images": photo()}, {}], ids=["beside", "alone"])
def test_a_model_that_reads_only_takes_no_image(given):
    with pytest.raises(TypeError, match="reads text only and takes no images"):
        lxt.load("tiny").attribute("a cat" if given else photo(), **given)


@pytest.mark.parametrize("name", ["vit", "deit with teacher"])
def test_a_folder_brings_its_image_processor(name, tmp_path):
    model = classifier(name).float()
    model.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        explainer = lxt.load(tmp_path)
    if "requires the Torchvision library" in "".join(str(warning.message) for warning in warned):
        pytest.skip("this transformers makes image processors by name with torchvision only")
    out = explainer.attribute(photo(), "dog")
    torch.testing.assert_close(out.pixels, lxt.load(model, image_processor()).attribute(photo(), "dog").pixels)


# Afterwards


def test_nothing_is_left_behind_by_a_failure():
    model = classifier()
    before = state(model)

    def wrong(logits):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Attributor(model).attribute(images(), wrong)
    with pytest.raises(ValueError, match="difference is 0"):
        Attributor(model).attribute(images(), contrast=int(model(pixel_values=images()).logits[0].argmax()))
    assert state(model) == before


def test_the_file_has_it_all(tmp_path):
    out = lxt.load(classifier(), image_processor()).attribute([photo(0), photo(1)])
    out.save(tmp_path / "out.safetensors")
    loaded = lxt.Attribution.load(tmp_path / "out.safetensors")
    for name in ("pixels", "patches", "relevance"):
        assert torch.equal(getattr(loaded, name), getattr(out, name))
    for one, other in zip(loaded.images, out.images, strict=True):
        assert torch.equal(one.picture, other.picture)
        assert one.row == other.row
    assert repr(loaded) == repr(out)
    assert "2 images" in repr(out)
    assert repr(out.images[1]) == "ImageRelevance(row 1: pixels 16 × 16, patches 4 × 4, picture 16 × 16)"


def test_images_that_do_not_stack_are_taken_one_by_one():
    out = Attributor(classifier()).attribute(images())
    odd = ImageRelevance(0, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"out\.images\[i\]\.pixels"):
        print(replace(out, images=(odd, *out.images)).pixels)
    with pytest.raises(ValueError, match="2 dimensions"):
        ImageRelevance(0, torch.zeros(5))
    with pytest.raises(ValueError, match="aren't finite"):
        ImageRelevance(0, torch.full((2, 2), torch.inf))
    with pytest.raises(ValueError, match="saw no image"):
        print(lxt.load("tiny").attribute("My cats love").pixels)


# The example


def test_the_example_runs(tmp_path, capsys):
    path = Path(__file__).resolve().parent.parent / "examples" / "explain_image.py"
    spec = importlib.util.spec_from_file_location("explain_image", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tmp_path), steps="2")
    assert {file.name for file in tmp_path.iterdir()} == {"image.png", "image.html"}
    assert "anywhere" in capsys.readouterr().out
