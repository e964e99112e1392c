"""Paths to fields inside an element (`address.street`, `items[*].card`), and changing what lies at them.

Elements are dicts, rows, named tuples or dataclasses; nothing here knows what the change is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import apache_beam as beam

from beam_envelope.errors import EnvelopeError, FormatError

Step: TypeAlias = "str | None"  # a field's name, or None for all items of a list
Change: TypeAlias = Callable[[Any], Any]
Tree: TypeAlias = "dict[Step, Any]"  # of trees; at the end of a path, the Path

Missing: TypeAlias = Literal["error", "skip"]

_MISSING: Final = "it is not there. Correct the path, or set missing='skip' if not every element has it"
_NO_FIELD: Final = "it is not there: the row has no field of this name"
_STEP: Final = re.compile(r"(?P<dot>\.?)(?:(?P<each>\[\*\])|`(?P<quoted>(?:[^`]|``)+)`|(?P<bare>[^.\[\]`]+))")


@dataclass(frozen=True)
class Path:
    """Where a field is, in one form: `str()` of two paths is equal exactly if they lead to the same field.

    Attributes:
        steps: a name for each field, None for each `[*]`.
    """

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """Return its text, with backticks only where they are needed."""
        parts = ["[*]" if step is None else "." + _quoted(step) for step in self.steps]
        return "".join(parts)[1:]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`" if re.search(r"[.\[\]`]", name) else name


def parse_path(text: str) -> Path:
    """Return the path that a text is.

    Names are separated by dots; `[*]` after a name stands for all items of its list. A name that holds a dot, bracket
    or backtick stands in backticks, in which a backtick is doubled.

    Raises:
        TypeError: it is no text.
        ValueError: it has another form.

    Example:
        >>> parse_path("items[*].`card.number`").steps
        ('items', None, 'card.number')
    """
    if not isinstance(text, str):
        msg = f"a path to a field is a str such as 'address.street', not a {type(text).__name__}"
        raise TypeError(msg)
    steps: list[Step] = []
    position = 0
    while position < len(text) or not steps:
        found = _STEP.match(text, position)
        # The first step is a name without a dot; later names have one, and [*] never does.
        if found is None or bool(found["dot"]) != (bool(steps) and not found["each"]) or (found["each"] and not steps):
            msg = (
                f"{text!r} is no path to a field: at character {position + 1} there should be a name, or [*]. "
                "Paths are such as email, address.street or items[*].card; names with dots or brackets need `backticks`"
            )
            raise ValueError(msg)
        steps.append(None if found["each"] else (found["quoted"] or "").replace("``", "`") or found["bare"])
        position = found.end()
    return Path(tuple(steps))


def parse_paths(texts: Iterable[str]) -> tuple[Path, ...]:
    """Return the paths of a list of texts.

    Raises:
        TypeError: it is one text, or not a list of texts.
        ValueError: it is empty; one is no path; two are the same, or one leads into the other.
    """
    if isinstance(texts, str):
        msg = f"fields is a list of paths: give [{texts!r}]"
        raise TypeError(msg)
    paths = tuple(parse_path(text) for text in texts)
    if not paths:
        msg = "fields names no field; give at least one"
        raise ValueError(msg)
    tree_of(paths)
    return paths


def parse_scopes(deterministic: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Return the scopes of deterministic fields by path; by default, a field is a scope of its own.

    Raises:
        TypeError: it is one text.
        ValueError: one is no path.
    """
    if isinstance(deterministic, str):
        msg = f"deterministic is a list of fields, or a mapping of fields to scopes: give [{deterministic!r}]"
        raise TypeError(msg)
    if isinstance(deterministic, Mapping):
        return {str(parse_path(text)): scope for text, scope in deterministic.items()}
    paths = [str(parse_path(text)) for text in deterministic]
    return {path: path for path in paths}


def tree_of(paths: Sequence[Path]) -> Tree:
    """Return paths as a tree of their steps.

    Raises:
        ValueError: two are the same, or one leads into the other, or they disagree on what is a list.
    """
    tree: Tree = {}
    for path in paths:
        node = tree
        for depth, step in enumerate(path.steps):
            if node and (step is None) != (None in node):
                above = Path(path.steps[:depth])
                raise ValueError(f"of the fields {_first_path(node)} and {path}, only one takes {above} for a list")
            last = depth == len(path.steps) - 1
            if step in node and (last or isinstance(node[step], Path)):
                other = _first_path(node[step])
                if other.steps == path.steps:
                    raise ValueError(f"the field {path} is given twice")
                raise ValueError(f"the fields {other} and {path} are both given, and one contains the other")
            node = node.setdefault(step, path if last else {})
    return tree


def _first_path(tree: Tree | Path) -> Path:
    while not isinstance(tree, Path):
        tree = next(iter(tree.values()))
    return tree


# ----------------------------------------------------------------------------------------------- changing elements


