"""Which keys and which context hold for an element or a path, where templates say so: from a dict, a row or a folder.

Nothing here knows Beam. The values are checked in template.py; no message here holds one.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

from beam_envelope.errors import FormatError
from beam_envelope.keys.cache import DataKeyPolicy, DataKeySource, shared_source
from beam_envelope.keys.context import AnyContext, checked_context
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.template import VALUE, checked_value, fill, gaps
from beam_envelope.keys.uri import Key, fill_key, key_gaps, open_keys

MAX_OPEN: Final = 1000
"""How many keys a bundle holds at once; the one that was used longest ago is erased for another."""

Values: TypeAlias = "tuple[str, ...]"
Context: TypeAlias = "Mapping[str, str] | AnyContext | None"
KeyFields: TypeAlias = "Callable[[Any], Mapping[str, Any]] | None"
"""What `key_fields=` takes: a function of the element that returns what fills the templates."""

T = TypeVar("T")
_PART: Final = re.compile(r"\*\*/|\*\*|\*|\?|\{([A-Za-z_][A-Za-z0-9_]*)\}|[^*?{}]+")


@dataclass(frozen=True)
class KeyChoice:
    """The KMS keys and the encryption context of a writer or reader, with or without gaps. Hashable; pickles cleanly.

    Attributes:
        keys: the keys, templates among them.
        context: the context as pairs, whose values may have gaps.
    """

    keys: tuple[KeyProvider, ...]
    context: tuple[tuple[str, str], ...] | AnyContext

    @classmethod
    def to_write(cls, key: Key | Sequence[Key], context: Mapping[str, str] | None) -> KeyChoice:
        """Check the arguments of a writer. Raises ValueError, TypeError, FormatError."""
        return cls(open_keys(key, templates=True, lists=False), tuple(checked_context(context).items()))

    @classmethod
    def to_read(cls, key: Key | Sequence[Key], context: Context) -> KeyChoice:
        """Check the arguments of a reader. Raises ValueError, TypeError, FormatError."""
        expected = context if isinstance(context, AnyContext) else tuple(checked_context(context).items())
        return cls(open_keys(key, templates=True), expected)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all gaps, each once; none where there are no templates."""
        return tuple(dict.fromkeys((*key_gaps(self.keys), *context_gaps(self.context))))

    @property
    def pairs(self) -> Mapping[str, str] | AnyContext:
        """The context as a mapping."""
        return self.context if isinstance(self.context, AnyContext) else dict(self.context)

    def filled(self, values: Values) -> KeyChoice:
        """Return the same without gaps; the values are in the order of `names`."""
        if not values:
            return self
        named = dict(zip(self.names, values, strict=True))
        keys = tuple(dict.fromkeys(fill_key(key, named) for key in self.keys))
        return KeyChoice(keys, fill_context(self.context, named))


def context_gaps(context: tuple[tuple[str, str], ...] | AnyContext) -> tuple[str, ...]:
    """Return the names of the gaps in a context's values."""
    if isinstance(context, AnyContext):
        return ()
    return tuple(dict.fromkeys(name for _, text in context for name in gaps(text)))


def fill_context(
    context: tuple[tuple[str, str], ...] | AnyContext, named: Mapping[str, str]
) -> tuple[tuple[str, str], ...] | AnyContext:
    """Return a context with its values' gaps filled. Raises ValueError: it became too large."""
    if isinstance(context, AnyContext):
        return context
    return tuple(checked_context({name: fill(text, named) for name, text in context}).items())


