"""EncryptColumns and DecryptColumns: chosen columns of Arrow tables, a whole column at a time.

Elements are tables or record batches; or schema'd rows, which Beam hands over as tables, so that between
`ReadFromParquet(as_rows=True)` and `WriteToParquet` no row becomes a Python object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import apache_beam as beam
import pyarrow as pa
from apache_beam import typehints
from apache_beam.typehints import arrow_type_compatibility, schemas
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_envelope.formats.dataset_key import DATASET_KEY, DeterministicEncryptor
from beam_envelope.formats.keyfile import RAW_CELL_CIPHER, RECORD_CIPHER
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.formats.row_groups import in_groups
from beam_envelope.formats.table import Counts, FailedCell, Layout, decrypt_columns, encrypt_columns
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import Opened, Values
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.transforms.elements import (
    ElementTransform,
    KeyUsingDoFn,
    ReadKeys,
    WriteKeys,
    failed_record,
    read_keys,
    write_keys,
)
from beam_envelope.transforms.row_tables import RowsToTables, TablesToRows, without_dictionaries
from beam_envelope.transforms.runner_limits import refuse_on_dask

_TABLES: Final = typehints.Union[pa.Table, pa.RecordBatch]


class EncryptColumns(ElementTransform):
    """Encrypts columns, each cell on its own: encrypted cells survive any engine, export and format.

    Input: `pyarrow.Table` or `RecordBatch`, or schema'd rows. Output: the same, with binary columns in the place of
    those encrypted. Null stays null. Types and metadata come back with `DecryptColumns`.

    Args:
        columns: their names; `address.street` is a child of a struct.
        key: the KMS key, as URI or provider, or several: any one of them opens the cells. Or templates, which a column
            fills row by row (`aws-kms://alias/data-{tenant}`; docs/key-choice.md).
        keys: the key store: the folder, on any Beam filesystem, that gets a small key file for each data key. Readers
            need it.
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        deterministic: those of `columns` whose equal values become equal cells, so that they can be joined and grouped;
            or a mapping from them to the name of a scope, within which that is so across columns and datasets. Whoever
            sees such cells learns which are equal, and how often each occurs.
        dataset_key: the name of the key for these in the key store.
        layout: `compact`: 45 bytes more than the value and its type. `raw`: 28 bytes more than the value, for the SQL
            functions of Spark, Databricks and Snowflake; a column `<name>_key_id` says which key opens a cell.
        policy: when to ask the KMS for a new data key. By default each bundle has one; of unbounded input, the process.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form, two do not go together, or rows have
            no such column. While it runs, see `formats.table.encrypt_columns`; its errors fail the bundle, also with an
            error handler: they are about whole columns.

    Example:
        >>> tables | EncryptColumns(["email"], key="aws-kms://alias/etl", keys="s3://sealed/keys/")
    """

    def __init__(
        self,
        columns: Iterable[str],
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore,
        context: Mapping[str, str] | None = None,
        deterministic: Iterable[str] | Mapping[str, str] = (),
        dataset_key: str = DATASET_KEY,
        layout: Layout = "compact",
        policy: DataKeyPolicy | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        if layout not in {"compact", "raw"}:
            raise ValueError(f"layout is 'compact' or 'raw', not {layout!r}")
        cipher = RAW_CELL_CIPHER if layout == "raw" else RECORD_CIPHER
        names = _checked_columns(columns)
        scopes = _checked_scopes(deterministic, names)
        if scopes and layout == "raw":
            raise ValueError(
                "deterministic= goes with layout='compact' only: SQL engines have no AES-SIV, and AES-GCM with equal "
                "nonces would give the key away"
            )
        self._work = _Encryption(write_keys(key, keys, context, policy, dataset_key, cipher), names, scopes, layout)
        _refuse_key_columns(names, self._work.keys.names)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the encrypted tables or rows."""
        work = replace(self._work, keys=self._work.keys.for_input(elements))
        return _apply(self, "Encrypt", _EncryptDoFn(work), elements, work)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        work = self._work
        return {
            "columns": ", ".join(work.columns),
            "deterministic": ", ".join(work.scopes),
            "layout": work.layout,
            **_display(work.keys),
        }


