"""What stands between the marks of a page is what its JSON gives; figures stand nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.tables import BLOCKS, RUNS, json_at_end, marks, place, with_blocks
from tests.docs.pages import pages
from tests.workshop import ROOT

# Read whole; of the other pages of docs what stands in tables.
WHOLE = ("README.md", "docs/measured.md")
# A number with a unit, an error such as 5.9e-7, or a decimal that is no part of a version.
FIGURE = re.compile(
    r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-\d+)?\s?"
    r"(?:%|ms|s|MB|GB|KB|dB|x|times|points|images/s|requests/s|GFLOP/s)(?![\w-])"
    r"|\d\.\d+e-\d+|\d,\d{3}|(?<![\w.-])\d+\.\d+(?![\w.])"
)
# Page -> what has figures and no JSON -> why; "": the whole page.
OUTSIDE: dict[str, dict[str, str]] = {
    "README.md": {"arXiv 2410.22952": "an address"},
    "docs/formats.md": {"0.5 or more": "a definition"},
    "docs/howto/jetson.md": {"": "versions"},
    "docs/measured.md": {
        "184,320 and 491,520": "a test counts them",
        "10,000 malformed": "how many a test sends",
        "1.2 M parameters": "what the model is",
        "3.2 MB in all": "what lies in the checkout",
    },
    "docs/models.md": {
        "e-07 |": "benchmarks.real_sizes: errors, which tests bound; seven models take an hour",
    },
    "docs/serving.md": {
        "0.5 or more": "a definition",
        "99th percentile": "bounds",
        "| memory of the server": "a bound",
        " | 0 | ": "hhdeploy bench --serve --abuse: runs of a minute a kind; JSON was not kept",
    },
    "docs/tensorrt.md": {
        "1.7": "versions",
        "| `speed`": "what is asked for",
        "| `memory`": "what is asked for",
        "2,147,483,647": "a limit",
    },
    "docs/threat-model.md": {"": "limits, which are settings"},
    "docs/versions.md": {"": "versions"},
    "docs/web.md": {"": "benchmarks.web_page, dated: needs a browser; its JSON was not kept"},
}


def outside(page: str, text: str) -> list[str]:
    """Lines with a figure that no block holds."""
    for begin, end in map(marks, BLOCKS):
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # addresses
    lines = (line for line in text.splitlines() if page in WHOLE or line.startswith("|"))
    return [line for line in lines if FIGURE.search(line)]


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS.values()}))
def test_a_page_is_what_its_results_give(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_blocks(page, text) == text, "python -m benchmarks.tables"


def test_drawings_are_what_their_results_give():
    for name, content in tables.drawings().items():
        assert (ROOT / name).read_text(encoding="utf-8") == content


def test_every_result_says_how_it_came_about():
    names = {name for block in BLOCKS.values() for name in block.results}
    ours = {name for name in names if not name.endswith(".json")} - {"gpu"}
    assert ours == set(RUNS)
    stored = {file.stem for file in tables.RESULTS.iterdir()}
    assert stored <= {*ours, "gpu"}
    for name in ours & stored:
        content = json.loads(place(name).read_text(encoding="utf-8"))
        assert {"machine", "command", "date", "load"} <= set(content), name
        assert content["machine"]["versions"], name


@pytest.mark.parametrize("page", [p for p in pages() if p in WHOLE or p.startswith("docs/")])
def test_a_figure_has_its_json_or_its_reason(page):
    allowed = OUTSIDE.get(page, {})
    if "" in allowed:
        return
    found = outside(page, (ROOT / page).read_text(encoding="utf-8"))
    assert not [line for line in found if not any(part in line for part in allowed)]
    assert not [part for part in allowed if not any(part in line for line in found)]


@pytest.mark.parametrize(
    ("page", "line", "found"),
    [
        ("README.md", "It is 3.9x as fast.", True),
        ("README.md", "an error of 5.9e-7", True),
        ("README.md", "12,345 MB of it", True),
        ("README.md", "memory: 1.24", True),
        ("README.md", "Python 3, 64 adapters, [paper](https://arxiv.org/abs/2410.22952)", False),
        ("docs/serving.md", "| p99 | 12 ms |", True),
        ("docs/serving.md", "It waits for 5 s.", False),
    ],
)
def test_a_planted_figure_is_found(page, line, found):
    begin, end = marks("fold")
    assert outside(page, f"{begin}\n| 9.9 ms |\n{end}\n{line}\n") == [line] * found


def test_a_changed_digit_is_found():
    page = BLOCKS["peers"].page
    text = (ROOT / page).read_text(encoding="utf-8")
    begin, _ = marks("peers")
    head, tail = text.split(begin)
    digit = re.search(r"\| \d\.\d", tail)
    assert digit is not None
    spoilt = f"{head}{begin}{tail[: digit.end() - 1]}x{tail[digit.end() :]}"
    assert with_blocks(page, spoilt) == text != spoilt
    with pytest.raises(SystemExit, match="no place for peers"):
        with_blocks(page, text.replace(begin, ""))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A checkout of one page with one block, of a result that a program leaves."""
    (tmp_path / "page.md").write_text("{}\nold\n{}\nrest\n".format(*marks("sum")))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    block = tables.Block("page.md", ("sum",), lambda content: f"{content['results']} ms")
    monkeypatch.setattr(tables, "BLOCKS", {"sum": block})
    program = "print('a line'); print('{\"results\": 11}')"
    monkeypatch.setattr(tables, "RUNS", {"sum": ("-c", program), "none": ("-c", "print(1)"),
                                         "fails": ("-c", f"{program}; exit(3)")})  # fmt: skip
    return tmp_path


def test_a_run_is_kept_and_written(elsewhere: Path):
    content = tables.measure("sum")
    assert content["command"].startswith("python -c print(")
    assert content["machine"]["versions"]
    assert content["load"] is None or content["load"] >= 0
    tables.keep("sum", content)
    assert json.loads((elsewhere / "results" / "sum.json").read_text()) == content
    page = (elsewhere / "page.md").read_text()
    assert page == "{}\n11 ms\n{}\nrest\n".format(*marks("sum"))
    with pytest.raises(KeyError):
        tables.keep("sum", {"something": "else"})
    assert (elsewhere / "page.md").read_text() == page
    assert json.loads((elsewhere / "results" / "sum.json").read_text()) == content


@pytest.mark.parametrize(("name", "said"), [("none", "no JSON"), ("fails", "ended with 3")])
def test_a_run_that_leaves_nothing_is_refused(elsewhere, name, said):
    with pytest.raises(SystemExit, match=said):
        tables.measure(name)


def test_json_at_the_end_is_a_line_or_a_document():
    content = {"a": {"b": [1, {"c": 2}]}}
    assert json_at_end(f"words\n{json.dumps(content)}\n") == content
    assert json_at_end(f"words\n{json.dumps(content, indent=1)}\n") == content
