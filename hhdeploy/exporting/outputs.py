"""Which outputs the graph of an export has, and what that means for its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hhdeploy.adapters.checks import headless, unused_head
from hhdeploy.adapters.config import CLASSES, problem_type_of
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import FEATURES, LOGITS, OUTPUTS, BackboneFacts
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import member
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.plan import Reserve


def check_outputs(outputs: Sequence[str], reserve: Reserve) -> None:
    """Outputs are some there are, and nothing is reserved for classifiers that will not be.

    Raises:
        OptionError: naming the option.
    """
    for output in outputs:
        if member(OUTPUTS, output) is None:
            raise OptionError(f"`outputs=[{output!r}]`: expected one of {', '.join(OUTPUTS)}.")
    if outputs and LOGITS not in outputs and (reserve.max_classes or reserve.keep_backbone_head):
        raise OptionError(
            "`max_classes` and `keep_backbone_head` are about classifiers, and a graph without "
            "logits has none. Add 'logits' to `outputs`, or leave them out."
        )


def outputs_of_graph(
    asked: Sequence[str],
    facts: BackboneFacts,
    adapters: Mapping[str, Adapter],
    reserve: Reserve,
    progress: Progress,
) -> tuple[str, ...]:
    """The outputs of a graph, in the order of `OUTPUTS`; features by themselves are said.

    Raises:
        PlanError: logits are asked for, of a model without a classifier.
    """
    if asked:
        if LOGITS in asked and not facts.classifier:
            raise PlanError(
                f"`outputs`: {facts.model} has no classifier, so its graph has no logits. Ask for "
                f"{FEATURES}."
            )
        return tuple(name for name in OUTPUTS if name in asked)
    heads = any(adapter.head is not None for adapter in adapters.values())
    if facts.classes or heads or reserve.max_classes or reserve.keep_backbone_head:
        return (LOGITS,)
    progress("no classifier in the model and the adapters: the graph gives features")
    return (FEATURES,)


def unkept_meaning(facts: BackboneFacts, reserve: Reserve) -> str | None:
    """A line where the backbone's own classifier, kept for requests, means more than such a
    request tells: classes, by their numbers, and so of one output always the first."""
    kind = problem_type_of(facts.meaning.problem_type, facts.classes)
    said = [str(kind)] if kind != CLASSES else []
    said += ["the names of its classes"] if facts.meaning.class_names else []
    if not said or not reserve.keep_backbone_head:
        return None
    certain = ", of its one output always with the first" if facts.classes == 1 else ""
    whose = "its source" if facts.meaning.to_json() else "a single output"
    return (
        f"the backbone's own classifier answers with numbered classes{certain}: "
        f"{' and '.join(said)}, as {whose} says, is for a whole model (`fold=True`) and for "
        "adapters"
    )


def without_heads(adapters: Mapping[str, Adapter], progress: Progress) -> dict[str, Adapter]:
    """Adapters for a graph without logits; whose classifier is not used is said.

    Raises:
        PlanError: nothing would be left of an adapter.
    """
    for name, adapter in adapters.items():
        if line := unused_head(name, adapter):
            progress(line)
    return {name: headless(name, adapter) for name, adapter in adapters.items()}
