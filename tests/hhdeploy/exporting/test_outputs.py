"""Graphs that give features and tokens, beside logits or alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.facts import FEATURES, LOGITS, TOKENS
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.building import build
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.errors import BackboneError, BundleError, OptionError, PlanError, SessionError
from hhdeploy.exporting.bundles import export
from hhdeploy.parity import bound, compare
from hhdeploy.quantising import calibrate_bundle
from hhdeploy.repositories.triton import write_triton_repository
from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.http.codec import write_response
from hhdeploy.runtime.serving.messages import FP32, InferRequest, Tensor, Wanted
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.training import attach, detach
from hhdeploy.verifying.bundles import verify, verify_against_torch
from tests.broken_manifests import OF_OTHER_GRAPHS, broken
from tests.parity.architectures import save_transformers_config
from tests.support import images, random_adapter
from tests.workshop import copy_bundle

DIM, PLACES = 48, 17  # of the workshop's backbone: 16 patches and a class token
BOTH = ("alpha", "gamma")
LABELS = {"num_labels": 7}


@pytest.fixture(scope="module")
def features(workshop, tmp_path_factory):
    """Two adapters whose graph gives features alone, and what its export said. Read only."""
    out, said = tmp_path_factory.mktemp("features") / "bundle", []
    result = workshop.export(out, BOTH, outputs=["features"], progress=said.append)
    assert result.parity.passed
    return out, said


@pytest.fixture(scope="module")
def everything(workshop, tmp_path_factory):
    """Two adapters whose graph gives all three. Read only."""
    out = tmp_path_factory.mktemp("all") / "bundle"
    workshop.export(out, BOTH, outputs=["tokens", "logits", "features"], precisions=["float16"])
    return out


def told_otherwise(bundle, tmp_path, change):
    """A copy whose manifest has other `tensors`."""
    path = copy_bundle(bundle, tmp_path / "told")
    content = json.loads((path / MANIFEST).read_text())
    content["tensors"] = change(content["tensors"])
    (path / MANIFEST).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_the_order_of_the_manifest_s_keys_means_nothing(everything, tmp_path, device):
    """Tools of JSON put them in others: features were cut out of the tokens."""
    path = told_otherwise(everything, tmp_path, lambda told: dict(sorted(told.items())[::-1]))
    x = images(2)
    with (
        open_session(everything, device=device, threads=1) as known,
        open_session(path, device=device, threads=1) as found,
    ):
        for output in (LOGITS, FEATURES, TOKENS):
            assert_array_equal(
                found.run(x, "alpha", output=output), known.run(x, "alpha", output=output)
            )


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize(
    "change",
    [
        {FEATURES: ["batch", DIM // 2, 2]},
        {FEATURES: ["batch", DIM - 1]},
        {FEATURES: ["batch", -1]},
        {TOKENS: ["batch", DIM, PLACES]},
        {TOKENS: None},
    ],
)
def test_outputs_that_the_graph_has_otherwise_are_refused(everything, tmp_path, device, change):
    """They were cut in other places, without a word."""

    def told(tensors):
        return {name: shape for name, shape in {**tensors, **change}.items() if shape is not None}

    path = told_otherwise(everything, tmp_path, told)
    with pytest.raises(
        BundleError, match=r"hhdeploy\.json: tensors: expected the outputs of model"
    ):
        open_session(path, device=device, threads=1)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize("name", OF_OTHER_GRAPHS)
def test_a_graph_of_another_manifest_is_refused(branches, tmp_path, device, name):
    """OpenVINO computed with a bank that nobody filled."""
    change, message = OF_OTHER_GRAPHS[name]
    with pytest.raises(BundleError, match=message):
        open_session(broken(branches, tmp_path / "bundle", change), device=device, threads=1)


def truth_of(workshop, name, x):
    """Logits, features and tokens by timm's own methods, in float64."""
    model, given = workshop.backbone.model, torch.from_numpy(x).double()
    if name is not None:
        attach(model, workshop.adapters[name])
    try:
        model.double()
        with torch.no_grad():
            tokens = model.forward_features(given)
            pooled = model.forward_head(tokens, pre_logits=True)
            logits = model.head(pooled)
    finally:
        if name is not None:
            detach(model)
        model.float()
    return {LOGITS: logits.numpy(), FEATURES: pooled.numpy(), TOKENS: tokens.numpy()}


