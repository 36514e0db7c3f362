"""Adapters whose parts were put together in Python: what is none is refused, never left out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hhdeploy.adapters.format import (
    Adapter,
    Head,
    SiteTensors,
    checked_adapter,
    load_adapter,
    save_adapter,
)
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.errors import AdapterError, OptionError
from hhdeploy.runtime import open_session
from hhdeploy.training import attach
from tests.support import random_adapter

SITE = "blocks.0.attn.proj"


def at_site(**parts):
    """A change of the parts of one site."""
    return lambda a: replace(a, sites={**a.sites, SITE: replace(a.sites[SITE], **parts)})


def of_head(**parts):
    """A change of the parts of the classifier."""
    return lambda a: replace(a, head=replace(a.head, **parts))


WRONG = {
    "half a reflection": (at_site(u=None), f"missing tensor key {SITE}.u"),
    "half a product": (at_site(lora_B=None), f"missing tensor key {SITE}.lora_B"),
    "an array of another shape": (
        lambda a: at_site(u=a.sites[SITE].u[:-1])(a),
        f"{SITE}.d: expected shape",
    ),
    "an array of another dimension": (
        lambda a: at_site(u=a.sites[SITE].u[None])(a),
        f"{SITE}.u: expected 1 dimension",
    ),
    "integers": (
        lambda a: at_site(u=a.sites[SITE].u.astype(int))(a),
        f"{SITE}.u: expected a float tensor, found int64",
    ),
    "no numbers": (lambda a: at_site(u=a.sites[SITE].u * np.nan)(a), f"{SITE}.u: expected finite"),
    "a list": (
        lambda a: at_site(u=a.sites[SITE].u.tolist())(a),
        f"{SITE}.u: expected a NumPy array, found list",
    ),
    "a tensor of torch": (
        lambda a: at_site(u=torch.from_numpy(a.sites[SITE].u))(a),
        f"{SITE}.u: expected a NumPy array, found Tensor",
    ),
    "a dictionary for a site": (
        lambda a: replace(a, sites={SITE: {"u": a.sites[SITE].u}}),
        f"sites['{SITE}']: expected SiteTensors(...), found dict",
    ),
    "a list of sites": (lambda a: replace(a, sites=[]), "sites: expected a dictionary of names"),
    "a number for a name": (
        lambda a: replace(a, sites={3: a.sites[SITE]}),
        "sites: a name: expected a string, found int 3",
    ),
    "a short bias": (lambda a: of_head(bias=a.head.bias[:1])(a), "head.bias: expected shape"),
    "no bias": (of_head(bias=None), "head.bias: expected a NumPy array, found NoneType"),
    "a classifier of no numbers": (
        lambda a: of_head(weight=a.head.weight * np.inf)(a),
        "head.weight: expected finite values",
    ),
    "other classes": (
        lambda a: of_head(weight=a.head.weight[:1], bias=a.head.bias[:1])(a),
        "head.weight: expected 4 rows (num_classes), found 1",
    ),
    "a tuple for the classifier": (
        lambda a: replace(a, head=(a.head.weight, a.head.bias)),
        "head: expected Head(...) or None, found tuple",
    ),
    "a number for the classifier's name": (of_head(path=3), "head.path: expected a string"),
    "a parameter that is only folded": (
        lambda a: replace(a, values={"norm.weight": np.ones(8, np.float32)}),
        "norm.weight.value: expected fold_only",
    ),
    "no values": (lambda a: replace(a, values=None), "values: expected a dictionary"),
    "no configuration": (lambda a: replace(a, config=None), "config: expected AdapterConfig(...)"),
    "a strength that is none": (
        lambda a: replace(a, strength="0.5"),
        "strength: expected a finite number, found '0.5'",
    ),
}


@pytest.fixture(scope="module")
def made(workshop) -> Adapter:
    return random_adapter(workshop.backbone.facts, targets=("proj",), r=2, classes=4, seed=5)


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_what_takes_an_adapter_refuses_one_with_a_wrong_part(
    workshop, made, tmp_path, change, message
):
    """A bank answered with half of it, a classifier's one bias for all classes, or NaN."""
    wrong = change(made)
    for use in (
        lambda: save_adapter(wrong, tmp_path / "saved"),
        lambda: merge_adapters({"wrong": (wrong, 1.0)}),
        lambda: attach(workshop.backbone.model, wrong),
    ):
        with pytest.raises(AdapterError, match=re.escape(f"<memory>: {message}")):
            use()
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_a_session_refuses_one_with_a_wrong_part(small, made, change, message):
    with open_session(small, device="cpu", threads=1, slots=4) as session:
        with pytest.raises(AdapterError, match=re.escape(f"<memory>: {message}")):
            session.adapters.add("wrong", change(made))
        assert list(session.adapters) == ["alpha", "gamma"]


def test_float64_and_numbers_of_numpy_are_taken(made, tmp_path):
    wide = {
        name: SiteTensors(*(None if t is None else t.astype(np.float64) for t in vars(s).values()))
        for name, s in made.sites.items()
    }
    head = Head(made.head.path, made.head.weight.astype(np.float64), made.head.bias)
    save_adapter(replace(made, sites=wide, head=head, strength=np.float32(1.0)), tmp_path / "saved")
    read = load_adapter(tmp_path / "saved")
    for name, site in made.sites.items():
        assert np.array_equal(read.sites[name].u, site.u)
    assert np.array_equal(read.head.weight, made.head.weight)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(OptionError, match=r"`adapter`: expected Adapter\(\.\.\.\), found str"):
        checked_adapter("adapters/flowers")
