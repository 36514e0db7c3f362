"""What an operator chooses for a server on several replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final

from pydantic import ConfigDict, TypeAdapter

from hhdeploy.errors import OptionError
from hhdeploy.runtime.serving.settings import ServeSettings, within

# What waits rather than computes takes as many requests and questions at the same time. Processes
# of a kind are at most as many: each of them waits for the registry.
MOST_WAITING: Final = 4096


@dataclass(frozen=True)
class RaySettings(ServeSettings):
    """`ServeSettings` of every replica, and how many there are.

    Paths are those of the machines that the replicas run on: bundle, fleet directory and token
    file must be there under the same names on all of them. ``host`` is what Ray's proxies listen
    on (``http_options`` tell them).

    Attributes:
        replicas: sessions, each in a process of its own.
        ingresses: processes that take HTTP requests.
        gpus: of each replica, as Ray counts them; a replica with 0 sees none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    replicas: int = field(default=2, metadata=within(1, MOST_WAITING))
    ingresses: int = field(default=1, metadata=within(1, MOST_WAITING))
    gpus: float = field(default=0.0, metadata=within(0))


def read_settings(args: Mapping[str, Any]) -> RaySettings:
    """``args`` of the application: fields by name, as YAML and JSON hold them.

    Raises:
        ValidationError: pydantic's, for a name that there is not, or a value of another type.
        OptionError: true or false for a number; a blank path, which would be the working directory
            of whatever process reads it.
        PlanError: values that do not go together.
    """
    for each in fields(RaySettings):
        value, kind = args.get(each.name), str(each.type)
        if isinstance(value, bool) and ("int" in kind or "float" in kind):
            raise OptionError(f"`{each.name}`: expected a number, found {str(value).lower()}.")
        if isinstance(value, str) and not value.strip() and "Path" in kind:
            raise OptionError(f"`{each.name}`: expected a path, found {value!r}.")
    return TypeAdapter(RaySettings).validate_python(dict(args))