def check(expected, found, stage="branches"):
    flat = [a.reshape(len(a), -1) for a in (expected, found)]
    comparison = compare(*flat, "regression")
    assert not comparison.failures(bound(stage, "float32")), comparison


def test_features_are_those_of_each_image_s_own_adapter(workshop, features):
    bundle, said = features
    x, names = images(3), ["gamma", None, "alpha"]
    with open_session(bundle, device="cpu") as session:
        found = session.run(x, names)
        assert found.shape == (3, DIM)
        for index, name in enumerate(names):
            mine = slice(index, index + 1)
            check(truth_of(workshop, name, x[mine])[FEATURES], found[mine])
        with pytest.raises(SessionError, match=r"gives features and no logits.*Session.run"):
            session.classify([Image.new("RGB", (40, 40))], ["alpha"])
        with pytest.raises(SessionError, match="`output='logits'`: this bundle has features"):
            session.run(x, names, "logits")
    assert [line for line in said if "classifier is not used" in line] == [
        f"adapter {name!r}: its classifier is not used, the graph gives no logits" for name in BOTH
    ]


def test_the_manifest_says_what_the_graph_gives(features, everything):
    alone, all_three = (Bundle.open(path).manifest for path in (features[0], everything))
    assert alone.outputs == {FEATURES: (DIM,)}
    assert alone.to_json()["tensors"]["features"] == ["batch", DIM]
    assert (alone.classes, alone.to_json()["schema_version"]) == (0, 2)
    assert not any(part.startswith("head") for part in alone.layout.parts)
    assert all_three.outputs == {LOGITS: (7,), FEATURES: (DIM,), TOKENS: (PLACES, DIM)}
    assert all_three.to_json()["schema_version"] == 1
    lines = Bundle.open(everything).parity()["stages"]
    judged = {(s["adapter"], s["precision"], s.get("output", LOGITS)) for s in lines}
    assert judged == {
        (name, precision, output)
        for name in BOTH
        for precision in ("float32", "float16")
        for output in (LOGITS, FEATURES, TOKENS)
    }


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_all_three_of_one_graph(workshop, everything, device):
    if device == "openvino":
        pytest.importorskip("openvino")
    x = images(2)
    stage = "branches" if device == "cpu" else "openvino"
    with open_session(everything, device=device, cache=None) as session:
        answers = {o: session.run(x, list(BOTH), o) for o in (LOGITS, FEATURES, TOKENS)}
        assert np.array_equal(session.run(x, list(BOTH)), answers[LOGITS])
        (said,) = session.classify([Image.new("RGB", (40, 40), (9, 200, 3))], "gamma")
        assert len(said) == 3
    for index, name in enumerate(BOTH):
        mine = slice(index, index + 1)
        for output, expected in truth_of(workshop, name, x[mine]).items():
            found = answers[output][mine]
            check(expected, found[:, : expected.shape[1]] if output == LOGITS else found, stage)


def test_verify_catches_features_that_are_not_the_model_s(
    features, everything, tmp_path, monkeypatch
):
    from tests.workshop import copy_bundle

    for path in (features[0], everything):
        assert verify(path, precisions=["float32"]).passed
    bundle = Bundle.open(features[0])
    rows = bundle.bank().copy()
    rows[1, :40] += 0.5
    from hhdeploy.bundle.manifest import BANK_FILE
    from hhdeploy.bundle.store import edit
    from hhdeploy.files.tensors import tensor_bytes

    changed = copy_bundle(features[0], tmp_path / "changed")
    with edit(changed) as change:
        change.store(BANK_FILE, tensor_bytes({"adapter_bank": rows}))
    # By what they answer, not by the row that is another than its adapter's.
    monkeypatch.setattr("hhdeploy.bundle.membership._is_in_row", lambda *given: True)
    report = verify(changed)
    assert {s.adapter for s in report.stages if s.failures} == {"alpha"}


