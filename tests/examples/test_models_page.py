"""docs/models.md: its code runs as it stands."""

from __future__ import annotations

import re
import sys

from tests.workshop import ROOT


def test_your_own_model_in_ten_lines(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    module, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_vit.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_vit", raising=False)
    exec(compile(script, "docs/models.md", "exec"), {})
    assert capsys.readouterr().out == "True\n"
    assert (tmp_path / "bundle" / "hhdeploy.json").is_file()
