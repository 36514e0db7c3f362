"""Adapters of other tools as hhdeploy adapters: PEFT's LoRA, rsLoRA and HRA, and .pth files.

PEFT itself is not needed; torch is, for .pth and .bin files (``weights_only=True``: nothing is
unpickled but tensors). Whatever this module does not know for certain is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.peft import HRA, import_peft, read_peft_config
from hhdeploy.adapters.importers.pth import import_pth
from hhdeploy.adapters.importers.template import ImportOptions as ImportOptions
from hhdeploy.errors import AdapterError

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

_DEFAULTS = ImportOptions()


def import_adapter(
    source: str | Path, backbone: Backbone, options: ImportOptions = _DEFAULTS
) -> Adapter:
    """Convert an adapter of another tool; its facts are kept under ``imported_from``.

    Args:
        source: a PEFT directory (``adapter_config.json`` with peft_type LORA or HRA), or a
            ``.pth`` file with keys ``<site>.<u|v|d|lora_A|lora_B>`` and the classifier's, at the
            top or under ``state_dict`` or ``model``.
        backbone: the model that the adapter belongs to. HRA multiplies the weights, so it is
            converted with these very weights.
        options: see `ImportOptions`.

    Returns:
        An adapter of float32 tensors. LoRA and HRA become pure low-rank sites, additive and
        without a scale; a fused qkv is split into its q, k and v thirds.

    Raises:
        AdapterError: naming file and key, for everything that is not known for certain: other
            methods and variants, unknown keys, layers that are no sites, wrong shapes.
    """
    path = Path(source)
    if path.is_dir():
        return import_peft(path, backbone, options)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist. Expected a PEFT directory or a .pth file.")
    return import_pth(path, backbone, options)


def needs_weights(source: str | Path) -> bool:
    """True if converting ``source`` takes the backbone's weights, not only its structure."""
    path = Path(source)
    return path.is_dir() and read_peft_config(path).get("peft_type") == HRA
