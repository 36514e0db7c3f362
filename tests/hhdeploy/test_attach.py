"""attach, extract and save on models that are not timm's."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from hhdeploy import export
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import load_adapter
from hhdeploy.backbones.structure import (
    base_sha256,
    classifier_path,
    find_linears,
    signs_sha256,
)
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.training import attach, detach, extract, save
from hhdeploy.training.heads import linear_of, replace_module
from hhdeploy.training.recipe import replace_classifier
from tests.own_models import authors_vit, encoder, ending, gated, pooled, reading, torchvision_vit
from tests.parity.architectures import VIT
from tests.support import TINY_ARGS, TINY_MODEL, assert_parity, random_adapter, tiny_backbone

EVERY = ("q", "k", "v", "proj", "fc1", "fc2")


def shaken(model):
    """Random values on top of what is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class Stem(nn.Module):
    """A convolution with BatchNorm before tokens and a Linear or two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24))
        self.mix, self.head = nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mix(tokens)).mean(1))


STEM_S = AdapterConfig("mine", num_classes=2, target_modules=("mix",))


def on_a_stem():
    torch.manual_seed(1)
    return attach(Stem(), STEM_S)


def step(model, parameters=None):
    optimizer = torch.optim.AdamW(parameters or [p for p in model.parameters() if p.requires_grad])
    nn.functional.cross_entropy(
        model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 0, 1])
    ).backward()
    optimizer.step()


def test_statistics_that_moved_are_held_by_no_adapter(tmp_path):
    model = on_a_stem()
    model.train()
    step(model)
    with pytest.raises(AdapterError, match=r"stem\.1\.running_mean .*eval\(\) on those modules"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()

    model = on_a_stem()
    model.train()
    model.stem[1].eval()
    step(model)
    save(model, tmp_path / "a")


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_moved_is_held_by_no_adapter(persistent):
    """One that no state dict has is as little in the adapter, and as much in the answers."""
    model = Stem()
    model.stem.register_buffer("seen", torch.ones(24), persistent=persistent)
    attach(model, STEM_S)
    extract(model)
    model.stem.seen += 0.5
    with pytest.raises(AdapterError, match=r"stem\.seen has changed since"):
        extract(model)
    model.stem.seen -= 0.5
    extract(deepcopy(model).half())


def test_a_cache_may_go_or_be_of_another_size():
    model = Stem()
    model.stem.register_buffer("cache", torch.ones(24), persistent=False)
    attach(model, STEM_S)
    model.stem.cache = torch.ones(48)
    extract(model)
    del model.stem.cache
    extract(model)


def test_weights_that_were_trained_too_are_held_by_no_adapter(tmp_path):
    model = on_a_stem().eval()
    step(model)  # what is the adapter's may change
    extract(model)
    model.requires_grad_(True)
    step(model)
    with pytest.raises(AdapterError, match=r"stem\.0\.weight has changed.*parameters that require"):
        extract(model)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averaged_weights_are_saved(decay, tmp_path):
    model = on_a_stem().eval()
    average = AveragedModel(model, avg_fn=lambda old, new, _: decay * old + (1 - decay) * new)
    before = model.mix.parametrizations.weight.original.clone()
    for _ in range(100):
        step(model)
        average.update_parameters(model)
    moved = average.module
    assert not torch.equal(moved.mix.parametrizations.weight.original, before)  # is rounded
    save(moved, tmp_path / "a")
    np.testing.assert_array_equal(
        load_adapter(tmp_path / "a").head.weight, moved.head.weight.detach().numpy()
    )
    assert not np.array_equal(extract(moved).head.weight, extract(model).head.weight)


@pytest.mark.parametrize("share", [1e-3, float("nan")])
def test_a_small_part_of_a_frozen_weight_that_moved_is_seen(share):
    model = on_a_stem()
    weight = model.stem[0].weight
    with torch.no_grad():
        weight.view(-1)[7] += share * weight.norm()
    with pytest.raises(AdapterError, match=r"stem\.0\.weight has changed.*what averages them"):
        extract(model)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Dropout(0.1), nn.Linear(24, 2)),
        nn.Linear(24, 2, bias=False),
        nn.Linear(24, 3),
        None,
    ],
)
def test_a_classifier_that_no_adapter_holds_is_named(head):
    model = on_a_stem()
    model.head = head
    with pytest.raises(AdapterError, match=r"(?s)^head: expected .* a Linear of 2 classes.*found"):
        extract(model)
    model.head = nn.Linear(24, 2)
    assert extract(model).head.weight.shape == (2, 24)


@pytest.mark.parametrize("use", [extract, detach])
def test_of_a_wrapper_the_module_with_the_adapter_is_named(use):
    model = on_a_stem()
    for outer in (nn.ModuleDict({"ema": model}), SimpleNamespace(ema=model)):  # timm's: no module
        with pytest.raises(AdapterError, match=r"inside of this \w+, at 'ema': pass that one"):
            use(outer)
    with pytest.raises(AdapterError, match="no adapter is attached to this model"):
        use(Stem())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": ("cat", "dog", "owl")}, "class_names: expected 2 names"),
        ({"class_names": (0, 1)}, "class_names: expected a list of strings"),
        ({"class_names": ("a", "a")}, "class_names: expected a name of its own .*'a' and 'a'"),
        ({"class_names": ("\u00e9", "e\u0301")}, r"class_names: expected .*'\\xe9' and 'e\\u0301'"),
        ({"class_names": "ab"}, "class_names: expected a list of strings, found 'ab'"),
        ({"class_names": {"a", "b"}}, "class_names: expected a list of strings, found {'"),
        ({"target_modules": "mix"}, "target_modules: expected a list of strings, found 'mix'"),
        ({"reflection": "orthogonl"}, "reflection: expected one of"),
        ({"problem_type": "multi_label"}, "problem_type: expected one of"),
        ({"form": "lora"}, "form: expected one of"),
        ({"r": -1}, "r: expected a rank"),
        ({"num_classes": 0}, "num_classes: expected a positive integer"),
        ({"preprocess": {"mean": 1}}, r"preprocess: expected Preprocess\(...\), found {'mean"),
        ({"compressed": "rank 3"}, r"compressed: expected Compression\(...\), found 'rank 3'"),
        ({"extra": {"weights": torch.ones(2)}}, "cannot be written as JSON"),
    ],
)
def test_what_could_not_be_saved_is_refused_before_training(settings, message):
    torch.manual_seed(1)
    config = AdapterConfig("mine", **{"num_classes": 2, "target_modules": ("mix",), **settings})
    model = Stem()
    with pytest.raises(AdapterError, match=f"^the new adapter: .*{message}"):
        attach(model, config)
    attach(model, replace(STEM_S, extra={"note": "it is as it was"}))


@pytest.mark.parametrize("classes", [2, None])
def test_a_classifier_that_an_export_would_refuse_is_refused_before_training(classes):
    model = gated().train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    config = AdapterConfig("mine", num_classes=classes, target_modules=("fc1",))
    random = torch.get_rng_state()
    with pytest.raises(BackboneError, match=r"^mine: gate, the last Linear, was taken for the cl"):
        attach(model, config)
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.pretrained_cfg = {"classifier": "head"}
    attach(model, config)


OWN_ENDINGS = {
    "normed": r"head, Normed, computes more than W x \+ b",
    "scaled": r"head, Scaled, computes more than W x \+ b",
    "hooked": r"head, Linear, computes more than W x \+ b",
    "weight norm": "a weight that is computed from other parameters",
}


@pytest.mark.parametrize("how", OWN_ENDINGS)
def test_a_classifier_that_an_adapter_s_cannot_replace_is_refused(how, tmp_path):
    """What else it did was lost in training, and stayed in the graph."""
    config = AdapterConfig("m", target_modules=("fc1",), num_classes=3)
    model = ending(how)
    kept = dict(model.named_parameters())
    with pytest.raises(BackboneError, match=OWN_ENDINGS[how]):
        attach(model, config)
    assert all(now is kept[name] for name, now in model.named_parameters())
    trained = attach(ending("renamed"), config)
    save(trained, tmp_path / "a")
    with pytest.raises(BackboneError, match=OWN_ENDINGS[how]):
        attach(model, load_adapter(tmp_path / "a"))
    for fold in (True, False):
        with pytest.raises(BackboneError, match=OWN_ENDINGS[how]):
            export(
                "python:tests.own_models:ending",
                {"a": tmp_path / "a"},
                tmp_path / "b",
                fold=fold,
                model_args={"how": how},
                verify=False,
                cache=None,
            )
    attach(model, replace(config, num_classes=None))


@pytest.mark.parametrize("size", [None, (5, 9, 9)])
def test_a_guess_that_cannot_be_tried_is_none_s_fault(size):
    """Of a model that does not say its images, or runs on other things where it is trained."""
    model = gated()
    model.input_size = size
    attach(model, AdapterConfig("mine", num_classes=2, target_modules=("fc1",)))


@pytest.mark.parametrize(
    ("model", "adapter", "seed", "message"),
    [
        (
            Stem,
            "adapters/mine",
            0,
            r"AdapterConfig to attach, found str 'adapters/mine'\. load_a",
        ),
        (Stem, Path("mine"), 0, r"found PosixPath .*load_adapter reads"),
        (Stem, AdapterConfig, 0, "expected an Adapter or an AdapterConfig to attach, found type"),
        (lambda: STEM_S, Stem, 0, r"expected the model, a torch\.nn\.Module, found AdapterConfig"),
        (lambda: Stem, STEM_S, 0, r"expected the model, a torch\.nn\.Module, found type"),
        (Stem, STEM_S, 3.5, r"^`seed`: expected -?\d+ to \d+, a whole number, found 3\.5"),
        (Stem, STEM_S, 2**64, "`seed`: expected .* found 18446744073709551616"),
    ],
)
def test_what_cannot_be_attached_is_named(model, adapter, seed, message):
    with pytest.raises(AdapterError, match=message):
        attach(model(), adapter, seed=seed)


def test_a_seed_of_numpy_is_the_number():
    one, other = (attach(Stem(), STEM_S, seed=seed) for seed in (np.int64(3), 3))
    np.testing.assert_array_equal(extract(one).head.weight, extract(other).head.weight)


@pytest.mark.parametrize("given", ["a model", None, STEM_S])
def test_of_what_is_no_model_nothing_is_taken_off(given):
    for use in (extract, detach):
        with pytest.raises(AdapterError, match="no adapter is attached to this model"):
            use(given)


def test_a_model_without_its_values_is_refused():
    model = Stem()
    model.head = nn.LazyLinear(7)
    with pytest.raises(
        BackboneError, match=r"Stem: head\.weight: .*a lazy module that has not run"
    ):
        attach(model, STEM_S)
    model(torch.ones(2, 3, 32, 32))
    attach(model, STEM_S)


def test_norms_that_were_frozen_before_are_told_of():
    """Their weights are buffers then, of the very same checkpoint."""
    model = Stem()
    adapter = extract(attach(timm.layers.freeze_batch_norm_2d(deepcopy(model)), STEM_S))
    with pytest.raises(AdapterError, match=r"was trained on the weights .*freeze_batch_norm_2d\)"):
        attach(model, adapter)
    other = deepcopy(model)
    with torch.no_grad():
        other.mix.weight += 1
    adapter = extract(attach(other, STEM_S))
    with pytest.raises(AdapterError, match=r"was trained on the weights .*with `checkpoint`\.$"):
        attach(model, adapter)


@pytest.mark.parametrize("classes", [5, 3])
def test_one_of_two_classifiers_takes_no_other(classes):
    """Of a distilled model, which averages both: classes of another number failed in its forward,
    the same number after the training."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **TINY_ARGS)
    with pytest.raises(BackboneError, match=r"without classes with .*'classifier': ''\}"):
        attach(model, AdapterConfig("mine"))
    model.pretrained_cfg = {**model.pretrained_cfg, "classifier": "head"}
    with pytest.raises(BackboneError, match=r"head, as pretrained_cfg has it, .* more than"):
        attach(model, AdapterConfig("mine", num_classes=classes))
    model.pretrained_cfg = {**model.pretrained_cfg, "classifier": ""}
    attach(model, AdapterConfig("mine"))


