"""Files that trainings write: which weights are taken of one, and what keeps it from being read."""

from __future__ import annotations

import argparse
import copy
import json
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.utils import CheckpointSaver
from torch.nn.utils.parametrizations import weight_norm

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.importers.checkpoint import extract_adapter
from hhdeploy.adapters.importers.pth import read_pth
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.weights import passed_over
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.files.checkpoints import unwrapped
from hhdeploy.files.tensors import read_tensors
from hhdeploy.training import attach, extract
from tests.own_models import compiled_encoder, encoder
from tests.support import TINY_ARGS, TINY_MODEL, perturb, tiny_spec

VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 3, "intermediate_size": 80, "num_labels": 3}


@pytest.fixture(scope="module")
def model():
    """What is to be read. Read only."""
    found = load_backbone(tiny_spec(num_classes=7)).model
    perturb(found)
    return found


@pytest.fixture(scope="module")
def raw(model):
    """The weights beside their average. Read only."""
    return {key: value + 1 for key, value in model.state_dict().items()}


def named(state, start):
    return {f"{start}{key}": value for key, value in state.items()}


def within(state, wrapper):
    """Of a model whose blocks were wrapped one by one."""
    return {key.replace("blocks.1.", f"blocks.1.{wrapper}."): v for key, v in state.items()}


def average(state):
    """As torch's AveragedModel saves it."""
    return {"n_averaged": torch.tensor(3), **named(state, "module.")}


def listed(state):
    """As torch_ema keeps its averages: without names."""
    return list(state.values())


def optimizer(state):
    """As Adam saves what it keeps of every weight."""
    return {
        "state": {i: {"exp_avg": value} for i, value in enumerate(state.values())},
        "param_groups": [{"lr": 0.1}],
    }


def spec(file):
    return BackboneSpec(TINY_MODEL, TINY_ARGS, checkpoint=file)


