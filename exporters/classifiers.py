"""Whether the Linear that is taken for a model's classifier is what its answer is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.structure import states_classifier
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from hhdeploy.backbones.facts import BackboneFacts

_SEED = 3


def check_classifier(model: nn.Module, facts: BackboneFacts) -> None:
    """Compare a model's answer with the output of its classifier, where that is a guess.

    Adapters have classifiers of their own, and features are a classifier's input: of the last
    Linear of a pooling, or of a gate, both would be wrong. The answer has to come from the
    classifier alone, and each of its numbers from the class of that place (a scale is no fault).

    Args:
        model: returns a tensor, logits; in eval mode.
        facts: of it.

    Raises:
        BackboneError: it does not.
    """
    import torch

    path = facts.classifier
    if not path or states_classifier(model):
        return
    generator = torch.Generator().manual_seed(_SEED)
    images, others = torch.randn(2, 2, *facts.preprocess.input_size, generator=generator)
    answer, logits = _called(model, path, images)
    if not logits:
        why = "the model never calls it"
    elif answer.shape[-1] != logits[0].shape[-1]:
        why = f"it gives {logits[0].shape[-1]} numbers, the model {answer.shape[-1]}"
    elif not torch.equal(_called(model, path, others, logits)[0], answer):
        why = "the model's answer is made of more than its output"
    else:
        for given in logits:
            given[..., 0] += 1
        if torch.equal(_called(model, path, images, logits)[0][..., 1:], answer[..., 1:]):
            return
        why = "what comes after it mixes its classes"
    raise BackboneError(
        f"{facts.model}: {path}, the last Linear, was taken for the classifier, and is none: "
        f"{why}. A module can state which Linear its logits are the output of, pretrained_cfg = "
        "{'classifier': 'PATH'}, or that it has none and returns features, {'classifier': ''}."
    )


def _called(
    model: nn.Module, path: str, images: Tensor, logits: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """A model's answer, and what a module of it returned at each call, or returns instead."""
    outputs: list[Tensor] = []

    def kept(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.clone())
        return logits[len(outputs) - 1] if logits else output

    with model.get_submodule(path).register_forward_hook(kept):
        return model(images), outputs
