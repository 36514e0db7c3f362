"""Models of transformers: loading them (`models`), and their image processors (`processors`)."""

from hhdeploy.backbones.transformers.models import load_transformers, with_classifier
from hhdeploy.backbones.transformers.processors import stated_transform

__all__ = ["load_transformers", "stated_transform", "with_classifier"]