def assert_taken(file, model, *lines):
    """It is that model's weights, and what was said of it."""
    found = load_backbone(spec(file))
    for key, value in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key
    assert len(found.notes) == len(lines)
    for note, line in zip(found.notes, lines, strict=True):
        assert line in note


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (lambda raw, own: {"state_dict": named(own, "model."), "epoch": 1}, None),
        (lambda raw, own: {"state_dict": named(own, "net.backbone._orig_mod.")}, None),
        (lambda raw, own: {"state_dict": named(within(own, "_orig_mod"), "model.")}, None),
        (lambda raw, own: within(own, "_orig_mod"), None),
        (lambda raw, own: within(own, "_checkpoint_wrapped_module"), None),
        (
            lambda raw, own: named(
                within(own, "_fsdp_wrapped_module"), "module._fsdp_wrapped_module."
            ),
            None,
        ),
        # As DeepSpeed saves it.
        (lambda raw, own: {"module": own, "random": {"x": torch.ones(2)}}, None),
        (lambda raw, own: average(own), None),
        (lambda raw, own: {"net": own, "epoch": 1}, None),
        (lambda raw, own: {"model": raw, "model_ema": average(own)}, "model_ema of the"),
        (lambda raw, own: {"model": raw, "ema": own}, "ema of the checkpoint, not from model"),
        (lambda raw, own: {"state_dict": raw, "ema_state_dict": own}, "ema_state_dict of the"),
        (lambda raw, own: {"model": raw, "ema_model": own, "steps": 3}, "ema_model of the"),
        (lambda raw, own: {"model": raw, "swa_weights": own}, "swa_weights of the"),
        (lambda raw, own: {"model": raw, "ema": {"decay": 0.9, "model": own}}, "ema.model of the"),
        (lambda raw, own: {"model": raw, "EMA": own}, "EMA of the checkpoint, not from model"),
        (lambda raw, own: {"model": raw, "modelEma": {"model": own}}, "modelEma.model of the"),
        (lambda raw, own: {"model": raw, "EMAModel": own}, "EMAModel of the"),
        (lambda raw, own: {"model": raw, "model_avg": own}, "model_avg of the"),
        (lambda raw, own: {"model": raw, "ema": {"shadow": own, "backup": raw}}, "ema.shadow of"),
        (lambda raw, own: {"model": raw, "polyak_average": own}, "polyak_average of the"),
        (lambda raw, own: {**raw, "ema": own}, "ema of the checkpoint, not from its own tensors"),
        # No average, and not what was taken: said.
        (lambda raw, own: {"model": own, "best_state_dict": raw}, "model of the checkpoint, not f"),
        (
            lambda raw, own: {"model": own, "ema": {"decay": 0.9, "shadow_params": listed(raw)}},
            "weights taken from model of the checkpoint, not from ema.shadow_params",
        ),
        (
            lambda raw, own: {
                "state_dict": own,
                "callbacks": {"EMA": {"ema_state_dict": raw}},
                "optimizer_states": [{"opt": optimizer(raw), "ema": listed(raw)}],
            },
            "not from callbacks.EMA.ema_state_dict, optimizer_states.0.ema",
        ),
        # Of a training, and no weights.
        (
            lambda raw, own: {
                "state_dict": own,
                "optimizer": optimizer(raw),
                "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
                "rng": {"torch": torch.get_rng_state()},
                "train_avg": {"loss": torch.tensor(0.1)},
            },
            None,
        ),
        # Averages, but of no weights: of losses, and of classes and their mistakes.
        (lambda raw, own: {"loss_ema": {"x": torch.ones(50)}, "state_dict": own}, None),
        (lambda raw, own: {"state_dict": own, "ema": {"x": torch.ones(50)}}, None),
        (
            lambda raw, own: {
                "state_dict": own,
                "val_avg": {"top1": torch.ones(7), "pairs": torch.ones(7, 7)},
            },
            "weights taken from state_dict of the checkpoint, not from val_avg",  # as of a bias
        ),
        (lambda raw, own: {"avg": {"loss": torch.ones(50)}, "net": own}, None),
        (lambda raw, own: {"train_avg": {"loss": torch.ones(9)}, "net_avg": own}, None),
        (lambda raw, own: {"net": own, "rng": {"torch": torch.get_rng_state()}}, None),
        (lambda raw, own: {"model": own, "teacher": raw}, "model of the checkpoint, not from t"),
        (
            lambda raw, own: {
                **named(raw, "online_model."),
                **named(own, "ema_model."),
                "step": torch.tensor(3),
            },
            "ema_model.* of the checkpoint, not from online_model.",
        ),
    ],
)
def test_what_trainings_write(tmp_path, model, raw, wrap, line):
    torch.save(wrap(raw, model.state_dict()), tmp_path / "x.pth")
    assert_taken(tmp_path / "x.pth", model, *([line] if line else []))


def head(*shape):
    return {"weight": torch.ones(7, *shape), "bias": torch.ones(7)}


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda own: {"model": own, "classifier": head(48)}, "it has classifier beside model"),
        (lambda own: {"net": own, "fc": {"state_dict": head(48)}}, "it has fc.state_dict beside n"),
        (lambda own: {"state_dict": own, **named(head(48), "fc.")}, "it has fc.weight, fc.bias be"),
        (lambda own: {"ema": {"model": own, "x": head(9, 9)}}, "it has x beside model"),
        (lambda own: {"model_ema": own, "model": own, "x": head(9, 9)}, "it has x beside model_"),
        (lambda own: {"model": own, "lora": {"blocks.0.down": torch.ones(9)}}, "it has lora besid"),
        (lambda own: {"backbone": own, "head": head(48)}, "several state dicts, backbone, head"),
    ],
)
def test_a_part_of_the_model_beside_it_is_refused(tmp_path, model, wrap, found):
    """Its answers would be those of another head, or of none, without a word."""
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    with pytest.raises(BackboneError) as raised:
        load_backbone(spec(tmp_path / "x.pth"))
    assert found in str(raised.value)
    assert "Parts of one model, as a classifier apart, go into one state dict" in str(raised.value)


@pytest.mark.parametrize("start", ["model.", ""])
@pytest.mark.parametrize("number", [torch.tensor([3.0]), torch.tensor(0.5)])
def test_a_number_that_the_answers_are_computed_with_is_refused(tmp_path, model, start, number):
    """A temperature of the logits, a gate; a count of steps is none."""
    torch.save(named(model.state_dict(), start) | {"temperature": number}, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match="keys unexpected: temperature"):
        load_backbone(spec(tmp_path / "x.pth"))


