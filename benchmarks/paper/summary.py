"""The paper's claims in one table, judged by the records that lie in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from .catalogue import in_order
from .experiment import Claim, Verdict
from .record import RESULTS, file_stem, read_records

__all__ = [
    "BEGIN",
    "DOCUMENT",
    "END",
    "Judged",
    "as_markdown",
    "judge",
    "summary_table",
    "write_summary",
]

Judged = tuple[str, Claim]
"""The stem of a record's file, and a claim that was judged by it."""

DOCUMENT = Path(__file__).parents[2] / "docs" / "method.md"
BEGIN = "<!-- The claims: written by `make paper`. -->"
END = "<!-- End of the claims. -->"

# What no experiment here could decide.
UNTESTABLE = [
    Claim(
        "3.1, corollary 1",
        "SGDM's trajectory is smoother than VSGD's",
        Verdict.NOT_TESTABLE,
        "no measure of smoothness is given, and the appendix that should show it is not there",
    ),
    Claim(
        "3.3",
        "Theorem 3.1: a bound on the gradients of AdamAL",
        Verdict.NOT_TESTABLE,
        "the constants A0 to A3 are not given, nor the section that holds the assumptions",
    ),
]
STYLES = {
    Verdict.REPRODUCED: "green",
    Verdict.NOT_REPRODUCED: "red",
    Verdict.NOT_TESTABLE: "yellow",
}


def judge(folder: Path) -> list[Judged]:
    """Return all claims of the experiments whose records lie in ``folder``, in their order."""
    found: list[Judged] = [
        (file_stem(record), claim)
        for experiment, record in in_order(read_records(folder))
        for claim in experiment.claims(record)
    ]
    return [*found, *(("", claim) for claim in UNTESTABLE)]


def summary_table(judged: list[Judged]) -> Table:
    """Return the claims as a table for the terminal."""
    table = Table(title="The paper's claims", title_justify="left", show_lines=True)
    for header in ("section", "claim", "verdict", "figure", "from"):
        table.add_column(header)
    for stem, claim in judged:
        style = STYLES[claim.verdict]
        verdict = f"[{style}]{claim.verdict.value}[/{style}]"
        table.add_row(claim.section, escape(claim.text), verdict, escape(claim.figure), stem)
    return table


def as_markdown(judged: list[Judged], results: str) -> str:
    """Return the claims as a Markdown table whose links begin with ``results``."""

    def rows() -> Iterator[tuple[str, ...]]:
        yield ("section", "claim", "verdict", "figure", "from")
        yield ("---",) * 5
        for stem, claim in judged:
            link = f"[{stem}]({results}{stem}.json)" if stem else ""
            yield (claim.section, claim.text, f"**{claim.verdict.value}**", claim.figure, link)

    # A bar in a cell would begin another.
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows())
    return "\n".join(lines) + "\n"


def write_summary(folder: Path) -> list[Judged]:
    """Write ``summary.md`` into ``folder``, and into ``docs/method.md`` if they are its results."""
    judged = judge(folder)
    title = (
        "# The paper's claims\n\nJudged by `python -m benchmarks.paper` from the JSON beside it.\n"
    )
    (folder / "summary.md").write_text(f"{title}\n{as_markdown(judged, '')}", "utf-8")
    if folder.resolve() == RESULTS:
        before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        table = as_markdown(judged, "../benchmarks/paper/results/")
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", "utf-8")
    return judged
