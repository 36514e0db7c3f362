"""Triton's ensembles: checked as Triton checks them, and run step by step as it runs them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import write_manifest
from hhdeploy.errors import PlanError, WriteError
from hhdeploy.exporters.portable.ensemble import _names
from hhdeploy.exporters.triton import TritonOptions, requestable
from hhdeploy.preprocess import open_image
from hhdeploy.repositories.triton import write_triton_repository
from hhdeploy.runtime import open_session
from tests.support import assert_caught, assert_parity
from tests.workshop import ROOT, contents, copy_bundle
from tests.wrong_logits import LOGITS, bundle_of_logits

PHOTO = ROOT / "hhdeploy" / "verifying" / "photo.jpg"
# Of the photograph: one part shrinks, one grows.
PARTS = ((0, 0, 451, 299), (200, 100, 229, 141))
KINDS = {
    "TYPE_FP32": "tensor(float)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_STRING": "tensor(string)",
}


def write(bundle: Path, out: Path, **options: Any):
    overwrite = options.pop("overwrite", False)
    chosen = TritonOptions(ensemble=True, **options)
    return write_triton_repository(bundle, out, chosen, overwrite=overwrite)


@pytest.fixture(scope="module")
def pictures():
    return [open_image(PHOTO).convert("RGB").crop(part) for part in PARTS]


def fits(one, other) -> bool:
    """Dims agree, where -1 agrees with everything."""
    return len(one) == len(other) and all(
        a == b or -1 in (a, b) for a, b in zip(one, other, strict=True)
    )


class FakeEnsemble:
    """What Triton checks when it loads an ensemble and its models, and what it does with requests.

    The rules are those of the server's own `ValidateEnsembleConfig` and of its ONNX Runtime
    backend: every input of a step is mapped, types and shapes agree, a model that batches has a
    dynamic first dimension, and no step takes fewer than the ensemble.
    """

    def __init__(self, repository: Path, name: str) -> None:
        self.repository = repository
        self.config = self._parsed(name)
        assert self.config.platform == "ensemble"
        assert not self.config.backend
        assert (repository / name / "1").is_dir()
        self.known = {tensor.name: tensor for tensor in self.config.input}
        self.steps = []
        for step in self.config.ensemble_scheduling.step:
            assert step.model_version == -1
            self.steps.append((step, self._session(step)))
        for output in self.config.output:
            self._consistent(output.name, output)

    def _parsed(self, name: str) -> ModelConfig:
        text = (self.repository / name / "config.pbtxt").read_text(encoding="ascii")
        config = text_format.Parse(text, ModelConfig())
        assert config.name == name
        return config

    def _consistent(self, name: str, tensor: Any) -> None:
        """A tensor of the ensemble is everywhere of one type and shape."""
        first = self.known.setdefault(name, tensor)
        assert first.data_type == tensor.data_type, name
        assert fits(first.dims, tensor.dims), name

    def _session(self, step: Any) -> ort.InferenceSession:
        model = self._parsed(step.model_name)
        assert model.max_batch_size >= self.config.max_batch_size >= 1
        assert set(step.input_map) == {i.name for i in model.input}, "every input is mapped"
        assert set(step.output_map) <= {o.name for o in model.output}
        for tensors, mapped in ((model.input, step.input_map), (model.output, step.output_map)):
            for tensor in tensors:
                self._consistent(mapped[tensor.name], tensor)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        path = self.repository / step.model_name / "1" / "model.onnx"
        session = ort.InferenceSession(str(path), settings)
        for declared, found in (
            (model.input, session.get_inputs()),
            (model.output, session.get_outputs()),
        ):
            assert {t.name for t in declared} == {t.name for t in found}
            for tensor in declared:
                (node,) = (n for n in found if n.name == tensor.name)
                assert KINDS[DataType.Name(tensor.data_type)] == node.type
                dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
                shape = [d if isinstance(d, int) else -1 for d in node.shape]
                assert shape[0] == -1, "a model that batches has a dynamic first dimension"
                assert fits(shape[1:], dims), tensor.name
        return session

    def infer(self, **request: np.ndarray) -> dict[str, np.ndarray]:
        """One request through the steps."""
        assert set(request) == {i.name for i in self.config.input}
        tensors = dict(request)
        for step, session in self.steps:
            reshaped = {
                i.name for i in self._parsed(step.model_name).input if i.HasField("reshape")
            }
            feeds = {
                inner: tensors[outer].reshape(-1) if inner in reshaped else tensors[outer]
                for inner, outer in step.input_map.items()
            }
            names = list(step.output_map)
            found = session.run(names, feeds)
            tensors |= {step.output_map[n]: v for n, v in zip(names, found, strict=True)}
        return {output.name: tensors[output.name] for output in self.config.output}

    def ask(self, picture: Image.Image, row: int | None) -> dict[str, np.ndarray]:
        """A picture, and a row where there is a choice."""
        ids = {} if row is None else {"adapter_ids": np.asarray([[row]], np.int64)}
        return self.infer(image=np.asarray(picture)[None], **ids)


def assert_as_session(bundle: Path, repository: Path, pictures, ensembles) -> None:
    """Every adapter says of every picture what a session says, in all three outputs."""
    manifest = Bundle.open(bundle).manifest
    servers = {name: FakeEnsemble(repository, name) for name in set(ensembles.values())}
    with open_session(bundle, device="cpu", threads=1) as session:
        for entry in requestable(manifest):
            asked = None if manifest.whole else entry.name
            said = [servers[ensembles[entry.name]].ask(p, entry.row) for p in pictures]
            logits = session.run(session.preprocess(pictures, asked), [asked] * len(pictures))
            found = np.concatenate([each["logits"] for each in said])
            own = slice(entry.classes)
            assert_parity(logits[:, own], found[:, own], "pictures", "float32")
            for answers, each in zip(
                session.classify(pictures, [asked] * len(pictures)), said, strict=True
            ):
                scores = {a.index: a.score for a in answers}
                assert each["scores"][0, own] == pytest.approx(
                    [scores[i] for i in range(entry.classes)], abs=1e-3
                )
                values = entry.problem_type == "regression"
                assert not values or each["label"].tolist() == [[""]]
                assert values or each["label"].tolist() == [[answers[0].label]]
                assert not each["scores"][0, entry.classes :].any() or values


@pytest.mark.parametrize("which", ["branches", "heads", "folded"])
def test_pictures_in_answers_out(request, which, pictures, tmp_path):
    bundle = request.getfixturevalue(which)
    result = write(bundle, tmp_path / "models", name="vit")
    entries = requestable(Bundle.open(bundle).manifest)
    assert dict(result.ensembles) == {entry.name: "vit_pictures" for entry in entries}
    assert_as_session(bundle, tmp_path / "models", pictures, result.ensembles)


def test_what_it_writes(small, tmp_path):
    out = tmp_path / "models"
    result = write(small, out, name="vit", gpu=True)
    names = ["vit", "vit_pictures_preprocess", "vit_pictures_answer", "vit_pictures"]
    assert [p.name for p in sorted(out.iterdir())] == sorted(names)
    assert sorted(result.files) == sorted(contents(out))
    content = json.loads((out / "vit_pictures" / "adapters.json").read_text())
    assert content["model"] == "vit_pictures"
    assert {name: entry["ensemble"] for name, entry in content["adapters"].items()} == {
        "alpha": "vit_pictures", "gamma": "vit_pictures",
    }  # fmt: skip
    ensemble = FakeEnsemble(out, "vit_pictures")
    assert json.loads(ensemble.config.parameters["adapters"].string_value) == result.rows
    # Strings, and rows that are checked, are the CPU's; the model is where it was asked for.
    for name, kind in zip(names, ("KIND_GPU", "KIND_CPU", "KIND_CPU"), strict=False):
        (group,) = ensemble._parsed(name).instance_group
        assert ModelInstanceGroup.Kind.Name(group.kind) == kind


@pytest.fixture(scope="module")
def mixed(small, tmp_path_factory):
    """Alpha is squashed, gamma has borders: two ensembles; in the manifest alone."""
    path = copy_bundle(small, tmp_path_factory.mktemp("mixed") / "bundle")
    manifest = Bundle.open(path).manifest
    alpha, gamma = manifest.adapters
    alpha = replace(
        alpha, preprocess=replace(alpha.preprocess, crop_mode="squash", interpolation="bilinear")
    )
    gamma = replace(gamma, preprocess=replace(gamma.preprocess, crop_mode="border", crop_pct=0.7))
    write_manifest(path, replace(manifest, adapters=(alpha, gamma)))
    return path


def test_names_of_classes_are_text_that_a_graph_holds(small):
    """JSON allows lone surrogates, UTF-8 does not."""
    entry = Bundle.open(small).manifest.adapters[0]
    names = ("\ud800", "é", *entry.class_names[2:])
    told = _names(entry.classes + 1, [replace(entry, class_names=names)]).string_data
    assert [text.decode() for text in told] == ["?", *names[1:], ""]


def test_an_ensemble_for_each_way_to_make_images(mixed, pictures, tmp_path):
    out = tmp_path / "models"
    result = write(mixed, out, name="m")
    expected = {"alpha": "m_pictures_squash_bilinear", "gamma": "m_pictures_border_bicubic"}
    assert dict(result.ensembles) == expected
    assert_as_session(mixed, out, pictures, result.ensembles)
    squash = FakeEnsemble(out, expected["alpha"])
    for row in (0, result.rows["gamma"], 3, -1, -2, 2**40):
        with pytest.raises(Exception, match=r"out of data bounds|invalid index"):
            squash.ask(pictures[0], row)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_an_ensemble_of_a_folded_bundle_batches_however_it_crops(folded, pictures, tmp_path, mode):
    """Where nothing is cropped all sizes are known, and no dimension may become one for it."""
    bundle = copy_bundle(folded, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    (alpha,) = manifest.adapters
    alpha = replace(alpha, preprocess=replace(alpha.preprocess, crop_mode=mode, crop_pct=1.0))
    write_manifest(bundle, replace(manifest, adapters=(alpha,)))
    result = write(bundle, tmp_path / "models", name="m")
    assert_as_session(bundle, tmp_path / "models", pictures, result.ensembles)


def test_logits_that_are_no_numbers_fail_the_request(small, pictures, tmp_path):
    """Scores alone as well: a server runs what is asked for."""
    bundle = bundle_of_logits(small, tmp_path / "bundle")
    result = write(bundle, tmp_path / "models", name="vit")
    server = FakeEnsemble(tmp_path / "models", "vit_pictures")
    answer = server.steps[-1][1]
    for name, (kind, logits, said) in LOGITS.items():
        row = result.rows[name]
        if said is None:
            own = np.full((1, 7), -np.inf, np.float32)
            own[0, :3] = logits
            feeds = {"logits": own, "adapter_ids": np.asarray([[row]], np.int64)}
            for outputs in (["scores"], ["label"]):
                with pytest.raises(Exception, match="out of data bounds"):
                    answer.run(outputs, feeds)
            with pytest.raises(Exception, match="out of data bounds"):
                server.ask(pictures[0], row)
        else:
            found = server.ask(pictures[0], row)["label"].tolist()
            assert found == [["" if kind == "regression" else said[0]]], name


def test_the_comparison_of_answers_can_fail(branches, pictures, tmp_path):
    """Another row is another answer, and without its transform a picture is another input."""
    result = write(branches, tmp_path / "models", name="vit")
    server = FakeEnsemble(tmp_path / "models", "vit_pictures")
    rows = result.rows
    said = {name: server.ask(pictures[0], rows[name])["logits"] for name in rows}
    assert BACKBONE in said
    assert_caught(said["alpha"][:, :7], said["rival"][:, :7], "pictures", "float32")
    _, model = server.steps[1]
    own = Bundle.open(branches).manifest.backbone.preprocess(pictures[0])
    ids = np.asarray([rows["gamma"]], np.int64)
    (other,) = model.run(["logits"], {"images": own[None], "adapter_ids": ids})
    assert_caught(said["gamma"][:, :3], other[:, :3], "pictures", "float32")


@pytest.mark.parametrize(
    ("model", "right", "wrong"),
    [
        ("vit_pictures", 'key: "pictures"', 'key: "images"'),
        ("vit_pictures", "TYPE_UINT8", "TYPE_FP32"),
        ("vit_pictures", "dims: [ -1, -1, 3 ]", "dims: [ 3 ]"),
        ("vit_pictures", "max_batch_size: 1", "max_batch_size: 2"),
        ("vit_pictures_answer", "TYPE_STRING", "TYPE_FP32"),
        ("vit_pictures_preprocess", "dims: [ 3, 32, 32 ]", "dims: [ 3, 32, 31 ]"),
    ],
)
def test_the_check_of_ensembles_can_fail(small, tmp_path, model, right, wrong):
    write(small, tmp_path / "models", name="vit")
    FakeEnsemble(tmp_path / "models", "vit_pictures")
    config = tmp_path / "models" / model / "config.pbtxt"
    text = config.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError):
        FakeEnsemble(tmp_path / "models", "vit_pictures")


def test_a_repository_that_exists(small, folded, tmp_path):
    out = tmp_path / "models"
    write(folded, out, name="other")
    write(small, out, name="vit")
    before = contents(out)
    (out / "vit_pictures_answer" / "mine").touch()
    with pytest.raises(WriteError, match=r"vit_pictures_answer .*holds mine"):
        write(small, out, name="vit", overwrite=True, max_batch=7)
    (out / "vit_pictures_answer" / "mine").unlink()
    assert contents(out) == before, "nothing is replaced before all may be"
    write(small, out, name="vit", overwrite=True, max_batch=7)
    after = contents(out)
    assert [name for name in before if before[name] != after[name]] == ["vit/config.pbtxt"]


def test_ensembles_of_an_earlier_writing_go_with_their_model(small, mixed, folded, tmp_path):
    """They would run the new model, and have the old one's rows and names."""
    out = tmp_path / "models"
    write(folded, out, name="other")
    write(mixed, out, name="vit")
    mine = out / "mine" / "config.pbtxt"  # an operator's own, which runs it too
    mine.parent.mkdir()
    mine.write_text('ensemble_scheduling {\n  step {\n    model_name: "vit"\n  }\n}\n')
    others = {n: b for n, b in contents(out).items() if n.startswith(("other", "mine"))}
    former = [
        f"vit_pictures_{way}{step}"
        for way in ("border_bicubic", "squash_bilinear")
        for step in ("", "_preprocess", "_answer")
    ]
    before = contents(out)
    (out / former[0] / "notes").touch()
    with pytest.raises(WriteError, match=rf"{former[0]} .*holds notes"):
        write(small, out, name="vit", overwrite=True)
    (out / former[0] / "notes").unlink()
    assert contents(out) == before, "nothing is replaced before all may be"
    result = write(small, out, name="vit", overwrite=True)
    assert list(result.removed) == result.to_json()["removed"] == former
    left = contents(out)
    assert set(left) == {*result.files, *others}
    assert {name: left[name] for name in others} == others
    assert set(result.ensembles.values()) == {"vit_pictures"}
    plain = write_triton_repository(small, out, TritonOptions(name="vit"), overwrite=True)
    assert plain.removed == ("vit_pictures", "vit_pictures_preprocess", "vit_pictures_answer")
    assert sorted(p.name for p in out.iterdir()) == [
        "mine", "other", "other_pictures", "other_pictures_answer", "other_pictures_preprocess",
        "vit",
    ]  # fmt: skip


def test_an_ensemble_whose_model_was_removed_by_hand(small, tmp_path):
    """Without `overwrite` nothing is removed, and a model that it would run is not written."""
    out = tmp_path / "models"
    write(small, out, name="vit")
    shutil.rmtree(out / "vit")
    with pytest.raises(WriteError, match=r"vit_pictures already exists.*`overwrite=True`"):
        write_triton_repository(small, out, TritonOptions(name="vit"))
    assert not (out / "vit").exists()


def test_pictures_that_no_graph_makes(small, tmp_path):
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    alpha, gamma = manifest.adapters
    alpha = replace(alpha, preprocess=replace(alpha.preprocess, interpolation="lanczos"))
    write_manifest(bundle, replace(manifest, adapters=(alpha, gamma)))
    with pytest.raises(PlanError, match=r"`ensemble=True`: .*alpha.*lanczos"):
        write(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    write_triton_repository(bundle, tmp_path / "models")
