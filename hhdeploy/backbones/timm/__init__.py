"""Models of timm: `models` loads them, `arrays` JAX's files, `geometry` says what is resampled."""

from hhdeploy.backbones.timm.models import (
    load_timm,
    named_as_timm_does,
    preprocess_of,
    resolved_name,
    transform_beside,
)

__all__ = [
    "load_timm",
    "named_as_timm_does",
    "preprocess_of",
    "resolved_name",
    "transform_beside",
]
