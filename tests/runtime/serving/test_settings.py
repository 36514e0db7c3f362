"""What an operator may choose."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from hhdeploy.cli.serve import command
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.settings import ServeSettings

TOKEN = "0123456789abcdef"


def test_loading_over_the_network_needs_a_token(tmp_path):
    with pytest.raises(PlanError, match=r"needs `token_file`.*openssl rand"):
        ServeSettings(Path("tiny"), allow_adapter_loading=True)
    (tmp_path / "token").write_text(TOKEN)
    settings = ServeSettings(
        Path("tiny"), allow_adapter_loading=True, token_file=tmp_path / "token"
    )
    Access.of(settings).check_loading(f"Bearer {TOKEN}")
    # It does not travel with the settings, e.g. to replicas.
    assert TOKEN not in repr(settings) and TOKEN.encode() not in pickle.dumps(settings)


def test_a_token_that_nothing_asks_for_is_refused(tmp_path):
    """Whoever gives one may believe that it protects inference."""
    with pytest.raises(OptionError, match="`token_file` needs `allow_adapter_loading`"):
        ServeSettings(Path("tiny"), token_file=tmp_path / "token")


@pytest.mark.parametrize("host", ["", " "])
def test_no_host_is_not_every_address(host):
    """As a variable that is not set leaves it in a script."""
    with pytest.raises(OptionError, match="`host`: expected an address or a name"):
        ServeSettings(Path("tiny"), host=host)


@pytest.mark.parametrize("half", ["tls_cert", "tls_key"])
def test_half_of_tls_is_refused(tmp_path, half):
    with pytest.raises(OptionError, match="`tls_cert` and `tls_key` go together"):
        ServeSettings(Path("tiny"), **{half: tmp_path / "file"})


def test_what_a_server_beyond_the_loopback_is_without(tmp_path):
    tls = {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key"}
    tokens = {"inference_token_file": tmp_path / "tokens"}

    def exposed(**chosen):
        return ServeSettings(Path("tiny"), **chosen).exposed()

    assert exposed() == exposed(host="::1") == exposed(host="0.0.0.0", **tls, **tokens) == ""
    assert exposed(host="0.0.0.0") == "`tls_cert`, `inference_token_file`"
    assert exposed(host="::", **tls) == "`inference_token_file`"
    assert exposed(host="192.0.2.1", **tokens) == "`tls_cert`"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_batch": 0}, "`max_batch`: expected 1 or more, found 0"),
        ({"contexts": 0}, "`contexts`: expected 1"),
        ({"slots": 1}, "`slots`: expected 2"),
        ({"request_seconds": 0.0}, "`request_seconds`: expected more than 0"),
        ({"request_seconds": float("inf")}, "`request_seconds`: expected a number, found inf"),
        ({"request_seconds": float("nan")}, "`request_seconds`: expected a number, found nan"),
        ({"max_wait_ms": float("nan")}, "`max_wait_ms`: expected a number, found nan"),
        ({"watch_seconds": float("nan")}, "`watch_seconds`: expected a number, found nan"),
        ({"body_bytes": 1 << 31}, "`body_bytes`: expected 2147483647 or less, found 2147483648"),
        ({"connections": 10**10}, "`connections`: expected 1048576 or less, found 10000000000"),
        ({"adapter_bytes": -1}, "`adapter_bytes`: expected 1024 or more, found -1"),
        ({"adapter_bytes": 1 << 31}, "`adapter_bytes`: expected 2146435071 or less"),
        ({"bodies_bytes": 0}, "`bodies_bytes`: expected 1024 or more, found 0"),
        ({"decoders": 10**10}, "`decoders`: expected 1024 or less"),
        ({"log_level": "loud"}, "`log_level='loud'`: expected one of debug"),
    ],
)
def test_numbers_in_their_range(wrong, said):
    with pytest.raises(OptionError, match=said):
        ServeSettings(Path("tiny"), **wrong)


def test_the_bundle_is_called_as_its_directory_unless_told(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    monkeypatch.chdir(tmp_path / "served")
    assert ServeSettings(Path()).model_name == "served"
    assert ServeSettings(Path(), model_name="vit").model_name == "vit"
    assert ServeSettings(Path(), model_name="vit \u00e9?").model_name == "vit \u00e9?"


@pytest.mark.parametrize("name", ["org/vit", "/", ".", "..", "\udcff"])
def test_a_model_name_that_no_request_can_have(name):
    with pytest.raises(OptionError, match="`model_name`: expected a name that can be a part"):
        ServeSettings(Path("tiny"), model_name=name)
    with pytest.raises(OptionError, match="`model_name`"):
        ServeSettings(Path("/"))  # which has no name


def test_the_command_line_has_every_option_with_its_default():
    """A field on the command line that a test or Ray would see with another default."""
    context = command.make_context("serve", ["OUT"])
    options = context.params
    settings = ServeSettings(Path("OUT"))
    for field in dataclasses.fields(ServeSettings):
        if "option" in field.metadata:
            given = options[field.name]
            expected = getattr(settings, field.name) if field.name != "model_name" else None
            assert given == (sorted(expected) if isinstance(given, tuple) else expected) or (
                given == () and expected == frozenset()
            ), field.name


def test_a_fleet_directory_that_there_is_not(tmp_path):
    with pytest.raises(PlanError, match="is not a directory"):
        ServeSettings(Path("tiny"), adapters_dir=tmp_path / "none")
    (tmp_path / "bundle" / "adapters").mkdir(parents=True)
    (tmp_path / "bundle" / "hhdeploy.json").write_text('{"files": {}}')
    (tmp_path / "bundle" / "mine" / "fleet").mkdir(parents=True)
    for inside in (".", "adapters", "mine/fleet"):
        with pytest.raises(PlanError, match="belongs to a bundle, which an upload would damage"):
            ServeSettings(Path("tiny"), adapters_dir=tmp_path / "bundle" / inside)
    with pytest.raises(PlanError, match="nothing to watch without `adapters_dir`"):
        ServeSettings(Path("tiny"), watch_seconds=1.0)
    settings = ServeSettings(Path("tiny"), adapters_dir=tmp_path, watch_seconds=1.0)
    assert settings.adapters_dir == tmp_path
