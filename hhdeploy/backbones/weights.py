"""Files of weights: state dicts, out of what a training wrapped them in, into a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Where trainings keep the weights in a larger checkpoint; the averaged ones first, as timm does.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
# Statistics of batch norms, which an average of the parameters alone does not have.
_COUNTED = ("running_mean", "running_var")
# What distributed and compiled modules put before every key.
_WRAPPERS = ("module.", "_orig_mod.")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a .safetensors file or of a file of torch.save.

    Nothing is unpickled but tensors. Of a training's checkpoint the averaged weights (EMA) are
    taken where there are some; prefixes of distributed and compiled modules are cut.

    Raises:
        BackboneError: there is no such file, or it holds something else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BackboneError(f"`checkpoint`: {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"`checkpoint`: {path} cannot be read: {error}. Expected a safetensors file "
            "or a PyTorch state dict without other pickled objects."
        ) from error
    state = unwrapped(content)
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise BackboneError(f"`checkpoint`: {path}: expected a state dict of tensors.")
    return dict(state)


def unwrapped(content: Any) -> Any:
    """The state dict inside a checkpoint, its keys without what a wrapper put before them all."""
    for entry in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
            break
    if not isinstance(content, Mapping) or not content:
        return content
    state = {str(key): value for key, value in content.items()}
    while wrapper := next((w for w in _WRAPPERS if all(k.startswith(w) for k in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], classifier: str, spec: BackboneSpec
) -> None:
    """load_state_dict where only the classifier, whose path is given, may be missing.

    Raises:
        BackboneError: naming the keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(f"{classifier}.")]
    # Buffers that follow from the architecture are often left out of, or left over in, files. What
    # a norm has counted is none of them.
    persistent = {*dict(model.named_parameters()), *(k for k in own if k.endswith(_COUNTED))}
    missing = [k for k in missing if k in persistent]
    unexpected = [k for k in state if k not in own and not _derived(k)]
    wrong = [
        f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
        for k in own
        if k in state and own[k].shape != state[k].shape and k in persistent
    ]
    if missing or unexpected or wrong:
        problems = [
            f"{title}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for title, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
            )
            if names
        ]
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} does not fit {spec.model} with {dict(spec.args)}; "
            f"keys {'; '.join(problems)}. Is it this model's, with these arguments?"
        )
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def _derived(key: str) -> bool:
    return any(name in key for name in ("relative_position_index", "attn_mask", "mask_token"))
