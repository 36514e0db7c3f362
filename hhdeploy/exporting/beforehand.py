"""What an export refuses before the slow work: tracing, folding, running the model in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hhdeploy.adapters.bases import check_answer
from hhdeploy.adapters.checks import BACKBONE, WHOLE, check
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.outputs import base_answer, computing
from hhdeploy.bundle.layout import check_row_range
from hhdeploy.bundle.rounding import check_row_survives
from hhdeploy.choices import TYPED, TypedPrecision, one_of
from hhdeploy.errors import OptionError
from hhdeploy.plan import Reserve, check_whole, plan_branches
from hhdeploy.verifying.reference import check_verifiable

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone
    from hhdeploy.verifying.reference import VerifyData


def check_precisions(precisions: Sequence[TypedPrecision]) -> None:
    """Raise `OptionError` for a precision that an export does not write."""
    hint = " (float32 is always written; int8 comes from calibration data: `calibrate()`.)"
    for precision in precisions:
        one_of(TYPED, precision, "precisions[]", hint)


def check_fold(adapters: int, reserve: Reserve, bank_as_constant: bool) -> None:
    """Raise `OptionError` for options that a folded graph has no use for.

    Args:
        adapters: how many there are.
        reserve: room for later ones.
        bank_as_constant: bake the bank into the graph.
    """
    if adapters > 1:
        raise OptionError(
            f"`fold=True` takes exactly one adapter, found {adapters}; or none, for a whole model."
        )
    if reserve != Reserve() or bank_as_constant:
        raise OptionError(
            "`fold=True` cannot be combined with `max_rank`, `max_classes`, `sites`, `parts`, "
            "`keep_backbone_head` or `bank_as_constant`: a folded graph has no bank."
        )


def check_contents(
    facts: BackboneFacts,
    adapters: Mapping[str, Adapter],
    fold: bool,
    reserve: Reserve,
    precisions: Sequence[TypedPrecision],
) -> tuple[str, ...]:
    """What the adapters and the loaded model alone tell of the bundle to be made.

    The traced graph may have fewer Linears, so all of this is checked again with those it has.

    Args:
        facts: of the loaded model; without a classifier where the graph gives no logits.
        adapters: by name; without classifiers there, too.
        fold: one adapter, or none, in the weights.
        reserve: room for later ones.
        precisions: of further graphs.

    Returns:
        The names by which the bundle will answer, the backbone's included.

    Raises:
        AdapterError, PlanError: see `plan_branches`, `check`, `check_whole`.
        CapacityError: a row does not fit a graph's type, or nothing of it is left there.
    """
    if fold:
        for name, adapter in adapters.items():
            check(name, adapter, facts)
        if not adapters:
            check_whole(facts)
        return tuple(adapters) or (WHOLE,)
    plan = plan_branches(facts, adapters, reserve, logits=bool(facts.classifier))
    for name, adapter in adapters.items() if precisions else ():  # float32 holds every row
        row = plan.layout.pack(name, adapter)
        check_row_range(name, row, precisions)
        check_row_survives(name, plan.layout, row, precisions)
    answers = plan.layout.backbone_head or not plan.classes
    return (BACKBONE, *plan.names) if answers else plan.names


def check_answers(backbone: Backbone, adapters: Mapping[str, Adapter]) -> list[str]:
    """The backbone computes what the models did that the adapters were trained on.

    Args:
        backbone: as loaded; it is called once, where an adapter knows what it should answer.
        adapters: by name; they passed `check_contents`.

    Returns:
        A line for each adapter of which that is not known.

    Raises:
        AdapterError: it computes otherwise.
        BackboneError: it does not compute on images.
    """
    facts, found = backbone.facts, None
    size = facts.preprocess.input_size
    if any(adapter.config.base_answer for adapter in adapters.values()):
        with computing(facts.model, (1, *size)):
            found = base_answer(backbone.model, facts.classifier, size)
    lines = (check_answer(name, a, facts, found) for name, a in adapters.items())
    return [line for line in lines if line]


def check_data(
    data: VerifyData,
    names: Sequence[str],
    adapters: Mapping[str, Adapter],
    facts: BackboneFacts,
) -> None:
    """There is something to verify, and its images can be read.

    Args:
        data: which images.
        names: by which the bundle will answer.
        adapters: by name; none of the backbone or a whole model.
        facts: of the loaded model.

    Raises:
        PlanError: there is nothing to verify.
        DataError: the folder has no images, or one cannot be decoded.
    """
    check_verifiable(names)
    if data.folder is not None:
        for name in names:
            data.batch(name, adapters.get(name), facts)