@pytest.mark.parametrize("classes", [None, 3])
def test_on_the_meta_device_parameters_are_counted_and_not_saved(tmp_path, classes):
    """What an adapter began with, or was trained to, is lost there."""
    config = replace(STEM_S, num_classes=classes)
    trained = extract(attach(Stem(), config))
    model = attach(Stem().to("meta"), config)
    expected = sum(p.numel() for p in attach(Stem(), config).parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    said = r"Stem: stem\.0\.weight: expected a tensor with values, found one of torch's meta device"
    for filled in (model, model.to_empty(device="cpu")):
        with pytest.raises(AdapterError, match=said):
            save(filled, tmp_path / "adapter")
    with pytest.raises(BackboneError, match=said):
        attach(Stem().to("meta"), trained)


def test_a_model_of_inference_mode_is_refused_and_its_copy_is_taken():
    with torch.inference_mode():
        model = Stem()
    with pytest.raises(AdapterError, match=r"^stem\.0\.weight was made in .*copy\.deepcopy\(model"):
        attach(model, STEM_S)
    step(attach(deepcopy(model), STEM_S))


def test_one_licence_is_no_list_of_letters():
    model = attach(Stem(), replace(STEM_S, license="mit"))
    assert extract(model).config.license == ("mit",)


def with_a_norm(fc1, fc2):
    nn.utils.parametrizations.weight_norm(fc1)


def with_an_old_norm(fc1, fc2):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(fc1)


def with_one_weight(fc1, fc2):
    fc2.weight = fc1.weight


def with_one_bias(fc1, fc2):
    fc2.bias = fc1.bias


def in_whole_numbers(fc1, fc2):
    fc1.weight = nn.Parameter(fc1.weight.mul(100).to(torch.int8), requires_grad=False)


def in_eight_bits(fc1, fc2):
    fc1.weight = nn.Parameter(fc1.weight.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_norm, r"^0: its weight is computed from other parameters"),
        (with_an_old_norm, r"^0: its weight is computed from other parameters"),
        (
            with_one_weight,
            r"^0: one parameter is the weight of several modules \(0.weight, 1.weight",
        ),
        (with_one_bias, r"^0: one parameter is the bias of several modules \(0.bias, 1.bias"),
        (in_whole_numbers, r"^0: expected a weight of numbers as they were trained, found int8"),
        (in_eight_bits, r"^0: expected a weight of .* found float8_e4m3fn, as quantisation"),
    ],
)
def test_a_weight_that_is_no_linear_s_own_is_refused_before_training(change, message):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    change(model[0], model[1])
    keys = list(model.state_dict())
    config = AdapterConfig("own", num_classes=None, r=2, target_modules=("0",))
    with pytest.raises(AdapterError, match=message):
        attach(model, config)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters() if p.dtype == torch.float32)
    others = replace(config, target_modules=("1",))
    if change in (with_one_weight, with_one_bias):
        with pytest.raises(AdapterError, match=r"^1: one parameter"):
            attach(model, others)
    else:  # what the adapter leaves alone may be as it likes
        assert set(extract(attach(model, others)).sites) == {"1"}