def test_a_classifier_behind_another_layer_is_left_out_with_it(tmp_path, model):
    """timm's ViTs had the layer once: the classifier reads others than their features now."""
    layer = {"pre_logits.fc.weight": torch.ones(48, 48), "pre_logits.fc.bias": torch.ones(48)}
    torch.save(model.state_dict() | layer, tmp_path / "x.pth")
    backbone = load_backbone(spec(tmp_path / "x.pth"))
    assert backbone.facts.classes == 0
    assert torch.equal(backbone.model.state_dict()["norm.weight"], model.norm.weight)
    (line,) = backbone.notes
    assert "left out of the checkpoint: head.weight, head.bias, pre_logits.fc.weight" in line


def test_what_timm_passes_over_is_said(model):
    state = model.state_dict()
    (line,) = passed_over(model, state | {"projectors.0.weight": torch.ones(2)}, state, "head")
    assert line == "left out of the checkpoint, as timm does: projectors.0.weight"


@pytest.mark.parametrize(
    ("more", "way"),
    [
        ({"blocks.0.attn.qkv.lora_A": torch.ones(2, 48)}, "merge where it was trained"),
        ({"blocks.0.ssf_scale": torch.ones(48)}, "merge where it was trained"),
        ({"prompts": torch.ones(1, 5, 48)}, "as a model of your own, python:MODULE:FUNCTION"),
    ],
)
def test_what_is_inside_of_the_model_stays_an_error(tmp_path, model, more, way):
    torch.save(model.state_dict() | more, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=rf"keys unexpected: {next(iter(more))}.*{way}"):
        load_backbone(spec(tmp_path / "x.pth"))


def test_weights_that_torch_parametrizes_say_what_to_do(tmp_path, model):
    wrapped = copy.deepcopy(model)
    weight_norm(wrapped.blocks[0].attn.qkv)
    torch.save(wrapped.state_dict(), tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"call .*remove_parametrizations\(MODULE, 'weight'\)"):
        load_backbone(spec(tmp_path / "x.pth"))


@pytest.mark.parametrize("form", ["additive", "sequential"])
@pytest.mark.parametrize("start", ["", "net."])
def test_a_model_with_an_adapter_attached_says_what_to_do(tmp_path, model, form, start):
    """As a training saves it that knows nothing of adapters; what is told is the whole adapter."""
    config = AdapterConfig("mine", form=form, num_classes=3, target_modules=("proj",))
    trained = attach(copy.deepcopy(model), config, seed=1)
    torch.save(named(trained.state_dict(), start), tmp_path / "x.pth")
    said = r"They are of a model that attach changed\. Call attach .*hhdeploy\.training\.save"
    for use in (load_backbone, lambda spec: extract_adapter(spec.checkpoint, tiny_spec())):
        with pytest.raises(BackboneError, match=said):
            use(spec(tmp_path / "x.pth"))
    again = attach(copy.deepcopy(model), config, seed=2)
    state = torch.load(tmp_path / "x.pth")
    again.load_state_dict({key.removeprefix(start): value for key, value in state.items()})
    assert extract(again).sites == extract(trained).sites
    assert extract(again).head == extract(trained).head


def test_a_model_of_transformers_with_an_adapter_attached_says_what_to_do(tmp_path):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    theirs.save_pretrained(tmp_path)
    attach(theirs, AdapterConfig("mine", num_classes=3, target_modules=("o_proj",)))
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"They are of a model that attach changed\."):
        load_backbone(BackboneSpec(f"transformers:{tmp_path}", checkpoint=tmp_path / "x.pth"))


def test_empty_tensors_of_deepspeed_say_what_to_do(tmp_path, model):
    torch.save({"module": dict.fromkeys(model.state_dict(), torch.ones(0))}, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"tensors of its module are empty.*zero_to_fp32"):
        load_backbone(spec(tmp_path / "x.pth"))
    torch.save(dict.fromkeys(model.state_dict(), torch.ones(0)), tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"the tensors are empty.*zero_to_fp32"):
        load_backbone(spec(tmp_path / "x.pth"))


def test_what_a_training_saved_of_a_model_says_what_to_do(tmp_path, model):
    """The biases, as BitFit has them."""
    part = {key: value for key, value in model.state_dict().items() if key.endswith("norm1.bias")}
    torch.save(part, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"a part of the model alone.*PART, strict=False"):
        load_backbone(spec(tmp_path / "x.pth"))


