"""Which keys and which context hold where a caller does not give them, such as for a path of the filesystems.

The order is that of docs/configuration.md: an argument, then the pipeline's option (`--envelope_key`), then the
environment (`BEAM_ENVELOPE_KEY`). Nothing here is a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from beam_envelope.arguments import parse_context
from beam_envelope.keys.choice import Context, KeyChoice, PathFields
from beam_envelope.keys.context import ANY_CONTEXT, AnyContext, checked_context
from beam_envelope.keys.defaults import environment, option
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import Key, open_keys

_NO_KEY: Final = (
    "no key is set: pass key='aws-kms://alias/NAME' (--key), give --envelope_key=aws-kms://alias/NAME as a pipeline "
    "option (make the pipeline with its options before the transform), or set BEAM_ENVELOPE_KEY"
)


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


@dataclass(frozen=True)
class PathSettings:
    """What a reader of many paths was given. Configuration only, so it travels.

    Attributes:
        choice: the keys and the context, templates among them.
        fields: takes from paths what fills those.
    """

    choice: KeyChoice
    fields: PathFields

    @classmethod
    def of(cls, key: Key | Sequence[Key] | None, context: Context, path_fields: str | None) -> PathSettings:
        """Check the arguments. Raises ValueError, TypeError, FormatError."""
        choice = read_choice(key, context)
        return cls(choice, PathFields(choice.names, path_fields))

    @property
    def keys(self) -> tuple[KeyProvider, ...]:
        """The keys, templates among them."""
        return self.choice.keys

    @property
    def context(self) -> Mapping[str, str]:
        """The context that is expected, if there is one in particular."""
        return {} if isinstance(self.choice.pairs, AnyContext) else self.choice.pairs

    @property
    def any_context(self) -> bool:
        """Whether any context does."""
        return isinstance(self.choice.context, AnyContext)

    def for_path(self, path: str) -> Settings:
        """Return what holds for a path. Raises FormatError: it does not say what fills a template."""
        filled = self.choice.filled(self.fields(path))
        if isinstance(filled.pairs, AnyContext):
            return Settings(filled.keys, {}, any_context=True)
        return Settings(filled.keys, filled.pairs)


def settings_of(*, key: Any = None, context: Any = None, any_context: bool | None = None, missing: str) -> Settings:
    """Return settings as given; what is None comes from the pipeline's options, then from the environment.

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
        key = _key_that_is_set(missing)
    if any_context is None:
        any_context = bool(option("any_context") or environment("any_context"))
    if not key:
        raise ValueError(missing)
    return Settings(open_keys(key), _pairs(context), any_context)


def chosen_keys(
    key: Key | Sequence[Key] | None, *, templates: bool = False, lists: bool = True
) -> tuple[KeyProvider, ...]:
    """Return the keys of a transform: those given, or else those that are set. Arguments and errors: `open_keys`."""
    return open_keys(_key_that_is_set(_NO_KEY) if key is None else key, templates=templates, lists=lists)


def write_choice(key: Key | Sequence[Key] | None, context: Mapping[str, str] | None) -> KeyChoice:
    """Return the keys and the context that a transform writes with, templates among them. Raises as `settings_of`."""
    return KeyChoice.to_write(_key_that_is_set(_NO_KEY) if key is None else key, written_context(context))


def read_choice(key: Key | Sequence[Key] | None, context: Mapping[str, str] | AnyContext | None) -> KeyChoice:
    """Return the keys that a transform may read with, and the context that it expects. Raises as `settings_of`."""
    return KeyChoice.to_read(_key_that_is_set(_NO_KEY) if key is None else key, expected_context(context))


def written_context(context: Mapping[str, str] | None) -> dict[str, str]:
    """Return the context that a transform writes with: that given, or else the one that is set. Raises ValueError."""
    return _pairs(context)


def expected_context(context: Mapping[str, str] | AnyContext | None) -> dict[str, str] | AnyContext:
    """Return the context that a transform expects: that given, or else the one that is set. Raises ValueError."""
    if context is None and (option("any_context") or environment("any_context")):
        return ANY_CONTEXT
    return context if isinstance(context, AnyContext) else _pairs(context)


def _key_that_is_set(missing: str) -> Any:
    key = option("key") or (environment("key") or "").split()
    if not key:
        raise ValueError(missing)
    return key


def _pairs(context: Any) -> dict[str, str]:
    if context is None:
        context = option("context") or environment("context") or ()
    if isinstance(context, Mapping):
        return checked_context(context)
    return parse_context(context.split(",") if isinstance(context, str) and context else context)
