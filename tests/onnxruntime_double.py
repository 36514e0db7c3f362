"""ONNX Runtime's CPU in the place of a GPU: the same calls, with the CPU's kernels and memory."""

from __future__ import annotations

import pytest

from hhdeploy.runtime import onnxruntime_backend, onnxruntime_gpu


def stand_in(patch: pytest.MonkeyPatch, device: str, provider: str) -> None:
    """Let a device's name mean another provider of this build, without the options of its own."""
    patch.setitem(onnxruntime_backend._PROVIDERS, device, provider)
    patch.setattr(onnxruntime_backend, "_PROVIDER_OPTIONS", {})
    patch.setattr(onnxruntime_backend, "_RECORDING", {device: {}})
    patch.setattr(onnxruntime_gpu, "MEMORY", "cpu")