def test_an_adapter_added_later_is_verified_too(workshop, features, tmp_path):
    from tests.workshop import copy_bundle

    bundle, said = copy_bundle(features[0], tmp_path / "bundle"), []
    entry = add_adapter(bundle, "rival", workshop.directory("rival"), progress=said.append)
    assert (entry.classes, entry.class_names) == (0, None)
    assert "classifier is not used" in " ".join(said)
    with pytest.raises(PlanError, match="'probe' is a classifier alone"):
        add_adapter(bundle, "probe", workshop.directory("probe"))
    report = verify_against_torch(bundle, checkpoint=workshop.checkpoint, verify_images=2)
    assert report.passed
    assert {s.adapter for s in report.stages} == {"backbone", *BOTH, "rival"}
    assert all(a.verified for a in Bundle.open(bundle).manifest.adapters)


def test_a_model_without_a_classifier_gives_features_by_itself(workshop, tmp_path):
    """timm's with num_classes 0, folded; the adapter has no head either."""
    said, args = [], {**workshop.backbone.facts.args, "num_classes": 0}
    adapter = workshop.adapters["headless"]
    free = replace(adapter.config, base_model_args=args, base_sha256=None, num_classes=None)
    save_adapter(replace(adapter, config=free), tmp_path / "a")
    model = workshop.backbone.facts.model
    result = export(
        model, {"a": tmp_path / "a"}, tmp_path / "out", fold=True, pretrained=False,
        verify_images=2, progress=said.append, cache=workshop.cache,
    )  # fmt: skip
    assert result.manifest.outputs == {FEATURES: (DIM,)}
    assert "no classifier in the model and the adapters: the graph gives features" in said
    assert verify(tmp_path / "out").passed
    whole = export(
        model, {}, tmp_path / "whole", fold=True, pretrained=False, model_args=args,
        verify_images=2, cache=workshop.cache,
    )  # fmt: skip
    assert whole.manifest.whole
    assert whole.parity.passed


