"""The three ways to fit a task: a linear probe, LoRA, HTA. All see the same training images.

HTA is trained with ``hhdeploy train`` at one learning rate that was never tuned. The baselines get
more help: the probe its best penalty and LoRA its best learning rate, found on a fifth of the
training images that was held out for it; then both are fitted again on all of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from shared import fit_linear
from weights import MODEL

from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.files.folders import list_classes
from hhdeploy.preprocess import Preprocess, open_image
from hhdeploy.training.data import BatchSource, PixelCache, read_image_folder
from hhdeploy.training.loop import Trainer
from hhdeploy.training.recipe import replace_classifier
from hhdeploy.training.settings import TrainSettings

SEED = 0
BATCH = 250
HELD_OUT = 0.2
PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LORA_LEARNING_RATES = (1e-3, 5e-3, 1e-2)
# As many parameters as HTA with r = 1 on q, k, v and proj of width d: 4 * 5 d a block.
# Rank 3 on the fused qkv is 3 * (d + 3 d), rank 4 on proj is 4 * (d + d).
LORA: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 3,
    "rank_pattern": {"attn.proj": 4},
    "alpha_pattern": {"attn.proj": 4},
    "target_modules": r".*\.attn\.(qkv|proj)",
    "modules_to_save": ["head"],
}


@dataclass(frozen=True)
class Setup:
    """What all methods share: the frozen weights, the image size, the recipe, CPU threads."""

    checkpoint: Path
    size: int
    epochs: int
    threads: int

    @property
    def backbone(self) -> BackboneSpec:
        """How the frozen model is loaded."""
        return BackboneSpec(MODEL, {"img_size": self.size}, self.checkpoint)

    def model_options(self) -> list[str]:
        """The options of ``hhdeploy`` that say the same."""
        arguments = f'{{"img_size": {self.size}}}'
        return [
            "--model", MODEL, "--model-args", arguments, "--checkpoint", str(self.checkpoint)
        ]  # fmt: skip

    def recipe(self, data: Path, learning_rate: float, epochs: int) -> TrainSettings:
        """The options of ``hhdeploy train`` that HTA and LoRA share; no augmentation."""
        return TrainSettings(
            model=MODEL,
            data=data,
            val_fraction=0.0,
            epochs=epochs,
            batch_size=32,
            lr=learning_rate,
            seed=SEED,
            augment=False,
            threads=self.threads,
        )


def hhdeploy(*arguments: str | Path) -> None:
    """Run one ``hhdeploy`` command."""
    command = str(Path(sys.executable).with_name("hhdeploy"))
    print("$ hhdeploy", *arguments, flush=True)
    subprocess.run([command, *map(str, arguments)], check=True)


def train_hta(setup: Setup, data: Path, out: Path) -> None:
    """Train an HTA adapter: additive, r = 1, on q, k, v and proj. Goes on where it stopped."""
    recipe = setup.recipe(data, 5e-3, setup.epochs)
    unfinished = out.with_name(f"{out.name}.training") / "state.json"
    hhdeploy(
        "train", *setup.model_options(), "--data", data, "--val-fraction", "0",
        "--epochs", str(recipe.epochs), "--batch-size", str(recipe.batch_size),
        "--lr", str(recipe.lr), "--seed", str(SEED), "--no-augment", "--device", "cpu",
        "--threads", str(setup.threads), *(["--resume"] if unfinished.exists() else []), out,
    )  # fmt: skip


def train_lora(setup: Setup, data: Path, out: Path) -> dict[str, Any]:
    """Train LoRA with PEFT and import it; return the search for its learning rate."""
    found = _search(setup, data, out.with_name(f"{out.name}.search.json"))
    best = max(LORA_LEARNING_RATES, key=lambda rate: found[f"{rate:g}"])
    model, _ = _fit_lora(setup, setup.recipe(data, best, setup.epochs))
    peft = out.with_name(f"{out.name}.peft")
    shutil.rmtree(peft, ignore_errors=True)
    model.save_pretrained(str(peft))
    names = [part for name in list_classes(data).paths for part in ("--class-name", name)]
    hhdeploy("adapter", "import", *setup.model_options(), *names, "--overwrite", peft, out)
    return {"learning_rate": best, "held_out_top1": found}


def _search(setup: Setup, data: Path, file: Path) -> dict[str, float]:
    """Held-out top-1 by learning rate, after half the epochs; kept in ``file`` as it grows."""
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for rate in LORA_LEARNING_RATES:
        if f"{rate:g}" not in found:
            recipe = replace(setup.recipe(data, rate, setup.epochs // 2), val_fraction=HELD_OUT)
            found[f"{rate:g}"] = _fit_lora(setup, recipe)[1] or 0.0
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
    return found


def _fit_lora(setup: Setup, recipe: TrainSettings) -> tuple[Any, float | None]:
    """Train LoRA with the loop that trains HTA; return PEFT's model and the held-out top-1."""
    folder = read_image_folder(recipe.data, None, recipe.val_fraction, SEED)
    backbone = load_backbone(setup.backbone)
    classes = len(folder.class_names)
    replace_classifier(backbone.model, backbone.facts.classifier, classes, seed=SEED)
    torch.manual_seed(SEED)
    model = get_peft_model(backbone.model, LoraConfig(**LORA))
    cache = PixelCache(1 << 30)
    preprocess = backbone.facts.preprocess
    with BatchSource(preprocess, batch_size=recipe.batch_size, cache=cache) as batches:
        trainer = Trainer(model, recipe, folder, batches, torch.device("cpu"))
        for epoch in range(1, recipe.epochs + 1):
            report = trainer.run_epoch(epoch, lambda step: None)
            print(f"LoRA, lr {recipe.lr:g}, epoch {epoch}: loss {report.loss:.4f}", flush=True)
    return model, report.val_top1


def load_folder(folder: Path, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Read FOLDER/CLASS/image: float32 [n, 3, H, W], normalised, and int64 [n]."""
    classes = list_classes(folder).paths
    images = [preprocess(open_image(path)) for paths in classes.values() for path in paths]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    return np.stack(images), labels


@torch.no_grad()
def _features(model: Any, images: np.ndarray) -> torch.Tensor:
    """What the classifier sees, float32 [n, width]."""
    parts = torch.split(torch.from_numpy(images), BATCH)
    return torch.cat(
        [model.forward_head(model.forward_features(x), pre_logits=True) for x in parts]
    )


def linear_probe(setup: Setup, data: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit a classifier on frozen features (L-BFGS); return test logits, labels, the search."""
    backbone = load_backbone(setup.backbone)
    preprocess = backbone.facts.preprocess
    images, answers = load_folder(data / "train", preprocess)
    test_images, test_labels = load_folder(data / "test", preprocess)
    found, labels = _features(backbone.model, images), torch.from_numpy(answers)
    classes = int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    held, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]

    def right(penalty: float) -> float:
        weight, bias = fit_linear(found[kept], labels[kept], classes, penalty)
        answers = (found[held] @ weight.T + bias).argmax(1)
        return float((answers == labels[held]).float().mean())

    scores = {f"{penalty:g}": right(penalty) for penalty in PENALTIES}
    best = max(PENALTIES, key=lambda penalty: scores[f"{penalty:g}"])
    weight, bias = fit_linear(found, labels, classes, best)
    logits = _features(backbone.model, test_images) @ weight.T + bias
    return logits.numpy(), test_labels, {"penalty": best, "held_out_top1": scores}
