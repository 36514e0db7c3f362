"""Files of weights as they lie on a disk: of safetensors, of torch.save, or a list of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.files.bundle_json import json_problem
from hhdeploy.files.pickles import begins_as_torch_s, unpickled
from hhdeploy.files.plain import open_plain, read_few, what_instead

if TYPE_CHECKING:
    import torch

# The list of the files that a model's weights were divided into.
_INDEX = ".index.json"
_MOST_INDEX = 1 << 28

# What transformers calls a directory's weights, in the order in which it looks for them.
_IN_DIRECTORY = (
    *("model.safetensors", f"model.safetensors{_INDEX}"),
    *("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
)


def content_of(path: Path) -> Any:
    """What a file of weights holds; of the list of a divided model's, what all of them do.

    Raises:
        ValueError: it is none, or damaged, or a tensor is in two of its files.
        OSError: it cannot be opened.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.name.endswith(_INDEX):
        whole: dict[str, Any] = {}
        for file in files_of(path):
            try:
                part = content_of(file)
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from error
            if twice := sorted(whole.keys() & part.keys()):
                raise ValueError(
                    f"{twice[0]} is in {file.name} and in another of its files, of which one is of "
                    "an earlier save; save the model into an empty directory"
                )
            whole |= part
        return whole
    open_plain(path).close()  # what reads it would wait for a pipe
    if path.suffix != ".safetensors":
        return unpickled(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        if other := begins_as_torch_s(path):
            raise ValueError(other) from error
        raise ValueError(what_instead(path) or str(error)) from error


def files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint: those that an index lists, else it alone.

    Raises:
        ValueError: it is called an index, and is no such list.
    """
    if not checkpoint.name.endswith(_INDEX):
        return [checkpoint]
    try:
        content = json.loads(read_few(checkpoint, _MOST_INDEX).decode())
    except ValueError as error:
        raise ValueError(what_instead(checkpoint) or json_problem(error)) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    files = sorted(set(names.values())) if isinstance(names, dict) else []
    if not files or not all(isinstance(n, str) and Path(n).name == n for n in files):
        raise ValueError("expected a weight_map of files beside it")
    return [checkpoint.parent / name for name in files]


def not_floats(checkpoint: Path) -> dict[str, str]:
    """Name -> type of a checkpoint's tensors that are no floating-point numbers, which are whole
    or complex ones, or truths; no values are kept of it.

    Raises:
        ValueError, OSError: as `content_of`.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    for file in files_of(checkpoint):
        open_plain(file).close()  # as in `content_of`
        if file.suffix != ".safetensors":
            content = unpickled(file, values=False)
            tensors = content.items() if isinstance(content, dict) else ()
            kinds = {k: v.dtype for k, v in tensors if torch.is_tensor(v)}
            found |= {k: named_type(t) for k, t in kinds.items() if not t.is_floating_point}
            continue
        try:
            with safe_open(file, framework="pt") as stream:
                names = list(stream.keys())
                types = {name: stream.get_slice(name).get_dtype() for name in names}
        except SafetensorError as error:
            raise ValueError(what_instead(file) or str(error)) from error
        found |= {name: kind for name, kind in types.items() if not kind.startswith(("F", "BF"))}
    return found


def named_type(dtype: torch.dtype) -> str:
    """What torch calls a type of numbers, without its own name before it."""
    return str(dtype).removeprefix("torch.")


def weights_in(directory: Path) -> Path:
    """The checkpoint of a directory of save_pretrained; the first name where there is none."""
    found = [directory / name for name in _IN_DIRECTORY]
    return next((file for file in found if file.is_file()), found[0])


def advice_on_directory(directory: Path) -> str:
    """What to do with a directory in a file's place, behind a message that it is none; "" where
    nobody knows."""
    if not any(directory.glob("*.distcp")):
        return ""
    return (
        " It is a checkpoint of torch.distributed, of which torch makes a file: python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {directory} weights.pth"
    )
