"""Sessions of the check: the provider that was asked for computes, or the test fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hhdeploy.runtime import Session, open_session
from tests.gpu.scale import SCALE


def open_on(path: Path, device: str, **options: Any) -> Session:
    """`open_session` on one of `Scale.providers`."""
    session = open_session(path, device=device, **options)
    check_device(session.device, device)
    return session


def check_device(said: str, device: str) -> None:
    """``said`` is `Session.device`: another provider, or one that is not known, is a failure."""
    assert said.startswith(f"onnxruntime {SCALE.providers[device]}"), said
    assert "does not tell" not in said, said
