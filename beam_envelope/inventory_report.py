"""The document of an audit as one page for a browser: no script, nothing from elsewhere, everything escaped.

File names, encryption contexts and names of keys are written by others: each goes through `_text`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any, Final

from rich.filesize import decimal

from beam_envelope import __version__
from beam_envelope.console import printable
from beam_envelope.inventory_audit import CRITICAL, NOTE, WARNING
from beam_envelope.keys.state import CLOSED, ENABLED

MAX_ROWS: Final = 200
"""How many rows any table has; below it stands how many more there are."""
_FIRST_ROWS: Final = 5
_MAX_BARS: Final = 12
_MAX_TEXT: Final = 1000
_UNKNOWN: Final = "?"


def render(document: dict[str, Any]) -> str:
    """Return the page. The same document gives the same page.

    Args:
        document: what `inventory_audit.audit` returned.
    """
    style = files("beam_envelope").joinpath("inventory_page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"Encrypted data in {', '.join(document['patterns'])}"
    body = "\n".join(_body(document))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{_text(title, 200)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _body(document: dict[str, Any]) -> Iterator[str]:
    places = ", ".join(f"<code>{_text(pattern)}</code>" for pattern in document["patterns"][:_FIRST_ROWS])
    time = document["time"]
    asked = "KMS was asked for the state of its keys" if document["kms_asked"] else "KMS was not asked"
    days = document["older_than_days"]
    due = "" if days is None else f" Data keys last wrapped over {days:g} days ago count as due for rotation."
    yield f"""<a class="skip" href="#findings">To the findings</a>
<header>
<h1>Inventory of encrypted data</h1>
<p>{places}{_more(len(document["patterns"]), _FIRST_ROWS, "place")}</p>
<p class="soft">As of <time datetime="{time}">{time[:10]} {time[11:16]} UTC</time>. {asked}.{due}</p>
{_verdict(document["totals"]["findings"])}
<nav aria-label="Contents"><ul>
<li><a href="#findings">Findings</a></li><li><a href="#keys">KMS keys</a></li><li><a href="#ages">Ages</a></li>
<li><a href="#contexts">Encryption contexts</a></li><li><a href="#kinds">Files</a></li>
</ul></nav>
</header>
<main>"""
    yield _tiles(document)
    yield _section("findings", "Findings", _finding_parts(document))
    yield _section("keys", "KMS keys", _key_parts(document))
    yield _section("ages", "When data keys were last wrapped", _age_parts(document))
    yield _section("contexts", "Encryption contexts", _context_parts(document))
    yield _section("kinds", "What the files are", _kind_parts(document))
    yield f"""</main>
<footer>
<p>Made by beam-envelope {_text(__version__)} from listings and key files. It has no key, so it authenticates nothing:
<code>beam-envelope verify</code> does. Sizes are those of stored files, in powers of 1000. A file under several KMS
keys counts under each. Dates are when a key file was last written, as the store says: a rotation writes it anew,
and so does a copy.</p>
</footer>"""


def _verdict(found: dict[str, int]) -> str:
    worst = next((severity for severity in (CRITICAL, WARNING, NOTE) if found[severity]), "good")
    said = {
        CRITICAL: "Something needs attention now",
        WARNING: "Something needs attention",
        NOTE: "All is well; there are notes",
        "good": "All is well, as far as can be told without a key",
    }[worst]
    words = ((CRITICAL, "critical finding"), (WARNING, "warning"), (NOTE, "note"))
    counts = ", ".join(_count(found[severity], noun) for severity, noun in words if found[severity])
    return f'<p class="verdict {worst}"><strong>{said}</strong>{counts or "No findings"}</p>'


def _tiles(document: dict[str, Any]) -> str:
    totals = document["totals"]
    oldest = min((row["oldest"] for row in document["kms_keys"] if row["oldest"]), default="")
    tiles = [
        ("Encrypted files", f"{totals['encrypted']['files']:,}", f"of {_count(totals['files'], 'file')}"),
        ("Encrypted, stored", _size(totals["encrypted"]["bytes"]), f"of {_size(totals['bytes'])}"),
        ("KMS keys", f"{totals['kms_keys']:,}", _count(totals["contexts"], "encryption context")),
        ("Key files", f"{totals['key_files']['files']:,}", _size(totals["key_files"]["bytes"])),
        ("Oldest wrapped key", oldest[:10] or _UNKNOWN, _days(oldest, document["time"])),
    ]
    rows = "\n".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in tiles)
    return f'<dl class="tiles">\n{rows}\n</dl>'


def _section(name: str, title: str, parts: Iterable[str]) -> str:
    inside = "\n".join(part for part in parts if part)
    return (
        f'<section class="card" id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{title}</h2>\n{inside}\n</section>'
    )


# ---------------------------------------------------------------------------------------------------- findings


def _finding_parts(document: dict[str, Any]) -> Iterator[str]:
    if not document["findings"]:
        yield '<p class="good">None: each file has a key file, and each key file its file.</p>'
        return
    overview = [
        (
            f'<td><span class="badge {finding["severity"]}">{finding["severity"]}</span></td>',
            f'<th scope="row"><a href="#finding-{number}">{_text(finding["title"])}</a></th>',
            _number(finding["files"]),
            _bytes(finding["bytes"]),
        )
        for number, finding in enumerate(document["findings"])
    ]
    heads = [("severity", ""), ("finding", ""), ("files", "number"), ("stored", "number")]
    yield _table("All findings, the most urgent first", heads, overview)
    for number, finding in enumerate(document["findings"]):
        yield f"""<article class="finding" aria-labelledby="finding-{number}">
