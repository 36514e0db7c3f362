"""A whole fine-tuned checkpoint as an adapter: its difference to the backbone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from hhdeploy.adapters.applying import values_of
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.difference import changed_parameters
from hhdeploy.adapters.importers.template import (
    ImportOptions,
    finish,
    largest_rank,
    stated_preprocess,
)
from hhdeploy.algebra import Array
from hhdeploy.backbones.licences import licences_of_card
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import Backbone, BackboneSpec
from hhdeploy.backbones.timm import transform_beside
from hhdeploy.choices import of_kind, options_of
from hhdeploy.errors import AdapterError, OptionError
from hhdeploy.files.weights import advice_on_directory, weights_in
from hhdeploy.files.writing import as_path, is_folder
from hhdeploy.preprocess import Preprocess

# Of the backbone's, a weight's size after a training, below which it was none.
_SMALL = 0.2


def extract_adapter(
    checkpoint: str | Path,
    spec: BackboneSpec,
    options: ImportOptions | None = None,
    *,
    backbone: Backbone | None = None,
) -> Adapter:
    """What a fine-tuned checkpoint changed of the backbone that it started from.

    Live where the change of every Linear has a low rank (a merged LoRA) or multiplies rows or
    columns, and only Linears, their biases and the classifier changed; else to be folded, or
    compressed (`ImportOptions.compress_rank`).

    Args:
        checkpoint: any file of weights of this model, of transformers also a directory of
            save_pretrained; of a training's checkpoint the averaged weights (EMA) where there are
            some.
        spec: the backbone as it was before.
        backbone: what ``spec`` loads, where that is done; None: it is loaded here.
        options: see `ImportOptions`; what concerns keys is for adapters alone.

    Raises:
        AdapterError: nothing changed, or something that is no parameter.
        BackboneError: the checkpoint does not fit the model.
    """
    options = options_of(options, ImportOptions, "options")
    unused = replace(
        options,
        class_names=None,
        problem_type=None,
        preprocess=None,
        compress_rank=None,
        accept_error=None,
    )
    if unused != ImportOptions():
        raise OptionError(
            "`prefix`, `key_map`, `form`, `reflection`, `lora_scale` and `adapter_name` are for "
            "adapters; a checkpoint is read as the backbone's own weights are."
        )
    path, spec = as_path(checkpoint, "checkpoint"), of_kind(spec, BackboneSpec, "spec")
    directory = path if is_folder(path, AdapterError) else path.parent
    backbone = load_backbone(spec) if backbone is None else of_kind(backbone, Backbone, "backbone")
    tuned = load_backbone(_tuned_spec(spec, path))
    _check_buffers(backbone, tuned, path)
    after = values_of(tuned.model)
    if tuned.facts.classes == 0:  # the file has no classifier, the model's is a placeholder
        head = f"{tuned.facts.classifier}."
        after = {name: value for name, value in after.items() if not name.startswith(head)}
    _check_whole(backbone, after, path)
    tensors = changed_parameters(backbone, after, {}, path)
    if not tensors:
        raise AdapterError(
            f"{path}: every parameter is the backbone's: there is no change to extract. Is it the "
            "fine-tuned checkpoint, and `checkpoint` the one before?"
        )
    if (low := _only_rounded(backbone, tuned, after)) is not None:
        raise AdapterError(
            f"{path}: every parameter is the backbone's, rounded to {low}: there is no change to "
            "extract. Is it the fine-tuned checkpoint, and `checkpoint` the one before?"
        )
    config = AdapterConfig(
        backbone.facts.model,
        r=largest_rank(tensors),
        license=licences_of_card(directory),
        extra={"imported_from": {"format": "checkpoint", **_said(tuned, backbone)}},
    )
    stated = _stated(path, tuned) or stated_preprocess(directory, backbone, options)
    told = tuned.facts.meaning
    options = replace(
        options,
        class_names=options.class_names or told.class_names,
        problem_type=options.problem_type or told.problem_type,
    )
    file = weights_in(path) if path.is_dir() else path
    return finish(tensors, config, file, backbone, options, stated)


def _only_rounded(backbone: Backbone, tuned: Backbone, after: Collection[str]) -> str | None:
    """The type of 16 bits to which the backbone's parameters were rounded, and no more was done to
    those of ``after``; None if there is none."""
    import torch

    before = dict(backbone.model.named_parameters())
    now = {name: p for name, p in tuned.model.named_parameters() if name in after}
    if any(name not in before or p.shape != before[name].shape for name, p in now.items()):
        return None
    for low in (torch.float16, torch.bfloat16):
        if all(torch.equal(before[name].to(low).to(p.dtype), p) for name, p in now.items()):
            return str(low).removeprefix("torch.")
    return None


def _check_whole(backbone: Backbone, after: Mapping[str, Array], path: Path) -> None:
    """The values are a model's, and not their differences to the backbone's (a task vector), which
    have the names of its and are small: a training leaves most weights about as large."""
    ratios = [
        float(np.linalg.norm(after[name])) / size
        for name, value in backbone.model.named_parameters()
        if name in after and (size := float(value.detach().norm())) > 0
    ]
    ratio = float(np.median(ratios)) if ratios else 1.0
    if ratio < _SMALL:
        raise AdapterError(
            f"{path}: expected the weights of a model, found values {ratio:.1g} times as large as "
            "the backbone's. If they are differences to it, add its weights and bring the sum."
        )


def _tuned_spec(spec: BackboneSpec, path: Path) -> BackboneSpec:
    """Of transformers a whole directory may be given, of everything else a file."""
    if path.is_dir():
        source, _, _ = spec.model.partition(":")
        if source != "transformers" or advice_on_directory(path):
            raise AdapterError(
                f"{path} is a directory. Expected a file of weights; a directory of "
                f"save_pretrained goes with a model of transformers.{advice_on_directory(path)}"
            )
        return replace(spec, model=f"transformers:{path}", checkpoint=weights_in(path))
    return replace(spec, checkpoint=path)


def _stated(path: Path, tuned: Backbone) -> Preprocess | None:
    """The transform that timm's config.json states beside a file of weights of a timm model."""
    if path.is_dir() or "architecture" not in getattr(tuned.model, "pretrained_cfg", {}):
        return None
    found = transform_beside(path, tuned.model, tuned.facts.args)
    return None if found is None else found[0]


def _said(tuned: Backbone, backbone: Backbone) -> dict[str, list[str]]:
    """What had to be assumed of the checkpoint alone: which of several weights it is, say."""
    notes = [note for note in tuned.notes if note not in backbone.notes]
    return {"assumed": notes} if notes else {}


def _check_buffers(backbone: Backbone, tuned: Backbone, path: Path) -> None:
    """Statistics of batch norms are no parameters, and no adapter holds them."""
    own = dict(backbone.model.named_buffers())
    for name, buffer in tuned.model.named_buffers():
        if name in own and not np.array_equal(own[name].cpu().numpy(), buffer.cpu().numpy()):
            raise AdapterError(
                f"{path}: the buffer {name} changed, which no adapter holds. Export the checkpoint "
                "as a model of its own: `export('model', {}, 'out', fold=True, "
                "checkpoint='FILE')`."
            )
