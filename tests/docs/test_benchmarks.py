"""Every measurement in the documentation has its commit, hardware, number of repetitions and date."""

import re
import subprocess
from collections.abc import Iterator

import pytest
from helpers.processes import ROOT


def rows(page: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row of the tables of a page, by column, with the heading above."""
    heading, columns = "", []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if cells and columns and set(line) - set("|-: "):
            yield heading, dict(zip(columns, cells, strict=True))
        columns = (columns or cells) if cells else []


ROWS = [(page, *row) for page in ("docs/benchmarks.md", "docs/evidence.md", "README.md") for row in rows(page)]
MEASURED = [row for _, _, row in ROWS if {"commit", "commit, date"} & row.keys()]


def commit_and_date(row: dict[str, str]) -> tuple[str, str]:
    commit, date = row["commit, date"].split(", ") if "commit, date" in row else (row["commit"], row["date"])
    return commit, date


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def has_history() -> bool:
    try:
        return git("rev-parse", "--is-shallow-repository", "--show-prefix") == "false"
    except (OSError, subprocess.CalledProcessError):
        return False


def test_every_row_has_its_conditions():
    for row in MEASURED:
        (hardware,) = (f"{name}: {value}" for name, value in row.items() if name.startswith("hardware") and value)
        assert re.search(r"CPU|GPU|\bcores?\b", hardware), row
        assert re.fullmatch(r"(≥ )?[1-9]\d*(; trials 1)?", row["n"]), row
        assert re.fullmatch(r"[0-9a-f]{7}, 20\d\d-\d\d-\d\d", ", ".join(commit_and_date(row))), row


def test_other_tables_are_of_a_listed_experiment_or_published_by_others():
    experiments = {re.match(r"\[(.+?)\]", row["experiment"])[1] for row in MEASURED if "experiment" in row}
    others = [(page, heading, row) for page, heading, row in ROWS if "commit" not in row]
    assert {heading for page, heading, _ in others if page == "docs/evidence.md"} == experiments
    assert all("published images/s" in row for page, _, row in others if page == "docs/benchmarks.md")


@pytest.mark.skipif(not has_history(), reason="not a checkout with its history")
def test_each_date_is_that_of_a_commit_that_git_knows():
    given = set(map(commit_and_date, MEASURED))
    assert given == {(commit, git("log", "-1", "--format=%cs", commit)) for commit, _ in given}


def test_chinese_results_have_the_same_commits():
    pages = ((ROOT / f"README{language}.md").read_text(encoding="utf-8") for language in ("", ".zh-CN"))
    ours, theirs = (re.findall(r"\| ([0-9a-f]{7}, 20[\d-]{8}) \|", page) for page in pages)
    assert ours == theirs
