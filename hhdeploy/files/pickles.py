"""Files of torch.save: tensors and plain values, nothing that runs code."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

from hhdeploy.files.plain import what_instead

# How files of torch.save begin: zip archives, pickles of old ones.
_STARTS = (b"PK", b"\x80")


# Programs of torch, zip archives too: by a file that all of a kind have, where their weights are.
_PROGRAMS = {
    "constants.pkl": "torch.jit.load(FILE).state_dict()",
    "archive_format": "torch.export.load(FILE).state_dict",
}


def unpickled(path: Path) -> Any:
    """What a file of torch.save holds: tensors and plain values, nothing that runs code.

    The arguments of a training (``argparse.Namespace``) are plain values; timm's are among them.

    Raises:
        ValueError: there is something else in it, or it is damaged; the message says what.
        OSError: it cannot be opened.
    """
    import torch

    if (weights := _weights_of_program(path)) is not None:
        raise ValueError(
            "it holds a program. If you trust it, keep its weights alone in another file: "
            f"torch.save(dict({weights}), 'weights.pth')"
        )
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(_in_the_way(path, str(error).partition("\n")[0])) from error


def _weights_of_program(path: Path) -> str | None:
    """How to get at the weights of what torch.jit.save or torch.export.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):  # said where it is read
        return None
    return next((weights for name, weights in _PROGRAMS.items() if name in names), None)


def _in_the_way(path: Path, reason: str) -> str:
    """What keeps a file from being read; torch's own words advise options that nobody has here."""
    import torch

    if instead := what_instead(path):
        return instead
    with path.open("rb") as file:
        start = file.read(24)
    if not start.startswith(_STARTS):
        return f"it begins with {start!r}, as no file of torch.save does"
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  # damaged in any way
        found = []
    if not found:
        return reason.partition(". ")[0] or "it ends early"
    return (
        f"beside tensors it holds {', '.join(sorted(found)[:5])}, which are never loaded. If you "
        "trust it, keep its weights alone in another file: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
    )
