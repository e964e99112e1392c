"""Which keys and which context hold where a path is all that a caller gives, such as for the filesystems.

What is not given comes from the environment: `BEAM_ENVELOPE_KEY`, and so on. Nothing here is a secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_envelope.arguments import parse_context
from beam_envelope.keys.context import ANY_CONTEXT, AnyContext, checked_context
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import open_keys


@dataclass(frozen=True)
class Settings:
    """Which keys and which context hold for a path.

    Attributes:
        keys: to write, all of them wrap the data key; to read, any of them may open it.
        context: to write, and to be expected when reading.
        any_context: when reading, expect none in particular.
        shard_id: when reading, the shard that a manifest lists, in hexadecimal digits; empty if none does.
    """

    keys: tuple[KeyProvider, ...]
    context: Mapping[str, str]
    any_context: bool = False
    shard_id: str = ""

    @property
    def expected_context(self) -> Mapping[str, str] | AnyContext:
        """What a reader expects."""
        return ANY_CONTEXT if self.any_context else self.context


def settings_of(*, key: Any = None, context: Any = None, any_context: bool | None = None, missing: str) -> Settings:
    """Return settings as given; what is None comes from the environment.

    Args:
        key: a KMS key, as URI or provider, or several. In BEAM_ENVELOPE_KEY: URIs with spaces between them.
        context: pairs, as a mapping, as texts like `dataset=flights`, or, as in BEAM_ENVELOPE_CONTEXT, as one text with
            commas between them.
        any_context: whether readers take any context. In BEAM_ENVELOPE_ANY_CONTEXT: anything but nothing means yes.
        missing: the message if no key is set.

    Raises:
        ValueError: no key is set anywhere, or the context is not of the right form.
        FormatError: a key's URI is wrong.
    """
    if key is None:
        key = os.environ.get("BEAM_ENVELOPE_KEY", "").split()
    if context is None:
        context = os.environ.get("BEAM_ENVELOPE_CONTEXT", "")
    if isinstance(context, str):
        context = context.split(",") if context else []
    if any_context is None:
        any_context = bool(os.environ.get("BEAM_ENVELOPE_ANY_CONTEXT"))
    if not key:
        raise ValueError(missing)
    pairs = checked_context(context) if isinstance(context, Mapping) else parse_context(context)
    return Settings(open_keys(key), pairs, any_context)
