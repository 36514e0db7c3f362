"""What is chosen by name: the precision of a graph, the device that computes, what logits mean.

Every name is a member of one `Literal`, and its `typing.get_args` is the list that the command
line offers and messages show. A name is checked once, where it enters (a command, a function of
the Python API, a manifest), and typed from there on. Several come in a list.
So are numbers, switches and options that many functions take.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from numbers import Real
from typing import Any, Final, Literal, TypeVar, cast, get_args

from hhdeploy.errors import HhdeployError, OptionError

# Graphs beside float32: made of it alone, or of it and calibration data.
TypedPrecision = Literal["float16", "bfloat16"]
QuantisedPrecision = Literal["int8", "fp8", "int8-weights"]
Precision = Literal["float32", TypedPrecision, QuantisedPrecision]
# What runs a bundle's engines; TensorRT-RTX offers TensorRT's API.
TensorRt = Literal["tensorrt", "tensorrt-rtx"]
# The first four are ONNX Runtime's execution providers.
Runner = Literal["cpu", "cuda", "ort-tensorrt", "ort-tensorrt-rtx", "openvino", TensorRt]
# ``auto``: see `AUTO`.
Device = Literal["auto", Runner]
# What logits mean, as transformers names it; they are compared by it.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
# Where training computes.
TorchDevice = Literal["auto", "cpu", "cuda"]

TYPED: Final[tuple[TypedPrecision, ...]] = get_args(TypedPrecision)
QUANTISED: Final[tuple[QuantisedPrecision, ...]] = get_args(QuantisedPrecision)
# Those whose activations are clipped, to ranges that were found with the adapters of then.
RANGED: Final[tuple[QuantisedPrecision, ...]] = ("int8", "fp8")
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
BACKENDS: Final[tuple[TensorRt, ...]] = get_args(TensorRt)
RUNNERS: Final[tuple[Runner, ...]] = get_args(Runner)
DEVICES: Final[tuple[Device, ...]] = get_args(Device)
AUTO: Final = "auto: the first that is here and can: an engine of BUNDLE, cuda, openvino, cpu."
TORCH_DEVICES: Final[tuple[TorchDevice, ...]] = get_args(TorchDevice)
PROBLEM_TYPES: Final[tuple[ProblemType, ...]] = get_args(ProblemType)
CLASSES, LABELS, VALUES = PROBLEM_TYPES
# NumPy takes none below 0, torch none above.
MOST_SEED: Final = 2**63 - 1
# The least and the largest that torch alone takes.
SEEDS: Final = (-(2**63), 2**64 - 1)

_Name = TypeVar("_Name", bound=str)
_Kind = TypeVar("_Kind")


def member(names: Iterable[_Name], given: object) -> _Name | None:
    """``given`` as the one of ``names`` that it is; None if it is none. (An array is compared
    element by element, which is neither.)"""
    return next((name for name in names if isinstance(given, str) and name == given), None)


def one_of(names: Iterable[_Name], given: object, parameter: str, hint: str = "") -> _Name:
    """What a user gave, as the one of ``names`` that it is.

    Args:
        names: that can be chosen.
        given: for it.
        parameter: that holds it, for the message; ``precisions[]`` of a list.
        hint: what the message says behind the names.

    Raises:
        OptionError: it is none of them.
    """
    if (name := member(names, given)) is not None:
        return name
    listed = parameter.endswith("[]")
    shown = f"{parameter[:-2]}=[{given!r}]" if listed else f"{parameter}={given!r}"
    raise OptionError(f"`{shown}`: expected one of {', '.join(names)}.{hint}")


def listed(
    given: object, parameter: str, what: str, error: type[HhdeployError] = OptionError
) -> list[Any]:
    """What a user gave for a parameter that takes several values, as a list.

    A set has no order that anybody chose, it is another one in the next process; the letters of a
    string and the keys of a mapping are no values.

    Args:
        given: for it.
        parameter: for the message.
        what: its values are, in the plural.
        error: to raise.
    """
    if not isinstance(given, str | bytes | set | frozenset | Mapping):
        try:
            return list(cast(Iterable[Any], given))
        except TypeError:
            pass  # nothing that can be gone through
    raise _unlike(parameter, f"{what} in a list or tuple", given, error)


def of_kind(given: object, kind: type[_Kind], parameter: str) -> _Kind:
    """What a user gave for options that are an object of their own, which a dictionary is not.

    Raises:
        OptionError: it is none.
    """
    if isinstance(given, kind):
        return given
    raise _unlike(parameter, f"{kind.__name__}(...)", given)


def options_of(given: object, kind: type[_Kind], parameter: str) -> _Kind:
    """The same where None stands for what the options are when nobody says."""
    return kind() if given is None else of_kind(given, kind, parameter)


def mapping(
    given: object, parameter: str, what: str, error: type[HhdeployError] = OptionError
) -> Mapping[Any, Any]:
    """What a user gave for a dictionary; ``what``: its entries are. Else ``error``."""
    if isinstance(given, Mapping):
        return given
    raise _unlike(parameter, f"a dictionary of {what}", given, error)


def text(given: object, parameter: str, what: str) -> str:
    """What a user gave for ``what``, a string. Raises `OptionError`."""
    if isinstance(given, str):
        return given
    raise _unlike(parameter, f"{what} in a string", given)


def yes_or_no(given: object, parameter: str, error: type[HhdeployError] = OptionError) -> bool:
    """What a user gave for a switch, NumPy's values, 0 and 1 among them; else ``error``: Python
    takes "no" for true."""
    try:
        known = isinstance(given, Hashable) and given in (False, True)
    except (ValueError, RuntimeError):  # a tensor of several values
        known = False
    if known:
        return bool(given)
    raise _unlike(parameter, "True or False", given, error)


def listener(given: object) -> Callable[[str], None]:
    """A ``progress`` parameter: a function that is told lines. Raises `OptionError`."""
    if callable(given):
        return cast(Callable[[str], None], given)
    expected = "a function that takes a line, such as print, or nothing where none is to be told"
    raise _unlike("progress", expected, given)


def _unlike(
    parameter: str, expected: str, given: object, error: type[HhdeployError] = OptionError
) -> HhdeployError:
    return error(
        f"`{parameter}`: expected {expected}, found {type(given).__name__} {reprlib.repr(given)}."
    )


def number(given: object, parameter: str) -> float:
    """What a user gave for a finite number, NumPy's among them. Raises `OptionError`."""
    if math.isfinite(found := as_float(given)):
        return found
    raise _unlike(parameter, "a finite number", given)