class ElementFields:
    """Takes from elements what fills templates. Pickles if `key_fields` does.

    Args:
        names: of the gaps.
        key_fields: a function of the element that returns them. None: they are fields of dicts, named tuples, rows or
            dataclasses.
        record_id: a function that returns what messages call an element, and nothing secret.
    """

    def __init__(
        self, names: Sequence[str], key_fields: KeyFields = None, record_id: Callable[[Any], Any] | None = None
    ) -> None:
        if key_fields is not None and not callable(key_fields):
            raise TypeError(f"key_fields is a function of the element that returns a dict, not {key_fields!r}")
        if key_fields is not None and not names:
            raise ValueError(
                "key_fields= fills templates, and neither key= nor context= is one, such as 'data-{tenant}'"
            )
        self.names = tuple(names)
        self._key_fields, self._record_id = key_fields, record_id

    @property
    def by_function(self) -> bool:
        """Whether `key_fields` was given."""
        return self._key_fields is not None

    def __call__(self, element: Any) -> Values:
        """Return the values of an element.

        Raises:
            FormatError: one is missing or may not fill a template; the message names the field and the element.
        """
        fields: Any = element
        if self._key_fields is not None:
            failure = None
            try:
                fields = self._key_fields(element)
            except Exception as error:  # noqa: BLE001  # of the user's function
                failure = type(error).__name__
            if failure is not None or not isinstance(fields, Mapping):
                raise FormatError(
                    f"key_fields= gave nothing for {self._called(element)} "
                    f"({failure or f'it returned a {type(fields).__name__}, not a dict'}), so its key is not known"
                )
        found = []
        for name in self.names:
            try:
                found.append(checked_value(_field(fields, name)))
            except (AttributeError, ValueError) as error:
                problem = error if isinstance(error, ValueError) else "it is not there"
                raise FormatError(
                    f"the field {name!r}, which the template of the key or context needs, does not do in "
                    f"{self._called(element)}: {problem}"
                ) from None
        return tuple(found)

    def _called(self, element: Any) -> str:
        if self._record_id is None:
            return f"an element of type {type(element).__name__} (record_id= would say which)"
        try:
            return f"the element {self._record_id(element)}"
        except Exception:  # noqa: BLE001  # of the user's function
            return f"an element of type {type(element).__name__}"


def _field(fields: Any, name: str) -> Any:
    """Return a field. Raises AttributeError."""
    if isinstance(fields, Mapping):
        if name in fields:
            return fields[name]
    elif hasattr(fields, "_asdict") or hasattr(fields, "as_dict") or dataclasses.is_dataclass(fields):
        return getattr(fields, name)
    raise AttributeError


class PathFields:
    """Takes from paths what fills templates.

    Args:
        names: of the gaps.
        pattern: how paths end, such as `{tenant}/*.csv`, or whole paths, such as `s3://raw/{tenant}/**`. None: the
            folders of a path say it, as Hive has them (`tenant=acme/`).

    Raises:
        ValueError: the pattern is not of that form, or does not say where each field is.
    """

    def __init__(self, names: Sequence[str], pattern: str | None = None) -> None:
        self.names, self.pattern = tuple(names), pattern
        if pattern is not None:
            if not names:
                raise ValueError(
                    "path_fields= fills templates, and neither key= nor context= is one, such as 'data-{tenant}'"
                )
            self._find = _path_pattern(pattern, self.names)

    def __call__(self, path: str) -> Values:
        """Return the values of a path.

        Raises:
            FormatError: one is missing or may not fill a template; the message names field and path.
        """
        if self.pattern is None:
            folders = [part.partition("=") for part in path.split("/")[:-1]]
            found = {name: [value for label, _, value in folders if label == name] for name in self.names}
        else:
            match = self._find.fullmatch(path)
            if match is None:
                raise FormatError(
                    f"{path} is not of the form {self.pattern!r} (path_fields), so the key's {self.names[0]!r} is not "
                    "known"
                )
            found = {name: [match[name]] for name in self.names}
        for name, values in found.items():
            if len(values) != 1:
                raise FormatError(
                    f"the path {path} has {len(values) or 'no'} folder{'s' if len(values) > 1 else ''} {name}=..., so "
                    f"the {name!r} that the template of the key or context needs is not known. Name folders so, or say "
                    "with path_fields (--path-fields) where it is, such as '{tenant}/*.csv'"
                )
            try:
                checked_value(values[0])
            except ValueError as error:
                raise FormatError(f"the {name!r} of the path {path} does not do: {error}") from None
        return tuple(found[name][0] for name in self.names)


