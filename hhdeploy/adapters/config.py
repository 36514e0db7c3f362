"""adapter_config.json: what it says, and whether it can."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hhdeploy.algebra import REFLECTIONS, Reflection
from hhdeploy.backbones.facts import BaseAnswer
from hhdeploy.backbones.licences import (
    Licences,
    licences_of,
    licences_of_card,
    licences_to_json,
    together,
)
from hhdeploy.backbones.sites import FORMS, KINDS, SEQUENTIAL_KINDS, Form
from hhdeploy.choices import CLASSES as CLASSES
from hhdeploy.choices import LABELS as LABELS
from hhdeploy.choices import PROBLEM_TYPES as PROBLEM_TYPES
from hhdeploy.choices import VALUES as VALUES
from hhdeploy.choices import ProblemType as ProblemType
from hhdeploy.errors import AdapterError
from hhdeploy.files.bundle_json import CONFIG_FILE as CONFIG_FILE
from hhdeploy.files.bundle_json import MANIFEST, check_levels, object_in, without_duplicates
from hhdeploy.preprocess import Preprocess

# 2 has s_in, s_out, db, values of parameters, and fold_only; written only where they are used.
SCHEMA_VERSION = 2


TENSOR_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Compression:
    """What an adapter lost when its dense changes became products of a rank.

    Attributes:
        rank: of the products.
        max_range_error: the largest difference in logits from the original, of their range.
        worst_site: where the most of a change was lost.
    """

    rank: int
    max_range_error: float
    worst_site: str

    def __str__(self) -> str:
        return (
            f"compressed to rank {self.rank}: its logits differ from the original's by "
            f"{self.max_range_error:.1e} of their range, most at {self.worst_site}"
        )

    def to_json(self) -> dict[str, Any]:
        """The ``compressed`` entry of a configuration and a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: object) -> Compression | None:
        """Read what `to_json` wrote, None for null.

        Raises:
            ValueError: it is something else.
        """
        if content is None:
            return None
        said: dict[str, Any] = content if isinstance(content, dict) else {}
        rank, site = said.get("rank"), said.get("worst_site")
        error: Any = said.get("max_range_error")
        if (
            len(said) != 3
            or type(rank) is not int
            or rank < 0
            or type(error) not in (int, float)  # other tools write 0 for 0.0
            or not abs(error) <= sys.float_info.max
            or not isinstance(site, str)
        ):
            raise ValueError("an object of rank, max_range_error and worst_site, or null")
        return cls(rank, float(error), site)


