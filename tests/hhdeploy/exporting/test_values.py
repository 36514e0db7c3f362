"""A regression in 16 bits: on noise its values hardly differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters.config import VALUES
from hhdeploy.adapters.format import save_adapter
from hhdeploy.errors import ParityError
from hhdeploy.exporting.bundles import export
from hhdeploy.verifying.graphs import add_typed_graph
from tests.support import TINY_MODEL
from tests.workshop import AGE


@pytest.mark.parametrize("fold", [False, True])
def test_rounding_of_values_on_noise_is_no_fault_to_report(workshop, tmp_path, fold):
    """Ages of 40.11: a step of bfloat16 is 1/4 there."""
    adapter = workshop.adapters[AGE]
    assert adapter.head is not None
    assert adapter.config.problem_type == VALUES
    bias = np.asarray([40.11], np.float32)
    head = replace(adapter.head, weight=adapter.head.weight * np.float32(0.002), bias=bias)
    save_adapter(replace(adapter, head=head), tmp_path / "age")
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "fold": fold}
    options |= {"precisions": ["bfloat16"], "verify_images": 2}
    with pytest.raises(ParityError, match=r"hardly differ on noise.*`verify_data`\.$") as caught:
        export(TINY_MODEL, {"age": tmp_path / "age"}, tmp_path / "out", **options)
    assert "report" not in str(caught.value)
    assert not (tmp_path / "out").exists()

    # A wide head, and images as different as black and white.
    head = replace(head, weight=adapter.head.weight * np.float32(20))
    save_adapter(replace(adapter, head=head), tmp_path / "wide")
    (tmp_path / "photos").mkdir()
    for name, level in (("black", 0), ("white", 255)):
        Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / "photos" / f"{name}.png")
    options["verify_data"] = tmp_path / "photos"
    export(TINY_MODEL, {"wide": tmp_path / "wide"}, tmp_path / "out", **options)


def test_the_same_of_a_graph_that_is_added(workshop, tmp_path):
    """As `build` adds what is missing."""
    adapter = workshop.adapters[AGE]
    head = replace(adapter.head, weight=adapter.head.weight * np.float32(4))
    head = replace(head, bias=np.asarray([40.11], np.float32))
    save_adapter(replace(adapter, head=head), tmp_path / "age")
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify_images": 2}
    path = export(TINY_MODEL, {"age": tmp_path / "age"}, tmp_path / "out", **options).path
    with pytest.raises(ParityError, match=r"hardly differ on noise.*`verify_data`\.$") as caught:
        add_typed_graph(path, "bfloat16")
    assert "report" not in str(caught.value)
