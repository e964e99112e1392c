"""Keys whose names have gaps that data fills: `aws-kms://alias/data-{tenant}`. What fills them is checked here.

Where values come from, an element or a path, is in choice.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NoReturn

from beam_envelope.errors import FormatError
from beam_envelope.keys.provider import DataKey, KeyProvider, WrappedKey

MAX_VALUE_CHARACTERS: Final = 64
"""How long a value may be that fills a template: as long as a SHA-256 in hexadecimal."""
VALUE: Final = "[A-Za-z0-9_-]+(?:[.][A-Za-z0-9_-]+)*"
"""What such a value looks like, as a regular expression: no slash, no brace, no `..`, and no dot at either end."""

_NAME: Final = "[A-Za-z_][A-Za-z0-9_]*"
_GAP: Final = re.compile(rf"\{{({_NAME})\}}")
_VALUE: Final = re.compile(VALUE)
_IN_VALUES: Final = re.compile(r"[A-Za-z0-9_.-]*")
_EXAMPLE: Final = "x"
_MAX_INT_BITS: Final = 200  # Python refuses to write very long ints


def gaps(text: str) -> tuple[str, ...]:
    """Return the names of a text's gaps, `{name}`, each once. Other braces are text like any other."""
    return tuple(dict.fromkeys(_GAP.findall(text)))


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return a text with its gaps filled, each by one value, in one pass: no value is looked through for gaps."""
    return _GAP.sub(lambda gap: values[gap[1]], text)


def checked_value(value: object) -> str:
    """Return a value as what may fill a gap: a str of up to 64 ASCII letters, digits, `_`, `-` and single dots inside.

    So it cannot reach another path, folder, region or account than the template says. An int becomes its digits.

    Raises:
        ValueError: it may not fill a gap; the message says why, and does not hold the value.
    """
    if value is None:
        raise ValueError("it is null")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < _MAX_INT_BITS:
        value = int.__repr__(value)
    if not isinstance(value, str):
        raise ValueError(f"it is a {type(value).__name__}, not a str or an int of up to 64 digits")  # noqa: TRY004  # data
    text = str.__str__(value)  # what is checked is what is used, also of an Enum
    if not text:
        raise ValueError("it is empty")
    if len(text) > MAX_VALUE_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, and at most {MAX_VALUE_CHARACTERS} may go into a key's name")
    if not _VALUE.fullmatch(text):
        raise ValueError(
            "it has other characters than A-Z, a-z, 0-9, '_', '-' and single dots inside, so it names no key"
        )
    return text


@dataclass(frozen=True)
class KeyTemplate(KeyProvider):
    """A key's URI with gaps. It is no key before it is filled, and refuses to be used as one.

    Gaps may stand in the name of an alias (`aws-kms://alias/data-{tenant}`, also in an alias ARN), in mount and name of
    a Vault key (`hcvault://transit/keys/{tenant}`), and in path and name of a local key
    (`local-kms://keys/{tenant}.json`): never where region, account, server or credentials are said. Between two gaps
    there is a character that no value may have, such as a slash, so that two elements with different values never mean
    one key.

    Args:
        uri: the text.

    Raises:
        FormatError: it is of another form.
    """

    uri: str

    provider: ClassVar[str] = "template"

    def __post_init__(self) -> None:
        """Check where the gaps are, and fix the path of a keyring, for a worker with another working directory."""
        scheme, _, rest = self.uri.partition("://")
        place, question, query = rest.partition("?")
        if re.search(r"[{}]", _GAP.sub("", self.uri)):
            self._refuse("it has braces that are no {name}. A keyring with braces in its path is LocalKms(path)")
        if scheme == "aws-kms" and not re.match(r"(?:arn:[^{}]*:)?alias/", place):
            self._refuse("data may fill the name of an alias only (alias/data-{tenant}): not a key id, account, region")
        if gaps(query) and scheme != "local-kms":
            self._refuse("data may fill no setting: not the region, the server or the profile")
        for between in _GAP.split(self.uri)[2:-1:2]:
            if _IN_VALUES.fullmatch(between):
                self._refuse(
                    f"between two gaps there is {between!r}, which values may hold as well, so that two elements with "
                    "different values could mean one key. Put a slash between them, or make one field of the two"
                )
        if scheme == "local-kms":
            object.__setattr__(self, "uri", f"{scheme}://{os.path.abspath(place)}{question}{query}")

    @property
    def example(self) -> str:
        """The URI with something in its gaps, to look whether it is one."""
        return fill(self.uri, dict.fromkeys(gaps(self.uri), _EXAMPLE))

    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Raise TypeError."""
        self._not_filled()

    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Raise TypeError."""
        self._not_filled()

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Raise TypeError."""
        self._not_filled()

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Raise TypeError."""
        self._not_filled()

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Raise TypeError."""
        self._not_filled()

    def __str__(self) -> str:
        """Return the URI, gaps and all."""
        return self.uri

    def _not_filled(self) -> NoReturn:
        msg = f"the key {self.uri} is a template, and was not filled"
        raise TypeError(msg)

    def _refuse(self, why: str) -> NoReturn:
        msg = f"the key template {self.uri!r} is refused: {why}"
        raise FormatError(msg)
