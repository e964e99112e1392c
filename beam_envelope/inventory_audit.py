"""What an auditor asks of an inventory: which KMS key opens what, how old it is, and what is not as it should be.

`audit` makes one document of JSON types, docs/inspect.md; inventory_report.py shows it as a page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from beam_envelope.inventory import (
    BAD_KEY_FILE,
    CLOSED_KEY_FILE,
    KEY_FILE,
    LEFT_OVER,
    LONE_KEY_FILE,
    LOST_KEY_FILE,
    NO_KEY_FILE,
    TRUNCATED,
    Inventory,
    ShardEntry,
)
from beam_envelope.inventory_looks import PLAINTEXT
from beam_envelope.io.store import split_path
from beam_envelope.keys.ask import ask_states
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.state import (
    CLOSED,
    DISABLED,
    ENABLED,
    NOT_FOUND,
    NOT_PERMITTED,
    PENDING_DELETION,
    UNAVAILABLE,
    UNKNOWN,
    KeyState,
)

FORMAT: Final = "beam-envelope inventory"
VERSION: Final = 1
CRITICAL: Final = "critical"
WARNING: Final = "warning"
NOTE: Final = "note"
SEVERITIES: Final = (CRITICAL, WARNING, NOTE)
PLAIN_FILE: Final = "plaintext"
DUE: Final = "due-for-rotation"

MAX_ITEMS: Final = 10_000
"""How many files a finding lists; its counts are of all."""
_AGES_DAYS: Final = (30, 90, 180, 365, 730, 1095)
_AGE_LABELS: Final = (
    "under 30 days",
    "30 to 90 days",
    "90 to 180 days",
    "180 days to 1 year",
    "1 to 2 years",
    "2 to 3 years",
    "over 3 years",
    "unknown",
)

# Of each kind of finding: its severity, what it is, and what to do. In the order in which they are told.
_KINDS: Final[dict[str, tuple[str, str, str]]] = {
    NOT_FOUND: (
        CRITICAL,
        "KMS key not found",
        (
            "What it wrapped cannot be opened. Check which account, region or server was asked. A key that was deleted "
            "is gone, and its data with it."
        ),
    ),
    PENDING_DELETION: (
        CRITICAL,
        "KMS key waits for its deletion",
        (
            "What it wrapped cannot be opened, and soon never again. If the data is wanted, cancel the deletion (aws "
            "kms cancel-key-deletion), enable the key, and rotate."
        ),
    ),
    DISABLED: (
        CRITICAL,
        "KMS key disabled",
        (
            "What it wrapped cannot be opened until it is enabled (aws kms enable-key). Delete the data if it is "
            "meant to be gone."
        ),
    ),
    UNAVAILABLE: (
        CRITICAL,
        "KMS key in a state in which it opens nothing",
        "See what the KMS says of it; imported key material may have to be imported again.",
    ),
    BAD_KEY_FILE: (
        CRITICAL,
        "Key file that cannot be used",
        "The data cannot be opened without it. Restore the key file from a copy.",
    ),
    LOST_KEY_FILE: (
        CRITICAL,
        "Encrypted Parquet without its key file",
        "It cannot be opened. Restore the key file from a copy; without one the data is lost.",
    ),
    TRUNCATED: (CRITICAL, "Shard cut short", "Restore it from a copy, or write it again."),
    PLAIN_FILE: (
        CRITICAL,
        "Plaintext beside encrypted files",
        "Encrypt it (beam-envelope encrypt), then delete it, and older versions that the store keeps.",
    ),
    CLOSED_KEY_FILE: (
        WARNING,
        "Key file that may not be read",
        (
            "Nothing is known of its data. Allow whoever runs this to read it (on S3, s3:GetObject and s3:ListBucket), "
            "and run it again."
        ),
    ),
    NO_KEY_FILE: (
        WARNING,
        "File with no key file",
        (
            "It is not encrypted by this software, or a shard that nobody can open. Find out what it is; restore its "
            "key file, encrypt it, or move it elsewhere."
        ),
    ),
    LONE_KEY_FILE: (
        WARNING,
        "Key file without its file",
        "Restore the file from a copy, or delete the key file if a job was stopped before it wrote the rest.",
    ),
    DUE: (
        WARNING,
        "Data key due for rotation",
        "It was last wrapped too long ago. Rotate: beam-envelope rotate FOLDER --from KEY --to KEY.",
    ),
    NOT_PERMITTED: (
        WARNING,
        "KMS key whose state may not be asked",
        "Allow kms:DescribeKey (of Vault: read on the key) to whoever runs this, and run it again.",
    ),
    UNKNOWN: (WARNING, "KMS key whose state is not known", "See what was said of it, and run this again."),
    LEFT_OVER: (NOTE, "Unfinished file", "Delete it if no job is running."),
}


_ALL_SAID: Final = frozenset({LONE_KEY_FILE, LEFT_OVER, LOST_KEY_FILE})


@dataclass
class _Sum:
    """Files and their bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, n_bytes: int, files: int = 1) -> None:
        self.files += files
        self.bytes += n_bytes

    def as_dict(self) -> dict[str, int]:
        return {"files": self.files, "bytes": self.bytes}


