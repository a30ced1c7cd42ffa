"""Compare finished runs: one table, and one page with curves, answers and settings side by side."""

import json
from pathlib import Path

from pydantic import Field

from burnish.config import Settings


class Config(Settings):
    """Which runs, and where the report goes."""

    runs: str | tuple[str, ...] = Field(description="Folders of finished runs, as in [runs/a,runs/b].")
    out: str = Field(default="runs/report", description="The folder for report.html, table.md and results.json.")
    title: str | None = Field(default=None, description="The headline of the page; none: the names of the methods.")


def main(config: Config, as_json: bool) -> None:
    """Writes the comparison and prints its table; with --json, the rows and the path of the page."""
    from burnish.report.results import compare, show

    runs = (config.runs,) if isinstance(config.runs, str) else config.runs
    rows = compare([Path(run) for run in runs], Path(config.out), config.title)
    if as_json:
        print(json.dumps({"runs": rows, "report": str(Path(config.out) / "report.html")}, ensure_ascii=False))
    else:
        show(rows, Path(config.out))