def test_what_timm_s_own_training_writes(tmp_path, model):
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model=TINY_MODEL),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(1, metric=0.5)
    assert_taken(tmp_path / "model_best.pth.tar", model)


def test_a_model_that_is_there_twice_is_refused(tmp_path, model, raw):
    both = named(raw, "student.") | named(model.state_dict(), "teacher.")
    torch.save(both, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"several times, as student\., teacher\."):
        load_backbone(spec(tmp_path / "x.pth"))
    torch.save({"a": raw, "b": raw}, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match="several state dicts, a, b: keep one"):
        load_backbone(spec(tmp_path / "x.pth"))


def test_a_model_that_is_wrapped_itself(tmp_path):
    """Its own names have what others are rid of; a file comes in with it and without."""
    own = compiled_encoder().state_dict()
    assert any("._orig_mod." in key for key in own)
    for state in (own, {key.replace("_orig_mod.", ""): value for key, value in own.items()}):
        torch.save(named(state, "module."), tmp_path / "x.pth")
        found = load_backbone(
            BackboneSpec("python:tests.own_models:compiled_encoder", checkpoint=tmp_path / "x.pth")
        )
        assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in own.items())


def test_names_that_differ_by_a_wrapper_alone_are_refused(tmp_path, model, raw):
    both = model.state_dict() | within(raw, "_orig_mod")
    torch.save(both, tmp_path / "x.pth")
    message = (
        r"expected one tensor for blocks\.1\.norm1\.weight, found two that differ by a wrapper"
    )
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "more",
    [
        {"criterion.weight": torch.ones(7)},
        {"train_loss.pos_weight": torch.ones(7), "valMetrics.tp": torch.zeros(7).long()},
    ],
)
@pytest.mark.parametrize("start", ["model.", ""])
def test_what_a_training_judges_by_is_left_out(tmp_path, model, more, start):
    torch.save(named(model.state_dict(), start) | more, tmp_path / "x.pth")
    line = f"as of a loss or a metric: {', '.join(sorted(more))}"
    assert_taken(tmp_path / "x.pth", model, line)


@pytest.mark.parametrize(
    "more",
    [
        {"fc.weight": torch.ones(7, 8), "fc.bias": torch.ones(7)},
        # Of a loss that has the classifier in it (ArcFace).
        {"criterion.weight": torch.ones(7, 8)},
    ],
)
def test_what_is_beside_the_model_stays_an_error(tmp_path, model, more):
    torch.save(named(model.state_dict(), "model.") | more, tmp_path / "x.pth")
    message = rf"keys unexpected: {', '.join(more)}\. All of .*call it head\.weight and head\.bias"
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(tmp_path / "x.pth"))


def test_what_is_beside_a_model_of_transformers(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    model.save_pretrained(tmp_path / "base")
    where = f"transformers:{tmp_path / 'base'}"
    more = {"loss_fn.weight": torch.ones(3), "fc.weight": torch.ones(3, 48)}
    torch.save(named(model.state_dict(), "model.") | more, tmp_path / "x.ckpt")
    message = r"unexpected: fc\.weight\. All of .*call it classifier\.weight"
    with pytest.raises(BackboneError, match=message):
        load_backbone(BackboneSpec(where, checkpoint=tmp_path / "x.ckpt"))
    del more["fc.weight"]
    torch.save(named(model.state_dict(), "model.") | more, tmp_path / "x.ckpt")
    found = load_backbone(BackboneSpec(where, checkpoint=tmp_path / "x.ckpt"))
    assert any("loss_fn.weight" in note for note in found.notes)


@pytest.mark.parametrize("twice", ["head", "norm"])
def test_a_tensor_beside_the_model_s_of_its_name_is_refused(tmp_path, model, twice):
    """A head of the user's own module, say: nobody knows which one made the answers."""
    leaves = [f"{twice}.{leaf}" for leaf in ("weight", "bias")]
    own = {leaf: model.get_parameter(leaf) for leaf in leaves}
    torch.save(named(model.state_dict(), "model.") | own, tmp_path / "x.pth")
    assert_taken(tmp_path / "x.pth", model)
    more = {leaf: value + 1 for leaf, value in own.items()}
    torch.save(named(model.state_dict(), "model.") | more, tmp_path / "x.pth")
    message = rf"has {twice}\.weight beside model\.{twice}\.weight: expected one"
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(tmp_path / "x.pth"))


