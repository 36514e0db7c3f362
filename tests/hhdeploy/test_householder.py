"""The training-time model: attach, detach, save, load, and its gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import PARTS, Head, SiteTensors, load_adapter
from hhdeploy.errors import AdapterError
from hhdeploy.exporters.fold import fold_additive, fold_sequential, folded_bias
from hhdeploy.training import attach, detach, extract, save
from hhdeploy.training.householder import HouseholderMatrix, new_site, reflection_matrix
from tests.support import (
    assert_caught,
    assert_parity,
    images,
    logits_of,
    random_adapter,
    tiny_backbone,
)

REFLECTIONS = ("unnormalized", "orthogonal")
CASES = [
    ("additive", ("q", "k", "v", "proj")),
    ("additive", ("k", "fc1", "fc2")),
    ("sequential", ("proj", "fc2")),
]


def folded_by_hand(model, adapter, forget_bias=False):
    """Fold with the export's algebra into the torch weights: the other implementation."""
    state = model.state_dict()
    for name in adapter.sites:
        path, part = name.rsplit(".", 1) if ".qkv." in name else (name, None)
        weight, bias = state[f"{path}.weight"].numpy(), state[f"{path}.bias"].numpy()
        n = weight.shape[0] // 3
        rows = (
            slice(None)
            if part is None
            else slice("qkv".index(part) * n, ("qkv".index(part) + 1) * n)
        )
        if adapter.form == "additive":
            weight[rows] = fold_additive(weight[rows], adapter.delta(name))
        else:
            weight[rows] = fold_sequential(weight[rows], adapter.delta(name))
            if not forget_bias:
                bias[:] = folded_bias(bias, adapter.delta(name))
    if adapter.head is not None:
        head = torch.nn.Linear(*adapter.head.weight.shape[::-1])
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(adapter.head.weight))
            head.bias.copy_(torch.from_numpy(adapter.head.bias))
        model.set_submodule(adapter.head.path, head)
    return model


@pytest.mark.parametrize("reflection", REFLECTIONS)
def test_reflection_matrix(reflection):
    x = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = reflection_matrix(x, reflection)
    scale = 1.0 if reflection == "unnormalized" else 2.0 / float(x @ x)
    assert_parity(np.eye(7) - scale * np.outer(x, x), h.numpy(), "algebra", "float64")
    if reflection == "orthogonal":
        assert_parity(np.eye(7), (h @ h).numpy(), "algebra", "float64")
    zero = reflection_matrix(torch.zeros(7), reflection)
    assert torch.equal(zero, torch.eye(7))


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize(("form", "targets"), CASES)
def test_attached_is_folded(form, targets, reflection):
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, form=form, targets=targets, reflection=reflection, r=2)
    inputs = images(3)
    reference = logits_of(attach(tiny_backbone().model, adapter), inputs)
    assert reference.shape == (3, 7)
    found = logits_of(folded_by_hand(backbone.model, adapter), inputs)
    assert_parity(reference, found, "folded", "float32")
    assert_caught(
        reference,
        logits_of(folded_by_hand(tiny_backbone().model, replace(adapter, sites={})), inputs),
        "folded",
        "float32",
    )


def mistakes(adapter):
    """The same adapter with one deliberate mistake each."""
    other = "orthogonal" if adapter.config.reflection == "unnormalized" else "unnormalized"
    yield "reflection", replace(adapter, config=replace(adapter.config, reflection=other))
    swapped = {k: replace(s, u=s.v, v=s.u) for k, s in adapter.sites.items()}
    yield "swapped u and v", replace(adapter, sites=swapped)
    without = {k: replace(s, lora_B=0 * s.lora_B) for k, s in adapter.sites.items()}
    yield "no low-rank term", replace(adapter, sites=without)
    one = dict(adapter.sites)
    del one["blocks.1.attn.proj"]
    yield "a forgotten site", replace(adapter, sites=one)


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_mistakes_are_caught(form, reflection):
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, form=form, reflection=reflection, targets=("proj",))
    inputs = images(3)
    reference = logits_of(attach(backbone.model, adapter), inputs)
    wrong = dict(mistakes(adapter))
    wrong["another adapter"] = replace(
        random_adapter(backbone.facts, form=form, reflection=reflection, targets=("proj",), seed=1),
        head=adapter.head,
    )
    for mistaken in wrong.values():
        found = logits_of(folded_by_hand(tiny_backbone().model, mistaken), inputs)
        assert_caught(reference, found, "folded", "float32")


