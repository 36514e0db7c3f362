"""What a training minimises and reports, by the problem type of its truths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hhdeploy.adapters.config import CLASSES, LABELS, ProblemType
from hhdeploy.adapters.format import Head
from hhdeploy.adapters.labels import mean_absolute_error, mean_average_precision

Score = float | None


@dataclass(frozen=True)
class Objective:
    """Cross-entropy of classes, binary cross-entropy of labels, squared error of values.

    Values are trained standardised, whatever their unit; the head that is written gives them in
    their own (`restored`).

    Attributes:
        problem_type: of the truths.
        center, spread: mean and standard deviation of each value over the training images; empty
            of classes and labels.
    """

    problem_type: ProblemType
    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    @classmethod
    def of(cls, problem_type: ProblemType, truths: Tensor) -> Objective:
        """For training images of these truths, int64 [n] of classes, else float32 [n, names]."""
        if problem_type in (CLASSES, LABELS):
            return cls(problem_type)
        wide = truths.double()
        spread = wide.std(dim=0, correction=0)
        spread[spread == 0.0] = 1.0  # a value that never changes
        return cls(problem_type, tuple(wide.mean(dim=0).tolist()), tuple(spread.tolist()))

    @property
    def name(self) -> str:
        """Of the loss, for the record."""
        if self.problem_type == CLASSES:
            return "cross-entropy"
        labels = self.problem_type == LABELS
        return "binary cross-entropy" if labels else "squared error of standardised values"

    def loss(self, outputs: Tensor, truths: Tensor, reduction: str = "mean") -> Tensor:
        """Of a batch; ``sum`` adds the images' own losses up, ``mean`` is their mean."""
        if self.problem_type == CLASSES:
            return functional.cross_entropy(outputs, truths, reduction=reduction)
        if self.problem_type == LABELS:
            each = functional.binary_cross_entropy_with_logits(outputs, truths, reduction="none")
        else:
            each = (outputs - self._standardised(truths)) ** 2
        own = each.mean(dim=1)
        return own.sum() if reduction == "sum" else own.mean()

    def scores(self, outputs: Tensor, truths: Tensor) -> tuple[Score, Score, Score]:
        """(top-1 share, mAP, MAE in the values' unit) of all images; the one that is asked."""
        if self.problem_type == CLASSES:
            right = int((outputs.argmax(dim=1) == truths).sum())
            return right / len(truths), None, None
        found, true = outputs.double().cpu().numpy(), truths.double().cpu().numpy()
        if self.problem_type == LABELS:
            return None, mean_average_precision(found, true), None
        return None, None, mean_absolute_error(found * self.spread + self.center, true)

    def restored(self, head: Head) -> Head:
        """The head whose outputs are in the values' own unit."""
        if not self.center:
            return head
        center, spread = np.asarray(self.center), np.asarray(self.spread)
        weight = head.weight.astype(np.float64) * spread[:, None]
        bias = head.bias.astype(np.float64) * spread + center
        return replace(head, weight=weight.astype(np.float32), bias=bias.astype(np.float32))

    def _standardised(self, truths: Tensor) -> Tensor:
        center = torch.tensor(self.center, dtype=torch.float64, device=truths.device)
        spread = torch.tensor(self.spread, dtype=torch.float64, device=truths.device)
        return ((truths.double() - center) / spread).float()
