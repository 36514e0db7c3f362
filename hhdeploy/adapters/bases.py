"""Whether the model that an adapter was trained on is the backbone: names, arguments, digests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import NO_BUFFERS, BackboneFacts, BaseAnswer
from hhdeploy.errors import AdapterError

# Arguments of timm's models that change nothing of what a trained one computes, or that are
# compared by themselves: classes and the size of images.
_NEUTRAL = frozenset(
    {
        *("num_classes", "img_size", "dynamic_img_size", "drop_rate", "drop_path_rate"),
        *("attn_drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"),
    }
)
# Those that shape no parameter, and of which two values are never the same: of any model, and of
# what a classifier reads.
_HEADS, _POOL, _ACTIVATION = "num_heads", "global_pool", "act_layer"
# Behind a message about other weights, where there are others, too, that are no parameters.
_FROZEN = (
    " Of a checkpoint that is the same, norms that were frozen before attach (timm's "
    "freeze_batch_norm_2d) have no weights, but buffers. Leave them as they are: attach freezes "
    "their weights, and eval() on them after model.train() keeps their statistics."
)
# timm's second names of an activation.
_SECOND = {"swish": "silu"}


def check_base(name: str, adapter: Adapter, facts: BackboneFacts) -> None:
    """The adapter was trained on this backbone, as far as both sides say.

    The digest of the weights decides, whatever the model is called on either side, unless both
    say that they compute otherwise with them. Without one, timm's names are compared; of other
    sources sites and sizes alone can tell.
    """
    config, digests = adapter.config, _digests(adapter, facts)
    stated = (config.base_model, config.base_model_args)
    known = (facts.model, facts.args)
    if different := deciding(stated, known, pooled=adapter.head is not None):
        key, mine, theirs = different
        raise AdapterError(
            f"{adapter.source}: base_model_args: adapter {name!r} was trained with {key} {mine!r}, "
            f"the backbone has {theirs!r}: the weights may be the same, what they compute is not. "
            "Export a bundle with the arguments of the adapter."
        )
    proven = digests is not None and digests[1] == digests[2]
    named = _timm(config.base_model, facts.model)
    if not proven and named and not same_model(config.base_model, facts.model):
        raise AdapterError(
            f"{adapter.source}: base_model_name_or_path: adapter {name!r} expects "
            f"{config.base_model}, the backbone is {facts.model}."
        )
    advice = (
        "Use the checkpoint that it was trained on, also for the bundle: export with `checkpoint`."
    )
    buffers = config.base_buffers, facts.buffers
    if digests is not None and not proven:
        key, own, theirs = digests
        frozen = all(buffers) and buffers[0] != buffers[1] and NO_BUFFERS not in buffers
        raise AdapterError(
            f"{adapter.source}: {key}: adapter {name!r} was trained on the weights "
            f"{own[:12]}…, the backbone's are {theirs[:12]}…. {advice}{_FROZEN if frozen else ''}"
        )
    if all(buffers) and buffers[0] != buffers[1]:
        own, theirs = (str(digest)[:12] for digest in buffers)
        raise AdapterError(
            f"{adapter.source}: base_buffers_sha256: adapter {name!r} was trained with the buffers "
            f"{own}… (statistics of BatchNorm, masks), the backbone's are {theirs}…, with which "
            f"the same weights compute otherwise. {advice}"
        )


def check_answer(
    name: str, adapter: Adapter, facts: BackboneFacts, found: BaseAnswer | None
) -> str | None:
    """The backbone computes of the fixed image what the model did that the adapter was trained on.

    Args:
        name: of the adapter, for messages.
        adapter: one that passed `check_base`.
        facts: of the backbone.
        found: what it computes, None where it tells nothing.

    Returns:
        A line where that is not known, of an adapter that its weights are; None of an import too,
        whose source had no such answer.

    Raises:
        AdapterError: it computes otherwise.
    """
    config = adapter.config
    known = config.base_answer
    stated, own = (config.base_model, config.base_model_args), (facts.model, facts.args)
    if known is None or found is None or deciding(stated, own, pooled=True):
        distance = None
    else:
        distance = known.distance(found)
    if known is None or found is None or distance is None:
        silent = "imported_from" in config.extra or unbound(name, adapter, facts) is not None
        return None if silent else _unanswered(name, known, found)
    if distance > (bound := known.bound(found)):
        raise AdapterError(
            f"{adapter.source}: base_answer: adapter {name!r} was trained on a model that computes "
            f"otherwise ({known.made_with}) than {facts.model} here ({found.made_with}): features "
            f"of one fixed image differ by {distance:.2%} (expected {bound:.1%} at most). Export "
            "with the code, arguments and versions that it was trained with, or train it again."
        )
    return None


def _unanswered(name: str, known: BaseAnswer | None, found: BaseAnswer | None) -> str:
    if known is None:
        why = "the adapter has no base_answer"
    elif found is None:
        why = "the backbone's features of the fixed image say nothing"
    else:
        why = "they were asked for images of another size or for other features, or have other args"
    return (
        f"that the model of adapter {name!r} computed what the backbone does is not known beyond "
        f"weights and buffers: {why}"
    )


def _digests(adapter: Adapter, facts: BackboneFacts) -> tuple[str, str, str] | None:
    """The adapter's key of the weights, what it says, and what the backbone has; None where one
    of them says nothing."""
    config = adapter.config
    if config.base_sha256 is not None:
        return "base_sha256", config.base_sha256, facts.sha256
    if config.base_signs is not None and facts.signs:  # bundles of older versions have none
        return "base_signs_sha256", config.base_signs, facts.signs
    return None


_Stated = tuple[str, Mapping[str, Any]]


def deciding(one: _Stated, other: _Stated, *, pooled: bool) -> tuple[str, object, object] | None:
    """An argument that makes another model of the same weights, where both sides state it.

    Args:
        one: a model's name and its arguments.
        other: the other's.
        pooled: a classifier was trained on what is pooled.

    Returns:
        Which it is, and what they say; None without one, or where they are not timm's.
    """
    mine, theirs = _plain(one[1]), _plain(other[1])
    keys = (_HEADS, _ACTIVATION, *((_POOL,) if pooled else ()))
    for key in keys if _timm(one[0], other[0]) else ():
        alike = key in mine and key in theirs and type(mine[key]) is type(theirs[key])
        if alike and mine[key] != theirs[key]:
            return key, mine[key], theirs[key]
    return None


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them, without those that change nothing, what has two names by one."""
    found = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in args.items()
        if key not in _NEUTRAL
    }
    if activation := found.pop(_ACTIVATION, None):  # "" is the model's own
        found[_ACTIVATION] = _SECOND.get(str(activation), activation)
    return found