@pytest.mark.parametrize("lost", ["head.weight", "head.bias"])
def test_half_a_classifier_is_refused(tmp_path, model, lost):
    """The other half would be what the model was initialised with."""
    state = {key: value for key, value in model.state_dict().items() if key != lost}
    torch.save(state, tmp_path / "x.pth")
    torch.save(model.state_dict(), tmp_path / "base.pth")
    message = rf"keys missing: {lost}.* is there whole or not at all; a bias .* is one of zeros"
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(tmp_path / "x.pth"))
    with pytest.raises(BackboneError, match=message):
        extract_adapter(tmp_path / "x.pth", spec(tmp_path / "base.pth"))
    del state[{"head.weight": "head.bias", "head.bias": "head.weight"}[lost]]
    torch.save(state, tmp_path / "x.pth")
    assert load_backbone(spec(tmp_path / "x.pth")).facts.classes == 0


def test_half_a_classifier_of_a_function_s_model_is_refused(tmp_path):
    own = encoder(depth=1)
    classifier = classifier_path(own)
    state = {k: v for k, v in own.state_dict().items() if k != f"{classifier}.bias"}
    torch.save(state, tmp_path / "x.pth")
    at = BackboneSpec(
        "python:tests.own_models:encoder", {"depth": 1}, checkpoint=tmp_path / "x.pth"
    )
    with pytest.raises(BackboneError, match=rf"keys missing: {classifier}\.bias\."):
        load_backbone(at)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of what it writes and reads
@pytest.mark.parametrize(
    "stored",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to_sparse_csr(),
        lambda value: torch.quantize_per_tensor(value, 0.01, 0, torch.qint8),
    ],
)
def test_sparse_and_quantised_tensors_are_their_numbers(tmp_path, model, stored):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["head.weight"] = (state["head.weight"] / 0.01).round() * 0.01
    torch.save(
        {key: stored(value) if value.ndim == 2 else value for key, value in state.items()},
        tmp_path / "x.pth",
    )
    found = load_backbone(spec(tmp_path / "x.pth")).model.state_dict()["head.weight"]
    assert torch.equal(found, state["head.weight"])
    assert np.array_equal(read_pth(tmp_path / "x.pth")[0]["head.weight"], found.numpy())


def test_a_tensor_without_values_is_named(tmp_path, model):
    state = model.state_dict() | {"norm.bias": torch.empty(48, device="meta")}
    torch.save(state, tmp_path / "x.pth")
    message = r"norm\.bias: expected a tensor with values.*, found one of the device meta"
    for error, read in (
        (BackboneError, lambda f: load_backbone(spec(f))),
        (AdapterError, read_pth),
    ):
        with pytest.raises(error, match=message):
            read(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_named(tmp_path, model, value):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "base.pth")
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    torch.save(state, tmp_path / "tuned.pth")
    message = r"tuned\.pth: blocks\.1\.mlp\.fc1\.weight: expected finite values.* in 1 of "
    for read in (
        lambda: extract_adapter(tmp_path / "tuned.pth", spec(tmp_path / "base.pth")),
        lambda: load_backbone(spec(tmp_path / "tuned.pth")),
    ):
        with pytest.raises(BackboneError, match=f"`checkpoint`: .*{message}"):
            read()


