"""``.pth`` files: state dicts of torch.save with keys SITE.u, .v, .d, .lora_A, .lora_B.

Read with ``weights_only=True``: nothing is unpickled but tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.template import (
    ImportOptions,
    Tensors,
    finish,
    head_keys,
    low_rank_pair,
    split_thirds,
)
from hhdeploy.errors import AdapterError, require

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


_SITE_TENSORS = ("u", "v", "d", "lora_A", "lora_B")


def import_pth(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    """Convert a file of torch.save with the trained tensors alone; see `import_adapter`.

    Raises:
        AdapterError: naming the file and the key: another start than ``options.prefix``, an
            unknown key, a layer that is no site, or a wrong shape.
    """
    linears = {linear.path: linear for linear in backbone.facts.linears}
    fused: dict[str, Tensors] = {}
    result: Tensors = {}
    for key, tensor in read_pth(path).items():
        if not key.startswith(options.prefix):
            raise AdapterError(f"{path}: {key}: expected keys that start with {options.prefix!r}.")
        name = key.removeprefix(options.prefix)
        owner, _, last = name.rpartition(".")
        if name not in head_keys(backbone) and last not in _SITE_TENSORS:
            raise AdapterError(
                f"{path}: unknown tensor key {key!r}. Expected <site>.u, .v, .d, .lora_A or "
                f".lora_B, and the classifier's ({', '.join(head_keys(backbone))}). Save the "
                "trained tensors alone, without the backbone's; a common start is `prefix`."
            )
        if last == "lora_B":
            tensor = tensor.astype(np.float64) * options.lora_scale
        if last in _SITE_TENSORS and owner in linears and len(linears[owner].sites) > 1:
            fused.setdefault(owner, {})[last] = tensor
        else:
            result[name] = tensor
    for owner, group in fused.items():
        result |= split_thirds(linears[owner], *low_rank_pair(group, owner, path), path)
    config = AdapterConfig(
        backbone.facts.model,
        form=options.form or "additive",
        reflection=options.reflection or "unnormalized",
        r=max((t.shape[0] for n, t in result.items() if n.endswith(".lora_A")), default=0),
        extra={"imported_from": {"format": "torch.save", "lora_scale": options.lora_scale}},
    )
    return finish(result, config, path, backbone, options)


def read_pth(path: Path) -> Tensors:
    """The tensors of a file of ``torch.save``, as float32 (integers as they are)."""
    torch = require("torch", "export", f"reading {path.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{path} cannot be read: {reason} Expected a state dict of tensors written by "
            "torch.save; other pickled objects are never loaded."
        ) from error
    for entry in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path}: expected a state dict, found {type(content).__name__}.")
    tensors: Tensors = {}
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise AdapterError(f"{path}: {key}: expected a tensor, found {type(value).__name__}.")
        tensors[str(key)] = (value.float() if value.is_floating_point() else value).numpy()
    return tensors
