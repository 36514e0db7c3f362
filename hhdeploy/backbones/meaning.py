"""What a classifier's numbers mean, as the source of its weights says it: names and a type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhdeploy.choices import CLASSES, PROBLEM_TYPES, ProblemType, member
from hhdeploy.files.plain import read_plain


@dataclass(frozen=True)
class Meaning:
    """Of a classifier, as far as it is stated.

    Attributes:
        class_names: one per class, or None.
        problem_type: None where nothing is said: what the number of classes tells.
    """

    class_names: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None

    def to_json(self) -> dict[str, Any]:
        """What is stated, as keys of a manifest's ``backbone`` entry."""
        return {
            **({"class_names": list(self.class_names)} if self.class_names else {}),
            **({"problem_type": self.problem_type} if self.problem_type else {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Meaning:
        """Read what `to_json` wrote. Raises ValueError if it is damaged."""
        names, kind = content.get("class_names"), content.get("problem_type")
        if kind not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"expected a problem type of {', '.join(PROBLEM_TYPES)}, found {kind!r}"
            )
        return cls(tuple(names) if names else None, kind)


UNSTATED = Meaning()


def meaning_of(stated: Mapping[str, Any], classes: int) -> Meaning:
    """What a configuration says: of transformers (``id2label``, ``problem_type``) or timm
    (``label_names``).

    Classes that it leaves out have their numbers. LABEL_0 and so on are what transformers writes
    where nobody named any, and names of more classes than there are belong to another classifier.

    Args:
        stated: as it is in JSON.
        classes: of the classifier; 0 where it is a placeholder.
    """
    if not classes:
        return UNSTATED
    kind = member(PROBLEM_TYPES, stated.get("problem_type"))
    if (kind, classes) == (CLASSES, 1):
        kind = None
    labels = stated.get("id2label") or stated.get("label_names") or {}
    if isinstance(labels, (list, tuple)):
        labels = dict(enumerate(labels))
    names = {str(number): str(name) for number, name in dict(labels).items()}
    own = [names.pop(str(i), str(i)) for i in range(classes)]
    unnamed = [[f"LABEL_{i}" for i in range(classes)], [str(i) for i in range(classes)]]
    return Meaning(None if names or own in unnamed else tuple(own), kind)


def meaning_beside(checkpoint: Path, classes: int) -> Meaning:
    """What the config.json beside a file of weights says; nothing without one."""
    try:
        content = json.loads(read_plain(checkpoint.parent / "config.json"))
        return meaning_of(content, classes)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):  # somebody else's
        return UNSTATED
