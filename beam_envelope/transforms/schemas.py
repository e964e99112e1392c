"""What schema comes out when fields of a schema'd element change their type, and how its elements are made."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from apache_beam.typehints import native_type_compatibility
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_envelope.errors import FormatError
from beam_envelope.transforms.paths import Change, FieldError, Path, Tree, fields_of

TYPE_NAMES: Final[Mapping[str, Any]] = {
    "boolean": bool,
    "bytes": bytes,
    "integer": int,
    "number": float,
    "string": str,
}
"""The names that stand for types where there are only texts, as in Beam YAML: those of JSON schema, and bytes."""
_WITHOUT_FIELDS: Final = frozenset({str, bytes, int, float, bool})


def row_type(kind: Any) -> RowTypeConstraint | None:
    """Return the schema of a type hint: of a row, named tuple or dataclass; None for others."""
    return kind if isinstance(kind, RowTypeConstraint) else RowTypeConstraint.from_user_type(kind)


def output_type(kind: Any, tree: Tree, types_of: Callable[[Path], Any]) -> Any:
    """Return the type of elements after a change.

    Args:
        kind: their type before.
        tree: the changed paths.
        types_of: returns the type of the value at a path, afterwards.

    Returns:
        A row type for a schema'd type; `dict[str, Any]` for dicts; Any for what says nothing about fields.

    Raises:
        ValueError: the type has no such field.
    """
    if row_type(kind) is not None:
        return _changed(kind, tree, types_of, Path(()))
    if kind in _WITHOUT_FIELDS:
        msg = f"the elements are of the type {kind.__name__}, which has no fields; use EncryptRecords or DecryptRecords"
        raise ValueError(msg)
    native = _native(kind)
    return dict[str, Any] if typing.get_origin(native) is dict or native is dict else Any


def _changed(kind: Any, tree: Tree | Path, types_of: Callable[[Path], Any], path: Path) -> Any:
    if isinstance(tree, Path):
        return types_of(tree)
    present, nullable = without_null(kind)
    changed = _changed_present(present, tree, types_of, path)
    return typing.Optional[changed] if nullable and changed is not Any else changed  # noqa: UP045  # as Beam knows it


def _changed_present(kind: Any, tree: Tree, types_of: Callable[[Path], Any], path: Path) -> Any:
    row = row_type(kind)
    if row is not None and None not in tree:
        names = dict(row._fields)
        for name in tree:
            if name not in names:
                field = Path((*path.steps, name))
                raise ValueError(f"the elements have no field {field}: there is {', '.join(names)}")
        fields: list[tuple[str, Any]] = [
            (name, _changed(of, tree[name], types_of, Path((*path.steps, name))) if name in tree else of)
            for name, of in names.items()
        ]
        return RowTypeConstraint.from_fields(fields)
    item = item_type(kind)
    if item is not None and None in tree:
        return Sequence[_changed(item, tree[None], types_of, Path((*path.steps, None)))]  # type: ignore[misc]  # made here
    if kind is Any or isinstance(kind, (str, typing.TypeVar, typing.ForwardRef)):
        return Any
    if item is not None:
        raise ValueError(f"the field {path} is a list: write {path}[*] for what is in it")
    if None in tree:
        raise ValueError(f"the field {path} is no list of the type {_name(kind)}: leave out the [*] after it")
    raise ValueError(f"the field {path} is of the type {_name(kind)}, whose parts have no schema: encrypt it whole")


def _native(kind: Any) -> Any:
    """Return one of Beam's types as Python's, or Any where Python has none."""
    try:
        return native_type_compatibility.convert_to_python_type(kind)
    except ValueError:
        return Any


def is_row(kind: Any) -> bool:
    """Whether values of a type are rows, which have no form as one cell, or lists of them."""
    present, _ = without_null(kind)
    item = item_type(present)
    return row_type(present) is not None or (item is not None and is_row(item))


def type_at(kind: Any, steps: Sequence[str | None]) -> Any:
    """Return the type of what lies at a path, or Any where that is not known."""
    for step in steps:
        present, _ = without_null(kind)
        row = row_type(present)
        if step is None:
            kind = item_type(present) or Any
        elif row is None:
            return Any
        else:
            kind = row.get_type_for(step)
    return kind


def without_null(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None was in it."""
    native = _native(kind)
    if typing.get_origin(native) not in {typing.Union, types.UnionType}:
        return native, False
    present = tuple(arm for arm in typing.get_args(native) if arm is not type(None))
    if len(present) == len(typing.get_args(native)):
        return native, False
    return (present[0] if len(present) == 1 else Any), True


def item_type(kind: Any) -> Any:
    """Return the type of the items of a list type, or None for other types."""
    native = _native(kind)
    origin, arms = typing.get_origin(native), typing.get_args(native)
    if origin in {list, Sequence, Iterable} and len(arms) == 1:
        return arms[0]
    if origin is tuple and len(arms) == 2 and arms[1] is Ellipsis:  # noqa: PLR2004
        return arms[0]
    return Any if native is list else None


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


# ------------------------------------------------------------------------------------------------ making elements


def maker(kind: Any) -> Change | None:
    """Return a function that makes values of a named tuple or dataclass of dicts and rows, also within it.

    Returns:
        None for types whose values are as they should be.
    """
    kind, _ = without_null(kind)
    item = item_type(kind)
    if item is not None:
        make = maker(item)
        return None if make is None else lambda items: items if items is None else [make(value) for value in items]
    row = row_type(kind)
    if row is None or isinstance(kind, RowTypeConstraint):
        return None
    makers = {name: make for name, of in row._fields if (make := maker(_user_type(of))) is not None}
    names = [name for name, _ in row._fields]
    return _row_maker(kind, names, makers)


def _user_type(kind: Any) -> Any:
    """Return the class that Beam has wrapped into its own kind of type."""
    return kind.user_type if isinstance(kind, RowTypeConstraint) else kind


def _row_maker(kind: type, names: Sequence[str], makers: Mapping[str, Change]) -> Change:
    expected = set(names)

    def make(value: Any) -> Any:
        found = None if value is None else fields_of(value)
        if found is None:
            return value
        if found.keys() != expected:
            name = min(found.keys() ^ expected, key=str)
            msg = f"the element and {kind.__name__} do not have the same fields"
            raise FieldError(Path((str(name),)), FormatError(msg))
        if not makers:
            return kind(**found)
        return kind(**{name: makers[name](item) if name in makers else item for name, item in found.items()})

    return make


def check_fields(kind: Any, elements: Any) -> RowTypeConstraint:
    """Return the schema of the elements that a user asks for.

    Raises:
        TypeError: it is no named tuple or dataclass.
        ValueError: it has other fields than the elements, as far as theirs are known.
    """
    row = row_type(kind)
    if row is None or not (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, tuple))):
        msg = f"element_type is a NamedTuple class or a dataclass with a schema, not {kind!r}"
        raise TypeError(msg)
    known = row_type(elements)
    wanted = [name for name, _ in row._fields]
    if known is not None and [name for name, _ in known._fields] != wanted:
        there = ", ".join(name for name, _ in known._fields)
        raise ValueError(f"{kind.__name__} has the fields {', '.join(wanted)}, and the elements have {there}")
    return row
