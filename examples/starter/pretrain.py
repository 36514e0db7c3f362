"""Pre-train the starter backbone on one CPU thread (about half an hour), without labels.

Self-supervised, on the training splits of digits, fashion, emoji and faces. A step shows the
encoder two augmented views of every image, each with 24 of its 64 patches. Two losses are added:

* masked autoencoding: a small decoder predicts the pixels of the hidden patches (He et al. 2022);
* contrast: the class tokens of two views of one image find each other among those of the batch
  (NT-Xent, Chen et al. 2020). It shapes the class token, which the masked loss leaves untrained.

Only then are labels used: the classifier is a linear one, fitted on frozen features of the
Fashion-MNIST training split, so that the bare backbone has a meaningful head.

Every step seeds its own random numbers, so that a run that was stopped and started again ends in
the weights of an uninterrupted one. Run ``python examples/starter/pretrain.py``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import backbone
import numpy as np
import torch
from augment import random_views
from fetch_data import CACHE, load_task
from frozen import features, fit_linear
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

SEED = 2410
STEPS = 2000
BATCH = 96
LEARNING_RATE = 1.5e-3
WARMUP = 40
WEIGHT_DECAY = 0.05
VISIBLE = 24
PATCH = 4
PATCHES = (backbone.SIZE // PATCH) ** 2
CONTRAST_WEIGHT = 0.1
TEMPERATURE = 0.2
SAVE_EVERY = 100
HEAD_IMAGES = 10_000
# Share of each task in a batch: the small sets are shown more often than their size says.
SHARES = {"digits": 0.2, "fashion": 0.6, "emoji": 0.18, "faces": 0.02}
SUMMARY = (
    "self-supervised (masked autoencoding + contrast of class tokens) on the training images of "
    "digits, fashion, emoji and faces without labels; linear classifier fitted on 10,000 labelled "
    "Fashion-MNIST training images with the backbone frozen"
)


class Learner(nn.Module):
    """The backbone with the parts that only pre-training needs: decoder and projection."""

    def __init__(self) -> None:
        super().__init__()
        width, narrow = backbone.MODEL_ARGS["embed_dim"], 64
        self.encoder = backbone.create(0)
        self.narrow = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.randn(1, 1, narrow) * 0.02)
        self.decoder_position = nn.Parameter(torch.randn(1, 1 + PATCHES, narrow) * 0.02)
        self.decoder = nn.Sequential(
            *(Block(narrow, 4, mlp_ratio=2, qkv_bias=True) for _ in range(2)), nn.LayerNorm(narrow)
        )
        self.pixels = nn.Linear(narrow, 3 * PATCH * PATCH)
        self.projection = nn.Sequential(
            nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64)
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a random ``VISIBLE`` of the patches.

        Returns tokens [n, 1 + VISIBLE, width], class token first, and the patch numbers
        [n, VISIBLE].
        """
        vit: Any = self.encoder
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        numbers = torch.rand(len(images), PATCHES).argsort(1)[:, :VISIBLE]
        seen = patches.gather(1, numbers[..., None].expand(-1, -1, patches.shape[-1]))
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first, seen], 1))), numbers

    def decode(self, tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Predict the pixels of all patches, [n, PATCHES, 3 * PATCH * PATCH]."""
        tokens = self.narrow(tokens)
        where = numbers[..., None].expand(-1, -1, tokens.shape[-1])
        hidden = self.mask_token.expand(len(tokens), PATCHES, -1)
        full = torch.cat([tokens[:, :1], hidden.scatter(1, where, tokens[:, 1:])], 1)
        predicted: torch.Tensor = self.pixels(self.decoder(full + self.decoder_position))
        return predicted[:, 1:]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked and the contrastive loss of two views, stacked as [2 n, 3, 32, 32]."""
        tokens, numbers = self.encode(images)
        hidden = torch.ones(len(images), PATCHES).scatter(1, numbers, 0.0)
        error = (self.decode(tokens, numbers) - _patches(images)).square().mean(-1)
        masked = (error * hidden).sum() / hidden.sum()
        return masked, _contrast(self.projection(tokens[:, 0]))


def _patches(images: torch.Tensor) -> torch.Tensor:
    """Cut [n, 3, 32, 32] into [n, PATCHES, 3 * PATCH * PATCH]."""
    grid = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return grid.permute(0, 2, 3, 1, 4, 5).reshape(len(images), PATCHES, -1)


def _contrast(projected: torch.Tensor) -> torch.Tensor:
    """NT-Xent: row i and row i + n of [2 n, width] are two views of one image."""
    unit = functional.normalize(projected, dim=1)
    alike = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-math.inf)
    n = len(unit) // 2
    return functional.cross_entropy(alike, torch.arange(2 * n).roll(n))