def test_the_packed_weight_of_an_attention_that_pools_is_refused_before_training():
    """It computes q of the probe and k and v of the tokens: in a graph it is two weights."""
    model = pooled()
    config = AdapterConfig("own", num_classes=7, r=2, target_modules=("pool.in_proj",))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"^pool\.in_proj: q, k and v have inputs of their own"):
        attach(model, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attach(model, replace(config, target_modules=("layers.0.self_attn.in_proj", "pool.out_proj")))


@pytest.mark.parametrize(
    ("how", "found"),
    [
        *(("not transposed", "matmul"), ("and back", "matmul"), ("from the left", "matmul")),
        *(("by its norm", "norm"), ("scaled as well", "mul"), ("scaled", "mul"), ("moved", "add")),
        *(("as a table", "embedding"), ("in halves", "getitem"), ("in chunks", "chunk")),
        *(("by einsum", "einsum"), ("by addmm", "addmm"), ("by a convolution", "getitem")),
        ("bias elsewhere", "mul"),
    ],
)
def test_what_reads_a_weight_otherwise_is_refused_before_training(how, found):
    """An export has no such site (tests/exporters/test_tags.py)."""
    model = reading(how)
    config = AdapterConfig("own", num_classes=7, r=2, target_modules=("fc2",))
    with pytest.raises(AdapterError, match=rf"^mlp\.fc2: expected a Linear .*, found {found} of"):
        attach(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, replace(config, target_modules=("fc1",)))


@pytest.mark.parametrize(
    "how", ["as a linear", "twice", "without its bias", "by hand", "by hand, joined"]
)
def test_a_product_however_it_is_written_is_trained(how):
    attach(reading(how), AdapterConfig("own", num_classes=7, r=2, target_modules=("fc2",)))


def test_one_module_under_two_names_is_refused_before_training():
    twice = nn.Linear(6, 6)
    model = nn.Sequential(nn.Sequential(twice), nn.Sequential(twice), nn.Linear(6, 2))
    config = AdapterConfig("own", num_classes=None, r=2, target_modules=("0.0",))
    with pytest.raises(AdapterError, match=r"several modules \(0.0.weight, 1.0.weight\)"):
        attach(model, config)


def test_numpy_s_integers_are_integers(tmp_path):
    torch.manual_seed(1)
    model = attach(Stem(), replace(STEM_S, num_classes=np.int64(2)))
    save(model, tmp_path / "a")
    assert load_adapter(tmp_path / "a").config.num_classes == 2


CASTS = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", CASTS)
def test_a_model_that_was_cast_is_the_same(dtype):
    model = Stem()
    with torch.no_grad():
        model.stem[0].bias.normal_(std=1e-6)  # as class tokens begin, below what float16 keeps
    extract(attach(model, STEM_S).to(dtype))


@pytest.mark.parametrize("dtype", CASTS)
def test_of_a_model_that_was_cast_what_moved_is_seen(dtype):
    model = on_a_stem()
    model.train()
    step(model)
    with pytest.raises(AdapterError, match=r"stem\.1\.running_mean has changed since"):
        extract(model.to(dtype))


RECORDS = {"training": {"val_top1": 1.0}, "imported_from": {"format": "peft"}}


def with_records(directory):
    """An adapter on disk whose configuration says how its tensors came about."""
    model = shaken(on_a_stem().eval())
    save(model, directory)
    file = directory / "adapter_config.json"
    lost = {"rank": 3, "max_range_error": 0.25, "worst_site": "mix"}
    said = {**json.loads(file.read_text()), **RECORDS, "note": "mine", "compressed": lost}
    file.write_text(json.dumps(said))
    return load_adapter(directory), {**RECORDS, "compressed": lost}


def test_the_caller_s_random_numbers_go_on(tmp_path):
    model, head = Stem(), nn.Linear(24, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    save(attach(model, STEM_S), tmp_path / "a")
    attach(detach(model), load_adapter(tmp_path / "a"))
    replace_classifier(detach(model), "head", 3, seed=1)
    linear_of(head.weight, head.bias)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_said_of_tensors_is_not_said_of_others(tmp_path):
    adapter, records = with_records(tmp_path / "a")
    model = attach(detach(on_a_stem()).eval(), adapter)
    same = extract(model).config
    assert (same.extra, same.compressed) == (adapter.config.extra, adapter.config.compressed)
    step(model)
    save(model, tmp_path / "warm")
    warm = load_adapter(tmp_path / "warm").config
    assert warm.extra == {"note": "mine", "started_from": records}
    assert warm.compressed is None
    model = attach(detach(model), load_adapter(tmp_path / "warm"))
    step(model)
    assert extract(model).config.extra == {"note": "mine", "started_from": warm.origin}


def test_a_classifier_alone_that_was_trained_is_another_adapter(tmp_path):
    adapter, records = with_records(tmp_path / "a")
    model = attach(detach(on_a_stem()).eval(), adapter)
    step(model, [model.head.bias])
    assert extract(model).config.origin == {"started_from": records}


def test_a_new_adapter_of_an_old_configuration_has_none_of_its_records(tmp_path):
    adapter, records = with_records(tmp_path / "a")
    new = extract(attach(detach(on_a_stem()), adapter.config)).config
    assert new.extra == {"note": "mine", "started_from": records}
    assert new.compressed is None


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_a_wrapped_model_is_the_model_in_it(wrap, tmp_path):
    model = shaken(on_a_stem().eval())
    save(model, tmp_path / "bare")
    wrapped = wrap(model)
    save(wrapped, tmp_path / "wrapped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    detach(wrapped)
    with pytest.raises(AdapterError, match="wraps the model: attach the adapter to the model"):
        attach(wrapped, AdapterConfig("mine", num_classes=2, target_modules=("mix",)))


class Outer(nn.Module):
    """A wrapper of the user's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options)


def compiled(module):
    return torch.compile(module, backend="eager")


def small_vit():
    config = AdapterConfig(TINY_MODEL, num_classes=5, target_modules=EVERY)
    return shaken(attach(tiny_backbone().model, config))


def replace_parts(model, paths, change):
    for path in paths:
        replace_module(model, path, change(model.get_submodule(path)))


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
@pytest.mark.parametrize(
    "paths", [["blocks.1"], ["blocks.0", "blocks.1", "head"], ["blocks.0.attn.qkv", "blocks"]]
)
def test_a_model_of_which_a_part_is_wrapped_is_the_model(wrap, paths, tmp_path):
    model = small_vit()
    save(model, tmp_path / "bare")
    norm = model.blocks[1].norm1
    replace_parts(model, paths, wrap)
    save(model, tmp_path / "wrapped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    with torch.no_grad():
        norm.weight.add_(0.1)
    with pytest.raises(AdapterError, match=r"blocks\.1\.norm1\.weight has changed since"):
        extract(model)


def test_parameters_in_a_wrapper_are_saved(tmp_path):
    """Those that an adapter replaces whole."""
    model = tiny_backbone().model
    adapter = extract(attach(model, AdapterConfig(TINY_MODEL, target_modules=("q", "v"))))
    weight = np.full(model.blocks[1].norm1.weight.shape, 0.5, np.float32)
    config = replace(adapter.config, fold_only=True)
    adapter = replace(adapter, config=config, values={"blocks.1.norm1.weight": weight})
    attach(detach(model), adapter)
    model.blocks[1] = compiled(model.blocks[1])
    np.testing.assert_array_equal(extract(model).values["blocks.1.norm1.weight"], weight)


@pytest.mark.parametrize(("change", "found"), [(Outer, "nothing"), (deepcopy, "another one")])
def test_what_an_adapter_changed_is_in_its_place_or_not_saved(change, found, tmp_path):
    model = small_vit()
    replace_parts(model, ["blocks.1"], change)
    with pytest.raises(
        AdapterError,
        match=rf"^blocks\.1\.\S+: expected the module .* found {found} \(4 of 8 ",
    ):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_an_adapter_is_attached_before_a_part_is_wrapped(wrap):
    model = tiny_backbone().model
    replace_parts(model, ["blocks.1"], wrap)
    with pytest.raises(AdapterError, match=r"^blocks\.1: a part of the model is wrapped: attach"):
        attach(model, AdapterConfig(TINY_MODEL, num_classes=5, target_modules=("q",)))


@pytest.mark.filterwarnings("ignore")  # of what torch will move to another package
@pytest.mark.parametrize("part", ["", "blocks", "blocks.1"])
def test_an_adapter_is_attached_before_a_model_is_quantised(part):
    model = tiny_backbone().model
    owner = model.get_submodule(part) if part else model
    quantised = torch.ao.quantization.quantize_dynamic(owner, {nn.Linear})
    if part:
        replace_module(model, part, quantised)
    else:
        model = quantised
    with pytest.raises(AdapterError, match=rf"^{part}.*found torch\.ao\.nn\..*Linear, which quan"):
        attach(model, AdapterConfig(TINY_MODEL, num_classes=5, target_modules=("q",)))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_attached_to_no_model_that_is_prepared_for_quantisation():
    model = tiny_backbone().model.train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(model, inplace=True)
    with pytest.raises(
        AdapterError, match=r"expected a module with the weights.*torch\.ao\.nn\.qat"
    ):
        attach(model, AdapterConfig(TINY_MODEL, num_classes=5, target_modules=("q",)))


@pytest.mark.parametrize(
    ("make", "sites", "classifier"),
    [(authors_vit, 12, "head"), (torchvision_vit, 12, "heads.head"), (encoder, 12, "head")],
)
def test_an_adapter_goes_on_and_comes_off(make, sites, classifier, tmp_path):
    torch.manual_seed(1)
    model = make().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    digest = base_sha256(model, classifier)
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bare = model(inputs)
    shaken(attach(model, AdapterConfig("mine", num_classes=5, target_modules=EVERY)))
    with torch.no_grad():
        adapted = model(inputs)
    assert adapted.shape == (2, 5)
    save(model, tmp_path / "a")
    detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    adapter = load_adapter(tmp_path / "a")
    assert len(adapter.sites) == sites
    assert adapter.head is not None
    assert adapter.head.path == classifier
    # Bound to the weights that it was trained on.
    assert adapter.config.base_sha256 == digest
    attach(model, adapter)
    with torch.no_grad():
        assert_parity(adapted.numpy(), model(inputs).numpy(), "algebra", "float32")
    assert extract(model).sites.keys() == adapter.sites.keys()
    with torch.no_grad():
        assert_parity(bare.numpy(), detach(model)(inputs).numpy(), "algebra", "float32")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_new_adapter_is_bound_to_timm_s_preprocessing(channels, tmp_path):
    """Also where the configuration does not repeat how the model was made."""
    import timm

    args = {**TINY_ARGS, "img_size": 40, "in_chans": channels}
    model = timm.create_model(TINY_MODEL, pretrained=False, **args)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.83}
    save(attach(model, AdapterConfig(TINY_MODEL, num_classes=2)), tmp_path / "a")
    found = load_adapter(tmp_path / "a").config
    assert found.base_sha256
    assert found.preprocess.input_size == (channels, 40, 40)
    assert found.preprocess.mean == pytest.approx((0.2,) if channels == 1 else (0.1, 0.2, 0.3))
    assert found.preprocess.crop_pct == 0.83
    detach(model)
    own = replace(found.preprocess, crop_pct=1.0)
    attach(model, AdapterConfig(TINY_MODEL, num_classes=2, preprocess=own))
    assert extract(model).config.preprocess == own


def test_channels_are_not_those_of_a_convolution_that_timm_calls_no_stem(tmp_path):
    """CSATv2's first convolution is of a cosine transform's 64 frequencies."""
    import timm

    model = timm.create_model("csatv2", pretrained=False, num_classes=3)
    config = AdapterConfig(
        "csatv2", num_classes=2, r=1, target_modules=(find_linears(model)[0].path,)
    )
    save(attach(model, config), tmp_path / "a")
    assert load_adapter(tmp_path / "a").config.preprocess.input_size == (3, 512, 512)


def test_the_size_of_images_is_the_model_s_where_it_has_no_one_patch_embed():
    """timm's configuration of the name says 224; an export would refuse what was trained."""
    import timm

    args = {"img_size": 64, "embed_dim": 24, "inner_dim": 12, "depth": 1}
    model = timm.create_model("tnt_s_patch16_224", num_heads_outer=2, num_heads_inner=2, **args)
    attach(model, AdapterConfig("tnt_s_patch16_224", num_classes=2, target_modules=("fc1",)))
    assert extract(model).config.preprocess.input_size == (3, 64, 64)


def test_a_size_that_timm_s_model_does_not_take_is_refused_before_the_training():
    """A Hiera does not say what it was made for: timm's configuration of the name says 224."""
    import timm

    small = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
    model = timm.create_model("hiera_tiny_224", img_size=64, **small)
    config = AdapterConfig("hiera_tiny_224", num_classes=2, target_modules=("fc1",))
    said = r"not compute on images \[1, 3, 224, 224\] alone: .* what it was made .* base_model_args"
    with pytest.raises(BackboneError, match=said):
        attach(model, config)
    attach(model, replace(config, base_model_args={"img_size": 64}))
    assert extract(model).config.preprocess.input_size == (3, 64, 64)


@pytest.mark.parametrize("stated", [None, {"classifier": "head"}])
def test_of_another_model_preprocessing_is_not_guessed(stated):
    model = authors_vit()
    if stated is not None:
        model.pretrained_cfg = stated
    attach(model, AdapterConfig("python:m:f", num_classes=2))
    assert extract(model).config.preprocess is None


@pytest.mark.parametrize(
    ("settings", "labels", "loss"),
    [
        ({"num_classes": 2, "class_names": ("cat", "dog")}, torch.tensor([0, 1]), "cross_entropy"),
        (
            {"num_classes": 2, "problem_type": "multi_label_classification"},
            torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
            "binary_cross_entropy_with_logits",
        ),
        ({"num_classes": None}, torch.tensor([3, 8]), "cross_entropy"),
    ],
)
def test_transformers_computes_its_loss_of_the_adapter_s_classes(settings, labels, loss):
    import transformers

    torch.manual_seed(1)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 32}
    known = transformers.ViTConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=9
    )
    model = transformers.ViTForImageClassification(known).eval()
    own = model.config
    attach(model, AdapterConfig("transformers:mine", target_modules=("q",), **settings))
    found = model(pixel_values=torch.randn(2, 3, 32, 32), labels=labels)
    assert torch.equal(found.loss, getattr(nn.functional, loss)(found.logits, labels))
    if "class_names" in settings:
        assert model.config.id2label == {0: "cat", 1: "dog"}
        assert model.config.label2id == {"cat": 0, "dog": 1}
    assert model.config.num_labels == model.num_labels == (settings["num_classes"] or 9)
    detach(model)
    assert model.config is own
    assert model.config.num_labels == model.num_labels == 9


def test_a_state_dict_has_every_tensor_of_the_sequential_form_once():
    config = replace(STEM_S, form="sequential", target_modules=("fc2",), r=1)
    torch.manual_seed(1)
    model = shaken(attach(authors_vit(), config))
    state = model.state_dict()
    places = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(places)) == len(places)
    # As it was written before: the matrix under the bias too.
    older = {k.replace(".weight.0.", ".bias.0."): v for k, v in state.items()} | state
    assert len(older) > len(state)
    torch.manual_seed(1)
    again = attach(authors_vit(), config)
    again.load_state_dict(older)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
        copied = deepcopy(model)
        shaken(copied)
        assert not torch.equal(copied(inputs), model(inputs))
        assert torch.equal(again(inputs), model(inputs))


