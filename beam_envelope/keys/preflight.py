"""What a job needs of its KMS keys, and whether this process may do it. On workers: beam_envelope/preflight.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError, WrongKeyError
from beam_envelope.keys.provider import KeyProvider, Need, WrappedKey

LAUNCHER: Final = "launcher"

_DENIED: Final = re.compile(r"User: (\S+) is not authorized to perform: (\S+)")  # as AWS words it
_HEADINGS: Final = ("where", "key", "permission", "who", "result")

State = Literal["ok", "refused", "unavailable", "other key", "mismatch", "not checked"]
FINE: Final = {"ok", "not checked"}


@dataclass(frozen=True)
class KeyUse:
    """One thing that a job has to do with one KMS key. Configuration only, so it travels to workers.

    Attributes:
        key: the KMS key.
        need: what for.
        context: the encryption context.
        sample: a wrapped key of the dataset to try it on.
        to: the key that a rotation goes to.
        choice: uses of one choice are alternatives, of which one has to be possible; "" is no choice.
    """

    key: KeyProvider
    need: Need
    context: tuple[tuple[str, str], ...] = ()
    sample: WrappedKey | None = None
    to: KeyProvider | None = None
    choice: str = ""


@dataclass(frozen=True)
class Finding:
    """What was found of one `KeyUse`, or of a worker, at one place. Nothing in it is secret.

    Attributes:
        where: `launcher`, or which worker.
        key: the KMS key, as it was given; or what of a worker was looked at.
        permission: what the caller has to be allowed, in the KMS's words; refused by AWS, the action that it names.
        state: `ok`, `refused`, `unavailable` (no answer), `other key` (the sample is under another), `mismatch` (of
            software), or `not checked`, which is no problem.
        message: what is wrong and what to do next, or why it was not checked.
        principal: who the KMS takes the caller for, or "" if that is not known.
        choice: as of `KeyUse`.
    """

    where: str
    key: str
    permission: str
    state: State
    message: str = ""
    principal: str = ""
    choice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the attributes."""
        return asdict(self)


def for_writer(groups: Iterable[Sequence[KeyProvider]], context: Mapping[str, str]) -> list[KeyUse]:
    """Return what a writer needs: of each group of keys, the first generates data keys, and the others wrap them."""
    pairs = tuple(context.items())
    return _unique(
        KeyUse(key, Need.WRAP if number else Need.GENERATE, pairs)
        for group in groups
        for number, key in enumerate(group)
    )


def examine(
    uses: Iterable[KeyUse], where: str = LAUNCHER, *, who: bool = False, wait: Callable[[], object] = lambda: None
) -> list[Finding]:
    """Try every use in this process, and say of each what was found; nothing is raised.

    Args:
        uses: what to try.
        where: this place, for the findings.
        who: ask the KMSs who is asking.
        wait: is called before each.
    """
    findings = []
    principals: dict[KeyProvider, str] = {}
    for use in uses:
        wait()
        finding = _examine(use, where)
        if who and not finding.principal:
            if use.key not in principals:
                principals[use.key] = use.key.principal() or ""
            finding = replace(finding, principal=principals[use.key])
        findings.append(finding)
    return findings


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that keep a job from being done: what is not possible and has no alternative that is."""
    findings = list(findings)
    possible = {(found.where, found.choice) for found in findings if found.state in FINE}
    return [
        found
        for found in findings
        if found.state not in FINE and not (found.choice and (found.where, found.choice) in possible)
    ]


def table(findings: Sequence[Finding]) -> str:
    """Return findings as a table of plain text, and below it what is wrong, each text once."""
    rows = [_HEADINGS, *((f.where, f.key, f.permission, f.principal or "?", f.state) for f in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    texts: dict[str, list[str]] = {}
    for found in findings:
        if found.message:
            texts.setdefault(found.message, []).append(found.where)
    return "\n".join([*lines, *(f"{', '.join(dict.fromkeys(places))}: {text}" for text, places in texts.items())])


def raise_problems(findings: Sequence[Finding], hint: str = "") -> None:
    """Raise one error that tells of everything; where one thing is wrong in this process, its message is enough.

    Raises:
        KeyAccessError: something is refused.
        KmsUnavailableError: nothing is, but a KMS did not answer.
        EnvelopeError: the software of a worker is another.
    """
    found = problems(findings)
    if not found:
        return
    states = {problem.state for problem in found}
    kinds = {"unavailable": KmsUnavailableError, "mismatch": EnvelopeError}
    kind = kinds.get(states.pop(), KeyAccessError) if len(states) == 1 else KeyAccessError
    if len(found) == 1 and all(finding.where == LAUNCHER for finding in findings):
        raise kind(found[0].message)
    count = f"{len(found)} of {len(findings)} checks failed"
    raise kind(f"{count}, so nothing was started. docs/permissions.md has the policies.{hint}\n{table(findings)}")


def _examine(use: KeyUse, where: str) -> Finding:
    given = str(use.key) if use.to is None else f"{use.key} to {use.to}"
    finding = Finding(where, given, use.key.permission(use.need), "ok", choice=use.choice)
    try:
        # A provider of somebody else's may know no more than the context.
        more: dict[str, Any] = {} if use.need is Need.GENERATE else {"sample": use.sample, "to": use.to}
        unknown = use.key.check(dict(use.context), *([use.need] if more else []), **more)
    except KmsUnavailableError as error:
        return replace(finding, state="unavailable", message=str(error))
    except WrongKeyError as error:
        return replace(finding, state="other key", message=str(error))
    except Exception as error:  # noqa: BLE001  # one finding must not hide the others
        ours = isinstance(error, EnvelopeError)
        message = str(error) if ours else f"{given} could not be tried: {type(error).__name__}"
        denied = _DENIED.search(message)
        if denied:
            finding = replace(finding, principal=denied[1], permission=denied[2])
        return replace(finding, state="refused", message=message)
    return finding if unknown is None else replace(finding, state="not checked", message=unknown)


def _unique(uses: Iterable[KeyUse]) -> list[KeyUse]:
    return list(dict.fromkeys(uses))