<div class="head"><span class="badge {finding["severity"]}">{finding["severity"]}</span>
<h3 id="finding-{number}">{_text(finding["title"])}</h3>
<span class="count">{_count(finding["files"], "file")}, {_data(finding["bytes"])}</span></div>
<p class="soft">{_text(finding["advice"])}</p>
{_items(finding)}
</article>"""


def _is_of_keys(finding: dict[str, Any]) -> bool:
    return finding["kind"].replace("-", " ") in CLOSED or finding["kind"] in {"not-permitted", "unknown"}


def _items(finding: dict[str, Any]) -> str:
    of_keys = _is_of_keys(finding)
    texts = any(item["text"] for item in finding["items"])
    rows = [
        (
            _row_head(item["what"]),
            f'<td class="wide">{_text(item["text"])}</td>' if texts else "",
            *([_number(item["files"])] if of_keys else []),
            _bytes(item["bytes"]),
        )
        for item in finding["items"][:MAX_ROWS]
    ]
    heads = [("KMS key" if of_keys else "file", ""), *([("what", "")] if texts else [])]
    heads += [*([("files", "number")] if of_keys else []), ("stored", "number")]
    total = len(finding["items"]) if of_keys else finding["files"]
    first = _table(f"{finding['title']}: the first", heads, rows[:_FIRST_ROWS], hidden_caption=True)
    if len(rows) <= _FIRST_ROWS:
        return first
    rest = _table(f"{finding['title']}: more", heads, rows[_FIRST_ROWS:], hidden_caption=True)
    more = _more(total, MAX_ROWS, "KMS key" if of_keys else "file")
    return f"{first}\n<details><summary>{len(rows) - _FIRST_ROWS:,} more</summary>\n{rest}{more}\n</details>"


# ---------------------------------------------------------------------------------------------------- KMS keys


def _key_parts(document: dict[str, Any]) -> Iterator[str]:
    keys = document["kms_keys"]
    if not keys:
        yield '<p class="soft">None: no key file names one.</p>'
        return
    most = max(row["bytes"] for row in keys) or 1
    bars = [
        _bar(
            f"<code>{_text(row['kms_key'])}</code>{'' if row['state'] in {None, ENABLED} else _badge(row['state'])}",
            _size(row["bytes"]),
            row["bytes"] / most,
            f"{row['kms_key']}: {_size(row['bytes'])}",
            CRITICAL if row["state"] in CLOSED else "",
        )
        for row in keys[:_MAX_BARS]
    ]
    rows = "\n".join(bars)
    yield f"""<figure><figcaption>Bytes stored under each KMS key</figcaption>
<ol class="rows">
{rows}
</ol>{_more(len(keys), _MAX_BARS, "KMS key", "in the table below" if len(keys) <= MAX_ROWS else "")}</figure>"""
    asked = document["kms_asked"]
    due = document["older_than_days"] is not None
    heads = [("KMS key", ""), *([("state", "")] if asked else []), ("files", "number"), ("stored", "number")]
    heads += [("only key of", "number"), *([("due", "number")] if due else [])]
    heads += [("oldest", ""), ("newest", "")]
    cells = [_key_row(row, document["time"], asked=asked, due=due) for row in keys[:MAX_ROWS]]
    yield _table("Each KMS key, the one with the most data first", heads, cells)
    yield _more(len(keys), MAX_ROWS, "KMS key")


def _key_row(row: dict[str, Any], now: str, *, asked: bool, due: bool) -> tuple[str, ...]:
    state = f"<td>{_badge(row['state'])}{_small(_deletion(row))}</td>" if asked else ""
    return (
        _row_head(row["kms_key"]),
        state,
        _number(row["files"]),
        _bytes(row["bytes"]),
        _number(row["alone"]["files"]),
        _number(row["due"]["files"]) if due else "",
        f'<td class="date">{row["oldest"][:10] or _UNKNOWN}{_small(_days(row["oldest"], now))}</td>',
        f'<td class="date">{row["newest"][:10] or _UNKNOWN}{_small(_days(row["newest"], now))}</td>',
    )


def _badge(state: str) -> str:
    look = "good" if state == ENABLED else CRITICAL if state in CLOSED else WARNING
    return f' <span class="badge {look}">{_text(state)}</span>'


def _deletion(row: dict[str, Any]) -> str:
    return f"goes on {row['deletion_date'][:10]}" if row["deletion_date"] else ""


# --------------------------------------------------------------------------------------- ages, contexts, kinds


def _age_parts(document: dict[str, Any]) -> Iterator[str]:
    ages = document["ages"]
    most = max(row["files"] for row in ages) or 1
    days = document["older_than_days"]
    columns = "\n".join(_column(row, row["files"] / most, _look_of_age(row, days)) for row in ages)
    due = "" if days is None else f'<p class="soft">Amber: wrapped over {days:g} days ago, due for rotation.</p>'
    yield f"""<figure><figcaption>Encrypted files and record keys by the age of their wrapped data key</figcaption>
