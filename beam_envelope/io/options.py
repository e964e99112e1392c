"""EnvelopeOptions: the settings of everything of ours that has no arguments of its own, such as the filesystem.

Workers that pipeline options do not reach take them from the environment: `BEAM_ENVELOPE_KEY`, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope.settings import Settings, settings_of

__all__ = ["EnvelopeOptions", "Settings", "current_settings", "use_settings"]

_OPTIONS: Final = ("envelope_key", "envelope_context", "envelope_any_context")
_NO_KEY: Final = (
    "no key is set for envelope+... paths: give --envelope_key=aws-kms://alias/NAME as a pipeline option, or set "
    "BEAM_ENVELOPE_KEY where options do not reach the workers"
)


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
    if isinstance(options, PipelineOptions):
        options = options.view_as(EnvelopeOptions).get_all_options(drop_default=True)
    given = {name.removeprefix("envelope_"): (options or {}).get(name) or None for name in _OPTIONS}
    return settings_of(**given, missing=_NO_KEY)
