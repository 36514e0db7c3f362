"""``transformers:DIR_OR_HUB_ID``: image models of transformers, traced as they are.

No code of a repository is ever run (``trust_remote_code=False``), and a pickled file of weights
is read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.licences import CARD, Licences, licences_of_card
from hhdeploy.backbones.outputs import returns_tensor
from hhdeploy.backbones.spec import BackboneSpec, Loaded
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.weights import read_state
from hhdeploy.errors import BackboneError, require
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

# The exporter writes attention out; with the fused kernels some models do not trace.
_ATTENTION = "eager"
_CLASSIFIER = "ForImageClassification"
_PROCESSOR = "preprocessor_config.json"
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Processors, by name: whether a size that is a number is both edges, and the filter by default.
_KINDS: dict[str, tuple[bool, int]] = {
    "ViT": (True, 2), "Beit": (True, 3), "DeiT": (True, 3), "Siglip": (True, 3), "DPT": (True, 3),
    "Segformer": (True, 2), "CLIP": (False, 3), "Bit": (False, 3), "ConvNext": (False, 2),
    "Levit": (False, 3), "MobileViT": (False, 2), "PoolFormer": (False, 3),
}  # fmt: skip
# Which of them cut out the centre by default, and whose size is a share of the one resized to.
_CROPPING = frozenset(("DeiT", "CLIP", "Bit", "Levit", "MobileViT", "PoolFormer"))
_SHARES = frozenset(("ConvNext", "PoolFormer"))
_OTHER_STEPS = ("do_flip_channel_order", "do_pad", "do_align_long_axis", "keep_aspect_ratio")


def load_transformers(spec: BackboneSpec, where: str) -> Loaded:
    """A classifier (AutoModelForImageClassification), or a model of features (AutoModel).

    Args:
        spec: ``args`` replace entries of the configuration.
        where: a directory of ``save_pretrained``, or an id of the hub.

    Raises:
        BackboneError: no such directory or id, a configuration that needs code of its own,
            weights that do not fit.
    """
    transformers = require("transformers", "transformers", "loading a model of transformers")
    with _quiet(transformers):
        return _loaded(transformers, spec, where)


def _loaded(transformers: Any, spec: BackboneSpec, where: str) -> Loaded:
    config = _config(transformers, spec, where)
    classifies = _classifies(config, where)
    model, given = _model(transformers, spec, where, config, classifies)
    path = classifier_path(model) if classifies else ""
    classes = int(config.num_labels) if classifies and f"{path}.weight" in given else 0
    preprocess, notes = _preprocess(config, spec, where)
    means = getattr(config, "problem_type", None)
    if classes > 1 and means not in (None, "single_label_classification"):
        notes += (f"{means}, as config.json says, is not kept: its own outputs show as classes",)
    traced_with = (f"transformers {transformers.__version__}", _ATTENTION, config.to_json_string())
    name = f"transformers:{type(model).__name__ if Path(where).is_dir() else where}"
    return Loaded(
        returns_tensor(model),
        name,
        path,
        classes,
        preprocess,
        notes,
        traced_with,
        license=_licences(where) if spec.pretrained and spec.checkpoint is None else (),
    )


def _licences(where: str) -> Licences:
    """What the card beside the weights states: of the hub's, where it lies in its cache."""
    if Path(where).is_dir():
        return licences_of_card(Path(where))
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(where, CARD)
    return licences_of_card(Path(card).parent) if isinstance(card, str) else ()


def with_classifier(spec: BackboneSpec) -> BackboneSpec:
    """A model of transformers that was saved without a classifier (ViTModel) as one with a place
    for it, which its arguments then say; anything else as it is."""
    source, _, where = spec.model.partition(":")
    if source != "transformers" or "architectures" in spec.args:
        return spec
    transformers = require("transformers", "transformers", "loading a model of transformers")
    with _quiet(transformers):
        config = _config(transformers, spec, where)
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    names = known.get(config.model_type)
    if names is None or _classifies(config, where):
        return spec
    name = names if isinstance(names, str) else names[0]
    return replace(spec, args={**spec.args, "architectures": [name]})