<ol class="columns">
{columns}
</ol>{due}</figure>"""
    cells = [(_row_head(row["age"], code=False), _number(row["files"]), _bytes(row["bytes"])) for row in ages]
    yield _table("The same in numbers", [("age", ""), ("files", "number"), ("stored", "number")], cells)


def _context_parts(document: dict[str, Any]) -> Iterator[str]:
    contexts = document["contexts"]
    if not contexts:
        yield '<p class="soft">None is known.</p>'
        return
    cells = [
        (_row_head(_context(row["context"])), _number(row["files"]), _bytes(row["bytes"]))
        for row in contexts[:MAX_ROWS]
    ]
    heads = [("context", ""), ("files", "number"), ("stored", "number")]
    yield _table("Each encryption context, the one with the most data first", heads, cells)
    yield _more(len(contexts), MAX_ROWS, "encryption context")


def _context(context: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in context.items()) or "(none)"


def _kind_parts(document: dict[str, Any]) -> Iterator[str]:
    cells = [
        (_row_head(row["kind"], code=False), _number(row["files"]), _bytes(row["bytes"])) for row in document["kinds"]
    ]
    totals = document["totals"]
    cells.append((_row_head("all", code=False), _number(totals["files"]), _bytes(totals["bytes"])))
    heads = [("kind", ""), ("files", "number"), ("stored", "number")]
    yield _table("Files by kind; key files beside their files are not among them", heads, cells)


# ------------------------------------------------------------------------------------------------------- parts


def _table(
    caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], *, hidden_caption: bool = False
) -> str:
    """Return a table that scrolls by itself where it is too wide; cells are HTML."""
    head = "".join(f'<th scope="col" class="{look}">{name}</th>' for name, look in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    label = _text(caption)
    shown = "" if hidden_caption else f"<caption>{label}</caption>"
    named = f' aria-label="{label}"' if hidden_caption else ""
    return f"""<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table{named}>{shown}
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>"""


def _bar(label: str, value: str, share: float, title: str, look: str) -> str:
    return f"""<li><span>{label}</span><span class="value">{value}</span>
<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img"><title>{_text(title)}</title>
<rect class="track" width="100" height="10"/>
<rect class="fill {look}" width="{_share(share)}" height="10"/></svg></li>"""


def _look_of_age(row: dict[str, Any], older_than_days: float | None) -> str:
    old = older_than_days is not None and row["from_days"] is not None and row["from_days"] >= older_than_days
    return WARNING if old else ""


def _column(row: dict[str, Any], share: float, look: str) -> str:
    height = _share(share)
    title = f"{row['age']}: {_count(row['files'], 'file')}, {_size(row['bytes'])}"
    return f"""<li>{row["files"]:,}<svg viewBox="0 0 10 100" preserveAspectRatio="none" role="img">
<title>{title}</title><rect class="fill {look}" y="{100 - float(height):g}" width="10" height="{height}"/>
<path class="axis" d="M0 100H10"/></svg>
<span class="label">{_text(row["age"])}</span></li>"""


def _share(share: float) -> str:
    """Return percents for a drawing: what is not nothing shows."""
    return f"{max(100 * share, 0.7 if share else 0):.2f}"


def _text(text: str, limit: int = _MAX_TEXT) -> str:
    """Return a text of others' for a page: with nothing that HTML, a terminal or a reader takes for something else."""
    return escape(printable(text if len(text) <= limit else f"{text[:limit]}…"))


def _row_head(text: str, *, code: bool = True) -> str:
    inside = f"<code>{_text(text)}</code>" if code else _text(text)
    return f'<th scope="row">{inside}</th>'


def _number(number: int) -> str:
    return f'<td class="number"><data value="{number}">{number:,}</data></td>'


def _bytes(number: int) -> str:
    return f'<td class="number">{_data(number)}</td>'


def _data(number: int) -> str:
    return f'<data value="{number}">{_size(number)}</data>'


def _size(number: int) -> str:
    return decimal(number)


def _small(text: str) -> str:
    return f"<small>{_text(text)}</small>" if text else ""


def _days(time: str, now: str) -> str:
    """Return how long ago a time was."""
    if not time:
        return ""
    form = "%Y-%m-%dT%H:%M:%SZ"
    days = (datetime.strptime(now, form) - datetime.strptime(time, form)).days  # noqa: DTZ007  # both are in UTC
    return f"{_count(days, 'day')} ago" if days > 0 else "today"


def _more(count: int, shown: int, noun: str, where: str = "") -> str:
    if count <= shown:
        return ""
    return f'<p class="soft">{_count(count - shown, f"more {noun}")}{where and f" {where}"}.</p>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
