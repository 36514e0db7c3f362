"""What everybody who does not hold the model needs to know of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.backbones.licences import Licences, licences_of, licences_to_json
from hhdeploy.backbones.meaning import UNSTATED, Meaning
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.errors import BackboneError
from hhdeploy.preprocess import Preprocess

# What a graph may give of an image: answers, what the classifier sees, the last hidden state.
LOGITS, FEATURES, TOKENS = "logits", "features", "tokens"
OUTPUTS = (LOGITS, FEATURES, TOKENS)
# The digest of buffers of a model that has none in its state dict.
NO_BUFFERS = hashlib.sha256().hexdigest()
# What two answers of one model may differ by at most, of their root mean square: where one of them
# is of bfloat16, float16 or TF32, and where both are of full precision.
ANSWER_BOUND, FULL_ANSWER_BOUND = 0.05, 1e-3
_ANSWER_VALUES = 32  # kept of an answer, at most
_ANSWER_LIMIT = 1e38  # of its numbers, as float32 has them
_TRANSFORM = tuple(each.name for each in fields(Preprocess))


@dataclass(frozen=True)
class BaseAnswer:
    """What the bare backbone computes of one fixed image, in short: weights, buffers, attributes
    and code all have a part in it.

    Attributes:
        input_size: (channels, height, width) of the image.
        classifier: path of the classifier whose input the features are; "" where they are what the
            model returns.
        rms: root mean square of all features.
        values: up to 32 of them, spread evenly.
        made_with: packages and their versions, for messages.
        full_precision: float32 or more all through; False also where that is not known.

    Raises:
        ValueError: it is none.
    """

    input_size: tuple[int, int, int]
    classifier: str
    rms: float
    values: tuple[float, ...]
    made_with: str
    full_precision: bool = False

    def __post_init__(self) -> None:
        numbers = (self.rms, *self.values)
        sizes = [type(n) is int and n > 0 for n in self.input_size]
        texts = isinstance(self.classifier, str) and isinstance(self.made_with, str)
        counted = len(sizes) == 3 and 0 < len(self.values) <= _ANSWER_VALUES
        known = all(type(n) in (int, float) and abs(n) < _ANSWER_LIMIT for n in numbers)
        told = isinstance(self.full_precision, bool)
        if not (counted and all(sizes) and texts and known and self.rms > 0 and told):
            raise ValueError(_ANSWER_FORM)

    @classmethod
    def of_features(
        cls,
        features: NDArray[np.float32],
        input_size: tuple[int, int, int],
        classifier: str,
        made_with: str,
    ) -> BaseAnswer | None:
        """Of all features of the image; None of those that say nothing: none, zeros, or numbers
        that are not finite."""
        flat = features.astype(np.float64).reshape(-1)
        rms = float(np.sqrt(np.mean(flat * flat))) if flat.size else 0.0
        if not (rms > 0 and np.abs(flat).max() < _ANSWER_LIMIT):
            return None
        kept = flat[:: max(1, flat.size // _ANSWER_VALUES)][:_ANSWER_VALUES]
        short = [float(f"{value:.7g}") for value in (rms, *kept)]  # float32 has no more
        return cls(input_size, classifier, short[0], tuple(short[1:]), made_with)

    def distance(self, other: BaseAnswer) -> float | None:
        """`apart`; None where they cannot be compared, being of other images, or of another part
        of a model."""
        same = (self.input_size, self.classifier) == (other.input_size, other.classifier)
        return self.apart(other) if same else None

    def apart(self, other: BaseAnswer) -> float:
        """Root mean square of the difference, of the answers'; infinite where their numbers are
        not as many."""
        if len(self.values) != len(other.values):
            return math.inf
        mine, theirs = np.asarray(self.values), np.asarray(other.values)
        scale = max(self.rms, other.rms, _rms(mine), _rms(theirs))
        return max(_rms(mine - theirs), abs(self.rms - other.rms)) / scale

    def middle(self, other: BaseAnswer) -> BaseAnswer:
        """The mean of two answers that are of as many numbers."""
        values = tuple((a + b) / 2 for a, b in zip(self.values, other.values, strict=True))
        return replace(self, rms=(self.rms + other.rms) / 2, values=values)

    def bound(self, other: BaseAnswer) -> float:
        """What `distance` is at most, of one model."""
        full = self.full_precision and other.full_precision
        return FULL_ANSWER_BOUND if full else ANSWER_BOUND

    def to_json(self) -> dict[str, Any]:
        """The ``base_answer`` entry of an adapter's configuration."""
        return {
            "input_size": list(self.input_size),
            "classifier": self.classifier,
            "rms": self.rms,
            "values": list(self.values),
            "made_with": self.made_with,
            "full_precision": self.full_precision,
        }

    @classmethod
    def from_json(cls, content: object) -> BaseAnswer | None:
        """Read what `to_json` wrote, None for null. Raises ValueError if it is something else."""
        if content is None:
            return None
        names = {each.name for each in fields(cls)}
        if not isinstance(content, dict) or content.keys() | {"full_precision"} != names:
            raise ValueError(_ANSWER_FORM)
        if not all(isinstance(content[key], list) for key in ("input_size", "values")):
            raise ValueError(_ANSWER_FORM)
        said: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content.items()
        }
        return cls(**said)


