"""Has Beam encode our results as rows of typed fields, which engines and SDKs in other languages decode too."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from apache_beam import coders


def register_rows(*row_types: type) -> None:
    """Register NamedTuples with Beam's RowCoder.

    Under `from __future__ import annotations` the types of their fields are texts, which Beam takes for `Any`: a type
    that only Python knows. Flink, which decodes rows that cross a shuffle, then read garbage. So they are made types.
    """
    for row_type in row_types:
        row_type.__annotations__ = {name: _known(hint) for name, hint in get_type_hints(row_type).items()}
        coders.registry.register_coder(row_type, coders.RowCoder)


def _known(hint: Any) -> Any:
    """Return `X | None` as Optional[X], the form that Beam knows."""
    return Union[get_args(hint)] if get_origin(hint) is UnionType else hint  # noqa: UP007  # made at run time