@pytest.mark.parametrize(
    ("write", "how"),
    [
        (lambda m, x, f: torch.jit.save(torch.jit.trace(m, x), f), r"jit\.load\(FILE\).*ct\(\)\)"),
        (lambda m, x, f: torch.export.save(torch.export.export(m, (x,)), f), r"export\.load"),
    ],
    ids=["script", "exported"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_program_of_torch_is_no_file_of_weights(tmp_path, write, how):
    write(torch.nn.Linear(2, 2), torch.zeros(1, 2), file := tmp_path / "x.pt2")
    with pytest.raises(AdapterError, match=rf"it holds a program.*torch\.save\(dict\(torch\.{how}"):
        read_pth(file)


def test_what_cannot_be_read_is_named(tmp_path, model):
    file = tmp_path / "x.pth"
    torch.save({"state_dict": model.state_dict(), "share": Fraction(1, 2)}, file)
    message = r"it holds fractions\.Fraction, which are never loaded.*torch\.save\("
    for error, read in (
        (BackboneError, lambda f: load_backbone(spec(f))),
        (AdapterError, read_pth),
    ):
        with pytest.raises(error, match=message) as caught:
            read(file)
        assert "In PyTorch 2.6" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html><body>404", "it is a page of HTML: download the file"),
        (b"no tensors at all, a text", r"it begins with b'no tensors at all, a tex', as no f"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS's pointer to the file"),
        (b"PK\x03\x04 and no more", "not a ZIP archive"),
        (b"\x80\x02no pickle", "Weights only load failed"),
    ],
)
def test_a_file_that_is_none_of_torch_s_is_named(tmp_path, content, message):
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    for error, read in (
        (BackboneError, lambda f: load_backbone(spec(f))),
        (AdapterError, read_pth),
    ):
        with pytest.raises(error, match=f"x.pth cannot be read: .*{message}") as caught:
            read(file)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS's pointer to the file"),
        (b"\xef\xbb\xbf\n<html><body>404", "a page of HTML"),
        (b"", "it is empty"),
        (
            b"no arrays or tensors",
            "header too large|it begins with b'no arrays or tensors', as no f",
        ),
    ],
)
def test_what_lies_in_the_place_of_tensors_is_named(tmp_path, content, message):
    for name in ("x.safetensors", "x.npz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackboneError, match=message) as caught:
            load_backbone(spec(tmp_path / name))
        assert "pickle" not in str(caught.value).partition("Expected")[0]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "x.safetensors"}}))
    with pytest.raises(BackboneError, match=rf"x\.safetensors: .*({message})"):
        load_backbone(spec(index))
    index.unlink()
    with pytest.raises(AdapterError, match=message):
        read_tensors(tmp_path / "x.safetensors", AdapterError)
    transformers.ViTConfig(num_hidden_layers=1, architectures=["ViTModel"]).save_pretrained(
        tmp_path
    )
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackboneError, match=r"transformers:.* cannot be loaded") as caught:
            load_backbone(BackboneSpec(f"transformers:{tmp_path}"))
        assert "weights_only" not in str(caught.value)
        assert content[:2] == b"no" or f"{name}: it is" in str(caught.value)
        (tmp_path / name).unlink()


def test_a_list_of_files_that_is_none_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    transformers.ViTConfig(num_hidden_layers=1, architectures=["ViTModel"]).save_pretrained(
        tmp_path
    )
    for backbone in (spec(index), BackboneSpec(f"transformers:{tmp_path}")):
        with pytest.raises(BackboneError, match=r"index\.json.*: it is Git LFS's pointer"):
            load_backbone(backbone)


def test_an_adapter_s_file_is_read_alike(tmp_path):
    tensor = torch.ones(2)
    args = argparse.Namespace(lr=0.1)
    torch.save({"model": {}, "ema": {"x.u": tensor}, "args": args}, tmp_path / "x.pth")
    assert read_pth(tmp_path / "x.pth")[0].keys() == {"x.u"}
    torch.save({"state_dict": {"x.u": tensor}, "EMA": {"x.u": 2 * tensor}}, tmp_path / "x.pth")
    tensors, notes = read_pth(tmp_path / "x.pth")
    assert list(tensors["x.u"]) == [2, 2]
    assert notes == ("weights taken from EMA of the checkpoint, not from state_dict",)


