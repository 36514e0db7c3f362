"""Models of transformers: loading them (`models`), and their image processors (`processors`)."""

from hhdeploy.backbones.transformers.models import load_transformers, with_classifier
from hhdeploy.backbones.transformers.processors import from_image_processor, image_processor

__all__ = ["from_image_processor", "image_processor", "load_transformers", "with_classifier"]