def _classifies(config: Any, where: str) -> bool:
    """Whether the configuration names a model with a classifier.

    Raises:
        BackboneError: it has two, whose answers are averaged.
    """
    names = [str(name) for name in config.architectures or ()]
    for name in names:
        kind, found, more = name.partition(_CLASSIFIER)
        if found and more:
            raise BackboneError(
                f"transformers:{where}: {name} averages the answers of two classifiers, and an "
                "adapter has one. Take it with a single one, for adapters that bring theirs: "
                f"`model_args={{'architectures': ['{kind}{found}']}}`."
            )
    return any(name.endswith(_CLASSIFIER) for name in names)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and reports of its own: what is wrong with the weights is an error here."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _config(transformers: Any, spec: BackboneSpec, where: str) -> Any:
    """The configuration, entries of it replaced by ``spec.args``."""
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"transformers:{where} has no configuration that can be read: {_first_line(error)} "
            "Expected a directory with config.json, or an id of the hub; code that comes with a "
            "model is never run."
        ) from error
    for name, value in spec.args.items():
        if name.startswith("_") or not hasattr(config, name):
            raise BackboneError(
                f"transformers:{where}: its configuration has no entry {name!r}. Expected some of "
                f"{', '.join(sorted(k for k in config.to_dict() if not k.startswith('_')))}."
            )
        setattr(config, name, value)
    return config


def _model(
    transformers: Any, spec: BackboneSpec, where: str, config: Any, classifies: bool
) -> tuple[nn.Module, frozenset[str]]:
    """The model, and which of its tensors are more than random.

    Weights go through transformers' own reader also from ``spec.checkpoint``: files keep the
    names of older versions.
    """
    import torch

    auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    options = {"attn_implementation": _ATTENTION, "trust_remote_code": False}
    random = torch.random.get_rng_state()
    torch.manual_seed(spec.seed)
    try:
        if spec.checkpoint is None and not spec.pretrained:
            model: nn.Module = auto.from_config(config, **options)
            return model, frozenset(model.state_dict())
        common = {
            "config": config,
            "attn_implementation": _ATTENTION,
            "dtype": torch.float32,
            "output_loading_info": True,
        }
        if spec.checkpoint is not None:
            with torch.device("meta"):
                kind: Any = type(auto.from_config(config, **options))
            state = read_state(spec.checkpoint)
            model, loading = kind.from_pretrained(None, state_dict=state, **common)
        else:
            model, loading = auto.from_pretrained(
                where, weights_only=True, trust_remote_code=False, **common
            )
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"transformers:{where} cannot be loaded: {_first_line(error)}"
        ) from error
    finally:
        torch.random.set_rng_state(random)
    _check_loading(
        spec.checkpoint or f"transformers:{where}",
        loading,
        classifier_path(model) if classifies else "",
        whole=spec.checkpoint is not None and classifies,
    )
    return model, frozenset(model.state_dict()) - frozenset(loading["missing_keys"])


