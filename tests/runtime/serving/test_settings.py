"""What an operator may choose."""

from __future__ import annotations

import pytest

from hhdeploy.errors import OptionError, PlanError, SessionError
from hhdeploy.runtime.serving.settings import ServeSettings, read_token

TOKEN = "0123456789abcdef"


def test_loading_over_the_network_needs_a_token():
    with pytest.raises(PlanError, match=r"needs --token-file.*openssl rand"):
        ServeSettings("tiny", adapter_loading=True)
    assert ServeSettings("tiny", adapter_loading=True, token=TOKEN).adapter_loading
    assert not ServeSettings("tiny").adapter_loading


def test_a_token_that_nothing_asks_for_is_refused():
    """Whoever gives one may believe that it protects inference."""
    with pytest.raises(OptionError, match="--token-file needs --allow-adapter-loading"):
        ServeSettings("tiny", token=TOKEN)


def test_a_token_is_not_printed():
    assert TOKEN not in repr(ServeSettings("tiny", adapter_loading=True, token=TOKEN))


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"contexts": 0}])
def test_counts_from_one(wrong):
    with pytest.raises(SessionError, match="1 or more"):
        ServeSettings("tiny", **wrong)


def test_a_fleet_directory_that_there_is_not(tmp_path):
    with pytest.raises(PlanError, match="is not a directory"):
        ServeSettings("tiny", adapters_dir=tmp_path / "none")
    with pytest.raises(PlanError, match="nothing to watch without --adapters-dir"):
        ServeSettings("tiny", watch_seconds=1.0)
    settings = ServeSettings("tiny", adapters_dir=tmp_path, watch_seconds=1.0)
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
    with pytest.raises(PlanError, match="--token-file") as caught:
        read_token(file)
    if len(content) > 1:
        assert content.decode("utf-8", "replace") not in str(caught.value)


def test_a_token_file_that_there_is_not(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        read_token(tmp_path / "none")
