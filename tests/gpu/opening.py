"""Sessions of the check: the provider that was asked for computes, or the test fails."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.bundle import Bundle
from hhdeploy.runtime import Session, open_session
from hhdeploy.runtime.onnxruntime_backend import PRODUCTS
from tests.gpu.scale import SCALE


def open_on(path: Path, device: str, **options: Any) -> Session:
    """`open_session` on one of `Scale.providers`."""
    session = open_session(path, device=device, **options)
    check_device(session.device, device, path, session.precision)
    return session


def check_device(said: str, device: str, path: Path, precision: str) -> None:
    """``said`` is `Session.device`: products on another provider are a failure.

    A session says what is left to the CPU, and refuses products there; where its version of ONNX
    Runtime does not tell, a profile of the graph does.
    """
    provider = SCALE.providers[device]
    assert said.startswith(f"onnxruntime {provider}"), said
    if "does not tell" in said:
        left = ran_elsewhere(Bundle.open(path).graph(precision), provider)
        assert not [kind for kind in left if any(name in kind for name in PRODUCTS)], left


@functools.cache
def ran_elsewhere(graph: Path, provider: str) -> tuple[str, ...]:
    """Kinds of nodes that another provider ran, by ONNX Runtime's profile of one run."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(graph), settings, providers=[provider])
        assert session.get_providers()[0] == provider
        session.run(None, {i.name: _zeros(i) for i in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"] for e in events if e["cat"] == "Node" and "provider" in e["args"]]
    assert ran, "the profile names no node"
    return tuple(sorted({args["op_name"] for args in ran if args["provider"] != provider}))


def _zeros(tensor: Any) -> np.ndarray:
    """An input of the graph contract, of two images or rows."""
    kind = np.int64 if tensor.type == "tensor(int64)" else np.float32
    return np.zeros([size if isinstance(size, int) else 2 for size in tensor.shape], kind)
