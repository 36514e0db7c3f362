"""What an operator chooses for a server on several replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hhdeploy.runtime.serving.settings import Limits, ServeSettings, read_token


class RayArgs(BaseModel):
    """``args`` of the application: options of ``hhdeploy serve``, ``pinned`` those of ``--pin``.

    Paths are those of the machines that the replicas run on: bundle, fleet directory and token
    file must be there under the same names on all of them.

    Attributes:
        host: that Ray's proxies listen on (``http_options`` tell them): what requests may call the
            server follows from it, see `hosts_of`.
        replicas: sessions, each in a process of its own.
        cache_dir: where each machine keeps compiled models; None: ``$HHDEPLOY_CACHE``, else
            ``~/.cache/hhdeploy``.
        no_cache: keep none.
        ingresses: processes that take HTTP requests.
        gpus: of each replica, as Ray counts them; a replica with 0 sees none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    host: str = "127.0.0.1"
    device: str = "auto"
    precision: str = "float32"
    threads: int | None = Field(None, ge=1)
    cache_dir: Path | None = None
    no_cache: bool = False
    contexts: int = Field(1, ge=1)
    slots: int | None = Field(None, ge=2)
    max_batch: int = Field(32, ge=1)
    max_wait_ms: float = Field(2.0, ge=0)
    max_queue: int = Field(1024, ge=1)
    request_seconds: float = Field(30.0, gt=0)
    model_name: str | None = None
    adapters_dir: Path | None = None
    watch_seconds: float | None = Field(None, ge=0.05)
    pinned: tuple[str, ...] = ()
    allow_adapter_loading: bool = False
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    log_level: str = "info"
    replicas: int = Field(2, ge=1)
    ingresses: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)

    def settings(self, *, with_token: bool) -> ServeSettings:
        """For the ingress, which checks tokens, or for a replica, which never sees one.

        Raises:
            PlanError: options that do not go together, or no token in the file.
        """
        loading = self.allow_adapter_loading and with_token
        token = read_token(self.token_file) if self.token_file and with_token else None
        return ServeSettings(
            model_name=self.model_name or self.bundle.name,
            max_batch=self.max_batch,
            max_wait=self.max_wait_ms / 1e3,
            contexts=self.contexts,
            adapters_dir=self.adapters_dir,
            watch_seconds=self.watch_seconds,
            pinned=frozenset(self.pinned),
            adapter_loading=loading,
            token=token,
            allowed_hosts=frozenset(self.allowed_hosts),
            limits=Limits(queued_images=self.max_queue, request_seconds=self.request_seconds),
        )

    def session(self) -> dict[str, Any]:
        """Options of `open_session`."""
        throughput = self.contexts > 1 and self.device == "openvino"
        return {
            "device": self.device,
            "precision": self.precision,
            "slots": self.slots,
            "threads": self.threads,
            "contexts": self.contexts,
            "hint": "throughput" if throughput else "latency",
            "cache": None if self.no_cache else self.cache_dir or "default",
            "partial": True,
        }
