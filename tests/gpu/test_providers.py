"""ONNX Runtime's providers for NVIDIA GPUs, on the same graphs."""

from __future__ import annotations

import pytest

from hhdeploy.api import verify
from hhdeploy.runtime import open_session
from tests.gpu.workbench import MODELS, TYPED
from tests.support import assert_caught, assert_parity

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("precision", TYPED)
@pytest.mark.parametrize("model", MODELS)
def test_parity(provider, workbench, model, precision, record):
    report = verify(workbench.model(model).path, device=provider, precisions=[precision])
    found = [stage.comparison for stage in report.stages]
    record(
        range_error=max(c.range_error for c in found),
        cosine=min(c.cosine for c in found),
        top1=min(c.top1 for c in found),
    )
    assert report.passed, report.explain_failures()
    assert {stage.stage for stage in report.stages} == {"engine"}


def test_the_wrong_adapter_is_caught_and_rows_change(provider, workbench):
    made = workbench.model("starter")
    right, wrong = made.pair
    truth, other = made.truth_of(right), made.truth_of(wrong)
    with open_session(made.path, device=provider) as session:
        assert_parity(truth.logits, session.run(truth.images, right), "engine", "float32")
        assert_caught(truth.logits, session.run(truth.images, wrong), "engine", "float32")
        session.adapters.add("guest", made.adapter(wrong))
        assert_parity(other.logits, session.run(other.images, "guest"), "engine", "float32")
        session.adapters.add("guest", made.adapter(right), replace_existing=True)
        assert_parity(truth.logits, session.run(truth.images, "guest"), "engine", "float32")
        session.adapters.remove("guest")
        assert_parity(truth.logits, session.run(truth.images, right), "engine", "float32")


@pytest.mark.parametrize("count", [1, 3, 29])
def test_any_batch(provider, workbench, count):
    made = workbench.model("starter")
    truth = made.truth(count)
    with open_session(made.path, device=provider) as session:
        found = session.run(truth.images, truth.names)
        assert_parity(truth.logits, found, "engine", "float32")
