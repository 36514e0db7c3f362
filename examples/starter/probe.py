"""Linear probing: what a task reaches when only a classifier is trained, no adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import backbone
import torch
from frozen import features, fit_linear
from parts import Part
from recipes import SEED, WEIGHT_DECAY, Recipe
from torch import nn
from torch.nn import functional

from hhdeploy.training.loop import learning_rate as scheduled

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)


def train_head(
    found: torch.Tensor, labels: torch.Tensor, classes: int, recipe: Recipe, learning_rate: float
) -> nn.Linear:
    """Train only a classifier on frozen features, as ``hhdeploy train`` trains an adapter."""
    torch.manual_seed(SEED)
    head = nn.Linear(found.shape[1], classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    steps, step = -(-len(found) // recipe.batch_size), 0
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(found)).split(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = scheduled(
                    step,
                    peak=learning_rate,
                    warmup_steps=max(1, recipe.epochs // 10) * steps,
                    total_steps=recipe.epochs * steps,
                )
            optimizer.zero_grad()
            functional.cross_entropy(head(found[chosen]), labels[chosen]).backward()
            optimizer.step()
            step += 1
    return head


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, in percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 in percent on the test part, and what validation chose."""

    top1: float
    learning_rate: float
    top1_converged: float
    decay: float


def linear_probe(model: nn.Module, parts: dict[str, Part], recipe: Recipe) -> ProbeResult:
    """Probe ``model`` linearly, twice: with the adapters' recipe, and fitted to convergence.

    The learning rate, and the penalty of the converged fit, are those with the best top-1 on the
    validation part. The test part is looked at once, with the chosen ones.
    """
    found = {key: features(model, backbone.resize(part.images)) for key, part in parts.items()}
    labels = {key: torch.from_numpy(part.labels) for key, part in parts.items()}
    classes = int(labels["train"].max()) + 1

    def trained(rate: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return train_head(found["train"], labels["train"], classes, recipe, rate)

    def converged(decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = fit_linear(found["train"], labels["train"], classes, decay)
        return lambda inputs: inputs @ weight.T + bias

    def best(
        fit: Callable[[float], Callable[[torch.Tensor], torch.Tensor]], options: Sequence[float]
    ) -> tuple[float, float]:
        """Return the chosen option and its top-1 on the test part."""
        heads = {option: fit(option) for option in options}
        scores = {option: top1(heads[option](found["val"]), labels["val"]) for option in options}
        chosen = max(options, key=lambda option: scores[option])
        return chosen, top1(heads[chosen](found["test"]), labels["test"])

    rate, probe = best(trained, LEARNING_RATES)
    decay, exact = best(converged, DECAYS)
    return ProbeResult(probe, rate, exact, decay)
