"""What the operator of a server chose: the one declaration of every option and its default.

`hhdeploy serve` makes its command line of these fields, the Ray application its arguments, and
tests build the class as it is.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hhdeploy.choices import AUTO, DEVICES, PRECISIONS, Device, Precision, one_of
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.runtime.serving.access.hosts import allowed_name

# What the loopback is called.
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# A float32 as text, with its comma; and what `ServeSettings.json_limit` keeps to.
_NUMBER_BYTES, _LEAST_JSON, _MOST_JSON = 12, 8 << 20, 32 << 20
# Of a message of protobuf, and of gRPC's options.
_MOST_BYTES = (1 << 31) - 1
# Of an adapter that is sent as one, with what is around it.
_MOST_ADAPTER = _MOST_BYTES - (1 << 20)
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Option:
    """How a field is asked for on the command line.

    Attributes:
        help: what is shown.
        least: smallest number that is taken.
        above: every number above it is taken.
        most: largest number that is taken.
        flag: if it is not the field's name with dashes.
    """

    help: str = ""
    least: float | None = None
    above: float | None = None
    most: int | None = None
    flag: str = ""


def _asked(default: Any, help: str = "", **told: Any) -> Any:
    """A field that has an option; ``told``: further attributes of that."""
    return field(default=default, metadata={"option": Option(help, **told)})


def within(least: float, most: int | None = None) -> dict[str, Option]:
    """Metadata of a number that is not on the command line: its range alone."""
    return {"range": Option(least=least, most=most)}


@dataclass(frozen=True)
class ServeSettings:
    """How a bundle is served.

    The fields without an `Option` are not on the command line.

    Attributes:
        bundle: what is served.
        host: address to listen on.
        device, precision, threads, contexts, slots: see `open_session`.
        cache_dir: where compiled models are kept; None: ``$HHDEPLOY_CACHE``, else
            ``~/.cache/hhdeploy``.
        no_cache: keep none.
        max_batch: images of one run, and of one request.
        max_wait_ms: how long a request may wait for company, while another batch runs and the
            session could take a second one (``contexts``).
        max_queue: images of all requests that wait; more are refused (429, UNAVAILABLE).
        request_seconds: from the first byte to the answer.
        model_name: of the bundle in the protocol, its directory's if it is left out; adapters are
            models of their own beside it.
        adapters_dir: fleet directory, one adapter a folder; None: the bundle's adapters alone.
        watch_seconds: how often the fleet directory is looked through; None: once, at the start.
        pinned: adapters that are never evicted.
        allow_adapter_loading: whether the network may load and unload adapters.
        token_file: holds the token that it must present then.
        inference_token_file: holds the tokens, one a line, of which all other requests but health
            must present one; None: they need none.
        tls_cert, tls_key: certificate chain and key, PEM; None: no TLS.
        allowed_hosts: names by which HTTP requests may call the server, whatever the port, see
            `hosts`.
        no_access_log: write no line for each request.
        log_level: debug, info, warning or error.
        max_json: bytes of JSON in an inference, decompressed, or of large typed contents over gRPC;
            None: see `json_limit`.
        body_bytes: of a request, also once it is decompressed.
        image_pixels: of one encoded picture, read from its header before it is decoded.
        request_pixels: of all pictures of a request.
        decoders: pictures that are decoded at the same time; vast ones (of 2^24 pixels or more)
            take half of them at most.
        decoding_pixels: of the vast pictures that are decoded at the same time.
        adapter_bytes: of an uploaded adapter's files together.
        bodies_bytes: HTTP bodies of all requests that are read or answered, and answers until they
            are taken; more are refused (429). gRPC's answers until they are taken, as much again.
        connections: at the same time, of each wire; more are refused (HTTP: 503; gRPC: closed),
            and of gRPC's calls as many.
    """

    # ruff: noqa: RUF009 - each is a field of its own

    bundle: Path
    host: str = _asked("127.0.0.1", "Address to listen on.")
    device: Device = _asked("auto", AUTO)
    precision: Precision = _asked("float32")
    threads: int | None = _asked(None, "Threads of one run.", least=1)
    cache_dir: Path | None = None
    no_cache: bool = False
    contexts: int = _asked(
        1, "Batches at the same time; with openvino the threads are divided among them.", least=1
    )
    slots: int | None = _asked(
        None,
        "Rows of the bank, the backbone's included.  [default: 64, or what the bundle needs]",
        least=2,
    )
    max_batch: int = _asked(32, "Images of one run.", least=1)
    max_wait_ms: float = _asked(
        2.0,
        "How long a request waits for company while another batch runs, if --contexts lets it.",
        least=0,
    )
    max_queue: int = _asked(
        1024, "Images that may wait; more are refused (429, UNAVAILABLE).", least=1
    )
    request_seconds: float = _asked(
        30.0, "Limit of one request, from its first byte to its answer.", above=0
    )
    model_name: str = _asked("", "Of the bundle in the protocol.  [default: its directory's]")
    adapters_dir: Path | None = _asked(
        None, "Fleet directory: further adapters, one a folder, loaded when they are asked for."
    )
    watch_seconds: float | None = _asked(
        None,
        "Look through --adapters-dir that often for new, changed and removed adapters.",
        least=0.05,
    )
    pinned: frozenset[str] = _asked(
        frozenset(), "An adapter that never loses its row.", flag="--pin"
    )
    allow_adapter_loading: bool = _asked(
        False, "Let the network load and unload adapters; needs --token-file."
    )
    token_file: Path | None = _asked(None, "The token that loading adapters needs.")
    inference_token_file: Path | None = _asked(
        None, "Tokens, one a line; every request but health must present one then."
    )
    tls_cert: Path | None = _asked(None, "Certificate chain, PEM: HTTP and gRPC over TLS.")
    tls_key: Path | None = _asked(None, "Its key, PEM, not encrypted.")
    allowed_hosts: frozenset[str] = _asked(
        frozenset(),
        "A name by which requests may call the server, e.g. that of a proxy on this machine.  "
        "[default: localhost on a loopback --host, any on others]",
        flag="--allowed-host",
    )
    no_access_log: bool = _asked(False, "No line in the log for each request.")
    log_level: str = _asked("info")
    max_json: int | None = _asked(
        None,
        "Bytes of JSON in an inference, decompressed, or of typed contents over gRPC.  "
        "[default: what a full batch of numbers needs, from 8 to 32 MiB]",
        least=1024,
    )
    body_bytes: int = _asked(
        64 << 20, "Bytes of a request, also once it is decompressed.", least=1024, most=_MOST_BYTES
    )
    image_pixels: int = _asked(50_000_000, "Pixels of one encoded picture.", least=1)
    request_pixels: int = _asked(400_000_000, "Pixels of all pictures of a request.", least=1)
    decoders: int = _asked(2, "Pictures that are decoded at the same time.", least=1, most=1024)
    decoding_pixels: int = _asked(
        100_000_000,
        "Pixels of pictures of 16 million or more that are decoded at the same time.",
        least=1,
    )
    adapter_bytes: int = field(default=256 << 20, metadata=within(1024, _MOST_ADAPTER))
    bodies_bytes: int = field(default=1 << 30, metadata=within(1024))
    connections: int = _asked(
        4096, "Connections at the same time, of HTTP and of gRPC.", least=1, most=1 << 20
    )

    def __post_init__(self) -> None:
        if not self.model_name:
            object.__setattr__(self, "model_name", self.bundle.resolve().name)
        _check_model_name(self.model_name)
        if not self.host.strip():  # the system would take it for every address
            raise OptionError(
                f"`host`: expected an address or a name, e.g. 127.0.0.1, found {self.host!r}. All "
                "addresses of this machine are 0.0.0.0, or :: for IPv6 as well."
            )
        for each in fields(self):
            told = each.metadata.get("option") or each.metadata.get("range")
            _check_range(each.name, getattr(self, each.name), told)
        object.__setattr__(self, "allowed_hosts", frozenset(map(allowed_name, self.allowed_hosts)))
        one_of(DEVICES, self.device, "device")
        one_of(PRECISIONS, self.precision, "precision")
        one_of(LEVELS, self.log_level, "log_level")
        if self.allow_adapter_loading and self.token_file is None:
            raise OptionError(
                "`allow_adapter_loading` needs `token_file`: whoever can reach the port could "
                "replace adapters otherwise. Make one with: openssl rand -hex 32 > token"
            )
        if self.token_file is not None and not self.allow_adapter_loading:
            raise OptionError(
                "`token_file` needs `allow_adapter_loading`: nothing else asks for that token. "
                "The tokens of inference are in `inference_token_file`."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError("`tls_cert` and `tls_key` go together: give both, or none.")
        if self.adapters_dir is not None and not self.adapters_dir.is_dir():
            raise PlanError(
                f"`adapters_dir`: {self.adapters_dir} is not a directory. Expected a folder with "
                "one adapter directory a task."
            )
        if self.adapters_dir is not None:
            from hhdeploy.files.outputs import bundle_around  # the command line reads this module

            if bundle_around(self.adapters_dir / "NAME") is not None:
                raise PlanError(
                    f"`adapters_dir`: {self.adapters_dir} belongs to a bundle, which an upload "
                    "would damage. Expected a folder of its own, with one adapter directory a task."
                )
        if self.watch_seconds is not None and self.adapters_dir is None:
            raise OptionError("`watch_seconds`: there is nothing to watch without `adapters_dir`.")

    def session_options(self) -> dict[str, Any]:
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

    def json_limit(self, values: int | None) -> int:
        """``max_json``, or what a full batch of images of so many values needs as numbers.

        Not less than a few photos in base64 have, and not more than is read in some seconds.

        Args:
            values: None: not known.
        """
        if self.max_json is not None:
            return self.max_json
        batch = _MOST_JSON if values is None else self.max_batch * values * _NUMBER_BYTES
        return min(max(batch, _LEAST_JSON), _MOST_JSON)

    def hosts(self) -> frozenset[str] | None:
        """Names that HTTP requests may call the server, in lower case; None: any.

        A browser's own rules keep a web page from reading the loopback's answers, but for a page
        whose name is pointed at the loopback once it is loaded (DNS rebinding). Its requests carry
        that name.
        """
        if self.allowed_hosts or _is_loopback(self.host):
            return self.allowed_hosts | _LOOPBACK | {self.host.lower()}
        return None

    def exposed(self) -> str:
        """What keeps others from asking, and is missing; empty on a loopback address."""
        given = {
            "`tls_cert`": self.tls_cert is not None,
            "`inference_token_file`": self.inference_token_file is not None,
        }
        missing = [name for name, there in given.items() if not there]
        return "" if _is_loopback(self.host) else ", ".join(missing)


def _check_range(name: str, value: Any, option: Option | None) -> None:
    if option is None or value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"`{name}`: expected a number, found {value}.")
    if option.least is not None and value < option.least:
        raise OptionError(f"`{name}`: expected {option.least:g} or more, found {value}.")
    if option.above is not None and value <= option.above:
        raise OptionError(f"`{name}`: expected more than {option.above:g}, found {value}.")
    if option.most is not None and value > option.most:
        raise OptionError(f"`{name}`: expected {option.most} or less, found {value}.")


def _check_model_name(name: str) -> None:
    """It is a part of paths, ``/v2/models/NAME``, and of messages in UTF-8."""
    if "/" in name or name in ("", ".", "..") or any("\ud800" <= c <= "\udfff" for c in name):
        raise OptionError(
            f"`model_name`: expected a name that can be a part of a path, e.g. vit, found {name!r}."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