def _pool(cache: Path) -> tuple[np.ndarray, torch.Tensor]:
    """Return all training images, resized, and the probability to draw each."""
    images = {name: backbone.resize(load_task(cache, name).train_images) for name in SHARES}
    sizes = {name: len(array) for name, array in images.items()}
    chance = [np.full(sizes[name], share / sizes[name]) for name, share in SHARES.items()]
    return np.concatenate(list(images.values())), torch.from_numpy(np.concatenate(chance))


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to one hundredth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * cosine


def train(cache: Path, steps: int, checkpoint: Path) -> nn.Module:
    """Train for ``steps``, going on from ``checkpoint`` when it exists; return the encoder."""
    torch.manual_seed(SEED)
    learner = Learner().train()
    optimizer = torch.optim.AdamW(
        learner.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    start = 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        learner.load_state_dict(stored["learner"])
        optimizer.load_state_dict(stored["optimizer"])
        start = int(stored["step"])
    pool, chance = _pool(cache)
    columns = (
        TextColumn("pre-training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("", total=steps, completed=start, losses="")
        for step in range(start, steps):
            torch.manual_seed(SEED * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps)
            images = backbone.normalize(pool[torch.multinomial(chance, BATCH).numpy()])
            masked, contrast = learner(torch.cat([random_views(images), random_views(images)]))
            optimizer.zero_grad()
            (masked + CONTRAST_WEIGHT * contrast).backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            losses = f"masked {masked.item():.3f} contrast {contrast.item():.3f}"
            progress.update(bar, advance=1, losses=losses)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                progress.console.print(f"step {step + 1}: {losses}", highlight=False)
                _save_state(learner, optimizer, step + 1, checkpoint)
    return learner.encoder


def _save_state(
    learner: nn.Module, optimizer: torch.optim.Optimizer, step: int, checkpoint: Path
) -> None:
    """Write what ``train`` needs to go on, atomically."""
    partial = checkpoint.with_suffix(".partial")
    state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, partial)
    partial.replace(checkpoint)


def fit_head(encoder: nn.Module, cache: Path) -> tuple[nn.Module, list[str]]:
    """Return a model with ``encoder``'s weights and a linear Fashion-MNIST classifier."""
    task = load_task(cache, "fashion")
    chosen = np.random.default_rng(SEED).permutation(len(task.train_labels))[:HEAD_IMAGES]
    names = [str(name) for name in task.class_names]
    model = backbone.create(len(names))
    model.load_state_dict(encoder.state_dict(), strict=False)
    found = features(model, backbone.resize(task.train_images[chosen]))
    weight, bias = fit_linear(found, torch.from_numpy(task.train_labels[chosen]), len(names))
    model.load_state_dict({"head.weight": weight, "head.bias": bias}, strict=False)
    return model, names


def main() -> None:
    """Train, or go on training, and write the backbone."""
    parser = argparse.ArgumentParser(description="Pre-train the starter backbone.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory of the tasks' .npz")
    parser.add_argument("--out", type=Path, default=backbone.HERE / "backbone.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS, help="2000 take about half an hour")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = train(options.cache, options.steps, options.cache / f"pretrain-{options.steps}.pt")
    model, names = fit_head(encoder, options.cache)
    backbone.save(model, options.out, class_names=names, pretraining=SUMMARY)


if __name__ == "__main__":
    main()
