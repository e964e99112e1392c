"""The encryption context: non-secret key/value pairs that a KMS binds to a wrapped key.

AWS KMS logs the context in clear text (CloudTrail) and key files show it, so it must hold nothing secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from beam_envelope.errors import ContextMismatchError

MAX_CONTEXT_BYTES: Final = 8192
"""AWS KMS refuses a context whose JSON is larger ("EncryptionContext", AWS KMS API Reference)."""


class AnyContext:
    """The type of `ANY_CONTEXT`."""

    _instance: AnyContext | None = None

    def __new__(cls) -> AnyContext:
        """Return the one instance, also when unpickled on a worker."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> str:
        """Pickle by name, so that `is ANY_CONTEXT` holds on workers."""
        return "ANY_CONTEXT"

    def __repr__(self) -> str:
        """Return the public name."""
        return "ANY_CONTEXT"


ANY_CONTEXT: Final = AnyContext()
"""Given as `context=` on the read side: take each shard's context from its key file, whatever it is."""


def checked_context(context: Mapping[str, str] | None) -> dict[str, str]:
    """Return a copy of `context`, sorted by key, after checking it against the rules of AWS KMS.

    Raises:
        TypeError: a key or value is not a string.
        ValueError: a key or value is empty, a key starts with the reserved `aws:`, or the whole is over 8192 bytes.
    """
    pairs = dict(context or {})
    total = 2
    for key, value in pairs.items():
        if not isinstance(key, str) or not isinstance(value, str):
            msg = f"an encryption context maps strings to strings; {key!r} maps to a {type(value).__name__}"
            raise TypeError(msg)
        if not key or not value:
            msg = f"the encryption context has an empty key or value at {key!r}; KMS refuses those"
            raise ValueError(msg)
        if key.startswith("aws:"):
            msg = f"the encryption context key {key!r} starts with 'aws:', which AWS reserves; choose another"
            raise ValueError(msg)
        total += len(key.encode()) + len(value.encode()) + 6
    if total > MAX_CONTEXT_BYTES:
        msg = f"the encryption context takes about {total} bytes; KMS allows {MAX_CONTEXT_BYTES}. Shorten it"
        raise ValueError(msg)
    return dict(sorted(pairs.items()))


def match_context(
    expected: Mapping[str, str] | AnyContext | None, actual: Mapping[str, str], what: str
) -> dict[str, str]:
    """Return `actual` if it is what the caller expects, pair for pair, as KMS itself has it.

    The comparison comes before any call to KMS, so a reader who may use many keys cannot be steered to data of
    another tenant (the confused deputy).

    Args:
        expected: the caller's context, or `ANY_CONTEXT`.
        actual: the context in the key file.
        what: the shard or key file, for the message.

    Raises:
        ContextMismatchError: they differ.
    """
    if isinstance(expected, AnyContext) or checked_context(expected) == dict(actual):
        return dict(actual)
    wanted = checked_context(expected)
    differences = [
        f"{key!r} is {actual[key]!r} there and {wanted[key]!r} here"
        for key in sorted(wanted.keys() & actual.keys())
        if actual[key] != wanted[key]
    ]
    differences += [f"{key!r} is missing here" for key in sorted(actual.keys() - wanted.keys())]
    differences += [f"{key!r} is not there" for key in sorted(wanted.keys() - actual.keys())]
    msg = (
        f"{what} was written with another encryption context: {'; '.join(differences)}. "
        "Give the context that it was written with (key files show it), or ANY_CONTEXT (--any-context) to accept any"
    )
    raise ContextMismatchError(msg)


def encode_context(context: Mapping[str, str]) -> bytes:
    """Return the unambiguous bytes of a context: a count, then each key and value behind its length.

    All numbers are 4 bytes, big-endian; pairs are sorted by the UTF-8 bytes of their keys. (The AWS Encryption SDK
    serialises its context alike, with 2-byte lengths: message-header.md, "Key Value Pairs".)
    """
    pairs = sorted((key.encode(), value.encode()) for key, value in context.items())
    parts = [len(pairs).to_bytes(4, "big")]
    for pair in pairs:
        for text in pair:
            parts += [len(text).to_bytes(4, "big"), text]
    return b"".join(parts)