_ANSWER_FORM = (
    "an object of an image's three sizes, a classifier's path, rms (more than 0), values (up to "
    f"{_ANSWER_VALUES} numbers), made_with and maybe full_precision, or null"
)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values * values)))


@dataclass(frozen=True)
class BackboneFacts:
    """What planning, a bundle and its manifest need to know of the frozen model.

    Attributes:
        model: timm name with its tag, or a name that starts with its source and a colon.
        args: further arguments that the model was made with.
        sha256: digest of the frozen weights (design of the adapter format, ``base_sha256``).
        linears: the Linears that adapters can change, in execution order; none in a manifest,
            whose row layout has those with a branch.
        classifier: module path of the classifier.
        dim: features that the classifier sees.
        classes: classes of the backbone's own classifier, 0 if it has none.
        preprocess: how the model's images become inputs.
        license: of the weights, as their source states it; empty where it says nothing.
        meaning: of the classifier's numbers, as far as their source says it.
        signs: digest of the weights' signs, for adapters that were trained on them in another
            type; "" if unknown.
        buffers: digest of the buffers that the state dict holds (``base_buffers_sha256``),
            `NO_BUFFERS` of none; "" if unknown.
        extra: further keys of a manifest's entry, kept as they came.
    """

    model: str
    args: Mapping[str, Any]
    sha256: str
    linears: tuple[LinearSpec, ...]
    classifier: str
    dim: int
    classes: int
    preprocess: Preprocess
    license: Licences = ()
    meaning: Meaning = UNSTATED
    signs: str = ""
    buffers: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def without_classifier(self) -> BackboneFacts:
        """Of the same model, for a graph that gives no logits."""
        return replace(self, classifier="", classes=0, meaning=UNSTATED)

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``backbone`` entry, without the Linears (the row layout has them)."""
        return {
            "model": self.model,
            "args": dict(self.args),
            "sha256": self.sha256,
            **({"signs_sha256": self.signs} if self.signs else {}),
            **({"buffers_sha256": self.buffers} if self.buffers else {}),
            "classifier": self.classifier,
            "dim": self.dim,
            "classes": self.classes,
            "preprocess": self.preprocess.to_json(),
            **({"license": licences_to_json(self.license)} if self.license else {}),
            **self.meaning.to_json(),
            **self.extra,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BackboneFacts:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError if it is damaged."""
        rest = dict(content)
        rest.pop("preprocess_graph", None)  # the bundle's, which has the graph
        return cls(
            model=rest.pop("model"),
            args=dict(rest.pop("args")),
            sha256=rest.pop("sha256"),
            linears=(),
            classifier=rest.pop("classifier"),
            dim=rest.pop("dim"),
            classes=rest.pop("classes"),
            preprocess=Preprocess.from_json(rest.pop("preprocess")),
            license=licences_of(rest.pop("license", None)),
            meaning=Meaning.from_json(
                {key: rest.pop(key, None) for key in ("class_names", "problem_type")}
            ),
            signs=rest.pop("signs_sha256", ""),
            buffers=rest.pop("buffers_sha256", ""),
            extra=rest,
        )


def transform_of(config: Mapping[str, Any], input_size: Sequence[int]) -> Preprocess:
    """The transform that a ``pretrained_cfg`` as timm's states, for images of that size, turned
    upright; it says other things as well. Raises TypeError or ValueError: see `Preprocess`."""
    said = {key: config[key] for key in _TRANSFORM if key in config}
    return Preprocess.stated({**said, "input_size": input_size, "exif": True})


# Arguments of timm.create_model that name files, weights or code. They have no place in a file
# that comes from elsewhere; all others shape the model.
_NO_SHAPE = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "exportable",
        "features_only",
        "model_name",
        "no_jit",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
        "scriptable",
    }
)


def check_timm_args(args: Mapping[str, Any]) -> None:
    """Raise `BackboneError` for arguments of timm.create_model that do not shape the model."""
    if refused := sorted(_NO_SHAPE.intersection(args)):
        raise BackboneError(
            f"model arguments {', '.join(refused)} are not allowed: expected arguments that shape "
            "the model (img_size, in_chans, qk_norm, …), not ones that name files, weights or code."
        )
