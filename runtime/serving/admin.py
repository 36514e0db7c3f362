"""What the protocol tells about models, and how adapters are loaded over it.

The bundle is a model, and so is every adapter, under its own name; HTTP and gRPC give the same
answers. Loading is off unless the operator allowed it, and needs the operator's token then.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from hhdeploy.adapter import TENSOR_FILE
from hhdeploy.runtime.serving.errors import (
    ForbiddenError,
    NotFoundError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
)
from hhdeploy.runtime.serving.fleet import Fleet
from hhdeploy.runtime.serving.service import (
    ADAPTERS,
    IMAGES,
    LABELS,
    LOGITS,
    PROBABILITIES,
    VERSION,
    Service,
)

PLATFORM: Final = "hhdeploy"
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
# The one file of an upload beside its configuration, as Triton's load API names files.
_UPLOAD: Final = re.compile(rf"file:(?:[^/]*/)?{re.escape(TENSOR_FILE)}")


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": "hhdeploy", "version": version("hhdeploy"), "extensions": list(EXTENSIONS)}


def model_metadata(service: Service, model: str, version: str = "") -> dict[str, Any]:
    """Inputs and outputs of a model, and the adapters there are. -1: any number.

    Raises:
        NotFoundError: no such model.
    """
    alias = service.alias(model, version)
    classes = -1
    entries = service.entries()
    for entry in entries:
        if entry.name == alias or service.fleet is None:
            classes = entry.classes
    return {
        "name": model,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [
            {"name": IMAGES, "datatype": "FP32", "shape": [-1, *service.manifest.input_size]}
        ],
        "outputs": [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, classes]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, classes]},
            {"name": LABELS, "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {
            "adapters": adapter_names(service) if alias is None else [alias],
            "max_batch_size": service.settings.max_batch,
            "device": service.device,
            "optional_inputs": [
                {"name": IMAGES, "datatype": "BYTES", "shape": [-1]},
                {"name": ADAPTERS, "datatype": "BYTES", "shape": [-1]},
            ],
        },
    }


def adapter_names(service: Service) -> list[str]:
    """Adapters that requests may name."""
    if service.fleet is None:
        return [a.name for a in service.manifest.adapters]
    return [s.name for s in service.fleet.statuses() if s.state in ("ready", "on disk")]


def model_ready(service: Service, model: str, version: str = "") -> bool:
    """Whether a model answers.

    Raises:
        NotFoundError: no such model.
    """
    alias = service.alias(model, version)
    return service.ready and (alias is None or alias in adapter_names(service))


def model_config(service: Service, model: str, version: str = "") -> dict[str, Any]:
    """A model's configuration in Triton's terms, for tools that ask for it.

    Raises:
        NotFoundError: no such model.
    """
    metadata = model_metadata(service, model, version)
    types = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}

    def tensors(key: str) -> list[dict[str, Any]]:
        return [
            # With max_batch_size set, shapes are without the batch.
            {"name": t["name"], "data_type": types[t["datatype"]], "dims": t["shape"][1:] or [1]}
            for t in metadata[key]
        ]

    return {
        "name": model,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": service.settings.max_batch,
        "input": tensors("inputs"),
        "output": tensors("outputs"),
    }


def model_statistics(service: Service, model: str, version: str = "") -> dict[str, Any]:
    """Counts and durations since the start, of all adapters together, in Triton's terms.

    Raises:
        NotFoundError: no such model.
    """
    service.alias(model, version)
    metrics = service.metrics

    def duration(microseconds: int) -> dict[str, int]:
        return {"count": metrics.success, "ns": 1000 * microseconds}

    failures = sum(metrics.failures.values())
    statistics = {
        "name": service.settings.model_name,
        "version": VERSION,
        "inference_count": metrics.images,
        "execution_count": service.now().runs,
        "inference_stats": {
            "success": duration(metrics.request_us),
            "fail": {"count": failures, "ns": 0},
            "queue": duration(metrics.queue_us),
            "compute_input": duration(metrics.input_us),
            "compute_infer": duration(metrics.infer_us),
            "compute_output": duration(metrics.output_us),
        },
    }
    return {"model_stats": [statistics]}


def repository_index(service: Service, ready_only: bool) -> list[dict[str, str]]:
    """The bundle and every adapter, with its state; `reason` says why one is not ready."""
    found = [
        {
            "name": service.settings.model_name,
            "version": VERSION,
            "state": "READY" if service.ready else "UNAVAILABLE",
            "reason": "",
        }
    ]
    if service.fleet is None:
        found += [found[0] | {"name": a.name} for a in service.manifest.adapters]
    else:
        for status in service.fleet.statuses():
            answers = status.state in ("ready", "on disk")
            found.append(
                {
                    "name": status.name,
                    "version": VERSION,
                    "state": "READY" if answers else "UNAVAILABLE",
                    "reason": status.problem or ("" if answers else "unloaded"),
                }
            )
    return [m for m in found if m["state"] == "READY" or not ready_only]


def check_token(service: Service, authorization: str | None) -> None:
    """Whether a request may load and unload adapters: ``Authorization: Bearer TOKEN``.

    Raises:
        ForbiddenError: the operator has not allowed it to anybody.
        UnauthorizedError: the token is missing or wrong.
    """
    settings = service.settings
    if not settings.adapter_loading or settings.token is None:
        raise ForbiddenError(
            "adapters cannot be loaded over the network: the server was started without "
            "--allow-adapter-loading."
        )
    kind, _, given = (authorization or "").partition(" ")
    # In constant time, so that the answer's delay tells nothing of the token.
    same = hmac.compare_digest(given.strip().encode(), settings.token.encode())
    if kind.lower() != "bearer" or not same:
        raise UnauthorizedError("loading adapters needs the header Authorization: Bearer TOKEN.")


async def load_adapter(service: Service, name: str, parameters: Mapping[str, Any]) -> None:
    """Load an adapter of the fleet directory or the bundle, or one that is uploaded.

    An upload has two parameters: ``config``, the text of adapter_config.json, and
    ``file:adapter_model.safetensors``, the file's bytes (base64 if they are text).

    Raises:
        RequestError: or one of its kinds. HhdeployError: what is wrong with the adapter.
    """
    fleet = _fleet(service, name)
    config = parameters.get("config")
    files = {key: value for key, value in parameters.items() if key.startswith("file:")}
    if config is None and not files:
        await fleet.load(name)
        return
    if not isinstance(config, str) or len(files) != 1 or not _UPLOAD.fullmatch(next(iter(files))):
        raise RequestError(
            "an upload has two parameters: config, the text of adapter_config.json, and "
            f"file:{TENSOR_FILE}, its bytes. Found: "
            f"{', '.join(sorted(str(k)[:80] for k in parameters))}."
        )
    (content,) = files.values()
    if isinstance(content, str):
        try:
            content = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"file:{TENSOR_FILE}: expected base64: {error}") from error
    if not isinstance(content, bytes):
        raise RequestError(f"file:{TENSOR_FILE}: expected base64.")
    if len(content) + len(config) > service.settings.limits.adapter_bytes:
        raise TooLargeError(f"the adapter is beyond {service.settings.limits.adapter_bytes} bytes.")
    await fleet.upload(name, config.encode("utf-8", "replace"), content)


async def unload_adapter(service: Service, name: str) -> None:
    """Answer no request for an adapter any more, until it is loaded again.

    Raises:
        NotFoundError: no such adapter.
    """
    await _fleet(service, name).unload(name)


def _fleet(service: Service, name: str) -> Fleet:
    if name == service.settings.model_name:
        raise RequestError(
            f"{name!r} is the bundle: it is loaded as long as the server runs. Name an adapter."
        )
    if service.fleet is None:
        raise NotFoundError("this folded bundle holds one adapter, in its weights.")
    return service.fleet