@dataclass
class _Key:
    """What is under a KMS key."""

    all: _Sum = field(default_factory=_Sum)
    due: _Sum = field(default_factory=_Sum)
    oldest: str = ""
    newest: str = ""
    oldest_path: str = ""

    def add(self, entry: ShardEntry, *, due: bool) -> None:
        self.all.add(entry.stored_bytes)
        if due:
            self.due.add(entry.stored_bytes)
        at = entry.wrapped
        if at and (not self.oldest or at < self.oldest):
            self.oldest, self.oldest_path = at, entry.path
        self.newest = max(self.newest, at)


@dataclass
class _Finding:
    sum: _Sum = field(default_factory=_Sum)
    items: list[dict[str, Any]] = field(default_factory=list)
    severity: str = ""

    def add(self, what: str, text: str, n_bytes: int, files: int = 1, severity: str = "") -> None:
        self.sum.add(n_bytes, files)
        if SEVERITIES.index(severity or NOTE) <= SEVERITIES.index(self.severity or NOTE):
            self.severity = severity
        if len(self.items) < MAX_ITEMS:
            self.items.append({"what": what, "text": text, "files": files, "bytes": n_bytes})


_Groups = tuple[tuple[str, ...], ...]


class _Audit:
    """Adds up entries: memory grows with KMS keys, contexts and findings, not with files that are well."""

    def __init__(self, now: datetime, older_than_days: float | None) -> None:
        self._edges = [_iso(now - timedelta(days=days)) for days in reversed(_AGES_DAYS)]
        self._due_before = "" if older_than_days is None else _iso(now - timedelta(days=older_than_days))
        self.kinds: dict[str, _Sum] = {}
        self.keys: dict[str, _Key] = {}
        self.groups: dict[_Groups, _Sum] = {}
        self.contexts: dict[tuple[tuple[str, str], ...], _Sum] = {}
        self.ages = [_Sum() for _ in _AGE_LABELS]
        self.encrypted = _Sum()
        self.all = _Sum()
        self.findings: dict[str, _Finding] = {}
        self._without: list[ShardEntry] = []
        self._key_folders: set[str] = set()

    def add(self, entry: ShardEntry) -> None:
        self.all.add(entry.stored_bytes)
        self.kinds.setdefault(entry.kind, _Sum()).add(entry.stored_bytes)
        if entry.key_file_modified or entry.kms_keys or entry.kind == KEY_FILE or entry.finding == BAD_KEY_FILE:
            self._key_folders.add(split_path(entry.path)[0])
        if entry.finding == NO_KEY_FILE:
            self._without.append(entry)  # what it is depends on what else is in its folder
        elif entry.finding:
            self.finding(entry.finding).add(entry.path, _said_of(entry), entry.stored_bytes)
        if entry.kms_keys:
            self._add_encrypted(entry)

    def _add_encrypted(self, entry: ShardEntry) -> None:
        self.encrypted.add(entry.stored_bytes)
        at = entry.wrapped
        due = bool(at and at < self._due_before)
        # ISO 8601 times in UTC are in the order of their text.
        age = len(self._edges) - bisect_left(self._edges, at) if at else -1
        self.ages[age].add(entry.stored_bytes)
        groups: _Groups = tuple(dict.fromkeys((entry.kms_keys, *entry.column_kms_keys)))
        self.groups.setdefault(groups, _Sum()).add(entry.stored_bytes)
        for key in dict.fromkeys(key for group in groups for key in group):
            self.keys.setdefault(key, _Key()).add(entry, due=due)
        if due:
            self.finding(DUE).add(entry.path, f"last wrapped {at}", entry.stored_bytes)
        if entry.context is not None:
            self.contexts.setdefault(tuple(sorted(entry.context.items())), _Sum()).add(entry.stored_bytes)

    def finding(self, kind: str) -> _Finding:
        return self.findings.setdefault(kind, _Finding())

    def end(self, states: Mapping[str, KeyState]) -> None:
        """Add the findings that need all entries."""
        for entry in self._without:
            plain = entry.looks in PLAINTEXT and split_path(entry.path)[0] in self._key_folders
            text = f"it looks like {entry.looks}" if entry.looks else "nobody looked into it"
            self.finding(PLAIN_FILE if plain else NO_KEY_FILE).add(entry.path, text, entry.stored_bytes)
        self._without = []
        closed = self.closed(states)
        for key in sorted(states):
            state, sums = states[key], self.keys[key].all
            if state.state == ENABLED:
                continue
            due = f"It goes on {state.deletion_date}." if state.deletion_date else ""
            lost, severity = "", ""
            if state.state in CLOSED:
                severity = CRITICAL if closed[key].files else WARNING
                opens = sums.files - closed[key].files
                lost = f"{opens} of {sums.files} files open under other keys." if opens else ""
            text = " ".join(filter(None, (due, lost, state.detail)))
            self.finding(state.state).add(key, text, sums.bytes, sums.files, severity)

    def closed(self, states: Mapping[str, KeyState]) -> dict[str, _Sum]:
        """Return for each KMS key what is under it and, or a part of it, opens under no other key either."""
        shut = {key for key, state in states.items() if state.state in CLOSED}
        sums = {key: _Sum() for key in self.keys}
        for groups, found in self.groups.items():
            for key in {key for group in groups if shut.issuperset(group) for key in group}:
                sums[key].add(found.bytes, found.files)
        return sums

    def alone(self) -> dict[str, _Sum]:
        """Return for each KMS key what, or a part of which, it alone opens."""
        sums = {key: _Sum() for key in self.keys}
        for groups, found in self.groups.items():
            for key in {group[0] for group in groups if len(set(group)) == 1}:
                sums[key].add(found.bytes, found.files)
        return sums


