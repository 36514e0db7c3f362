"""An adapter is bound to what the bare backbone computes, not to its weights and buffers alone."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hhdeploy.adapters.bases import check_answer
from hhdeploy.adapters.config import CONFIG_FILE, AdapterConfig
from hhdeploy.adapters.differing import difference
from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.adapters.made import checked_config
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.backbones.facts import ANSWER_BOUND, FULL_ANSWER_BOUND, BaseAnswer
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.outputs import base_answer, fixed_image
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import AdapterError
from hhdeploy.exporting.bundles import export
from hhdeploy.training import attach, detach, extract, save
from hhdeploy.training.attach import base_answer_of
from hhdeploy.training.settings import TrainingError
from hhdeploy.training.state import ANSWER, SavedTraining, StateDirectory
from hhdeploy.verifying.bundles import verify_against_torch

SIZE = (3, 32, 32)
MODEL = "python:tests.own_models:scaling"


def bare(**args: Any) -> nn.Module:
    return load_backbone(BackboneSpec(MODEL, args)).model


def new(**changes: Any) -> AdapterConfig:
    return AdapterConfig(MODEL, target_modules=("linear1",), num_classes=3, **changes)


def kept(model: nn.Module, classes: int | None = 3) -> BaseAnswer | None:
    """What an adapter keeps that is attached now; the model is bare again afterwards."""
    answer = BaseAnswer.from_json(
        base_answer_of(attach(model, replace(new(), num_classes=classes)))
    )
    detach(model)
    return answer


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save(attach(bare(), new()), tmp_path / "a")
    return tmp_path / "a"


def exported(trained: Path, **args: Any) -> list[str]:
    """The lines of an export of the adapter on a model made with ``args``."""
    lines: list[str] = []
    export(
        MODEL,
        {"a": trained},
        trained.parent / "bundle",
        model_args=args,
        cache=None,
        verify=False,
        overwrite=True,
        progress=lines.append,
    )
    return lines


@pytest.mark.parametrize("how", ["scale", "table", "code", "slightly"])
def test_a_backbone_that_computes_otherwise_is_refused(trained, how):
    """An attribute, a buffer of no state dict, and code are in no digest."""
    adapter = load_adapter(trained)
    other = load_backbone(BackboneSpec(MODEL, {"other": how}))
    assert adapter.config.base_sha256 == other.facts.sha256
    assert adapter.config.base_buffers == other.facts.buffers
    found = (
        r"base_answer: adapter 'a' was trained on .*\(torch \d.*differ by \d+\.\d+% .* 0.1% at most"
    )
    with pytest.raises(AdapterError, match=found):
        exported(trained, other=how)
    before = {name: t.clone() for name, t in other.model.state_dict().items()}
    with pytest.raises(AdapterError, match="base_answer: adapter 'a' was trained on"):
        attach(other.model, adapter)
    assert before.keys() == other.model.state_dict().keys()
    assert all(torch.equal(t, other.model.state_dict()[n]) for n, t in before.items())


def test_the_same_backbone_is_taken(trained):
    assert "not known" not in " ".join(exported(trained))
    bundle = trained.parent / "bundle"
    with pytest.raises(AdapterError, match="base_answer: adapter 'a' was trained on"):
        verify_against_torch(bundle, model=MODEL, model_args={"other": "scale"})
    assert verify_against_torch(bundle, model=MODEL).passed
    again = attach(bare(), load_adapter(trained))
    assert extract(again).config.base_answer == load_adapter(trained).config.base_answer


def test_an_adapter_without_an_answer_is_exported_with_a_line(trained):
    """Of an earlier version, or of a model that did not run where it was attached."""
    file = trained / CONFIG_FILE
    content = json.loads(file.read_text())
    del content["base_answer"]
    file.write_text(json.dumps(content))
    (line,) = (line for line in exported(trained, other="scale") if "not known" in line)
    assert line.endswith("the adapter has no base_answer")
    imported = load_adapter(trained)
    extra = {"imported_from": {"format": "peft"}}
    imported = replace(imported, config=replace(imported.config, extra=extra))
    facts = load_backbone(BackboneSpec(MODEL)).facts
    assert check_answer("a", imported, facts, None) is None


def changed(how: str, model: nn.Module) -> nn.Module:
    """A model that computes the same features, but for rounding."""
    if how == "half":
        return model.bfloat16()
    if how == "double":
        return model.double()
    if how == "training":
        return model.train()
    if how == "classifier":
        model.head = nn.Linear(48, 11)
    if how == "casts":
        model.other = how
    if how == "hooked":
        model.register_forward_hook(lambda module, given, output: {"logits": output}["logits"])
    return model


@pytest.mark.parametrize("how", ["half", "casts", "double", "training", "classifier", "hooked"])
def test_what_rounding_and_training_change_is_not_refused(how):
    """Whose own code casts is of no full precision either, whatever its weights are."""
    one, other = kept(bare()), kept(changed(how, bare()))
    assert one is not None
    assert other is not None
    full = how not in ("half", "casts")
    assert (one.full_precision, other.full_precision) == (True, full)
    assert one.bound(other) == (FULL_ANSWER_BOUND if full else ANSWER_BOUND)
    distance = one.distance(other)
    assert distance is not None
    assert distance < one.bound(other) / 2


def test_of_less_than_full_precision_less_is_noticed(trained):
    """Also of an adapter of an earlier version, which does not say."""
    adapter = load_adapter(trained)
    other = load_backbone(BackboneSpec(MODEL, {"other": "slightly"}))
    attach(other.model, answered(adapter, full_precision=False))
    content = {k: v for k, v in adapter.config.base_answer.to_json().items() if k in GOOD}
    assert (
        BaseAnswer.from_json(content) == answered(adapter, full_precision=False).config.base_answer
    )


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        inside = kept(bare())
    assert inside == kept(bare())


def test_attach_leaves_the_model_and_chance_as_they_were():
    """Modes module by module, hooks, types, random numbers, BatchNorm's statistics."""
    model = bare(other="norm").train()
    model.norm.eval()  # frozen
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, drawn = torch.get_rng_state(), random.getstate()
    attach(model, new())
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    detach(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("how", ["attribute", "hook"])
def test_what_was_changed_since_attach_is_not_saved(trained, how):
    """No tensor tells of it, and the bundle's model has none of it."""
    model, adapter = bare(), load_adapter(trained)
    attach(model, adapter)
    with torch.no_grad():
        for parameter in model.parameters():  # training is no change
            parameter += 0.1 * parameter.requires_grad
    moved = extract(model).sites["encoder.layers.0.linear1"].d
    assert not np.array_equal(moved, adapter.sites["encoder.layers.0.linear1"].d)
    if how == "attribute":
        model.scale = 1.05
    else:
        model.encoder.register_forward_hook(lambda module, given, output: output * 2)
    with pytest.raises(AdapterError, match=r"computes no more what it did .* differ by \d+\.\d+%"):
        save(model, trained.parent / "b")


def test_parts_of_tensors_are_not_saved(tmp_path):
    """FSDP leaves one in each process; of one process it is all of it."""
    model = attach(bare(), new())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(AdapterError, match=r"expected a whole tensor.*full_state_dict=True"):
            save(model, tmp_path / "a")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
    finally:
        distributed.destroy_process_group()
    other = attach(bare(), new(), seed=1)
    other.load_state_dict(whole)
    save(other, tmp_path / "a")


class Failing(nn.Module):
    """Takes no images as they are here, or answers nothing that could be compared."""

    input_size = SIZE

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.pretrained_cfg = {"classifier": "head"}
        self.linear1 = nn.Linear(3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 4]."""
        if self.how == "raises":
            raise RuntimeError("no images here")
        x = self.linear1(images.mean((2, 3)))
        if self.how == "zeros":
            x = x * 0
        if self.how == "infinite":
            x = x / 0
        if self.how == "draws":
            x = x + torch.randn_like(x)
        if self.how == "digits":  # no processor rounds alike
            x = (images.sum((1, 2, 3)) * 1e6).sin()[:, None] * x
        return self.head(x)


@pytest.mark.parametrize("how", ["raises", "zeros", "infinite", "draws", "digits", "meta"])
def test_nothing_is_kept_of_a_model_that_tells_nothing_certain(how):
    model = Failing(how)
    if how == "meta":
        model = model.to("meta")
    assert kept(model, None) is None


def test_nothing_is_tried_of_images_of_a_size_that_nobody_knows():
    model = Failing("no")
    model.input_size = None  # type: ignore[assignment]
    assert kept(model, None) is None


def test_another_size_or_another_part_is_not_compared():
    model = bare()
    answer = base_answer(model, "head", SIZE)
    assert answer is not None
    assert answer.distance(replace(answer, input_size=(3, 40, 40))) is None
    assert answer.distance(replace(answer, classifier="")) is None
    assert answer.distance(replace(answer, values=answer.values[:-1])) == np.inf
    assert answer.distance(replace(answer, rms=answer.rms * 2)) == pytest.approx(0.5)
    facts = load_backbone(BackboneSpec(MODEL)).facts
    adapter = extract(attach(model, new()))
    smaller = replace(answer, input_size=(3, 16, 16))
    assert "images of another size" in str(check_answer("a", adapter, facts, smaller))
    assert "say nothing" in str(check_answer("a", adapter, facts, None))


def test_the_image_is_the_same_everywhere():
    image = fixed_image((1, 2, 2))
    assert image.dtype == np.float32
    assert (image * 2**24).astype(int).ravel().tolist() == [1436954, 3973021, 13443154, 9767058]
    assert 0 <= fixed_image(SIZE).min() < 0.01 < 0.99 < fixed_image(SIZE).max() < 1


def answered(adapter: Adapter, **changes: Any) -> Adapter:
    answer = adapter.config.base_answer
    assert answer is not None
    changed = replace(adapter.config, base_answer=replace(answer, **changes))
    return replace(adapter, config=changed)


def test_adapters_of_backbones_that_compute_otherwise_are_not_mixed(trained):
    adapter = load_adapter(trained)
    answer = adapter.config.base_answer
    assert answer is not None
    rounded = answered(adapter, values=tuple(v * 1.0001 for v in answer.values))
    other = answered(adapter, rms=answer.rms * 1.2)
    silent = replace(adapter, config=replace(adapter.config, base_answer=None))
    with pytest.raises(AdapterError, match="belong to backbones that compute otherwise"):
        merge_adapters({"a": (adapter, 0.5), "b": (other, 0.5)})
    for second in (rounded, silent):
        mixed = merge_adapters({"b": (second, 0.5), "a": (adapter, 0.5)})
        assert mixed.config.base_answer in (rounded.config.base_answer, answer)
        assert difference(adapter, second).equal
    assert list(difference(adapter, other).settings) == ["base_answer"]


def test_a_training_is_resumed_on_what_computes_the_same(tmp_path):
    answer = base_answer(bare(), "head", SIZE)
    assert answer is not None
    state = StateDirectory(tmp_path / "out.training")
    saved = SavedTraining(0, {}, ())
    state.write(saved, {"`r`": 1, ANSWER: answer.to_json()})
    nearly = replace(answer, rms=answer.rms * 1.0001, made_with="torch 9")
    for same in (answer.to_json(), nearly.to_json(), None):
        assert state.read({"`r`": 1, ANSWER: same}).epoch == 0
    other = replace(nearly, rms=answer.rms * 2).to_json()
    with pytest.raises(TrainingError, match=r"`resume`: what the backbone .* now with torch 9"):
        state.read({"`r`": 1, ANSWER: other})
    for unknown in ({"`r`": 1}, {"`r`": 1, ANSWER: None}):  # of an earlier version, of no answer
        state.write(saved, unknown)
        assert state.read({"`r`": 1, ANSWER: other}).epoch == 0


GOOD = {"input_size": [3, 8, 8], "classifier": "head", "rms": 1.5, "values": [1, -2.5]}
GOOD |= {"made_with": "torch 2"}


@pytest.mark.parametrize(
    "broken",
    [
        {"rms": 0},
        {"rms": float("nan")},
        {"rms": True},
        {"rms": "1"},
        {"rms": 10**400},
        {"values": []},
        {"values": [1.0] * 33},
        {"values": [float("inf")]},
        {"values": ["1"]},
        {"values": "12"},
        {"values": {"1": 2}},
        {"input_size": [3, 8]},
        {"input_size": [3, 8, 0]},
        {"input_size": [3, 8, 8.5]},
        {"input_size": 8},
        {"classifier": None},
        {"made_with": 3},
        {"full_precision": 1},
        {"full_precision": None},
        {"another": 1},
    ],
)
def test_an_answer_that_is_none_is_refused_where_it_is_read(trained, broken):
    file = trained / CONFIG_FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_answer": GOOD}))
    assert load_adapter(trained).config.base_answer == BaseAnswer.from_json(GOOD)
    file.write_text(json.dumps({**content, "base_answer": {**GOOD, **broken}}))
    with pytest.raises(AdapterError, match=r"base_answer: expected an object of an image's"):
        load_adapter(trained)


def test_of_a_configuration_made_in_python_it_has_to_be_one():
    with pytest.raises(AdapterError, match=r"base_answer: expected BaseAnswer\(\.\.\.\)"):
        checked_config(new(base_answer=GOOD))
    for nothing in ([], [0.0], [np.nan], [np.inf]):
        values = np.asarray(nothing, np.float32)
        assert BaseAnswer.of_features(values, SIZE, "", "torch 2") is None


def test_a_copy_of_the_attached_model_keeps_it():
    model = deepcopy(attach(bare(), new()))
    assert extract(model).config.base_answer == kept(bare())
