"""What a model returns, as tensors: logits, the features they are made of, the last tokens; and
whether what is taken for its classifier is what the logits are the output of."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.backbones.facts import (
    ANSWER_BOUND,
    FEATURES,
    LOGITS,
    TOKENS,
    BackboneFacts,
    BaseAnswer,
)
from hhdeploy.backbones.structure import states_classifier
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn

# By which the fixed image is moved, as much as bfloat16 rounds it; and how far the mean of its two
# answers is at most from the one between them, of its root mean square, in full precision.
_STEP, _FULL = 2.0**-9, 5e-5
# Of the largest number: what two calls may differ by that compute the same.
_ROUNDING = 1e-5
_SEED = 3  # of the images that a guess is tried on
# Whose code decides what a model computes. Others may be of the user's own, and are not named.
_NAMED = ("timm", "torch", "torchvision", "transformers")


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
        "object with logits, image_embeds or pooler_output. Of a model of tokens or maps, write a "
        "function that makes features of them and load that: python:package.module:function."
    )


def told(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


_SIZE = (
    "of another size, say it (`input_size`); of texts and images, save its tower (vision_model) by "
    "itself and pass that"
)


@contextmanager
def computing(name: str, shape: Sequence[int], advice: str = _SIZE) -> Iterator[None]:
    """A model is called on images in the block: what it says of them is no fault of the block's.

    Args:
        name: of the model.
        shape: of the images.
        advice: what to do with a model of other images.

    Raises:
        BackboneError: it does not compute on them.
    """
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # the model's own, whatever it is
        raise BackboneError(
            f"{name}: it does not compute on images {list(shape)} alone: "
            f"{told(error).rstrip('.')}. Expected a model that takes such images and nothing else: "
            f"{advice}."
        ) from error


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


def check_steady(model: nn.Module, facts: BackboneFacts) -> None:
    """Raise `BackboneError` where the same images have another answer at a second call: random
    numbers, or a count of the calls, which a graph draws and counts otherwise, or not at all."""
    import torch

    images = _drawn(model, facts)
    first, second = (_as_tensor(model, images, model(images.clone())) for _ in range(2))
    largest = float(first.where(first.isfinite(), 0).abs().max())
    # Not to the bit: threads may add in another order.
    if not torch.allclose(first, second, rtol=0, atol=_ROUNDING * largest, equal_nan=True):
        raise BackboneError(
            f"{facts.model}: called twice with the same images, in eval mode, it gives two "
            "answers: its forward pass draws random numbers (a dropout that eval() does not stop, "
            "masks, noise) or counts its calls. Export a model that does so in training alone."
        )


_LAST, _STATED = "the last Linear", "as pretrained_cfg has it"


def check_classifier(model: nn.Module, facts: BackboneFacts) -> None:
    """Raise `BackboneError` where `no_classifier` says something."""
    if (fault := no_classifier(model, facts)) is not None:
        raise BackboneError(fault)


def no_classifier(model: nn.Module, facts: BackboneFacts, *, stated: bool = False) -> str | None:
    """Compare a model's answer with the output of its classifier, where that is a guess.

    Adapters have classifiers of their own, and features are a classifier's input: of the last
    Linear of a pooling, or of a gate, both would be wrong. The answer has to come from the
    classifier alone, and each of its numbers from the class of that place (a scale is no fault).

    Args:
        model: returns logits, or an object with them; in eval mode.
        facts: of it.
        stated: also where the model states it; it may change the logits behind it.

    Returns:
        What is wrong, and what to do; None if nothing is.
    """
    import torch

    path = facts.classifier
    said = states_classifier(model)
    if not path or (said and not stated):
        return None
    images, others = _drawn(model, facts), _drawn(model, facts, _SEED + 1)
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
        # What a model that states its classifier does to the logits after it may be folded with it.
        if said or torch.equal(_called(model, path, images, logits)[0][..., 1:], answer[..., 1:]):
            return None
        why = "what comes after it mixes its classes"
    return (
        f"{facts.model}: {path}, {_STATED if said else _LAST}, was taken for the classifier, and "
        f"is none: {why}. A module can state which Linear its logits are the output of, "
        "pretrained_cfg = {'classifier': 'PATH'}, or that it has none and returns features, "
        "{'classifier': ''}."
    )


def fixed_image(size: tuple[int, int, int]) -> NDArray[np.float32]:
    """[1, channels, height, width] of noise in [0, 1), the same wherever it is made."""
    # Raw bits: NumPy promises no more of a seed.
    bits = np.random.PCG64(_SEED).random_raw(int(np.prod(size))) >> np.uint64(40)
    noise: NDArray[np.float32] = bits.astype(np.float32) / np.float32(1 << 24)
    return noise.reshape(1, *size)


def base_answer(
    model: nn.Module, classifier: str, size: tuple[int, int, int], *, certain: bool = False
) -> BaseAnswer | None:
    """Call a bare model on the fixed image, without autocast, and keep its features in short.

    The image is moved a little, both ways. Rounding is chance: what is computed in less than
    float32, by the model's types, a setting or its own code, has not the mean of both between them.

    Args:
        model: returns a tensor, or an object with one; in eval mode.
        classifier: path of its classifier; "" without one.
        size: (channels, height, width) of its images.
        certain: give None also where moving the image, or chance, makes the answer another.

    Returns:
        None where the features say nothing: the classifier is not called, or they are zeros or not
        finite.
    """
    image = fixed_image(size)
    odd = (image * np.float32(1 << 24)).astype(np.int64) & 1
    step = image * np.where(odd, np.float32(_STEP), np.float32(-_STEP))
    found = (_features_of(model, classifier, x) for x in (image, image + step, image - step))
    answer, one, other = found
    if answer is None or one is None or other is None:
        return None
    if certain and answer.apart(one) > ANSWER_BOUND / 4:
        return None
    return replace(answer, full_precision=answer.apart(one.middle(other)) <= _FULL)


def _features_of(
    model: nn.Module, classifier: str, image: NDArray[np.float32]
) -> BaseAnswer | None:
    import torch

    like = next(model.parameters())
    kept: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(like.device.type, enabled=False))
        if classifier:
            head = model.get_submodule(classifier)
            hook = head.register_forward_pre_hook(
                # A copy: what comes after it may write there.
                lambda module, given: kept.append(given[0].detach().clone())
            )
            stack.callback(hook.remove)
        given = torch.from_numpy(image.copy()).to(like.device, like.dtype)
        output = model(given)
        if not classifier:
            kept.append(_as_tensor(model, given, output))
    if not kept:
        return None
    features = kept[-1].float().cpu().numpy()
    _, channels, height, width = image.shape
    size = (channels, height, width)
    return BaseAnswer.of_features(features, size, classifier, _made_with(model))


def _made_with(model: nn.Module) -> str:
    """Packages that a model's code is of, with their versions."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()} | {"torch"}
    found = []
    for name in sorted(roots.intersection(_NAMED)):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def check_exchangeable(model: nn.Module, facts: BackboneFacts) -> None:
    """An adapter's classifier, a Linear, can take the place of a model's.

    Args:
        model: in eval mode.
        facts: of it.

    Raises:
        BackboneError: what is there computes something else than its weight and bias say, which
            would be lost with it in a training and stay in a graph, or its weight is no parameter.
    """
    import torch

    path = facts.classifier
    module: Any = model.get_submodule(path)
    weight, bias = module.weight, module.bias
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(2, module.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight, bias)
        try:
            found = _as_tensor(module, x, module(x))
        except Exception:  # noqa: BLE001  (of other features: the model's own call tells)
            found = expected
    if "weight" not in dict(module.named_parameters(recurse=False)):
        what = "has a weight that is computed from other parameters (weight norm)"
    elif found.shape != expected.shape or not _alike(found, expected):
        what = "computes more than W x + b (a forward of its own, or hooks)"
    else:
        return
    raise BackboneError(
        f"{facts.model}: the classifier {path}, {type(module).__name__}, {what}, and an adapter's "
        "is a torch.nn.Linear that takes its place. Have such a Linear there, and what else it "
        "does to the features in a module in front of it."
    )


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two answers are the same but for rounding; of those without values nobody can say."""
    import torch

    if found.is_meta:
        return True
    bound = 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=bound)


def _drawn(model: nn.Module, facts: BackboneFacts, seed: int = _SEED) -> Tensor:
    """Two images of random numbers."""
    import torch

    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, *facts.preprocess.input_size, generator=generator)
    return drawn.to(like.device, like.dtype)


def _called(
    model: nn.Module, path: str, images: Tensor, logits: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """A model's answer, and what a module of it returned at each call, or returns instead."""
    outputs: list[Tensor] = []

    def kept(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.clone())
        return logits[len(outputs) - 1] if logits else output

    with model.get_submodule(path).register_forward_hook(kept):
        return _as_tensor(model, images, model(images)), outputs
