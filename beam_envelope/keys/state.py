"""In what state a KMS says that one of its keys is: can what it wrapped be opened?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENABLED: Final = "enabled"
DISABLED: Final = "disabled"
PENDING_DELETION: Final = "pending deletion"
NOT_FOUND: Final = "not found"
NOT_PERMITTED: Final = "not permitted"
UNAVAILABLE: Final = "unavailable"
UNKNOWN: Final = "unknown"
STATES: Final = (NOT_FOUND, PENDING_DELETION, DISABLED, UNAVAILABLE, NOT_PERMITTED, UNKNOWN, ENABLED)
"""All states, the most urgent first."""
CLOSED: Final = frozenset({NOT_FOUND, PENDING_DELETION, DISABLED, UNAVAILABLE})
"""The states in which nothing that the key wrapped can be opened."""


@dataclass(frozen=True)
class KeyState:
    """What a KMS says of a key; nothing in it is secret.

    Attributes:
        state: one of `STATES`. `not permitted`: this caller may not ask, so nothing is known of the key.
        detail: what the KMS or this machine says beyond it, for a person, or "".
        deletion_date: of a key that is pending deletion, when it goes: ISO 8601 in UTC, or "".
    """

    state: str
    detail: str = ""
    deletion_date: str = ""
