"""The chart: an SVG of horizontal bars, written by hand, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Final

from benchmarks.report import Report, number
from benchmarks.results import Measurement

_WIDTH: Final = 860
_LEFT: Final = 280
_RIGHT: Final = 130
_BAR: Final = 16
_STEP: Final = 22
_STYLE: Final = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 15px; }
  .group { font-weight: 600; }
  .small { font-size: 11px; fill: #59636e; }
  .ours { fill: #2f6fd0; }
  .peer { fill: #9aa4b0; }
  .page { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9198a1; }
    .ours { fill: #5b9bff; }
    .peer { fill: #6b7580; }
    .page { fill: #0d1117; }
  }
"""


def write_svg(report: Report, path: Path) -> None:
    """Write the chart; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(report), encoding="utf-8")


def svg(report: Report) -> str:
    """Return the chart as an SVG document: a bar for each row, each group of rows on a scale of its own."""
    parts: list[str] = []
    y = 30
    for measurement in report.measurements:
        y = _draw(measurement, y, parts)
    facts = report.machine
    machine = ", ".join(
        [facts.get("cpu", "?"), f"{facts.get('cores', '?')} cores", f"Python {facts.get('python', '?')}"]
    )
    when = "a quick run, " if report.quick else ""
    parts.append(_text(20, y, f"{machine}; {when}{report.started}", "small"))
    height = y + 20
    title = "Benchmarks of beam_envelope and its peers"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{title}">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw(measurement: Measurement, y: int, parts: list[str]) -> int:
    """Add one measurement at height `y`; return the height below it."""
    parts.append(_text(20, y, measurement.title, "title"))
    unit = measurement.unit
    better = "less is better" if unit == "MiB" else "more is better"
    parts.append(_text(_WIDTH - 20, y, f"{unit}, {better}", "small", anchor="end"))
    for group in _unique(row.group for row in measurement.rows):
        y += _STEP + 4
        parts.append(_text(20, y, group, "group"))
        rows = [row for row in measurement.rows if row.group == group]
        longest = max(row.value for row in rows) or 1.0
        for row in rows:
            y += _STEP
            length = max(1.0, row.value / longest * (_WIDTH - _LEFT - _RIGHT))
            kind = "ours" if row.ours else "peer"
            tip = f"{row.name}: {number(row.value)} {unit} ({number(row.low)} to {number(row.high)})"
            parts += [
                _text(_LEFT - 10, y, row.name, "", anchor="end"),
                _bar(kind, y, length, tip),
                _text(_LEFT + length + 8, y, number(row.value), ""),
            ]
    return y + 2 * _STEP


def _bar(kind: str, y: float, length: float, tip: str) -> str:
    shape = f'x="{_LEFT}" y="{y - _BAR + 4}" width="{length:.1f}" height="{_BAR}" rx="2"'
    return f'<rect class="{kind}" {shape}><title>{escape(tip)}</title></rect>'


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
