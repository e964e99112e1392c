"""EnvelopeOptions: the settings of everything of ours that has no arguments of its own, such as the filesystem.

Workers that pipeline options do not reach take them from the environment: `BEAM_ENVELOPE_KEY`, and so on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope.arguments import parse_context
from beam_envelope.keys.context import ANY_CONTEXT, AnyContext
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import open_keys

_OPTIONS: Final = ("envelope_key", "envelope_context", "envelope_any_context")


class EnvelopeOptions(PipelineOptions):
    """Beam options of this package. None of them is a secret."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:  # Beam's own parser class is private
        parser.add_argument(
            "--envelope_key",
            action="append",
            help="the KMS key of envelope+... paths, as a URI; give it again for more: any one opens what is written",
        )
        parser.add_argument(
            "--envelope_context",
            action="append",
            metavar="NAME=VALUE",
            help="a pair of the encryption context of envelope+... paths. Nothing secret",
        )
        parser.add_argument(
            "--envelope_any_context",
            action="store_true",
            default=False,
            help="read envelope+... paths of any context",
        )


@dataclass(frozen=True)
class Settings:
    """Which keys and which context hold for a path.

    Attributes:
        keys: to write, all of them wrap the data key; to read, any of them may open it.
        context: to write, and to be expected when reading.
        any_context: when reading, expect none in particular.
    """

    keys: tuple[KeyProvider, ...]
    context: Mapping[str, str]
    any_context: bool = False

    @property
    def expected_context(self) -> Mapping[str, str] | AnyContext:
        """What a reader expects."""
        return ANY_CONTEXT if self.any_context else self.context


_override: ContextVar[Settings | None] = ContextVar("beam_envelope_settings", default=None)


@contextmanager
def use_settings(settings: Settings) -> Iterator[None]:
    """Let these settings hold for envelope+... paths in this block, in this thread, in place of the pipeline's."""
    token = _override.set(settings)
    try:
        yield
    finally:
        _override.reset(token)


def current_settings(options: PipelineOptions | Mapping[str, Any] | None) -> Settings:
    """Return what holds now: `use_settings`, else the pipeline's options, else the environment.

    Raises:
        ValueError: no key is set anywhere.
        FormatError: a key's URI is wrong.
    """
    override = _override.get()
    if override is not None:
        return override
    values = {name: os.environ.get(f"BEAM_{name.upper()}") for name in _OPTIONS}
    keys: list[str] = (values["envelope_key"] or "").split()
    pairs: list[str] = (values["envelope_context"] or "").split(",") if values["envelope_context"] else []
    any_context = bool(values["envelope_any_context"])
    if isinstance(options, PipelineOptions):
        options = options.view_as(EnvelopeOptions).get_all_options(drop_default=True)
    for name in _OPTIONS:
        given = (options or {}).get(name)
        if given and name == "envelope_key":
            keys = list(given)
        elif given and name == "envelope_context":
            pairs = list(given)
        elif given:
            any_context = True
    if not keys:
        msg = (
            "no key is set for envelope+... paths: give --envelope_key=aws-kms://alias/NAME as a pipeline option, or "
            "set BEAM_ENVELOPE_KEY where options do not reach the workers"
        )
        raise ValueError(msg)
    return Settings(open_keys(keys), parse_context(pairs), any_context)