class FieldError(Exception):
    """One field of an element cannot be changed.

    Attributes:
        path: the field's.
        error: why; its message names the field and holds no data.
        cell: on decryption, what was there, if it is bytes.
    """

    def __init__(self, path: object, error: EnvelopeError, cell: bytes | None = None) -> None:
        """Name the field in the message."""
        self.path, self.cell = str(path), cell
        place = f"the field {path}" if self.path else "the element"
        self.error = type(error)(f"{place}: {error}")
        super().__init__(str(self.error))


def fields_of(element: Any) -> dict[str, Any] | None:
    """Return the fields of a dict, row, named tuple or dataclass, or None if it is something else.

    A dict is returned as it is, not copied.
    """
    if isinstance(element, dict):
        return element
    if isinstance(element, beam.Row):
        return element.as_dict()
    if isinstance(element, tuple) and hasattr(element, "_asdict"):
        return dict(element._asdict())
    if dataclasses.is_dataclass(element) and not isinstance(element, type):
        return {field.name: getattr(element, field.name) for field in dataclasses.fields(element)}
    return None


def compile_tree(tree: Tree, leaf: Callable[[Path], Change], *, skip_missing: bool, above: Path = Path(())) -> Change:
    """Return a function that returns an element with other values at some paths, and leaves its argument as it is.

    Dicts stay dicts of their class; rows, named tuples and dataclasses become `beam.Row`s. Only what lies on a path is
    copied. Where there is None on the way, there is nothing to change.

    Args:
        tree: from `tree_of`.
        leaf: makes the function that changes the value at a path.
        skip_missing: pass over fields that a dict lacks, instead of raising FieldError.
        above: the path to what the function will get.
    """
    changes: list[tuple[Step, Path, Change]] = []
    for step, below in tree.items():
        path = Path((*above.steps, step))
        if isinstance(below, Path):
            changes.append((step, path, leaf(path)))
        else:
            changes.append((step, path, compile_tree(below, leaf, skip_missing=skip_missing, above=path)))
    if None in tree:
        return _each(above, changes[0][2])
    named = [(step, path, change) for step, path, change in changes if step is not None]
    return _object(above, named, skip_missing=skip_missing)


def _each(above: Path, change: Change) -> Change:
    def apply(items: Any) -> Any:
        if type(items) is list:
            return [change(item) for item in items]
        if items is None:
            return None
        if type(items) is tuple:
            return tuple([change(item) for item in items])
        msg = f"it is a {type(items).__name__}, not a list"
        raise FieldError(above, FormatError(msg))

    return apply


def _object(above: Path, changes: Sequence[tuple[str, Path, Change]], *, skip_missing: bool) -> Change:
    def apply(element: Any) -> Any:
        if isinstance(element, dict):
            changed = element.copy()
            for name, path, change in changes:
                if name in element:
                    changed[name] = change(element[name])
                elif not skip_missing:
                    raise FieldError(path, FormatError(_MISSING))
            return changed
        if element is None and above.steps:
            return None
        return _changed_row(element, above, changes)

    return apply


def _changed_row(element: Any, above: Path, changes: Sequence[tuple[str, Path, Change]]) -> beam.Row:
    found = fields_of(element)
    if found is None:
        msg = f"it is a {type(element).__name__}, which has no fields by name"
        raise FieldError(above, FormatError(msg))
    for name, path, change in changes:
        if name not in found:
            raise FieldError(path, FormatError(_NO_FIELD))
        found[name] = change(found[name])
    return beam.Row(**found)


# -------------------------------------------------------------------------------------------- what is to be changed


@dataclass(frozen=True)
class FieldsPlan:
    """What both directions know of the fields; configuration only, so it travels.

    Attributes:
        paths: the fields.
        scopes: what binds the deterministic cells of a path, where that is not the path.
        missing: what to do when a dict lacks a field: "error" or "skip".
    """

    paths: tuple[Path, ...]
    scopes: Mapping[str, str]
    missing: Missing

    def __post_init__(self) -> None:
        """Check that the scopes are for these fields."""
        if self.missing not in get_args(Missing):
            msg = f"missing is 'error' or 'skip', not {self.missing!r}"
            raise ValueError(msg)
        known = {str(path) for path in self.paths}
        for path, scope in self.scopes.items():
            if path not in known:
                msg = f"deterministic names {path}, which is not among the fields: {', '.join(sorted(known))}"
                raise ValueError(msg)
            if not isinstance(scope, str) or not scope:
                msg = f"the scope of {path} is a name, such as 'customer-id', not {scope!r}"
                raise ValueError(msg)

    def compiled(self, leaf: Callable[[Path], Change]) -> Change:
        """Return the function over elements that changes the fields."""
        return compile_tree(tree_of(self.paths), leaf, skip_missing=self.missing == "skip")

    def scope_of(self, path: Path) -> str:
        """Return what binds the deterministic cells of a path."""
        return self.scopes.get(str(path), str(path))
