"""``python -m tests.gpu.hhdeploy_cli ...``: the command ``hhdeploy`` on the check's provider."""

from __future__ import annotations

import sys

import pytest

from hhdeploy.cli import main
from tests.gpu.scale import DRY, SCALE
from tests.onnxruntime_double import stand_in

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        if DRY:
            stand_in(patch, "cuda", SCALE.providers["cuda"])
        sys.exit(main())
