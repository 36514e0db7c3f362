"""Run bundles at the edge: no torch, no timm, no onnx.

from hhdeploy.runtime import open_session
with open_session("OUT") as session:
    x = session.preprocess([image], adapter="digits")
    logits = session.run(x, adapters=["digits"])
"""

from hhdeploy.runtime.bank import AdapterBank
from hhdeploy.runtime.session import Session, open_session

__all__ = ["AdapterBank", "Session", "open_session"]
