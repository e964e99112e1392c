"""What holds where a key is named without all its settings: the pipeline's options first, then the environment.

Nothing here is a secret. `beam_envelope.io.options` says which options there are, and where Beam keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

PREFIX: Final = "BEAM_ENVELOPE_"
_NOTHING: Final[Mapping[str, Any]] = {}


def _no_options() -> Mapping[str, Any]:
    return _NOTHING


_options: Callable[[], Mapping[str, Any]] = _no_options


def set_options_source(source: Callable[[], Mapping[str, Any]]) -> None:
    """Have `option` ask `source` for the pipeline's options: a mapping by name, without the `envelope_`."""
    global _options  # noqa: PLW0603  # keys/ knows no Beam, so Beam's side comes here
    _options = source


def option(name: str) -> Any:
    """Return the pipeline option `--envelope_NAME` of this process, or None."""
    return _options().get(name) or None


def environment(name: str) -> str | None:
    """Return the environment variable `BEAM_ENVELOPE_NAME`, or None if it is not set or empty."""
    return os.environ.get(PREFIX + name.upper()) or None


def option_or_environment(name: str) -> Any:
    """Return the option, else the environment variable, else None."""
    return option(name) or environment(name)
