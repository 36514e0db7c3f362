"""Every kind of abuse by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from hhdeploy.loadtest.abuse import (
    fleet_files,
    grpc_names,
    json_bombs,
    lingering,
    overload,
    pictures,
)
from hhdeploy.loadtest.abuse.wire import Attack, Victim


@dataclass(frozen=True)
class Abuse:
    """One kind.

    Attributes:
        prepare: makes what is sent, once, and gives what each connection does again and again.
        connections: that do it at the same time.
        grpc: the honest clients ask over gRPC, where it could hurt them; else over HTTP.
    """

    prepare: Callable[[Victim], Attack]
    connections: int
    grpc: bool = False


KINDS: Final[Mapping[str, Abuse]] = {
    "json-gzip": Abuse(json_bombs.gzip_bombs, 4),
    "json-deflate": Abuse(json_bombs.deflate_bombs, 4),
    "json-nested": Abuse(json_bombs.nested_bombs, 4),
    "picture-png": Abuse(pictures.png_bombs, 4),
    "picture-jpeg": Abuse(pictures.jpeg_bombs, 4),
    "picture-webp": Abuse(pictures.webp_bombs, 4),
    "refused-bodies": Abuse(overload.refused_bodies, 48),
    "slow-senders": Abuse(lingering.slow_senders, 100),
    "slow-readers": Abuse(lingering.slow_readers, 60),
    "idle": Abuse(lingering.idle, 500),
    "grpc-names": Abuse(grpc_names.names_that_are_no_text, 8, grpc=True),
    "fleet-pipes": Abuse(fleet_files.pipes, 4),
}