def test_the_packed_weight_gets_its_thirds():
    """A change of k alone moves the middle third of in_proj_weight."""
    model = encoder(1)
    config = AdapterConfig("mine", target_modules=("k",), r=2)
    attention = model.get_submodule("encoder.layers.0.self_attn")
    before = attention.in_proj_weight.detach().clone()
    shaken(attach(model, config))
    changed = (attention.in_proj_weight != before).any(1)
    assert changed.tolist() == [False] * 48 + [True] * 48 + [False] * 48


def test_weights_of_another_type_bind_by_their_signs():
    model, config = authors_vit(), AdapterConfig("mine", num_classes=5)
    signs, digest = signs_sha256(model, "head"), base_sha256(model, "head")
    half = extract(attach(model.half(), config))
    assert (half.config.base_sha256, half.config.base_signs) == (None, signs)
    # Back in float32 the digest says more; these are the rounded weights.
    again = extract(attach(detach(model).float(), half)).config
    assert (again.base_sha256, again.base_signs) == (base_sha256(detach(model), "head"), None)
    assert again.base_sha256 != digest


def test_a_model_without_a_classifier():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)))
    assert classifier_path(model) == ""
    targets = (r"\d\.0",)
    adapted = attach(model, AdapterConfig("mine", target_modules=targets))
    assert len(extract(adapted).sites) == 3
    detach(model)
    with pytest.raises(AdapterError, match=r"Sequential has no classifier.* can state which"):
        attach(model, AdapterConfig("mine", num_classes=5, target_modules=targets))


