"""What can be known of adapters, options and paths is refused before the backbone is traced."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.format import save_adapter
from hhdeploy.errors import AdapterError, CapacityError, DataError, PlanError
from hhdeploy.exporters import trace
from hhdeploy.exporting.bundles import export
from hhdeploy.files.tensors import read_tensors, write_tensors
from hhdeploy.plan import Reserve
from tests.support import TINY_ARGS, TINY_MODEL

ADAPTER, NOTHING = ("alpha",), ()


@pytest.fixture
def untraced(workshop, tmp_path, monkeypatch):
    """Export adapters of the workshop, or from directories, where tracing must not be reached."""

    def refuse(*args, **options):
        pytest.fail("it was traced")

    monkeypatch.setattr(trace, "trace", refuse)

    def run(adapters, **options):
        places = {
            name: workshop.directory(name) if name in workshop.adapters else tmp_path / name
            for name in adapters
        }
        given = {"checkpoint": workshop.checkpoint, "cache": None, "model_args": TINY_ARGS}
        export(TINY_MODEL, places, tmp_path / "bundle", **{**given, **options})

    return run


@pytest.mark.parametrize("fold", [False, True])
def test_an_adapter_of_another_model(workshop, untraced, tmp_path, fold):
    lora = workshop.adapters["lora"]
    (site, tensors), *_ = lora.sites.items()
    config = replace(lora.config, target_modules=(f"blocks.7.{site.partition('.')[2]}",))
    save_adapter(
        replace(lora, config=config, sites={config.target_modules[0]: tensors}), tmp_path / "deep"
    )
    with pytest.raises(AdapterError, match=r"deep: tensor keys blocks\.7.*no such site"):
        untraced(["deep"], fold=fold)


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        (NOTHING, {}, PlanError, "nothing to export"),
        (NOTHING, {"outputs": ["features"]}, PlanError, "nothing to export"),
        (ADAPTER, {"reserve": Reserve(sites=("nope",))}, PlanError, "`sites`: 'nope'"),
        (ADAPTER, {"reserve": Reserve(sites=("q:sequential",))}, PlanError, "`sites`: 'q:seq"),
        (NOTHING, {"reserve": Reserve(2, 5, ("q",))}, PlanError, "nothing to verify"),
    ],
)
def test_options_that_do_not_go_with_the_model(untraced, adapters, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        untraced(adapters, **options)


def test_a_whole_model_without_a_classifier(workshop, untraced, tmp_path):
    weights, _ = read_tensors(workshop.checkpoint, AssertionError)
    bare = {name: value for name, value in weights.items() if not name.startswith("head.")}
    write_tensors(tmp_path / "bare.safetensors", bare)
    with pytest.raises(PlanError, match="no logits"):
        untraced(NOTHING, fold=True, checkpoint=tmp_path / "bare.safetensors", outputs=["logits"])


def test_values_that_a_graph_does_not_hold(workshop, untraced, tmp_path):
    lora = workshop.adapters["lora"]
    for name, factor, message in (("huge", 1e6, "beyond float16"), ("tiny", 1e-9, "rounds all")):
        sites = {
            site: replace(t, lora_A=t.lora_A * np.float32(factor), lora_B=t.lora_B)
            for site, t in lora.sites.items()
        }
        save_adapter(replace(lora, sites=sites), tmp_path / name)
        with pytest.raises(CapacityError, match=message):
            untraced([name], precisions=["float16"])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("what", ["missing", "empty", "broken"])
def test_pictures_that_cannot_be_read(untraced, tmp_path, what, fold):
    folder = tmp_path / "pictures"
    if what != "missing":
        folder.mkdir()
    if what == "broken":
        (folder / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="pictures"):
        untraced(ADAPTER, verify_data=folder, fold=fold)