def check_one_base(first: str, one: AdapterConfig, second: str, other: AdapterConfig) -> None:
    """Two adapters belong to one backbone, as far as they say: digests decide, then names;
    arguments that make another model of the same weights are the same. Raises `AdapterError`."""
    digests = {
        "base_sha256": (one.base_sha256, other.base_sha256),
        "base_signs_sha256": (one.base_signs, other.base_signs),
        "base_buffers_sha256": (one.base_buffers, other.base_buffers),
    }
    known = {key: both for key, both in digests.items() if None not in both}
    differing = {key: both for key, both in known.items() if both[0] != both[1]}
    names = one.base_model, other.base_model
    if not known.keys() - {"base_buffers_sha256"} and not same_model(*names):
        differing = {"base_model": names}
    for key, (mine, theirs) in differing.items():
        raise AdapterError(
            f"{first} and {second} belong to different backbones: {key} is {mine} and {theirs}."
        )
    stated = (one.base_model, one.base_model_args), (other.base_model, other.base_model_args)
    if different := deciding(*stated, pooled=False):
        key, mine, theirs = map(str, different)
        raise AdapterError(
            f"{first} and {second} were trained with base_model_args that compute otherwise: "
            f"{key} is {mine} and {theirs}. Mix adapters of one model."
        )
    if other_answer(one.base_answer, other.base_answer):
        raise AdapterError(
            f"{first} and {second} belong to backbones that compute otherwise: base_answer, of one "
            "fixed image, differs by more than rounding makes it. Mix adapters of one model."
        )


def other_answer(one: BaseAnswer | None, other: BaseAnswer | None) -> bool:
    """Whether two answers can be compared, and are not of one model."""
    if one is None or other is None:
        return False
    distance = one.distance(other)
    return distance is not None and distance > one.bound(other)


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: of timm's a tag counts only where both have one."""
    (mine, _, tag), (theirs, _, other_tag) = one.partition("."), other.partition(".")
    tags = not tag or not other_tag or tag == other_tag
    return one == other or (_timm(one, other) and mine == theirs and tags)


def _timm(*names: str) -> bool:
    return not any(":" in name for name in names)


def unbound(name: str, adapter: Adapter, facts: BackboneFacts) -> str | None:
    """A line about an adapter that names and sizes of sites alone bind to the backbone, or its
    weights alone; None where nothing is left open."""
    if _digests(adapter, facts) is None:
        return (
            f"adapter {name!r} ({adapter.config.base_model}) has no base_sha256: that it was "
            f"trained on these weights of {facts.model} is not known, its sites and sizes fit"
        )
    said = {"adapter": adapter.config.base_buffers or "", "backbone": facts.buffers}
    silent = [side for side, digest in said.items() if not digest]
    if not silent or not set(said.values()) - {"", NO_BUFFERS}:
        return None
    return (
        f"the weights are those of adapter {name!r}; that its buffers were the backbone's "
        f"(statistics of BatchNorm, masks) is not known: the {silent[0]} has no digest of them"
    )


def computing(name: str, adapter: Adapter, facts: BackboneFacts) -> str | None:
    """A line where names or arguments differ and only the digest says that the models are one, or
    None: activation, heads and pooling are no weights."""
    config = adapter.config
    digests = _digests(adapter, facts)
    if digests is None or digests[1] != digests[2]:  # of other weights `check_base` says so
        return None
    if not _timm(config.base_model, facts.model):
        return None
    mine = {"model": config.base_model.partition(".")[0], **_plain(config.base_model_args)}
    theirs = {"model": facts.model.partition(".")[0], **_plain(facts.args)}
    keys = [key for key in dict.fromkeys((*mine, *theirs)) if mine.get(key) != theirs.get(key)]
    if not keys:
        return None
    said, found = (
        ", ".join(f"{key} {side[key]!r}" if key in side else f"no {key}" for key in keys)
        for side in (mine, theirs)
    )
    return (
        f"adapter {name!r} says that it was trained with {said}; the backbone says {found}. Their "
        "weights are the same, whether they compute the same is not known"
    )
