"""What holds where a key is named without all its settings: the pipeline's options first, then the environment.

Nothing here is a secret. `beam_envelope.io.options` says which options there are, and where Beam keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

PREFIX: Final = "BEAM_ENVELOPE_"


def _no_option(_name: str) -> Any:
    return None


_source: Callable[[str], Any] = _no_option


def set_options_source(source: Callable[[str], Any]) -> None:
    """Have `option` ask `source` for the pipeline's options, by their name without the `envelope_`."""
    global _source  # noqa: PLW0603  # keys/ knows no Beam, so Beam's side comes here
    _source = source


def option(name: str) -> Any:
    """Return the pipeline option `--envelope_NAME` as this process has it, or None if it is not set or empty."""
    return _source(name) or None


def environment(name: str) -> str | None:
    """Return the environment variable `BEAM_ENVELOPE_NAME`, or None if it is not set or empty."""
    return os.environ.get(PREFIX + name.upper()) or None


def option_or_environment(name: str) -> Any:
    """Return the option, else the environment variable, else None."""
    return option(name) or environment(name)
