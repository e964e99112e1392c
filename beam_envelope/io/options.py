"""EnvelopeOptions: what holds for all of ours where an argument does not say otherwise. docs/configuration.md lists it.

Workers that pipeline options do not reach take the same names from the environment: `BEAM_ENVELOPE_KEY`, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope.keys.defaults import set_options_source
from beam_envelope.settings import PathSettings, Settings, settings_of

__all__ = ["EnvelopeOptions", "PathSettings", "Settings", "current_settings", "use_settings"]

_OPTIONS: Final = ("key", "context", "any_context")
_NO_KEY: Final = (
    "no key is set for envelope+... paths: give --envelope_key=aws-kms://alias/NAME as a pipeline option, or set "
    "BEAM_ENVELOPE_KEY where options do not reach the workers"
)
# Options with a text, beside those below.
_AWS: Final = {
    "region": "the AWS region of keys that do not name theirs",
    "profile": "the AWS profile; it has to be on every worker",
    "endpoint_url": "where AWS KMS is, such as a VPC endpoint",
    "role_arn": "an AWS role to assume to use the keys",
    "external_id": "the external id that the role's trust policy asks for. No secret",
    "session_name": "how AWS CloudTrail shows the role's session (default: beam-envelope)",
    "web_identity": "'google': assume the role with the identity of the Google Cloud machine, not with AWS credentials",
    "audience": "the audience of Google's identity token (default: sts.amazonaws.com)",
}


class EnvelopeOptions(PipelineOptions):
    """Beam options of this package. None of them is a secret.

    `--envelope_NAME` has the environment variable `BEAM_ENVELOPE_NAME`, which comes after it; arguments come before it.
    """

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:  # Beam's own parser class is private
        parser.add_argument(
            "--envelope_key",
            action="append",
            help="the KMS key where no key= is given, and of envelope+... paths, as a URI; give it again for more: any "
            "one opens what is written",
        )
        parser.add_argument(
            "--envelope_context",
            action="append",
            metavar="NAME=VALUE",
            help="a pair of the encryption context where no context= is given, and of envelope+... paths; not secret",
        )
        parser.add_argument(
            "--envelope_any_context",
            action="store_true",
            default=False,
            help="read data of any context where no context= is given, and envelope+... paths",
        )
        for name, text in _AWS.items():
            parser.add_argument(f"--envelope_aws_{name}", help=text)
        parser.add_argument(
            "--envelope_aws_role_for_s3",
            action="store_true",
            default=False,
            help="use the role for S3 too, where this package itself reads and writes it",
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
    given = {name: (options or {}).get(f"envelope_{name}") or None for name in _OPTIONS}
    return settings_of(**given, missing=_NO_KEY)


_seen: tuple[object, Any] = (None, None)  # options, and our view of them: making one takes longer than a request


def _option(name: str) -> Any:
    """Return an option of the pipeline that this process works for: where Beam's own filesystems find theirs."""
    global _seen  # noqa: PLW0603
    options = FileSystems._pipeline_options  # noqa: SLF001
    if isinstance(options, PipelineOptions):
        seen, view = _seen
        if seen is not options:
            view = options.view_as(EnvelopeOptions)
            _seen = (options, view)
        return getattr(view, f"envelope_{name}")
    return (options or {}).get(f"envelope_{name}")


set_options_source(_option)
