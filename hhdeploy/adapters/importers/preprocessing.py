"""How images become inputs, as the source of an adapter says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

PROCESSOR_FILE = "preprocessor_config.json"


def stated_preprocess(directory: Path, backbone: Backbone) -> Preprocess | None:
    """The transform of transformers' image processor beside an adapter; None without its file.

    Raises:
        AdapterError: a file that cannot be read, or steps that cannot be expressed.
    """
    from hhdeploy.backbones.transformers import from_image_processor

    file = directory / PROCESSOR_FILE
    if not file.is_file():
        return None
    advice = "Say how images become inputs with `preprocess`."
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}")
        return from_image_processor(content, backbone.facts.preprocess.input_size)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise AdapterError(f"{file} cannot be read: {error}. {advice}") from error
    except BackboneError as error:
        raise AdapterError(f"{file}: {error} {advice}") from error
