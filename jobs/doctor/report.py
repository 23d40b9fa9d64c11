"""Output of findings: a table in a terminal, plain lines elsewhere."""

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence

from pipelines.evaluation.doctor.findings import Finding, Status

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red", "unknown": "dim"}
_WIDTH = 120


def show(findings: Sequence[Finding], run: str) -> None:
    """Print findings with their advice."""
    if sys.stdout.isatty():
        _show_table(findings, run)
    else:
        print("\n".join(lines(findings)))
    print(summary(findings))


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line per finding, and one below it for its advice."""
    width = max((len(finding.topic) for finding in findings), default=0)
    output = []
    for finding in findings:
        output.append(f"{finding.status:<8} {finding.topic:<{width}}  {finding.text}")
        if finding.advice:
            output.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return output


def summary(findings: Sequence[Finding]) -> str:
    """Summary line: number of findings by status, and the names of the problems."""
    counts = Counter(finding.status for finding in findings)
    problems = [finding.topic for finding in findings if finding.status == "problem"]
    ends = [f"{counts[status]} {status}" for status in ("ok", "unknown", "warning", "problem") if counts[status]]
    text = ", ".join(ends) + (": " + ", ".join(problems) if problems else "")
    return "\n".join(textwrap.wrap(text, _WIDTH))


def _show_table(findings: Sequence[Finding], run: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"qformer doctor {escape(run)}", title_justify="left")
    for name in ("status", "check", "found", "advice"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.status]
        cells = (finding.topic, finding.text, finding.advice)
        table.add_row(f"[{colour}]{finding.status}[/]", *map(escape, cells))
    Console().print(table)