def with_another_norm(model):
    model.stem[1] = nn.Identity()


def with_a_wrapped_norm(model):
    model.stem[1] = nn.Sequential(model.stem[1], nn.Conv2d(24, 24, 1))


def with_a_parametrized_one(model):
    nn.utils.parametrizations.weight_norm(model.stem[0])


def with_a_prompt(model):
    model.prompt = nn.Parameter(torch.zeros(1, 1, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_another_norm, r"^stem\.1\.weight is gone .*\(5 of "),
        (with_a_wrapped_norm, r"^stem\.1\.weight is gone"),
        (with_a_parametrized_one, r"^stem\.0\.weight is gone .* parametrized"),
        (with_a_prompt, r"^prompt requires gradients and came .* or freeze"),
    ],
)
def test_what_came_or_went_after_attach_is_held_by_no_adapter(change, message):
    model = on_a_stem()
    change(model)
    with pytest.raises(AdapterError, match=message):
        extract(model)


def test_what_is_for_the_training_alone_or_another_classifier_is_no_matter():
    model = on_a_stem()
    model.projector = nn.Linear(24, 8).requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model.head)
    assert extract(model).head.weight.shape == (2, 24)
    model = attach(Stem(), replace(STEM_S, num_classes=None))  # features: no classifier is wanted
    model.head, model.projector = nn.Identity(), nn.Linear(24, 8)
    assert extract(model).head is None


