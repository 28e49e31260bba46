"""Which part of an image made a classifier say that? Planted data, so that the answer is known.

1. Every image shows a coloured disc and a dark square on a noisy ground; its class is the disc's colour.
2. A tiny vision transformer learns this from scratch, in less than a minute on one core.
3. Its decisions on new images are explained. How much of the positive relevance is on the disc, how much on the square,
   and how much would be there if relevance fell anywhere?
4. Written: image.png and image.html, the first three images with their maps.

In an earlier version the square had a colour too, never the disc's. The model then decided by the square, which is as
good: relevance was on the square, and the data were to blame. Planted answers hold only where there is no other way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import lxt

SIZE, PATCH, RADIUS = 48, 6, 7
COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.25), "blue": (0.15, 0.3, 0.85)}


def draw(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [count, 3, SIZE, SIZE] in -1 to 1, the disc's colour [count], and where disc and square are."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    label = torch.randint(3, (count,), generator=generator)
    grey = 0.1 + 0.25 * torch.rand(count, 1, 1, 1, generator=generator)
    # one shape in the left half and one in the right, in random order and at random heights
    low, high = RADIUS + 1, SIZE - RADIUS - 1
    x = torch.stack([torch.randint(low, SIZE // 2 - RADIUS + 1, (count,), generator=generator) for _ in range(2)], 1)
    x[:, 1] += SIZE // 2 - 1
    x = torch.where(torch.rand(count, 1, generator=generator) < 0.5, x, x.flip(1))
    y = torch.randint(low, high, (count, 2), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    dy, dx = rows - y[..., None, None], columns - x[..., None, None]
    disc = dy[:, 0] ** 2 + dx[:, 0] ** 2 <= RADIUS**2
    square = (dy[:, 1].abs() < RADIUS - 0.5) & (dx[:, 1].abs() < RADIUS - 0.5)
    ground = 0.55 + 0.12 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    images = torch.where(square[:, None], grey, ground)
    images = torch.where(disc[:, None], palette[label][..., None, None], images)
    images = (images + 0.03 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return 2 * images - 1, label, disc, square


def train(steps: int) -> ViTForImageClassification:
    """The model after that many batches."""
    torch.manual_seed(0)
    names = dict(enumerate(COLOURS))
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.1,  # learns in half the steps of the default 0.02
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for step in range(steps):
        images, labels, *_ = draw(64, seed=1000 + step)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
    return model.eval()


def on_shape(relevance: Tensor, shape: Tensor) -> float:
    """The share of positive patch relevance in patches that touch the shape, averaged over the images."""
    positive = relevance.clamp(min=0)
    touched = torch.nn.functional.max_pool2d(shape.float(), PATCH)
    return ((positive * touched).sum((1, 2)) / positive.sum((1, 2))).mean().item()


def main(folder: str = "out", steps: str = "200") -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a model is slower on several
    model = train(int(steps))

    images, labels, disc, square = draw(200, seed=1)
    with torch.no_grad():
        right = (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()
    print(f"\n{right:.0%} of 200 new images are classified right. Positive relevance on patches with")
    print(f"{'':24}{'disc':>8}{'square':>8}")
    gamma = lxt.ATTN_LRP.but(linear=lxt.Gamma(0.25), name="attnlrp, gamma 0.25")
    for rules in (lxt.ATTN_LRP, gamma, lxt.GRADIENT):
        found = lxt.load(model, rules=rules).attribute(images, target=labels.tolist()).patches
        print(f"{rules.name:24}{on_shape(found, disc):8.0%}{on_shape(found, square):8.0%}")
    anywhere = torch.ones(len(images), SIZE // PATCH, SIZE // PATCH)
    print(f"{'anywhere':24}{on_shape(anywhere, disc):8.0%}{on_shape(anywhere, square):8.0%}\n")

    attribution = lxt.load(model).attribute(images[:3])
    attribution[0].show()
    attribution.plot(out / "image.png")
    attribution.to_html(out / "image.html")
    print(f"\nwritten: {out / 'image.png'}, {out / 'image.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