def _check_loading(what: str | Path, loading: Mapping[str, Any], head: str, *, whole: bool) -> None:
    """Nothing may be missing but all of the classifier at ``head``; of a ``whole`` model's file
    nothing is too much."""
    missing = set(loading["missing_keys"])
    if head and f"{head}.weight" in missing:
        missing = {key for key in missing if key.rpartition(".")[0] != head}
    found = {
        "missing": list(missing),
        "of another shape": list(loading["mismatched_keys"]),
        "unexpected": list(loading["unexpected_keys"]) if whole else [],
    }
    problems = [
        f"{title}: {', '.join(map(str, sorted(keys)[:5]))}" for title, keys in found.items() if keys
    ]
    if problems:
        raise BackboneError(
            f"{what}: the weights do not fit the model's configuration; keys "
            f"{'; '.join(problems)}. Parts of the model would stay random."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _preprocess(config: Any, spec: BackboneSpec, where: str) -> tuple[Preprocess, tuple[str, ...]]:
    """The transform of preprocessor_config.json, else what has to be assumed."""
    seen = getattr(config, "vision_config", config)
    channels = getattr(seen, "num_channels", 3)
    size = spec.input_size or (channels, *_pair(getattr(seen, "image_size", None)))
    stated = image_processor(where)
    if stated is not None:
        return from_image_processor(stated, size), ()
    assumed = Preprocess(
        size, (0.5,) * channels, (0.5,) * channels, "bilinear", 1.0, "squash", True
    )
    return assumed, (
        f"image transform assumed, for want of preprocessor_config.json: {assumed.described()}",
    )


def _pair(size: Any) -> tuple[int, int]:
    if size is None:
        raise BackboneError("config.json has no image_size: give `input_size`.")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def image_processor(where: str) -> dict[str, Any] | None:
    """The content of preprocessor_config.json, of a directory or of the hub; None without.

    Raises:
        BackboneError: it is no JSON object.
    """
    path = Path(where) / _PROCESSOR
    if not Path(where).is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(
            where,
            _PROCESSOR,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return None
        path = Path(found)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def from_image_processor(stated: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocess:
    """An image processor of transformers as our transform.

    Its ``size`` is a height and a width (the image is squashed) or a shortest edge (its ratio is
    kept, the centre cropped); what a number alone means, and what else is not said, depends on the
    processor's kind.

    Raises:
        BackboneError: steps that cannot be expressed, what could mean several things, or values of
            other types.
    """
    try:
        return _transform(stated, input_size)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise BackboneError(f"{_PROCESSOR} cannot be read: {error}.") from error


def _kind(stated: Mapping[str, Any]) -> str:
    """The processor's name without what every one has at its end; "" if it is not said."""
    name = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(name))


def _is_square(stated: Mapping[str, Any], kind: str, crops: bool) -> bool:
    """Whether a ``size`` that is a number is both edges, and not the shortest one."""
    if kind in _KINDS:
        return _KINDS[kind][0]
    if not crops:  # a shortest edge alone would leave pictures of all shapes
        return True
    raise BackboneError(
        f"{_PROCESSOR}: size {stated['size']} is a square to some image processors and the "
        f"shortest edge to others: expected image_processor_type to be of {', '.join(_KINDS)}, "
        f"found {kind or 'none'}. Write size as its height and width, or as its shortest_edge."
    )


def _check_steps(stated: Mapping[str, Any], kind: str, cut: tuple[int, int] | None) -> None:
    """Refuse what is no step of our transform; ``cut`` is what is cut out, if anything is."""
    steps = [step for step in _OTHER_STEPS if stated.get(step)]
    if not stated.get("do_resize", True):
        steps.append("do_resize: false")
    if stated.get("crop_pct") and kind not in _SHARES:
        steps.append(f"crop_pct of {kind or 'a processor that is not named'}")
    if steps:
        raise BackboneError(
            f"{_PROCESSOR}: {steps[0]}: the transform here has no such step. Take it out of a "
            "copy of the directory, and give the model pictures that are prepared so."
        )
    if cut is None or (crop := stated.get("crop_size")) is None:
        return
    given = (crop["height"], crop["width"]) if isinstance(crop, dict) else _pair(crop)
    if given != cut:
        raise BackboneError(
            f"{_PROCESSOR}: crop_size: pictures are cut to {given[0]} x {given[1]}, and the "
            f"model's inputs are {cut[0]} x {cut[1]}. Say which with `input_size`, and mend the "
            "other."
        )


def _transform(stated: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocess:
    channels, height, width = input_size
    if stated.get("do_normalize", True):
        mean, std = stated.get("image_mean"), stated.get("image_std")
    else:
        mean, std = [0.0] * channels, [1.0] * channels
    size, kind = stated.get("size") or {}, _kind(stated)
    crops = bool(stated.get("do_center_crop", kind in _CROPPING))
    if crops and not stated.get("do_resize", True):
        raise BackboneError(
            f"{_PROCESSOR}: do_center_crop without do_resize: images would be cut as they are, and "
            "the transform here resizes first. Say in that file how images are resized."
        )
    if isinstance(size, int):
        square = _is_square(stated, kind, crops)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    edge = size.get("shortest_edge")
    if edge is not None and kind == "Levit":
        edge = int(256 / 224 * edge)
    if edge is not None and (share := stated.get("crop_pct")) and kind in _SHARES:
        # ConvNeXT's large pictures are squashed whole.
        edge = None if kind == "ConvNext" and edge >= 384 else int(edge / share)
    rescale = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1
    if mean is None or std is None or abs(rescale * 255 - 1) > 1e-3:
        raise BackboneError(
            "preprocessor_config.json: expected image_mean, image_std and a rescale_factor of "
            f"1/255, found {mean}, {std} and {rescale}."
        )
    _check_steps(stated, kind, (height, width) if crops else None)
    mode, pct = "squash", 1.0
    if edge is not None:
        mode, pct = "center", min(height, width) / edge
    elif crops and "height" in size:
        pct = height / size["height"]
    return Preprocess.from_json(
        {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": _FILTERS[int(stated.get("resample", _KINDS.get(kind, (True, 2))[1]))],
            "crop_pct": pct,
            "crop_mode": mode,
            "exif": True,
        }
    )
