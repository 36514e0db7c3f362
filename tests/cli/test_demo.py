"""`demo` on folders that are no starter models; what it does is in tests/examples."""

from __future__ import annotations

import pytest

from hhdeploy.cli.starter import Starter
from hhdeploy.errors import DataError


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": "vit", "model_args": 3}', None])
def test_a_folder_without_starter_models_is_named(content, tmp_path):
    (tmp_path / "adapters").mkdir()
    if content is not None:
        (tmp_path / "backbone.json").write_text(content)
    with pytest.raises(DataError, match=r"has no starter models: expected .*; found \w+Error: "):
        Starter.read(tmp_path)


def test_starter_models_without_adapters_are_named(tmp_path):
    (tmp_path / "backbone.json").write_text('{"model": "vit", "model_args": {}}')
    with pytest.raises(DataError, match="has no starter models"):
        Starter.read(tmp_path)
    (tmp_path / "adapters").mkdir()
    with pytest.raises(DataError, match="holds no adapter: expected a folder for each task"):
        Starter.read(tmp_path)
