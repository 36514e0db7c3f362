"""What a model returns, as tensors: logits, the features they are made of, the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.facts import FEATURES, LOGITS, TOKENS
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn


def returns_tensor(model: nn.Module) -> nn.Module:
    """Make a model's call return a tensor, in place; its module paths stay as they are.

    A model of transformers returns an object: its ``logits`` are taken, of a model without a
    classifier its ``image_embeds`` (an image tower's with a projection) or ``pooler_output``.
    """
    model.register_forward_hook(_as_tensor)
    return model


def _as_tensor(model: nn.Module, images: Any, output: Any) -> Tensor:
    from torch import Tensor

    if isinstance(output, Tensor):
        return output
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise BackboneError(
        f"{type(model).__name__} returned {type(output).__name__}; expected a tensor, or an "
        "object with logits, image_embeds or pooler_output."
    )


@contextmanager
def giving(model: nn.Module, classifier: str, outputs: Sequence[str]) -> Iterator[None]:
    """Make a model's call return a tuple of these outputs; logits alone stay one tensor.

    ``features`` [batch, dim] are the input of the classifier, of a model without one what it
    returns. ``tokens`` [batch, n, dim] are timm's ``forward_features`` (of NHWC and NCHW maps the
    places row by row), or transformers' ``last_hidden_state``.

    Args:
        model: returns a tensor.
        classifier: path of its classifier; "" without one.
        outputs: of `hhdeploy.backbones.facts.OUTPUTS`, in this order.

    Raises:
        BackboneError: when the model is called and does not tell its tokens.
    """
    if tuple(outputs) == (LOGITS,):
        yield
        return
    kept: dict[str, Tensor] = {}

    def features(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[FEATURES] = inputs[0]

    def chosen(module: nn.Module, inputs: Any, output: Tensor) -> tuple[Tensor, ...]:
        found = {(LOGITS if classifier else FEATURES): output, **kept}
        if missing := [name for name in outputs if name not in found]:
            raise BackboneError(
                f"{type(module).__name__} does not tell its {', '.join(missing)}: tokens are known "
                "of timm's models (forward_features) and transformers' (last_hidden_state), logits "
                "of models with a classifier."
            )
        kept.clear()
        return tuple(found[name] for name in outputs)

    with ExitStack() as stack:
        if classifier:
            head = model.get_submodule(classifier)
            stack.callback(head.register_forward_pre_hook(features).remove)
        if TOKENS in outputs:
            _keep_tokens(model, lambda tokens: kept.update({TOKENS: tokens}), stack)
        stack.callback(model.register_forward_hook(chosen).remove)
        yield


def _keep_tokens(model: nn.Module, keep: Callable[[Tensor], None], stack: ExitStack) -> None:
    """Have the last tokens kept at every call, until the stack ends."""
    from torch import Tensor

    forward_features = getattr(model, "forward_features", None)
    if callable(forward_features):

        def kept(*args: Any, **options: Any) -> Any:
            found = forward_features(*args, **options)
            if isinstance(found, Tensor):
                keep(_in_a_row(found, getattr(model, "output_fmt", "NCHW")))
            return found

        model.__dict__["forward_features"] = kept
        stack.callback(model.__dict__.pop, "forward_features")
        return

    def hidden(module: nn.Module, inputs: Any, output: Any) -> None:
        found = getattr(output, "last_hidden_state", None)
        if isinstance(found, Tensor) and found.ndim > 2:
            keep(_in_a_row(found, "NCHW"))

    for module in (*model.children(), model):
        # Before the hook that leaves one tensor of an object.
        stack.callback(module.register_forward_hook(hidden, prepend=True).remove)


def _in_a_row(tokens: Tensor, layout: str) -> Tensor:
    """[batch, n, dim], of a map its places row by row."""
    if tokens.ndim != 4:
        return tokens
    return tokens.flatten(1, 2) if layout == "NHWC" else tokens.flatten(2).transpose(1, 2)
