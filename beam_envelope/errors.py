"""Every error that a user of beam_envelope can meet.

Each message says what happened, to which file or key, and what to do next. None holds plaintext or key bytes.
"""

from __future__ import annotations

from typing import Final


class EnvelopeError(Exception):
    """The base of all errors below: catch it to catch them all."""


class KeyAccessError(EnvelopeError):
    """The KMS key exists only for others: access denied, disabled, pending deletion, or not found.

    Retrying does not help; the message names the missing permission and the key.
    """


class KmsUnavailableError(EnvelopeError):
    """The KMS did not answer, or asked us to slow down, after all retries. Running the job again may help."""


class WrongKeyError(EnvelopeError):
    """No allowed KMS key opens this, or the key commitment differs from the data's."""


class ContextMismatchError(EnvelopeError):
    """The encryption context given differs from the one that the data was written with."""


class TamperedError(EnvelopeError):
    """Data or its key file was changed after it was written."""


class TruncatedError(EnvelopeError):
    """Data was cut short: its end is missing."""


class NotEncryptedError(EnvelopeError):
    """A file that should be a shard is plain data."""


class AlreadyEncryptedError(EnvelopeError):
    """A file that should be plain is a shard of ours, a key file or an unfinished file."""


class KeyFileMissingError(EnvelopeError):
    """A shard has no key file beside it."""


class FormatError(EnvelopeError):
    """A key file, keyring or URI is not in the form that docs/format.md describes."""


class ManifestError(EnvelopeError):
    """A dataset and its manifest disagree: a shard is missing, added, swapped or old."""


DATA_ERRORS: Final = (
    AlreadyEncryptedError,
    ContextMismatchError,
    FormatError,
    KeyFileMissingError,
    ManifestError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
"""The errors that concern one file, record or cell, and so may become a dead letter.

Those of the KMS never do: they fail the bundle, so that the runner tries it again.
"""