def test_the_classifier_comes_back_in_the_type_that_the_model_has():
    model = on_a_stem()
    detach(model.bfloat16())
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 7)
    model = Stem()
    model.head.bfloat16()  # the new one takes what the old one took
    assert attach(model, STEM_S).head.weight.dtype == torch.bfloat16


def with_values(model):
    """An adapter that replaces a parameter too."""
    adapter = extract(attach(model, STEM_S))
    detach(model)
    bias = np.full(24, 0.5, np.float32)
    config = replace(adapter.config, fold_only=True)
    return replace(adapter, config=config, values={"stem.0.bias": bias})


def test_a_refused_adapter_replaces_no_parameter():
    model = Stem()
    adapter = with_values(model)
    nn.utils.parametrizations.weight_norm(model.mix)
    adapter = replace(adapter, config=replace(adapter.config, base_sha256=None))
    before = model.stem[0].bias
    with pytest.raises(AdapterError, match=r"^mix: its weight is computed from other parameters"):
        attach(model, adapter)
    assert model.stem[0].bias is before


def test_a_buffer_of_no_state_dict_is_none_after_detach():
    """BEiT's bias of k is a buffer beside parameters of q and v, and no part of a checkpoint."""
    backbone = tiny_backbone("beit_base_patch16_224", **VIT)
    adapter = random_adapter(backbone.facts, parts=("db",))
    assert "blocks.0.attn.qkv.k" in adapter.sites
    keys = set(backbone.model.state_dict())
    detach(attach(backbone.model, adapter))
    assert set(backbone.model.state_dict()) == keys
    attach(backbone.model, adapter)  # to the same model, by the digest of its buffers
