"""docs/models.md: its code runs as it stands."""

from __future__ import annotations

import re
import sys

from tests.workshop import ROOT

LOOP = "...  # an ordinary training loop\n"
# Two steps: an adapter that was never trained moves no logit, and its export says so.
TRAINING = """
chosen = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(chosen, 1.0)
for _ in range(2):
    loss = model(torch.randn(4, 3, 32, 32)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_your_own_model_in_ten_lines(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    module, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_vit.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_vit", raising=False)
    assert LOOP in script
    exec(compile(script.replace(LOOP, TRAINING), "docs/models.md", "exec"), {})
    assert capsys.readouterr().out == "True\n"
    assert (tmp_path / "bundle" / "hhdeploy.json").is_file()