def _path_pattern(pattern: str, names: Sequence[str]) -> re.Pattern[str]:
    whole = "://" in pattern or pattern.startswith("/")
    for segment in pattern.split("/"):
        moving = re.findall(r"\*+|\?|\{[^{}]*\}", segment)
        if "{" in segment and len(moving) > 1:
            raise ValueError(
                f"path_fields {pattern!r}: in {segment!r} it is not clear where a field ends. Give each a folder or "
                "file name of its own, with fixed text around it at most"
            )
    parts = [_PART.fullmatch(part) for part in re.findall(r"\*\*/|\*\*|\*|\?|\{[^{}]*\}|[^*?{}]+|[{}]", pattern)]
    given = [part[1] for part in parts if part is not None and part[1] is not None]
    if None in parts or sorted(given) != sorted(names):
        raise ValueError(f"path_fields {pattern!r} has each of {', '.join(f'{{{name}}}' for name in names)} once")
    if "**" in pattern and (not whole or "**" in pattern[: pattern.rindex("}")]):
        raise ValueError(
            f"path_fields {pattern!r}: ** may stand behind the last field, of a pattern of whole paths "
            "('s3://raw/{tenant}/**'). Elsewhere it is not clear which folder is the field"
        )
    regex = "".join(_regex(part) for part in parts if part is not None)
    return re.compile(regex if whole else f"(?:.*/)?{regex}", re.DOTALL)


def _regex(part: re.Match[str]) -> str:
    if part[1] is not None:
        return f"(?P<{part[1]}>{VALUE})"
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return known.get(part[0]) or re.escape(part[0])


class Opened(Generic[T]):
    """What was opened for values, in one bundle: at most `MAX_OPEN`, of which the least recently used goes first.

    Args:
        make: opens what goes with values.
        close: closes it; it erases its keys.
    """

    def __init__(self, make: Callable[[Values], T], close: Callable[[T], object]) -> None:
        self._make, self._close = make, close
        self._open: OrderedDict[Values, T] = OrderedDict()

    def __call__(self, values: Values) -> T:
        """Return what is open for these values. Raises what `make` raises."""
        if values not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._close(self._open.popitem(last=False)[1])
            self._open[values] = self._make(values)
        self._open.move_to_end(values)
        return self._open[values]

    def close(self) -> None:
        """Close all. May be called again."""
        while self._open:
            self._close(self._open.popitem()[1])


class ChosenSources:
    """The data keys of a bundle: one source for each choice of keys, or the process's, as the policy says.

    Args:
        choice: keys and context.
        policy: when to take a new data key.
    """

    def __init__(self, choice: KeyChoice, policy: DataKeyPolicy) -> None:
        """Make no call yet."""
        self._choice, self._policy = choice, policy
        self._own = policy.reuse == "bundle"
        self._opened: Opened[tuple[DataKeySource, dict[str, str]]] = Opened(self._make, self._drop)

    def of(self, values: Values) -> tuple[DataKeySource, dict[str, str]]:
        """Return the source and the context for values."""
        return self._opened(values)

    def close(self) -> None:
        """Erase the data keys of the bundle; those of the process live on."""
        self._opened.close()

    def _make(self, values: Values) -> tuple[DataKeySource, dict[str, str]]:
        filled = self._choice.filled(values)
        make = DataKeySource if self._own else shared_source
        context: Any = filled.pairs  # a writer's is never ANY_CONTEXT
        return make(filled.keys, context, self._policy), context

    def _drop(self, opened: tuple[DataKeySource, dict[str, str]]) -> None:
        if self._own:
            opened[0].close()