def test_a_forgotten_bias_is_caught():
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, form="sequential", targets=("proj", "fc2"))
    inputs = images(3)
    reference = logits_of(attach(backbone.model, adapter), inputs)
    found = logits_of(folded_by_hand(tiny_backbone().model, adapter, forget_bias=True), inputs)
    assert_caught(reference, found, "folded", "float32")


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize(("form", "targets"), CASES)
def test_detach_gives_the_backbone_back_to_the_bit(tiny, form, targets, reflection):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    names = [type(m).__name__ for m in tiny.model.modules()]
    attach(
        tiny.model, random_adapter(tiny.facts, form=form, targets=targets, reflection=reflection)
    )
    assert detach(tiny.model) is tiny.model
    after = tiny.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m).__name__ for m in tiny.model.modules()] == names


def test_a_b_a_gives_a_to_the_bit(tiny):
    first, second = random_adapter(tiny.facts, seed=1), random_adapter(tiny.facts, seed=2)
    inputs = torch.from_numpy(images(3))

    def run(adapter):
        with torch.no_grad():
            found = attach(tiny.model, adapter)(inputs)
        detach(tiny.model)
        return found

    once, between, twice = run(first), run(second), run(first)
    assert torch.equal(once, twice)
    assert not torch.equal(once, between)


@pytest.mark.parametrize("r", [0, 1, 2, 4])
def test_a_new_additive_adapter_is_the_backbone(tiny, r):
    inputs = images(3)
    expected = logits_of(tiny_backbone().model, inputs)
    config = AdapterConfig(tiny.facts.model, r=r, target_modules=("q", "v", "proj", "fc1"))
    assert_parity(expected, logits_of(attach(tiny.model, config), inputs), "algebra", "float64")


def test_a_new_orthogonal_sequential_adapter_is_the_backbone(tiny):
    inputs = images(3)
    expected = logits_of(tiny_backbone().model, inputs)
    config = AdapterConfig(tiny.facts.model, "sequential", "orthogonal", 1, ("proj", "fc2"))
    assert_parity(expected, logits_of(attach(tiny.model, config), inputs), "folded", "float32")


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize(("form", "targets"), CASES)
def test_only_the_adapter_and_its_head_are_trained(tiny, form, targets, reflection):
    config = AdapterConfig(
        tiny.facts.model, form, reflection, 1, targets, num_classes=5, base_sha256=None
    )
    model = attach(tiny.model, config, seed=3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "parametrizations" not in n} == {"head.weight", "head.bias"}
    assert not {n for n in trained if n.endswith("original")}
    loss = model(torch.from_numpy(images(3))).square().sum()
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # lora_A waits for lora_B to leave zero, and u and v of the additive form for d to.
    waiting = ("lora_A", ".u", ".v") if form == "additive" else ("lora_A",)
    assert {n for n in trained - moved if not n.endswith(waiting)} == set()


def test_u_and_v_do_not_start_at_the_stationary_point():
    generator = torch.Generator().manual_seed(0)
    for form in ("additive", "sequential"):
        site = new_site(7, 7, 1, form, "unnormalized", generator)
        assert site.u.detach().abs().min() > 0
        assert site.v.detach().abs().min() > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed):
    config = AdapterConfig("x", num_classes=3)
    first = extract(attach(tiny_backbone().model, config, seed=seed))
    second = extract(attach(tiny_backbone().model, config, seed=0))
    same = np.array_equal(first.sites["blocks.0.attn.proj"].u, second.sites["blocks.0.attn.proj"].u)
    assert same == (seed == 0)


@pytest.mark.parametrize("reflection", REFLECTIONS)
@pytest.mark.parametrize(("form", "targets"), CASES)
def test_save_and_load(tmp_path, tiny, form, targets, reflection):
    adapter = random_adapter(tiny.facts, form=form, targets=targets, reflection=reflection, r=2)
    save(attach(tiny.model, adapter), tmp_path / "a")
    found = load_adapter(tmp_path / "a")
    assert found.config == adapter.config
    assert set(found.sites) == set(adapter.sites)
    for name, site in adapter.sites.items():
        for tensor in ("u", "v", "d", "lora_A", "lora_B"):
            assert np.array_equal(getattr(found.sites[name], tensor), getattr(site, tensor))
    assert found.head.path == "head"
    assert np.array_equal(found.head.weight, adapter.head.weight)
    assert np.array_equal(found.head.bias, adapter.head.bias)


def test_what_was_trained_is_what_is_saved(tmp_path, tiny):
    config = AdapterConfig(tiny.facts.model, num_classes=5)
    model = attach(tiny.model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    inputs = torch.from_numpy(images(4))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), torch.arange(4)).backward()
        optimizer.step()
    save(model, tmp_path / "a")
    expected = logits_of(model, images(4))
    again = attach(tiny_backbone().model, load_adapter(tmp_path / "a"))
    assert_parity(expected, logits_of(again, images(4)), "algebra", "float64")


