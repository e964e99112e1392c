"""`beam-envelope inspect`: the list of shards, or what an auditor wants to know of them, on a terminal."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Sequence
from typing import Any, Final

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from beam_envelope import console
from beam_envelope.console import printable
from beam_envelope.formats.keyfile import PARQUET_CIPHER
from beam_envelope.inventory import FOOTER_PARQUET, RECORD_KEY, ShardEntry, list_shards
from beam_envelope.inventory_audit import CRITICAL, NOTE, WARNING, audit
from beam_envelope.inventory_report import render
from beam_envelope.io.store import store_of
from beam_envelope.keys.uri import open_key

_UNITS: Final = (("d", 86400), ("h", 3600), ("min", 60))
_SHOWN: Final = 20
_MAX_DAYS: Final = 36_500
_COLOURS: Final = {CRITICAL: "bold red", WARNING: "yellow", NOTE: "dim"}


def run(arguments: argparse.Namespace) -> int:
    """Look; return the exit status.

    Raises:
        FileNotFoundError: nothing matches.
        FileExistsError: the page exists.
        ValueError, FormatError: an argument is not of the right form.
        OSError: from the store.
    """
    days = arguments.older_than
    if days is not None and not 0 <= days <= _MAX_DAYS:  # also not a number
        msg = f"--older-than is a number of days from 0 to {_MAX_DAYS}, not {days:g}"
        raise ValueError(msg)
    if arguments.key and not arguments.ask_kms:
        msg = "--key says where to ask for the state of KMS keys. Give --ask-kms with it, or leave it out"
        raise ValueError(msg)
    audited = (arguments.audit, arguments.ask_kms, days is not None, arguments.html, arguments.fail_on_findings)
    if not any(audited):
        return _list(arguments)
    keys = [open_key(key) for key in arguments.key]
    if arguments.html is not None and store_of(arguments.html).size(arguments.html) is not None:
        raise FileExistsError(errno.EEXIST, "the page exists, and is kept; name another", arguments.html)
    with console.errors.status("Reading key files ..."):
        document = audit(arguments.patterns, ask_kms=arguments.ask_kms, keys=keys, older_than_days=days)
    if arguments.html is not None:
        _write(arguments.html, render(document).encode())
    if arguments.json:
        print(json.dumps(document, indent=2))  # noqa: T201  # what the command is asked for
    else:
        _show(document, arguments.html)
    found = document["totals"]["findings"]
    if arguments.fail_on_findings and (found[CRITICAL] or found[WARNING]):
        console.errors.print(f"[bold red]beam-envelope inspect:[/] {_findings(found)}")
        return 1
    return 0


def _write(path: str, page: bytes) -> None:
    output = store_of(path).create(path, overwrite=False, size_hint=len(page))
    try:
        output.write(page)
        output.commit()
    except BaseException:
        output.abort()
        raise


def _show(document: dict[str, Any], html: str | None) -> None:
    more = "--html FILE or --json tells of them" if html is None else f"{html} or --json tells of more"
    findings = [
        (row["severity"], row["title"], _n(row["files"]), decimal(row["bytes"]), _example(row))
        for row in document["findings"]
    ]
    _table(("", "finding", "files", "stored", "such as"), findings, more)
    keys = [
        (
            row["kms_key"],
            *([_state(row)] if document["kms_asked"] else []),
            _n(row["files"]),
            decimal(row["bytes"]),
            row["oldest"][:10] or "?",
            row["newest"][:10] or "?",
        )
        for row in document["kms_keys"]
    ]
    state = ["state"] if document["kms_asked"] else []
    _table(("KMS key", *state, "files", "stored", "oldest", "newest"), keys, more)
    contexts = [
        (_context(row["context"]) or "(none)", _n(row["files"]), decimal(row["bytes"])) for row in document["contexts"]
    ]
    _table(("context", "files", "stored"), contexts, more)
    totals = document["totals"]
    sealed = totals["encrypted"]
    text = (
        f"{_count(totals['files'], 'file')}, {decimal(totals['bytes'])}; of these {_n(sealed['files'])} encrypted, "
        f"{decimal(sealed['bytes'])}, under {_count(totals['kms_keys'], 'KMS key')}. "
        f"{_findings(totals['findings'])[0].upper()}{_findings(totals['findings'])[1:]}."
    )
    console.output.print(escape(text), soft_wrap=True)
    if html is not None:
        console.output.print(f"The page: {escape(printable(html))}", soft_wrap=True)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], more: str) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        number = heading in {"files", "stored"}
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows[:_SHOWN]:
        table.add_row(*(escape(printable(cell)) for cell in row), style=_COLOURS.get(row[0], ""))
    console.output.print(table)
    if len(rows) > _SHOWN:
        console.output.print(escape(printable(f"{_n(len(rows) - _SHOWN)} more; {more}.")), soft_wrap=True)
    console.output.print()


def _example(finding: dict[str, Any]) -> str:
    first = finding["items"][0]
    return f"{first['what']}: {first['text']}" if first["text"] else str(first["what"])


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']}, {row['deletion_date'][:10]}" if row["deletion_date"] else str(row["state"])


def _findings(found: dict[str, int]) -> str:
    words = ((CRITICAL, "critical finding"), (WARNING, "warning"), (NOTE, "note"))
    return ", ".join(_count(found[severity], noun) for severity, noun in words if found[severity]) or "no findings"


def _list(arguments: argparse.Namespace) -> int:
    entries = list_shards(arguments.patterns)
    if arguments.json:
        print(json.dumps([entry.as_dict() for entry in entries], indent=2))  # noqa: T201  # what is asked for
        return 0
    shards = [entry for entry in entries if not entry.problem]
    table = Table(box=None, pad_edge=False)
    for heading in ("shard", "KMS key", "context"):
        table.add_column(heading, overflow="fold")
    for heading in ("plaintext", "stored", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in shards:
        table.add_row(*map(escape, _row(entry)))
    if shards:
        console.output.print(table)
    keys = {key for entry in shards for group in (entry.kms_keys, *entry.column_kms_keys) for key in group}
    total = decimal(sum(entry.stored_bytes for entry in shards))
    records = sum(entry.kind == RECORD_KEY for entry in shards)
    more = f", {_count(records, 'record key')}" if records else ""
    console.output.print(
        f"{_count(len(shards) - records, 'shard')}{more}, {total} stored, {_count(len(keys), 'KMS key')}."
    )
    for entry in entries:
        if entry.problem:
            text = escape(printable(f"{entry.path}: {entry.problem}"))
            console.output.print(f"[yellow]{text}[/]", soft_wrap=True)
    return 0


def _row(entry: ShardEntry) -> tuple[str, ...]:
    context = printable(_context(entry.context or {}))
    columns = (f"columns: {key}" for group in entry.column_kms_keys for key in group)
    keys = "\n".join(map(printable, [*entry.kms_keys, *columns]))
    unknown = "Parquet" if entry.cipher == PARQUET_CIPHER else "key" if entry.kind == RECORD_KEY else "zstd"
    size = unknown if entry.plaintext_bytes is None else decimal(entry.plaintext_bytes)
    age = "?" if entry.kind == FOOTER_PARQUET else _age(entry.age_s())
    return printable(entry.path), keys, context, size, decimal(entry.stored_bytes), age


def _context(context: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in context.items())


def _count(number: int, noun: str) -> str:
    return f"{_n(number)} {noun}{'' if number == 1 else 's'}"


def _n(number: int) -> str:
    return f"{number:,}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
