"""What an operator may choose."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from hhdeploy.cli.serve import command
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.runtime.serving.settings import ServeSettings, read_token

TOKEN = "0123456789abcdef"


def test_loading_over_the_network_needs_a_token(tmp_path):
    with pytest.raises(PlanError, match=r"needs `token_file`.*openssl rand"):
        ServeSettings(Path("tiny"), allow_adapter_loading=True)
    assert ServeSettings(Path("tiny")).token() is None
    settings = ServeSettings(
        Path("tiny"), allow_adapter_loading=True, token_file=tmp_path / "token"
    )
    with pytest.raises(PlanError, match="cannot be read"):
        settings.token()
    (tmp_path / "token").write_text(TOKEN)
    assert settings.token() == TOKEN
    # It does not travel with the settings, e.g. to replicas.
    assert TOKEN not in repr(settings) and TOKEN.encode() not in pickle.dumps(settings)


def test_a_token_that_nothing_asks_for_is_refused(tmp_path):
    """Whoever gives one may believe that it protects inference."""
    with pytest.raises(OptionError, match="`token_file` needs `allow_adapter_loading`"):
        ServeSettings(Path("tiny"), token_file=tmp_path / "token")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_batch": 0}, "`max_batch`: expected 1 or more, found 0"),
        ({"contexts": 0}, "`contexts`: expected 1"),
        ({"slots": 1}, "`slots`: expected 2"),
        ({"request_seconds": 0.0}, "`request_seconds`: expected more than 0"),
        ({"log_level": "loud"}, "`log_level`: expected one of debug"),
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
    with pytest.raises(PlanError, match="nothing to watch without `adapters_dir`"):
        ServeSettings(Path("tiny"), watch_seconds=1.0)
    settings = ServeSettings(Path("tiny"), adapters_dir=tmp_path, watch_seconds=1.0)
    assert settings.adapters_dir == tmp_path


def test_a_token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"two words of a token", b"two\nlines-of-a-token", b"x" * 1025, b"\xff" * 32,
     "ümlaut-ümlaut-ümlaut".encode()],
)  # fmt: skip
def test_a_file_that_holds_no_token(tmp_path, content):
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(PlanError, match="`token_file`") as caught:
        read_token(file)
    if len(content) > 1:
        assert content.decode("utf-8", "replace") not in str(caught.value)


def test_a_token_file_that_there_is_not(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        read_token(tmp_path / "none")