def whole(
    given: object,
    parameter: str,
    least: int,
    most: int | None = None,
    error: type[HhdeployError] = OptionError,
) -> int:
    """What a user gave for a whole number of a range, NumPy's among them; else ``error``. A switch
    is none: Python takes True for 1."""
    try:
        number = None if isinstance(given, bool) else operator.index(cast(Any, given))
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        ends = f"{least} or more" if most is None else f"{least} to {most}"
        raise error(f"`{parameter}`: expected {ends}, a whole number, found {given!r}.")
    return number


def seconds(given: object, parameter: str) -> float:
    """What a user gave for a time, endless (``inf``) or not. Raises `OptionError`."""
    if not (found := as_float(given)) >= 0:
        raise OptionError(f"`{parameter}`: expected 0 seconds or more, found {given!r}.")
    return found


def as_float(given: object) -> float:
    """NaN for what is no number, as True is none; infinite where float has none so large."""
    if isinstance(given, bool) or not isinstance(given, Real):
        return math.nan
    try:
        return float(given)
    except OverflowError:
        return math.inf if cast(int, given) > 0 else -math.inf


def as_seed(given: object) -> int:
    """A ``seed`` parameter. Raises `OptionError`."""
    return whole(given, "seed", 0, MOST_SEED)


def as_precisions(given: Iterable[str] | None) -> tuple[Precision, ...] | None:
    """A ``precisions`` parameter, None as it is. Raises `OptionError`: see `one_of`, `listed`."""
    if given is None:
        return None
    names = listed(given, "precisions", "names")
    return tuple(one_of(PRECISIONS, name, "precisions[]") for name in names)
