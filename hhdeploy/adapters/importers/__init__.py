"""Adapters of other tools as hhdeploy adapters: those of PEFT, and .pth files.

LoRA, rsLoRA and HRA are read without PEFT; its other methods are merged by PEFT itself. Nothing is
unpickled but tensors (``weights_only=True``), and no code runs because a file names it. Whatever is
not known for certain is refused.
"""

from __future__ import annotations

from pathlib import Path

from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers import peft
from hhdeploy.adapters.importers.pth import import_pth
from hhdeploy.adapters.importers.template import ImportOptions as ImportOptions
from hhdeploy.adapters.peft_config import read_peft_config
from hhdeploy.backbones.spec import Backbone
from hhdeploy.choices import of_kind, options_of
from hhdeploy.errors import AdapterError
from hhdeploy.files.writing import as_path, is_folder


def import_adapter(
    source: str | Path, backbone: Backbone, options: ImportOptions | None = None
) -> Adapter:
    """Convert an adapter of another tool; its facts are kept under ``imported_from``.

    Args:
        source: a PEFT directory, or a ``.pth`` file with keys ``<site>.<u|v|d|lora_A|lora_B>``
            and the classifier's, at the top or inside a training's checkpoint.
        backbone: the model that the adapter belongs to. All but plain LoRA is converted with
            these very weights.
        options: see `ImportOptions`.

    Returns:
        An adapter of float32 tensors, additive and without a scale; a fused qkv is split into its
        q, k and v thirds. What has no live form has ``fold_only``.

    Raises:
        AdapterError: naming file and key, for everything that is not known for certain: unknown
            keys, wrong shapes, a configuration and tensors that disagree, changes that depend on
            the image.
        MissingDependencyError: PEFT is needed and not installed.
    """
    path = as_path(source, "source")
    options = options_of(options, ImportOptions, "options")
    of_kind(backbone, Backbone, "backbone")
    if is_folder(path, AdapterError):
        return peft.import_peft(path, backbone, options)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist. Expected a PEFT directory or a .pth file.")
    return import_pth(path, backbone, options)


def brings_classifier(source: str | Path) -> bool:
    """True if ``source`` says that a module was trained whole, which is nearly always the
    classifier: the backbone needs a place for it."""
    path = Path(source)
    return is_folder(path, AdapterError) and bool(read_peft_config(path).get("modules_to_save"))


def needs_weights(source: str | Path) -> bool:
    """True if converting ``source`` takes the backbone's weights, not only its structure."""
    path = Path(source)
    return is_folder(path, AdapterError) and peft.peft_needs_weights(path)
