"""The training-time model and the training recipe. Needs torch and timm."""

from hhdeploy.training.attach import attach, detach, extract, save

__all__ = ["attach", "detach", "extract", "save"]
