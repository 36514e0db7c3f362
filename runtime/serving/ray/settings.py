"""What an operator chooses for a server on several replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from hhdeploy.errors import OptionError
from hhdeploy.runtime.serving.settings import ServeSettings


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

    replicas: int = 2
    ingresses: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("replicas", 1), ("ingresses", 1), ("gpus", 0)):
            if not getattr(self, name) >= least:  # NaN is not either
                raise OptionError(f"{name}: expected {least} or more, found {getattr(self, name)}.")


def read_settings(args: Mapping[str, Any]) -> RaySettings:
    """``args`` of the application: fields by name, as YAML and JSON hold them.

    Raises:
        ValidationError: pydantic's, for a name that there is not, or a value of another type.
        PlanError: values that do not go together.
    """
    return TypeAdapter(RaySettings).validate_python(dict(args))