def test_a_pure_low_rank_adapter(tiny):
    adapter = random_adapter(tiny.facts, targets=("q", "proj"), classes=None)
    low = {k: replace(s, u=None, v=None, d=None) for k, s in adapter.sites.items()}
    adapter = replace(adapter, sites=low)
    model = attach(tiny.model, adapter)
    assert extract(model).head is None
    assert extract(model).sites["blocks.0.attn.proj"].u is None
    reference = logits_of(model, images(3))
    assert reference.shape == (3, 1000)
    found = logits_of(folded_by_hand(tiny_backbone().model, adapter), images(3))
    assert_parity(reference, found, "folded", "float32")


def test_models_that_call_functional_linear_on_the_weight():
    """EVA-02 has a fused qkv without bias and adds q_bias and v_bias itself: hooks never run."""
    args = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}
    name = "eva02_tiny_patch14_224"
    backbone = tiny_backbone(name, **args)
    assert backbone.model.get_submodule("blocks.0.attn.qkv").bias is None
    adapter = random_adapter(backbone.facts, targets=("q", "v"), classes=None)
    inputs = images(2, 28)
    plain = logits_of(tiny_backbone(name, **args).model, inputs)
    adapted = logits_of(attach(backbone.model, adapter), inputs)
    assert_caught(plain, adapted, "folded", "float32")


def test_a_matrix_is_dense_as_the_equations_read():
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {
        "u": draw(7),
        "v": draw(13),
        "d": draw(7),
        "lora_A": draw(2, 13),
        "lora_B": draw(7, 2),
    }
    found = HouseholderMatrix(tensors, "unnormalized")().detach().numpy()
    u, v, d, a, b = (t.numpy() for t in tensors.values())
    wide = np.concatenate([np.diag(d), np.zeros((7, 6))], axis=1)
    expected = (np.eye(7) - np.outer(u, u)) @ wide @ (np.eye(13) - np.outer(v, v)) + b @ a
    assert_parity(expected, found, "algebra", "float64")


# -- refusals -----------------------------------------------------------------------------------


def unchanged(model, before):
    return list(model.state_dict()) == list(before)


def test_attaching_twice_and_detaching_nothing(tiny):
    with pytest.raises(AdapterError, match=r"no adapter is attached.*attach first"):
        detach(tiny.model)
    with pytest.raises(AdapterError, match="no adapter is attached"):
        extract(tiny.model)
    attach(tiny.model, random_adapter(tiny.facts))
    with pytest.raises(AdapterError, match="attached to this model already; call detach first"):
        attach(tiny.model, random_adapter(tiny.facts))


def test_a_site_the_model_does_not_have_leaves_the_model_alone(tiny):
    before = tiny.model.state_dict()
    adapter = random_adapter(tiny.facts)
    site = adapter.sites["blocks.0.attn.proj"]
    wrong = replace(adapter, sites={**adapter.sites, "blocks.9.attn.proj": site})
    with pytest.raises(AdapterError, match=r"blocks\.9\.attn\.proj.*no such site"):
        attach(tiny.model, wrong)
    assert unchanged(tiny.model, before)
    attach(tiny.model, adapter)


def test_a_target_the_model_does_not_have(tiny):
    with pytest.raises(AdapterError, match="'gate' matches no site"):
        attach(tiny.model, AdapterConfig("x", target_modules=("gate",)))


def test_a_target_of_a_model_of_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.Flatten())
    with pytest.raises(AdapterError, match=r"'q' matches no site of x\. It has no Linear but a"):
        attach(model, AdapterConfig("x", target_modules=("q",)))


def test_sizes_of_another_model_leave_the_model_alone(tiny):
    before = tiny.model.state_dict()
    adapter = random_adapter(tiny.facts, targets=("proj",))
    low = SiteTensors(lora_A=np.ones((2, 47), np.float32), lora_B=np.ones((48, 2), np.float32))
    wrong = replace(adapter, sites={**adapter.sites, "blocks.1.attn.proj": low})
    with pytest.raises(AdapterError, match=r"blocks\.1\.attn\.proj.*48 x 48.*48 x 47"):
        attach(tiny.model, wrong)
    assert unchanged(tiny.model, before)


def test_the_sequential_form_acts_on_a_linear_of_its_own(tiny):
    adapter = random_adapter(tiny.facts, form="sequential", targets=("blocks.0.attn.qkv.q",))
    for asked in (adapter, adapter.config):
        with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv\.q: .* proj, fc2 only"):
            attach(tiny.model, asked)


def test_a_head_of_the_adapter_s_own(tiny):
    adapter = random_adapter(tiny.facts, classes=None)
    head = Head("head", np.ones((3, 48), np.float32), np.zeros(3, np.float32))
    model = attach(tiny.model, replace(adapter, head=head))
    assert logits_of(model, images(2)).shape == (2, 3)


