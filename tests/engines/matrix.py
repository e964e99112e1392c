"""The table of what ran where. Tests note their outcomes in a JSON file; run as a program, this makes a page of it.

A run replaces only the cells that it ran, so that a column can be run alone.
"""

import datetime as dt
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

HEADER = """# What ran where

Each line is a transform or a program of ours, each column an engine. `ok`: it encrypted, what it wrote was read again
and was the same, a wrong key was refused with our error, no plaintext was in any file that the engine made meanwhile,
and the KMS was asked no more often than the policy says. [runners.md](runners.md) says what each engine is.

This page is written by `make engines-matrix`, from what the tests in `tests/engines/` found; nothing in it is written
by hand.
"""
PROGRAMS = ("apache-beam", "cryptography", "pyarrow", "boto3")
ENGINES_ARE = "Prism 2.77.0, and Flink 1.19.0 and Spark 3.5.5 with the job servers of Beam 2.62.0"


class Matrix:
    """Outcomes of one run of the tests, by engine and transform."""

    def __init__(self):
        self._outcomes = {}

    def add(self, cell, outcome, reason=""):
        """Note the outcome of one test of a cell, (transform, engine): `passed`, `failed` or `skipped`."""
        transform, engine = cell
        self._outcomes.setdefault(engine, {}).setdefault(transform, []).append([outcome, reason])

    def save(self, path):
        """Put the cells of this run in the place of those in the file."""
        path = Path(path)
        columns = json.loads(path.read_text()) if path.exists() else {}
        today = str(dt.datetime.now(tz=dt.timezone.utc).date())
        versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PROGRAMS)])
        for engine, cells in self._outcomes.items():
            before = columns.get(engine, {}).get("cells", {})
            columns[engine] = {"date": today, "versions": versions, "cells": {**before, **cells}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(columns, indent=1))


def page(columns, engines):
    """Return the page, with the columns in the order of `engines`."""
    transforms = list(dict.fromkeys(transform for column in columns.values() for transform in column["cells"]))
    reasons = []
    lines = [f"| | {' | '.join(engines)} |", f"|---{'|---' * len(engines)}|"]
    for transform in transforms:
        cells = [_cell(columns.get(engine, {}).get("cells", {}).get(transform, []), reasons) for engine in engines]
        lines.append(f"| {transform} | {' | '.join(cells)} |")
    lines.append(f"| run on | {' | '.join(columns.get(engine, {}).get('date', 'never') for engine in engines)} |")
    versions = "; ".join(dict.fromkeys(column["versions"] for column in columns.values()))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    text = "\n".join([HEADER, *lines, "", f"With {versions}; {ENGINES_ARE}; {platform.system()}.", "", *notes])
    return text.rstrip() + "\n"


def _cell(outcomes, reasons):
    kinds = {outcome for outcome, _ in outcomes}
    if "failed" in kinds:
        return "**failed**"
    for reason in [reason for outcome, reason in outcomes if outcome == "skipped"]:
        if reason not in reasons:
            reasons.append(reason)
    notes = ", ".join(str(reasons.index(reason) + 1) for outcome, reason in outcomes if outcome == "skipped")
    return ("ok" if "passed" in kinds else "not run") + (f" ({notes})" if notes else "")


if __name__ == "__main__":
    from tests.engines.engine import ENGINES

    found, target = sys.argv[1:]
    Path(target).write_text(page(json.loads(Path(found).read_text()), list(ENGINES)))