def test_a_divided_model_is_read_by_its_list(tmp_path, model):
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    files = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(whole)}
    for name in set(files.values()):
        save_file({k: v for k, v in whole.items() if files[k] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_taken(index, model)
    for damaged in ({}, {"weight_map": {"x": "../x.safetensors"}}, []):
        index.write_text(json.dumps(damaged))
        with pytest.raises(BackboneError, match="expected a weight_map of files beside it"):
            load_backbone(spec(index))


def test_a_tensor_in_two_files_of_a_divided_model_is_refused(tmp_path, model):
    """One of them was left by an earlier save."""
    state = model.state_dict()
    first = {"pos_embed": state["pos_embed"]}
    save_file(first, tmp_path / "a.safetensors")
    save_file({**state, "pos_embed": state["pos_embed"] + 1}, tmp_path / "b.safetensors")
    files = {key: f"{'a' if key in first else 'b'}.safetensors" for key in state}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(BackboneError, match=r"pos_embed is in b\.safetensors and in another"):
        load_backbone(spec(index))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_no_weights_are_refused(tmp_path, model, kind):
    state = {key: (value * 100).to(kind) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"of a type that no weights have: cls_token \("):
        load_backbone(spec(tmp_path / "w.pth"))


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", None])
def test_numbers_that_are_no_weights_of_transformers_are_refused(tmp_path, kind, name):
    """Of a directory and of a file beside it; whole numbers are the type of some buffers."""
    theirs = transformers.BeitForImageClassification(
        transformers.BeitConfig(**VIT, use_relative_position_bias=True)
    )
    theirs.save_pretrained(tmp_path)
    assert load_backbone(BackboneSpec(f"transformers:{tmp_path}")).facts.classes == 3
    state = {k: (v * 100).to(kind) if v.ndim == 2 else v for k, v in theirs.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / (name or "w.pth")
    if file.suffix == ".safetensors":
        save_file(state, file, {"format": "pt"})
    else:
        torch.save(state, file)
    found = BackboneSpec(f"transformers:{tmp_path}", checkpoint=None if name else file)
    with pytest.raises(BackboneError, match=r"keys of a type that no weights have: beit.* bring"):
        load_backbone(found)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gptq", "fp8", None])
def test_quantised_models_of_transformers_are_refused(tmp_path, method):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "load_in_8bit": True,
        **({"quant_method": method} if method else {}),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = f"found a quantization_config, {method or 'without a method'}. Save the model as it was"
    for file in (None, tmp_path / "model.safetensors"):
        with pytest.raises(BackboneError, match=said):
            load_backbone(BackboneSpec(f"transformers:{tmp_path}", checkpoint=file))


def test_a_function_s_model_inside_of_another(tmp_path):
    torch.manual_seed(5)
    own = encoder(depth=1)
    state = {"ema": average(own.state_dict()), "model": own.state_dict()}
    torch.save(state, tmp_path / "x.pth")
    found = load_backbone(
        BackboneSpec("python:tests.own_models:encoder", {"depth": 1}, checkpoint=tmp_path / "x.pth")
    )
    assert "ema of the checkpoint" in found.notes[0]
    assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in own.state_dict().items())


@pytest.mark.parametrize("old", [False, True])
def test_a_transformers_model_inside_of_another(tmp_path, old):
    """Also by the names that it had before version 5."""
    torch.manual_seed(5)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    transformers.ViTForImageClassification(model.config).save_pretrained(tmp_path / "base")
    if old:
        model.save_pretrained(tmp_path / "own")
        state = load_file(tmp_path / "own" / "model.safetensors")
    else:
        state = model.state_dict()
    torch.save({"state_dict": named(state, "model.")}, tmp_path / "x.ckpt")
    where = f"transformers:{tmp_path / 'base'}"
    found = load_backbone(BackboneSpec(where, checkpoint=tmp_path / "x.ckpt"))
    assert (state.keys() != model.state_dict().keys()) == old
    for key, value in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_a_model_that_peft_wraps_says_what_to_do(tmp_path):
    """Of transformers, read as its own model and as timm's."""
    config = transformers.ViTConfig(**VIT)
    own = transformers.ViTForImageClassification(config)
    own.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(own, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.save(wrapped.state_dict(), tmp_path / "x.pth")
    for model in (f"transformers:{tmp_path / 'base'}", TINY_MODEL):
        args = TINY_ARGS if model == TINY_MODEL else {}
        with pytest.raises(BackboneError, match=r"PEFT wraps.*save_pretrained.*merge_and_unload"):
            load_backbone(BackboneSpec(model, args, checkpoint=tmp_path / "x.pth"))


def test_an_extracted_adapter_says_which_weights_it_is_of(tmp_path, model, raw):
    torch.save(model.state_dict(), tmp_path / "base.pth")
    torch.save({"model": raw, "ema": raw}, tmp_path / "tuned.pth")
    config = extract_adapter(tmp_path / "tuned.pth", spec(tmp_path / "base.pth")).config
    (line,) = config.extra["imported_from"]["assumed"]
    assert line.startswith("weights taken from ema")
    assert unwrapped({}) == unwrapped({"n_averaged": torch.tensor(3)}) == ({}, ())
