"""The report of a run: tables on a terminal, and JSON. The chart is in chart.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.results import Measurement, Row, Target


@dataclass(frozen=True)
class Report:
    """All that a run found.

    Attributes:
        machine: facts of the machine, by name.
        started: when, in UTC, as ISO 8601.
        seconds: how long the run took.
        quick: whether it was a quick run, whose figures are only a hint.
        measurements: in order.
    """

    machine: dict[str, str]
    started: str
    seconds: float
    quick: bool
    measurements: Sequence[Measurement]

    @property
    def targets(self) -> list[Target]:
        """All targets."""
        return [target for measurement in self.measurements for target in measurement.targets]

    @property
    def missed(self) -> list[Target]:
        """The targets that were missed."""
        return [target for target in self.targets if not target.met]

    def as_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        document = asdict(self)
        for measurement, found in zip(document["measurements"], self.measurements, strict=True):
            for entry, target in zip(measurement["targets"], found.targets, strict=True):
                entry["met"] = target.met
        return {"format": "beam-envelope benchmark", "version": 1, **document}


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def show(report: Report, console: Console) -> None:
    """Print all tables, the targets and the machine."""
    console.print()
    console.print(
        "[bold]The machine[/] " + escape(", ".join(f"{name} {fact}" for name, fact in report.machine.items()))
    )
    for measurement in report.measurements:
        console.print()
        console.print(_table(measurement))
        for note in (measurement.method, *measurement.notes):
            console.print(f"  {escape(note)}", style="dim")
    console.print()
    console.print(_targets(report.targets))
    console.print(f"Took {report.seconds:.0f} s. {_verdict(report)}")


def number(value: float) -> str:
    """Return a number with three digits or so, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(measurement: Measurement) -> Table:
    table = Table(title=escape(measurement.title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    with_cpu = any(row.cpu_s_per_gb is not None for row in measurement.rows)
    with_relative = any(row.relative is not None for row in measurement.rows)
    columns = {"relative": with_relative, "CPU s/GB": with_cpu}
    table.add_column("")
    for heading in (measurement.unit, "lowest to highest", *(name for name, wanted in columns.items() if wanted)):
        table.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for row in measurement.rows:
        if row.group != group:
            group = row.group
            table.add_row(f"[bold]{escape(group)}[/]")
        table.add_row(*_cells(row, with_relative=with_relative, with_cpu=with_cpu))
    return table


def _cells(row: Row, *, with_relative: bool, with_cpu: bool) -> list[str]:
    name = f"  {escape(row.name)}"
    span = f"{number(row.low)} to {number(row.high)}" if row.low != row.high else ""
    cells = [f"[green]{name}[/]" if row.ours else name, number(row.value), span]
    if with_relative:
        cells.append("" if row.relative is None else f"{row.relative:.2f}")
    if with_cpu:
        cells.append("" if row.cpu_s_per_gb is None else f"{row.cpu_s_per_gb:.2f}")
    return cells


def _targets(targets: Sequence[Target]) -> Table:
    table = Table(title="Targets", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("measured", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for target in targets:
        sign = ">=" if target.at_least else "<="
        table.add_row(
            escape(target.text),
            f"{number(target.value)} {target.unit}",
            f"{sign} {target.limit:g} {target.unit}",
            "[green]met[/]" if target.met else "[bold red]MISSED[/]",
        )
    return table


def _verdict(report: Report) -> str:
    if not report.targets:
        return "No targets were measured."
    verdict = f"{len(report.missed)} of {len(report.targets)} targets missed." if report.missed else "All targets met."
    return f"{verdict} This was a quick run: its figures are a hint, no measure." if report.quick else verdict