def audit(
    patterns: Sequence[str],
    *,
    ask_kms: bool = False,
    keys: Sequence[KeyProvider] = (),
    older_than_days: float | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Look through files and key files, and return the document that docs/inspect.md describes.

    Args:
        patterns: folders, globs, shards or key files.
        ask_kms: ask for the state of each KMS key: `keys.ask.ask_states`.
        keys: keys whose settings lead to them.
        older_than_days: data keys that were last wrapped longer ago are due for rotation.
        now: the time that ages are counted from. Default: now.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    now = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    inventory = Inventory(patterns, key_file_times=True)
    found = _Audit(now, older_than_days)
    for entry in inventory.entries():
        found.add(entry)
    states = ask_states(sorted(found.keys), keys) if ask_kms else {}
    found.end(states)
    n_key_files, key_file_bytes = inventory.key_files()
    findings = _findings(found)
    return {
        "format": FORMAT,
        "version": VERSION,
        "time": _iso(now),
        "patterns": list(patterns),
        "kms_asked": ask_kms,
        "older_than_days": older_than_days,
        "totals": {
            **found.all.as_dict(),
            "encrypted": found.encrypted.as_dict(),
            "key_files": {"files": n_key_files, "bytes": key_file_bytes},
            "kms_keys": len(found.keys),
            "contexts": len(found.contexts),
            "findings": {severity: sum(row["severity"] == severity for row in findings) for severity in SEVERITIES},
        },
        "findings": findings,
        "kms_keys": _key_rows(found, states),
        "contexts": [
            {"context": dict(context), **sums.as_dict()}
            for context, sums in sorted(found.contexts.items(), key=lambda item: (-item[1].bytes, item[0]))
        ],
        "ages": [
            {"age": label, "from_days": days, **sums.as_dict()}
            for label, days, sums in zip(_AGE_LABELS, (0, *_AGES_DAYS, None), found.ages, strict=True)
        ],
        "kinds": [{"kind": kind, **sums.as_dict()} for kind, sums in sorted(found.kinds.items())],
    }


def _findings(found: _Audit) -> list[dict[str, Any]]:
    rows = []
    for kind, (severity, title, advice) in _KINDS.items():
        finding = found.findings.get(kind)
        if finding is not None:
            rows.append(
                {
                    "kind": kind.replace(" ", "-"),
                    "severity": finding.severity or severity,
                    "title": title,
                    "advice": advice,
                    **finding.sum.as_dict(),
                    "items": finding.items,
                }
            )
    return sorted(rows, key=lambda row: SEVERITIES.index(row["severity"]))


def _key_rows(found: _Audit, states: Mapping[str, KeyState]) -> list[dict[str, Any]]:
    alone, closed = found.alone(), found.closed(states)
    rows = []
    for name, key in sorted(found.keys.items(), key=lambda item: (-item[1].all.bytes, item[0])):
        state = states.get(name)
        rows.append(
            {
                "kms_key": name,
                **key.all.as_dict(),
                "alone": alone[name].as_dict(),
                "due": key.due.as_dict(),
                "closed": closed[name].as_dict(),
                "oldest": key.oldest,
                "oldest_path": key.oldest_path,
                "newest": key.newest,
                "state": None if state is None else state.state,
                "deletion_date": "" if state is None else state.deletion_date,
                "detail": "" if state is None else state.detail,
            }
        )
    return rows


def _said_of(entry: ShardEntry) -> str:
    """Return what a problem says beyond its kind and the path."""
    if entry.finding in _ALL_SAID:
        return ""
    return entry.problem.removeprefix(f"the key file of {entry.path} ").removeprefix(f"{entry.path} ")


def _iso(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