class DecryptColumns(ElementTransform):
    """Decrypts the columns that `EncryptColumns` made, and gives them their types back.

    Input and output as those of `EncryptColumns`. With an error handler, a row with a cell that cannot be decrypted
    goes there, as a `FailedRecord` with the first such cell, and the other rows go on.

    Args:
        columns: their names; or a mapping from name to `pyarrow` type. Tables need no types: they are in the cells.
            Rows do, since Beam wants to know the type of rows before there are any.
        key: the KMS key, as URI or provider, or several, any of which may open a cell; `AllowedKeys`; or templates.
        keys: the key store that the writer had.
        context: the encryption context that the columns were written with, or `ANY_CONTEXT`.
        deterministic: the mapping from columns to scopes that they were written with, if one was.

    Raises:
        ValueError, TypeError, FormatError: as `EncryptColumns`. While it runs, see `formats.table.decrypt_columns`.

    Example:
        >>> tables | DecryptColumns(["email"], key="aws-kms://alias/etl", keys="s3://sealed/keys/")
    """

    def __init__(
        self,
        columns: Iterable[str] | Mapping[str, pa.DataType],
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore,
        context: Mapping[str, str] | AnyContext | None = None,
        deterministic: Iterable[str] | Mapping[str, str] = (),
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        names = _checked_columns(columns)
        types = dict(columns) if isinstance(columns, Mapping) else {}
        for name, kind in types.items():
            if not isinstance(kind, pa.DataType):
                raise TypeError(
                    f"the type of column {name!r} is one of pyarrow's, such as pyarrow.string(), not {kind!r}"
                )
        self._work = _Decryption(read_keys(key, keys, context), names, types, _checked_scopes(deterministic, names))
        _refuse_key_columns(names, self._work.keys.names)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the decrypted tables or rows."""
        return _apply(self, "Decrypt", _DecryptDoFn(self._work), elements, self._work)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return {"columns": ", ".join(self._work.columns), **_display(self._work.keys)}


def _checked_columns(columns: Iterable[str]) -> tuple[str, ...]:
    names = () if isinstance(columns, str) else tuple(columns)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"columns is a list of names of columns, such as ['email'], not {columns!r}")
    for name in names:
        others = [other for other in names if other == name or other.startswith(f"{name}.")]
        if len(others) > 1:
            raise ValueError(
                f"the column {others[1]!r} is named twice in columns={list(names)}, or with what it is part of"
            )
    return names


def _refuse_key_columns(columns: tuple[str, ...], names: Iterable[str]) -> None:
    for name in names:
        if any(column == name or column.startswith(f"{name}.") for column in columns):
            raise ValueError(f"the column {name!r} fills the template of the key or context, so it cannot be encrypted")


def _checked_scopes(deterministic: Iterable[str] | Mapping[str, str], columns: tuple[str, ...]) -> dict[str, str]:
    if isinstance(deterministic, str):
        raise TypeError(f"deterministic is a list of columns, or a mapping to scopes, not {deterministic!r}")
    scopes = dict(deterministic) if isinstance(deterministic, Mapping) else {name: name for name in deterministic}
    for name, scope in scopes.items():
        if name not in columns:
            raise ValueError(
                f"the deterministic column {name!r} is not among columns={list(columns)}. Name it there too"
            )
        if not isinstance(scope, str) or not scope:
            raise TypeError(f"the scope of the column {name!r} is a text, not {scope!r}")
    return scopes


def _display(keys: WriteKeys | ReadKeys) -> dict[str, Any]:
    names = "any" if isinstance(keys.context, AnyContext) else ", ".join(name for name, _ in keys.context)
    return {"key": ", ".join(map(str, keys.keys)), "keys": keys.store.place, "context": names}


# ------------------------------------------------------------------------------------------------- the work


@dataclass
class _Bundle:
    """What a bundle holds, and what it did.

    Attributes:
        chosen: what opens the keys of values that fill templates; without templates, of none.
        counts: what was done.
    """

    chosen: Opened[_Opening]
    counts: Counts = field(default_factory=Counts)


@dataclass
class _Opening:
    """What one choice of keys needs."""

    crypt: RecordEncryptor | RecordDecryptor
    equal: DeterministicEncryptor | None = None


@dataclass(frozen=True)
class _Encryption:
    """What to encrypt; configuration only."""

    keys: WriteKeys
    columns: tuple[str, ...]
    scopes: dict[str, str]
    layout: Layout

    def open(self) -> _Bundle:
        release: Any = self.keys.release
        return _Bundle(Opened(self._opened, lambda opening: release(opening.crypt)))

    def _opened(self, values: Values) -> _Opening:
        keys = self.keys.filled(values)
        return _Opening(keys.encryptor(), keys.deterministic() if self.scopes else None)

    def run(self, table: Any, bundle: _Bundle | None = None) -> Any:
        """Encrypt; without a bundle an empty table, for its schema."""
        if bundle is not None and self.keys.names and table.num_rows:
            return in_groups(table, self.keys.names, lambda part, values: self._run(part, bundle, values))
        return self._run(table, bundle, ())

    def _run(self, table: Any, bundle: _Bundle | None, values: Values) -> Any:
        opening = None if bundle is None or not table.num_rows else bundle.chosen(values)
        crypt: Any = None if opening is None else opening.crypt
        return encrypt_columns(
            table,
            self.columns,
            crypt,
            deterministic=self.scopes,
            dataset_key=None if opening is None else opening.equal,
            layout=self.layout,
            policy=self.keys.policy,
            counts=None if bundle is None else bundle.counts,
        )


@dataclass(frozen=True)
class _Decryption:
    """What to decrypt; configuration only."""

    keys: ReadKeys
    columns: tuple[str, ...]
    types: dict[str, pa.DataType]
    scopes: dict[str, str]

    def open(self) -> _Bundle:
        return _Bundle(Opened(lambda values: _Opening(self.keys.filled(values).decryptor()), lambda _: None))

    def run(self, table: Any, bundle: _Bundle | None = None, failures: list[FailedCell] | None = None) -> Any:
        """Decrypt; without a bundle an empty table, for its schema."""
        if bundle is None and (unknown := [name for name in self.columns if name not in self.types]):
            raise ValueError(
                f"Beam wants to know the type of rows before there are any: give columns={{{unknown[0]!r}: "
                "pyarrow.string()}, or whatever it was, instead of the name alone"
            )
        if bundle is not None and self.keys.names and table.num_rows:
            return in_groups(table, self.keys.names, lambda part, values: self._run(part, bundle, failures, values))
        return self._run(table, bundle, failures, ())

    def _run(self, table: Any, bundle: _Bundle | None, failures: list[FailedCell] | None, values: Values) -> Any:
        crypt: Any = None if bundle is None or not table.num_rows else bundle.chosen(values).crypt
        return decrypt_columns(
            table,
            self.types or self.columns,
            crypt,
            deterministic=self.scopes,
            failures=failures,
            counts=None if bundle is None else bundle.counts,
        )


class _EncryptDoFn(KeyUsingDoFn[_Bundle]):
    def __init__(self, work: _Encryption) -> None:
        self._work = work

    def open(self) -> _Bundle:
        return self._work.open()

    def close(self, bundle: _Bundle) -> Mapping[str, int]:
        bundle.chosen.close()
        return bundle.counts.of

    def process(self, table: Any) -> Iterator[Any]:
        done = self._work.run(_checked_table(table), self.bundle)
        self.bundle.counts.of["rows_encrypted"] += done.num_rows
        yield done


class _DecryptDoFn(KeyUsingDoFn[_Bundle]):
    def __init__(self, work: _Decryption) -> None:
        self._work = work

    def open(self) -> _Bundle:
        return self._work.open()

    def close(self, bundle: _Bundle) -> Mapping[str, int]:
        return bundle.counts.of

    def process(self, table: Any) -> Iterator[Any]:
        failures: list[FailedCell] = []
        done = self._work.run(_checked_table(table), self.bundle, failures if self.catch else None)
        self.bundle.counts.of["rows_decrypted"] += done.num_rows
        self.bundle.counts.of["records_failed"] += len(failures)
        for failed in failures:
            yield failed_record(failed.error, field=failed.column, ciphertext=failed.ciphertext)
        yield done


def _checked_table(table: Any) -> Any:
    if not isinstance(table, (pa.Table, pa.RecordBatch)):
        raise TypeError(
            f"an element is a {type(table).__name__}; EncryptColumns and DecryptColumns take pyarrow's Table and "
            "RecordBatch, or rows with a schema. For dicts there are EncryptFields and DecryptFields"
        )
    return table


# ----------------------------------------------------------------------------------------------------- rows


def _apply(
    transform: ElementTransform,
    label: str,
    dofn: _EncryptDoFn | _DecryptDoFn,
    elements: beam.PCollection[Any],
    work: _Encryption | _Decryption,
) -> beam.PCollection[Any]:
    """Apply to tables as they are; to rows, in tables of many.

    Rows become tables in a step of their own, since what `process_batch` yields to a second output Beam takes for rows
    of the first, and `with_exception_handling` does not cover it. The steps are fused, so no table is copied.
    """
    kind: Any = elements.element_type
    row: Any = kind if isinstance(kind, RowTypeConstraint) else RowTypeConstraint.from_user_type(kind)
    dofn.with_input_types(_TABLES)
    if row is None:
        return transform.apply(label, dofn, elements, kind if kind in {pa.Table, pa.RecordBatch} else _TABLES)
    refuse_on_dask(
        elements,
        f"{type(transform).__name__} of rows",
        "it takes rows in batches, and DaskRunner gives them one by one",
        "Make pyarrow tables the elements, or take EncryptFields and DecryptFields",
    )
    try:
        schema = schemas.typing_to_runner_api(row).row_type.schema
        before = arrow_type_compatibility.arrow_schema_from_beam_schema(schema)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"Beam cannot make columns of these rows: {error} Write Optional[str] for str | None, take types that "
            "Parquet has too, or use EncryptFields and DecryptFields"
        ) from None
    after = work.run(before.remove_metadata().empty_table()).schema
    to_rows = TablesToRows(without_dictionaries(after))
    tables = elements | "Tables" >> beam.ParDo(RowsToTables()).with_output_types(pa.Table)
    return transform.apply(label, dofn, tables, pa.Table) | "Rows" >> beam.ParDo(to_rows)
