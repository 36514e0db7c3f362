"""What a run skipped and why, as one table at its end."""

from __future__ import annotations

from collections import Counter

import pytest


def skipped_table(reports: list[pytest.TestReport]) -> list[str]:
    """One line a reason with how many tests it skipped, the most first, and the sum."""
    if not reports:
        return []
    reasons: Counter[str] = Counter()
    for report in reports:
        # (file, line, "Skipped: reason")
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reasons[" ".join(str(reason).removeprefix("Skipped: ").split())] += 1
    lines = [f"{count:5}  {reason}" for reason, count in reasons.most_common()]
    return [*lines, f"{len(reports):5}  skipped in all"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if lines := skipped_table(terminalreporter.getreports("skipped")):
        terminalreporter.section("skipped, and why")
        for line in lines:
            terminalreporter.write_line(line)
