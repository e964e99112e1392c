"""The table of what ran where, which the tests fill in and `make engines-matrix` writes."""

import datetime as dt
import platform
from importlib.metadata import version

HEADER = """# What ran where

Each line is a transform or a program of ours, each column an engine. `ok`: it encrypted, what it wrote was read again
and was the same, a wrong key was refused with our error, no plaintext was in any file that the engine made, and the KMS
was asked no more often than the policy says. [runners.md](runners.md) says what each engine is. This page is written by
`make engines-matrix`, from what the tests in `tests/engines/` found; nothing in it is written by hand.
"""


class Matrix:
    """Results by (transform, engine)."""

    def __init__(self):
        self._results = {}

    def add(self, cell, outcome, reason=""):
        """Note the outcome of one test of a cell: `passed`, `failed` or `skipped`."""
        self._results.setdefault(tuple(cell), []).append((outcome, reason))

    def write(self, path):
        """Write the table in Markdown."""
        transforms = list(dict.fromkeys(transform for transform, _ in self._results))
        engines = list(dict.fromkeys(engine for _, engine in self._results))
        reasons = []
        lines = [f"| | {' | '.join(engines)} |", f"|---{'|---' * len(engines)}|"]
        for transform in transforms:
            cells = [self._cell(transform, engine, reasons) for engine in engines]
            lines.append(f"| {transform} | {' | '.join(cells)} |")
        notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
        programs = {name: version(name) for name in ("apache-beam", "cryptography", "pyarrow", "boto3")}
        versions = ", ".join(f"{name} {number}" for name, number in programs.items())
        today = dt.datetime.now(tz=dt.timezone.utc).date()
        where = (
            f"Run on {today} with Python {platform.python_version()}, {versions}; Flink 1.19.0 and Spark 3.5.5 with "
            f"the job servers of Beam 2.62.0; Prism 2.77.0; {platform.system()}."
        )
        with open(path, "w") as page:
            page.write("\n".join([HEADER, where, "", *lines, "", *notes]).rstrip() + "\n")

    def _cell(self, transform, engine, reasons):
        results = self._results.get((transform, engine), [])
        outcomes = {outcome for outcome, _ in results}
        if "failed" in outcomes:
            return "**failed**"
        if "passed" in outcomes:
            return "ok"
        reason = next((reason for _, reason in results if reason), "")
        if reason and reason not in reasons:
            reasons.append(reason)
        return f"not run ({reasons.index(reason) + 1})" if reason else "not run"
