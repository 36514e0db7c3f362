"""What the tests of the gRPC side send, and what must come back."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tests.workshop import CLASSES

INFER = "/inference.GRPCInferenceService/ModelInfer"
# Seconds, generously: a test that would hang fails instead.
PATIENCE = 60


def own(name: str, logits: np.ndarray) -> np.ndarray:
    """The columns that an adapter has."""
    return logits[:, : CLASSES[name]]


def message(x: np.ndarray, adapter: str = "alpha", **fields: Any) -> pb.ModelInferRequest:
    """A good request, to be sent by hand or to be spoilt."""
    found = pb.ModelInferRequest(
        model_name="tiny", id="seven", raw_input_contents=[x.tobytes()], **fields
    )
    found.inputs.add(name="images", datatype="FP32", shape=x.shape)
    found.parameters["adapter"].string_param = adapter
    return found