# -- s_in, s_out, db and values -------------------------------------------------------------------

NORM = "blocks.1.norm2.weight"


def with_values(model, adapter):
    known = dict(model.named_parameters())
    values = {name: 0.5 + known[name].detach().numpy() for name in (NORM, "patch_embed.proj.bias")}
    return replace(adapter, config=replace(adapter.config, fold_only=True), values=values)


def scaled_by_hand(model, adapter, leave=()):
    """s_in, s_out, db and values put into the torch weights, without the algebra."""
    state = model.state_dict()
    for name, value in adapter.values.items():
        state[name].copy_(torch.from_numpy(value))
    for name, site in adapter.sites.items():
        path, part = name.rsplit(".", 1) if ".qkv." in name else (name, None)
        weight, bias = state[f"{path}.weight"], state[f"{path}.bias"]
        out = weight.shape[0] // (1 if part is None else 3)
        start = 0 if part is None else "qkv".index(part) * out
        rows = slice(start, start + out)
        tensors = {p: torch.from_numpy(t) for p, t in site.parts.items() if p not in leave}
        if "s_in" in tensors:
            weight[rows] *= tensors["s_in"]
        if "s_out" in tensors:
            weight[rows] *= tensors["s_out"][:, None]
        if "db" in tensors:
            bias[rows] += tensors["db"]
    return model


@pytest.mark.parametrize(("form", "targets"), CASES)
def test_attached_parts_and_values_come_before_the_matrix(form, targets):
    """Scaled and shifted by hand first, then folded: M multiplies all of it."""
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, form=form, targets=targets, parts=PARTS)
    adapter = with_values(backbone.model, adapter)
    inputs = images(3)
    reference = logits_of(attach(backbone.model, adapter), inputs)

    def by_hand(*leave):
        changed = scaled_by_hand(tiny_backbone().model, adapter, leave)
        return logits_of(folded_by_hand(changed, adapter), inputs)

    assert_parity(reference, by_hand(), "folded", "float32")
    for part in PARTS:
        assert_caught(reference, by_hand(part), "folded", "float32")


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_parts_and_values_come_back_and_the_backbone_too(tmp_path, form):
    backbone = tiny_backbone(qkv_bias=False)
    model, inputs = backbone.model, images(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    logits = logits_of(model, inputs)
    model.float()
    targets = ("q", "k", "v", "fc1") if form == "additive" else ("proj", "fc2")
    adapter = random_adapter(backbone.facts, form=form, targets=targets, parts=PARTS)
    adapter = with_values(model, adapter)
    attach(model, adapter)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(n.endswith((".s_in", ".s_out", ".db")) for n in trained) >= 3 * len(targets)
    assert NORM in trained
    found = extract(model)
    for name, site in adapter.sites.items():
        for key, value in vars(site).items():
            assert np.array_equal(getattr(found.sites[name], key), value), (name, key)
    for name, value in adapter.values.items():
        assert np.array_equal(found.values[name], value), name
    save(model, tmp_path / "saved")
    assert load_adapter(tmp_path / "saved").schema_version == 2
    assert_caught(logits[:, :7], logits_of(model, inputs), "folded", "float32")
    detach(model.float())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.blocks[0].attn.qkv.bias is None


def test_gradients_reach_the_parts():
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, targets=("q", "k", "v"), parts=PARTS)
    model = attach(backbone.model, adapter)
    model(torch.from_numpy(images(2))).square().sum().backward()
    found = {
        n: p.grad for n, p in model.named_parameters() if n.endswith((".s_in", ".s_out", ".db"))
    }
    assert len(found) == 2 * 3 * 3
    assert all(g is not None and g.abs().max() > 0 for g in found.values())


def test_what_does_not_fit_the_model_leaves_it_alone():
    backbone = tiny_backbone()
    before = logits_of(backbone.model, images(1))
    backbone.model.float()
    adapter = random_adapter(backbone.facts, targets=("fc1",), parts=PARTS)
    (name, *_) = adapter.sites
    wide = SiteTensors(s_in=np.ones(49, np.float32))
    folded = replace(adapter.config, fold_only=True)
    wrong = {
        r"fc1\.s_in: expected 48 values .*found 49": {"sites": {name: wide}},
        r"blocks\.7\.mlp\.fc1\.\*: .*no such site": {
            "sites": {"blocks.7.mlp.fc1": adapter.sites[name]}
        },
        r"norm9\.weight\.value: .*no parameter": {
            "config": folded,
            "values": {"norm9.weight": np.ones(3)},
        },
    }
    for message, changes in wrong.items():
        with pytest.raises(AdapterError, match=message):
            attach(backbone.model, replace(adapter, **changes))
    assert np.array_equal(logits_of(backbone.model, images(1)), before)