@pytest.mark.parametrize(
    ("name", "args", "dim", "places"),
    [
        ("ViTForImageClassification", LABELS, 48, 17),
        ("SwinForImageClassification", LABELS, 12, 64),
        ("Dinov2Model", {}, 48, 17),
    ],
)
def test_transformers_features_and_tokens(tmp_path, name, args, dim, places):
    """A classifier's, and those of a model without one; the tokens are its last hidden state."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    if name.startswith("Swin"):
        sizes = {"embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4}
    patches = {"image_size": 32, "patch_size": 4 if name.startswith("Swin") else 8}
    (tmp_path / "model").mkdir()
    save_transformers_config(name, {**sizes, **patches, **args}, tmp_path / "model")
    spec = BackboneSpec(f"transformers:{tmp_path / 'model'}", pretrained=False)
    backbone = load_backbone(spec)
    assert backbone.facts.dim == dim
    every = ("q", "k", "v", "proj", "fc1", "fc2")
    save_adapter(random_adapter(backbone.facts, targets=every, classes=None), tmp_path / "a")
    moved = random_adapter(backbone.facts, form="sequential", targets=("proj", "fc2"), classes=None)
    save_adapter(moved, tmp_path / "b")
    result = export(
        spec.model, {n: tmp_path / n for n in "ab"}, tmp_path / "out", outputs=[FEATURES, TOKENS],
        pretrained=False, verify_images=2, cache=None,
    )  # fmt: skip
    assert result.parity.passed
    assert result.manifest.outputs == {FEATURES: (dim,), TOKENS: (places, dim)}
    x = images(2)
    inner = getattr(backbone.model, backbone.model.base_model_prefix, backbone.model)
    with torch.no_grad():
        # Of a model that is called itself the hook leaves one tensor; its forward does not.
        expected = inner.double().forward(torch.from_numpy(x).double()).last_hidden_state
    with open_session(tmp_path / "out", device="cpu") as session:
        check(expected.numpy(), session.run(x, output=TOKENS))


def test_what_has_no_classifier_or_tells_no_tokens(tmp_path):
    own = "python:tests.own_models:encoder"
    with pytest.raises(BackboneError, match=r"Encoder does not tell its tokens: .*forward_feat"):
        export(own, {}, tmp_path / "out", fold=True, outputs=[TOKENS], verify=False)
    tower = "python:tests.own_models:tower"
    with pytest.raises(PlanError, match=r"`outputs`: python:.*tower has no classifier"):
        export(tower, {}, tmp_path / "out", fold=True, outputs=[LOGITS], verify=False)
    result = export(tower, {}, tmp_path / "out", fold=True, verify_images=2)
    assert result.manifest.outputs == {FEATURES: (48,)}
    with pytest.raises(PlanError, match=r"`outputs=\['logits'\]`, of a model that has a cl"):
        calibrate_bundle(tmp_path / "out", tmp_path)


def test_what_is_about_classifiers_is_refused(workshop, features, tmp_path):
    out = tmp_path / "out"
    for reserve in ({"max_classes": 9}, {"keep_backbone_head": True}):
        from hhdeploy.plan import Reserve

        with pytest.raises(OptionError, match=r"are about classifiers.*Add 'logits'"):
            workshop.export(out, ["alpha"], outputs=[FEATURES], reserve=Reserve(**reserve))
    with pytest.raises(OptionError, match="expected one of logits, features, tokens"):
        workshop.export(out, ["alpha"], outputs=["embedding"])
    with pytest.raises(PlanError, match=r"'probe' is a classifier alone"):
        workshop.export(out, ["probe"], outputs=[FEATURES])
    assert not out.exists()


def test_what_knows_logits_alone_says_so(features, everything, tmp_path, monkeypatch):
    for bundle in (features[0], everything):
        with pytest.raises(PlanError, match=r"calibration is for logits alone.*`outputs=\['lo"):
            calibrate_bundle(bundle, tmp_path)
        with pytest.raises(PlanError, match="a repository of Triton is for logits alone"):
            write_triton_repository(bundle, tmp_path / "repository")
        with pytest.raises(SessionError, match=r"device='cuda'.*logits alone.*cpu, openvino"):
            open_session(bundle, device="cuda")
        monkeypatch.setattr("hhdeploy.building.import_tensorrt", lambda backend: None)
        with pytest.raises(PlanError, match="an engine is for logits alone"):
            build(bundle, backend="tensorrt-rtx", precision="float32")


# --- served -------------------------------------------------------------------------------------


def served(bundle, *requests):
    """What a service says of itself, and of the requests."""

    async def answer():
        with open_session(bundle, device="cpu") as session:
            service = Service(session, ServeSettings(bundle, model_name="m"))
            await service.start()
            try:
                described = await LocalEndpoint(service).model_metadata("m")
                return described, [await service.infer(request) for request in requests]
            finally:
                await service.stop()

    return asyncio.run(answer())


def asking(x, *outputs, adapter="alpha"):
    wanted = tuple(o if isinstance(o, Wanted) else Wanted(o) for o in outputs)
    given = {"images": Tensor("images", FP32, x)}
    return InferRequest("m", "", "", given, wanted, {"adapter": adapter} if adapter else {})


def test_features_are_served(workshop, features):
    x = images(2)
    binary = replace(asking(x), binary=True)
    described, (plain, bare, named) = served(
        features[0], asking(x), asking(x, adapter=None), binary
    )
    assert described["outputs"] == [{"name": FEATURES, "datatype": "FP32", "shape": [-1, DIM]}]
    for answer, adapter in ((plain, "alpha"), (bare, None), (named, "alpha")):
        (tensor,) = answer.outputs
        assert tensor.name == FEATURES
        check(truth_of(workshop, adapter, x)[FEATURES], tensor.array)
    body, length = write_response(named, binary)
    assert body[length:] == named.outputs[0].array.tobytes()
    for output, said in (("logits", "unknown output 'logits': expected features"),):
        with pytest.raises(RequestError, match=said):
            served(features[0], asking(x, output))
    with pytest.raises(RequestError, match="output features: classification is of logits"):
        served(features[0], asking(x, Wanted(FEATURES, top=2)))


def test_logits_and_features_of_one_request(workshop, everything):
    x = images(2)
    described, (default, both) = served(
        everything, asking(x), asking(x, TOKENS, "labels", FEATURES, "logits")
    )
    shapes = {o["name"]: o["shape"] for o in described["outputs"]}
    assert list(shapes) == ["logits", "probabilities", "labels", "answers", FEATURES, TOKENS]
    assert shapes[TOKENS] == [-1, PLACES, DIM]
    assert [t.name for t in default.outputs] == list(shapes)
    truth = truth_of(workshop, "alpha", x)
    tokens, labels, pooled, logits = both.outputs
    for tensor in (tokens, pooled, logits):
        check(truth[tensor.name], tensor.array)
    best = truth[LOGITS].argmax(axis=1)
    assert [label.decode() for label in labels.array] == [f"class {i}" for i in best]