# Keys of ``extra`` that speak of the very tensors beside them: of others they are not true.
_ORIGIN = ("training", "imported_from", "merged_from", "started_from")


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says; see `load_adapter` for the checks.

    Attributes:
        base_model: timm name, with or without ``.tag``, or the name of another source's model.
        form: ``additive`` or ``sequential``.
        reflection: ``unnormalized`` or ``orthogonal``.
        r: default rank of the low-rank term; the tensors' shapes decide.
        target_modules: kinds (q, k, v, proj, fc1, fc2), names of sites or Linears, their ends, or
            regular expressions that match whole names.
        base_model_args: further arguments that the model was made with.
        base_sha256: digest of the frozen weights, None if unknown.
        base_signs: digest of their signs, of weights that were not float32; else None.
        base_buffers: digest of the buffers beside them (statistics of BatchNorm), None if unknown.
        base_answer: what the bare model computed of a fixed image, None if unknown.
        num_classes: classes of the adapter's head, None without one.
        class_names: one per class, or None.
        preprocess: how images become inputs, None if unknown.
        problem_type: what the head's numbers mean; None: what `problem_type_of` makes of it.
        fold_only: it can be folded alone, no side branch computes it.
        compressed: what it lost when it was compressed, None if it was not.
        license: as its source states it; empty where it says nothing.
        extra: JSON keys that this version does not know, kept as they are.
    """

    base_model: str
    form: Form = "additive"
    reflection: Reflection = "unnormalized"
    r: int = 1
    target_modules: tuple[str, ...] = ("q", "k", "v", "proj")
    base_model_args: Mapping[str, Any] = field(default_factory=dict)
    base_sha256: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    problem_type: ProblemType | None = None
    fold_only: bool = False
    compressed: Compression | None = None
    license: Licences = ()
    base_signs: str | None = None
    base_buffers: str | None = None
    base_answer: BaseAnswer | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """What it says of the very tensors: how they were trained, imported, merged, compressed."""
        said = {key: self.extra[key] for key in _ORIGIN if key in self.extra}
        return {**said, **({"compressed": self.compressed.to_json()} if self.compressed else {})}

    def of_other_tensors(self, **origin: Any) -> AdapterConfig:
        """The configuration of tensors that were made of these; ``origin`` (extra) says how."""
        rest = {key: value for key, value in self.extra.items() if key not in _ORIGIN}
        return replace(self, compressed=None, extra={**rest, **origin})

    def to_json(self, schema_version: int = 1) -> dict[str, Any]:
        """The JSON form, in the order of the format's description.

        ``schema_version``: the least that has all that the adapter's tensors need; see
        `hhdeploy.adapters.format.Adapter.schema_version`.
        """
        return {
            "peft_type": "HTA",
            "schema_version": max(schema_version, 2 if self.fold_only else 1),
            "base_model_name_or_path": self.base_model,
            "base_model_args": dict(self.base_model_args),
            "base_sha256": self.base_sha256,
            **({"base_signs_sha256": self.base_signs} if self.base_signs else {}),
            **({"base_buffers_sha256": self.base_buffers} if self.base_buffers else {}),
            **({"base_answer": self.base_answer.to_json()} if self.base_answer else {}),
            "form": self.form,
            "reflection": self.reflection,
            "r": self.r,
            "target_modules": list(self.target_modules),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names) if self.class_names is not None else None,
            "preprocess": self.preprocess.to_json() if self.preprocess else None,
            **({"problem_type": self.problem_type} if self.problem_type else {}),
            **({"fold_only": True} if self.fold_only else {}),
            **({"compressed": self.compressed.to_json()} if self.compressed else {}),
            **({"license": licences_to_json(self.license)} if self.license else {}),
            **self.extra,
        }


def problem_type_of(given: ProblemType | None, classes: int) -> ProblemType:
    """What a head's numbers mean: what its configuration says, else as transformers takes it.

    One output is a value, several are classes of which one is right.
    """
    return given or (VALUES if classes == 1 else CLASSES)


def read_config(path: Path) -> AdapterConfig:
    """Read and check an ``adapter_config.json``; ``path`` is the file.

    The licence that a model card beside it states joins the one of the configuration.

    Raises:
        AdapterError: it is missing, no file, no JSON object, or see `parse_config`.
    """
    without = f"An adapter directory holds {CONFIG_FILE} and {TENSOR_FILE}."
    if (path.parent / MANIFEST).is_file():
        without += " This one is a bundle, which has its adapters in adapters/NAME."
    content = config_object(path, without)
    config = parse_config(content, str(path))
    return replace(config, license=together(config.license, licences_of_card(path.parent)))


def config_object(path: Path, without: str) -> dict[str, Any]:
    """The JSON object of a file of a configuration, of this format or of PEFT.

    Args:
        path: the file.
        without: what to say where it does not exist.

    Raises:
        AdapterError: it is missing, cannot be read, or holds no JSON object.
    """
    try:
        return object_in(path, AdapterError, without_duplicates)
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist. {without}") from None


def parse_config(content: Mapping[str, Any], where: str) -> AdapterConfig:
    """Check the JSON form of a configuration. Raises `AdapterError` naming ``where`` and key."""

    def fail(key: str, expected: str) -> AdapterError:
        return AdapterError(f"{where}: {key}: expected {expected}, found {content.get(key)!r}.")

    known = {*AdapterConfig("x", problem_type=CLASSES, fold_only=True).to_json()}
    known |= {"compressed", "license", "base_signs_sha256", "base_buffers_sha256"}
    known |= {"base_answer"}
    if content.get("peft_type") != "HTA":
        raise AdapterError(
            f"{where}: peft_type: expected 'HTA', found {content.get('peft_type')!r}. Adapters of "
            "PEFT (LoRA, HRA) are converted with `import_adapter()`."
        )
    _check_text(content, where)
    version = content.get("schema_version")
    if not isinstance(version, int) or not _is_count(version):
        raise fail("schema_version", f"an integer up to {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise AdapterError(
            f"{where}: schema_version: expected at most {SCHEMA_VERSION}, found {version}. The "
            "adapter was written by a newer hhdeploy: upgrade with pip install -U hhdeploy."
        )
    base_model = content.get("base_model_name_or_path")
    if not isinstance(base_model, str) or not base_model:
        raise fail("base_model_name_or_path", "the name of a model")
    args = content.get("base_model_args")
    args = {} if args is None else args
    if not isinstance(args, dict):
        raise fail("base_model_args", "an object or null")
    form = content.get("form", "additive")
    if form not in FORMS:
        raise fail("form", f"one of {', '.join(FORMS)}")
    if content.get("reflection", "unnormalized") not in REFLECTIONS:
        raise fail("reflection", f"one of {', '.join(REFLECTIONS)}")
    if not _is_count(content.get("r", 1)):
        raise fail("r", "a rank of 0 or more")
    targets = content.get("target_modules", ["q", "k", "v", "proj"])
    if isinstance(targets, str):
        targets = [targets]
    fold_only = content.get("fold_only", False)
    if not isinstance(fold_only, bool):
        raise fail("fold_only", "true or false")
    if not isinstance(targets, list) or not all(_is_target(t) for t in targets):
        raise fail("target_modules", f"a list of {', '.join(KINDS)}, site names or expressions")
    if form == "sequential" and not set(targets).isdisjoint(set(KINDS) - set(SEQUENTIAL_KINDS)):
        raise fail("target_modules", f"{', '.join(SEQUENTIAL_KINDS)} or site names (form {form})")
    num_classes, class_names = content.get("num_classes"), content.get("class_names")
    if num_classes is not None and (not _is_count(num_classes) or num_classes == 0):
        raise fail("num_classes", "a positive integer or null")
    if class_names is not None:
        if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
            raise fail("class_names", "a list of strings or null")
        check_class_names(where, class_names, num_classes)
    problem_type = content.get("problem_type")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise fail("problem_type", f"one of {', '.join(PROBLEM_TYPES)}, or null")
    check_problem_type(where, problem_type, num_classes)
    try:
        compressed = Compression.from_json(content.get("compressed"))
    except ValueError as error:
        raise fail("compressed", str(error)) from error
    try:
        answer = BaseAnswer.from_json(content.get("base_answer"))
    except (ValueError, TypeError) as error:
        raise fail("base_answer", str(error)) from error
    try:
        stated = licences_of(content.get("license"))
    except ValueError as error:
        raise fail("license", str(error)) from error
    for key in ("base_sha256", "base_signs_sha256", "base_buffers_sha256"):
        if not isinstance(content.get(key), str | None):
            raise fail(key, "64 hex digits or null")
    preprocess = _parse_preprocess(content, where, args)
    _check_readable(content, where)
    return AdapterConfig(
        base_model=base_model,
        form=form,
        reflection=content.get("reflection", "unnormalized"),
        r=content.get("r", 1),
        target_modules=tuple(targets),
        base_model_args=args,
        base_sha256=content.get("base_sha256"),
        num_classes=num_classes,
        class_names=tuple(class_names) if class_names is not None else None,
        preprocess=preprocess,
        problem_type=problem_type,
        fold_only=fold_only,
        compressed=compressed,
        license=stated,
        base_signs=content.get("base_signs_sha256"),
        base_buffers=content.get("base_buffers_sha256"),
        base_answer=answer,
        extra={key: value for key, value in content.items() if key not in known},
    )


def check_problem_type(where: str, problem_type: ProblemType | None, classes: int | None) -> None:
    """The softmax of one class is always 1. Raises `AdapterError` naming ``where``."""
    if (problem_type, classes) == (CLASSES, 1):
        raise AdapterError(
            f"{where}: problem_type: {CLASSES} needs 2 classes or more, found 1, which would "
            f"always be certain. Say {VALUES} (the output is a value) or {LABELS} (a yes or no)."
        )


def check_class_names(where: str, names: Sequence[str] | None, classes: int | None) -> None:
    """There is a name for each class, where both are known. Raises `AdapterError`."""
    if names is not None and classes is not None and len(names) != classes:
        raise AdapterError(
            f"{where}: class_names: expected {classes} names, one per class, found {len(names)}."
        )


def _parse_preprocess(
    content: Mapping[str, Any], where: str, args: Mapping[str, Any]
) -> Preprocess | None:
    if content.get("preprocess") is None:
        return None
    try:
        preprocess = Preprocess.from_json(content["preprocess"])
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{where}: {error}") from error
    img_size = args.get("img_size")
    if img_size is not None:
        expected = list(img_size) if isinstance(img_size, list | tuple) else [img_size] * 2
        if list(preprocess.input_size[1:]) != expected:
            raise AdapterError(
                f"{where}: the image sizes disagree: base_model_args.img_size is {img_size!r}, "
                f"preprocess.input_size is {list(preprocess.input_size)}."
            )
    return preprocess


def _check_text(content: Mapping[str, Any], where: str) -> None:
    """JSON can spell half of a character, and nothing that names it can be written."""
    for key, value in content.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise AdapterError(
                f"{where}: {key!a}: expected text that UTF-8 has, found "
                f"{error.object[error.start]!a}, half of a character. Write the whole of it."
            ) from error


def _check_readable(content: Mapping[str, Any], where: str) -> None:
    """Python reads NaN, and levels without end; readers in other languages refuse the file."""
    for key, value in content.items():
        try:
            check_levels([value])
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise AdapterError(
                f"{where}: {key}: expected JSON that every reader takes, found {error}. Leave it "
                "out, or write null."
            ) from error


def _is_target(value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
