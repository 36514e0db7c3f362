"""The last Linear is the classifier where the answer is its output, and nothing else is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hhdeploy.backbones.facts import FEATURES, BackboneFacts
from hhdeploy.backbones.outputs import check_classifier, giving
from hhdeploy.backbones.structure import classifier_path, find_linears
from hhdeploy.errors import BackboneError
from hhdeploy.preprocess import Preprocess


class Model(nn.Module):
    """Two Linears, the one that is registered first and the last, and how they meet."""

    def __init__(self, answer, last=(6, 5)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.answer = nn.Linear(12, 6), nn.Linear(*last), answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self, images.flatten(1))


def facts_of(model: nn.Module) -> BackboneFacts:
    preprocess = Preprocess((3, 2, 2), (0.5,) * 3, (0.5,) * 3)
    path = classifier_path(model)
    return BackboneFacts("python:m:f", {}, "", find_linears(model, path), path, 6, 5, preprocess)


def check(model: nn.Module) -> None:
    with torch.no_grad():
        check_classifier(model, facts_of(model))


@pytest.mark.parametrize(
    "answer",
    [
        lambda m, x: m.last(m.first(x)),
        lambda m, x: 3 * m.last(m.first(x)).double() + 1,
        lambda m, x: m.last(torch.stack((m.first(x), m.first(2 * x)), 1)).mean(1),
        lambda m, x: m.last(m.first(x)) + m.last(m.first(2 * x)),
    ],
    ids=["plain", "scaled", "of tokens", "called twice"],
)
def test_what_the_answer_is_made_of_is_the_classifier(answer):
    check(Model(answer))


@pytest.mark.parametrize(
    ("answer", "last", "why"),
    [
        (lambda m, x: m.first(x) + m.last(m.first(x)), (6, 6), "made of more than its output"),
        (lambda m, x: m.first(x) * m.last(x).sigmoid(), (12, 6), "made of more than its output"),
        (lambda m, x: nn.functional.normalize(m.last(m.first(x)), dim=-1), (6, 5), "mixes its cl"),
        (lambda m, x: m.last(m.first(x)).softmax(-1), (6, 5), "mixes its classes"),
        (lambda m, x: m.first(m.last(x)), (12, 12), "it gives 12 numbers, the model 6"),
        (lambda m, x: nn.functional.linear(m.first(x), m.last.weight), (6, 5), "never calls it"),
    ],
    ids=["residual", "gate", "normalised", "softmax", "registered last", "weight alone"],
)
def test_what_else_is_called_the_classifier_is_refused(answer, last, why):
    model = Model(answer, last)
    with pytest.raises(BackboneError, match=f"python:m:f: last, the last Linear, .*{why}"):
        check(model)
    model.pretrained_cfg = {"classifier": ""}
    check(model)
    assert classifier_path(model) == ""
    assert [linear.path for linear in find_linears(model)] == ["first", "last"]


def test_a_module_states_its_classifier():
    model = Model(lambda m, x: m.first(m.last(x)), (12, 12))
    model.pretrained_cfg = {"classifier": "first"}
    images = torch.randn(2, 3, 2, 2)
    assert classifier_path(model) == "first"
    with giving(model, "first", (FEATURES,)):
        (features,) = model(images)
    assert torch.equal(features, model.last(images.flatten(1)))


def test_a_head_of_several_layers_is_named_by_its_last():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 5)))
    model.pretrained_cfg = {"classifier": "1"}
    with pytest.raises(BackboneError, match=r"1 is Sequential; expected a Linear\. .*: 'PATH'\}"):
        classifier_path(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "classifier": "1.2"}
    assert classifier_path(model) == "1.2"
    check(model)
