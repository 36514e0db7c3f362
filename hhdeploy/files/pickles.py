"""Files of torch.save: tensors and plain values, nothing that runs code."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

from hhdeploy.errors import abbreviate, first_line
from hhdeploy.files.plain import what_instead

# How files of torch.save begin: zip archives, pickles of old ones.
_PICKLE = b"\x80"
_STARTS = (b"PK", _PICKLE)
# What torch.save writes first into one.
_MAGIC = b"\x8a\nl\xfc\x9cF"

# Programs of torch, zip archives too: by a file that all of a kind have, where their weights are.
_PROGRAMS = {
    "constants.pkl": "torch.jit.load(FILE).state_dict()",
    "archive_format": "torch.export.load(FILE).state_dict",
}
# What is read at once of a part of an archive.
_PIECE = 2**22
# What torch.save has in its archives, and what others have.
_OWN = "data.pkl"
_ARCHIVES = (
    (".npy", "it holds NumPy's arrays (.npz)"),
    (".weights.h5", "it is a model of Keras"),
    ("", "it is a zip archive of other files: unpack it"),
)


def unpickled(path: Path, *, values: bool = True) -> Any:
    """What a file of torch.save holds: tensors and plain values, nothing that runs code.

    Without ``values`` tensors are on torch's meta device. Sums are looked at all the same: who then
    reads the values, as transformers does, may not. The arguments of a training
    (``argparse.Namespace``) are plain values; timm's are among them.

    Raises:
        ValueError: there is something else in it, or it is damaged; the message says what.
        OSError: it cannot be opened.
    """
    import torch

    if (other := _other_archive(path)) is not None:
        raise ValueError(other)
    _check_sums(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu" if values else "meta", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of what is no pickle, whatever its bytes mean in one
            raise ValueError(_in_the_way(path, str(error).partition("\n")[0])) from error


def _check_sums(path: Path) -> None:
    """The parts of an archive have the sums that were written with them, which torch does not look
    at; none of a training that wrote none (set_crc32_options), and of no archive."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.CRC == 0:
                    continue
                with archive.open(part) as file:
                    while file.read(_PIECE):
                        pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"it is damaged: {first_line(error)}. Copy or download it again"
        ) from error


def begins_as_torch_s(path: Path) -> str | None:
    """What to do with a file that begins as torch.save's do and is called .safetensors; None of
    another one."""
    with path.open("rb") as file:
        start = file.read(24)
    if not start.startswith(_STARTS) or start[8:9] == b"{":
        return None
    return "it begins as a file of torch.save: call it .pth if it is one"


def _ends_as_pickle(path: Path) -> bool:
    """Whether a file that is not empty ends with what every whole pickle ends with."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == pickle.STOP


def _other_archive(path: Path) -> str | None:
    """What a zip archive is that torch.save did not write; None of its own, and of no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):  # said where it is read
        return None
    for name, weights in _PROGRAMS.items():
        if name in names:
            return (
                "it holds a program. If you trust it, keep its weights alone in another file: "
                f"torch.save(dict({weights}), 'weights.pth')"
            )
    if _OWN in names:
        return None
    return next(what for end, what in _ARCHIVES if any(name.endswith(end) for name in names))


def _in_the_way(path: Path, reason: str) -> str:
    """What keeps a file from being read; torch's own words advise options that nobody has here."""
    import torch

    if instead := what_instead(path):
        return instead
    with path.open("rb") as file:
        start = file.read(24)
    if start[8:9] == b"{":  # behind the length of its header
        return "it is a file of safetensors by another name: call it .safetensors"
    if path.suffix == ".onnx":
        return (
            "it is a graph of ONNX, whose weights have no names of a model's. Give the weights "
            "that it was exported from"
        )
    if not start.startswith(_STARTS):
        return f"it begins with {start!r}, as no file of torch.save does"
    if start.startswith(_PICKLE) and _MAGIC not in start and _ends_as_pickle(path):
        return (
            "it is a pickle that torch.save did not write, and is never loaded. If you trust it, "
            "keep its weights alone, tensors by name, in another file: torch.save(STATE_DICT, "
            "'weights.pth')"
        )
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  # damaged in any way
        found = []
    if not found:
        return reason.partition(". ")[0] or "it ends early"
    if any(name.startswith("torchao.") for name in found):
        return (
            "its tensors are torchao's, quantised. Bring the weights as they were trained; the "
            "bundle that is exported can be quantised"
        )
    return (
        f"beside tensors it holds {abbreviate(sorted(found), 5)}, which are never loaded. If you "
        "trust it, keep its weights alone in another file: found = torch.load(FILE, "
        "weights_only=False), then torch.save(found.state_dict(), 'weights.pth') of a module, "
        "torch.save(found['state_dict'], 'weights.pth') of a training's checkpoint"
    )
