"""Whether the model that PEFT trained, as its configuration tells it, is the backbone.

Names that fit do not tell what a classifier reads: transformers' classifiers of CLIP and SigLIP
read other tokens than timm's models of the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.adapters.bases import same_model
from hhdeploy.backbones.converting import CLASSIFIERS, reads
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.errors import AdapterError

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


_HUB = re.compile(r"(hf[-_]hub:)?(timm/)?")


def other_name(config: Mapping[str, Any], facts: BackboneFacts) -> list[str]:
    """A line where the configuration names another model than the backbone.

    No more than that: with a checkpoint the same weights may come under many names, and a folder's
    says nothing.
    """
    stated = config.get("base_model_name_or_path")
    if not isinstance(stated, str) or not stated:
        return []
    own = facts.model.removeprefix("transformers:")
    if stated == own or same_model(_HUB.sub("", stated, count=1), own):
        return []
    return [
        f"the adapter says that it was trained on {stated} and is taken for one of {facts.model}: "
        "from now on it belongs to the weights that were given"
    ]


def check_reading(
    config: Mapping[str, Any], backbone: Backbone, file: Path, *, translated: bool
) -> list[str]:
    """Whether the adapter's own classifier reads of the backbone what it read in its training.

    Args:
        config: of PEFT.
        backbone: the model.
        file: for messages.
        translated: the names of the file are not the backbone's.

    Returns:
        A line where the class that was trained is not known.

    Raises:
        AdapterError: a class of transformers whose classifier reads other tokens.
    """
    if ":" in backbone.facts.model:
        return []  # not timm's: what computes is what was trained, by its very names
    trained = _class_of(config)
    found = reads(backbone.model)
    if trained is not None and trained in CLASSIFIERS:
        pool, normed, args = CLASSIFIERS[trained]
        if found != (pool, normed, False):
            raise AdapterError(
                f"{file}: the classifier was trained on {trained}, which reads "
                f"{_in_words(pool, normed, False)}; that of {backbone.facts.model} as loaded would "
                f"read {_in_words(*found)}. Pass `model_args={dict(args)}`, with a `checkpoint` of "
                f"transformers one that was saved as {trained}; or give transformers:DIR as the "
                "model."
            )
        return []
    if not translated:
        return []
    who = trained or "the model that was trained, which the configuration does not name,"
    return [
        f"what the classifier of {who} read is not known: assumed to be what that of "
        f"{backbone.facts.model} reads, {_in_words(*found)}"
    ]


def _class_of(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that PEFT wrapped, where the configuration says it."""
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, Mapping):
        return None
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    known = isinstance(name, str) and str(library).partition(".")[0] == "transformers"
    return name if known else None


def _in_words(pool: str | None, before: bool, behind: bool) -> str:
    """What a classifier reads."""
    norms = [n for n, there in (("before", before), ("behind", behind)) if there]
    return f"global_pool {pool!r} with " + (
        f"a norm {' and '.join(norms)} it" if norms else "no norm"
    )
