"""CSV files and JSON lines as Arrow batches, in memory that does not grow with the file."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from beam_envelope.errors import FormatError
from beam_envelope.io.table_source import BATCH_BYTES, Name, TableSource, TextTypes, parse_name

_MAX_LINE_BYTES: Final = 1 << 26
_CODEC: Final = "SNAPPY"
_CSV_VALUE: Final = re.compile(
    r"In CSV column #(\d+):(?: Row #(\d+):)?(?: CSV conversion error to ([^:]+):)?(.*)", re.DOTALL
)
_CSV_ROW: Final = re.compile(r"CSV parse error:(?: Row #(\d+):)? Expected (\d+) columns, got (\d+)")
_JSON_ROW: Final = re.compile(r"JSON parse error: (.*) in row (\d+)$", re.DOTALL)
_JSON_COLUMN: Final = re.compile(r"Column\(/([^/)]*)[^)]*\) (?:changed from (\w+) to (\w+)|was specified twice)")
_MERGE: Final = re.compile(r"Field (.*) has incompatible types: ([^<]*?)(?:<.*)? vs ([^<]*?)(?:<.*)?$", re.DOTALL)


class TextSource(TableSource):
    """What CSV and JSON lines have in common."""

    def __init__(self, path: str, size: int, types: TextTypes) -> None:
        """Open the file. Raises as `TableSource`."""
        self._name: Name = parse_name(path)
        self._types = types
        super().__init__(path, size)

    def done_bytes(self) -> int:
        """Return how far into the file pyarrow has read."""
        return min(self.size, int(self._bytes.native.tell()))

    def compression(self) -> str:
        """Return pyarrow's default."""
        return _CODEC

    def _check_named(self, names: list[str]) -> dict[str, pa.DataType]:
        """Return the types that were given. Raises FormatError: for a column that there is not."""
        types = self._types.arrow()
        unknown = [name for name in types if name not in names]
        if unknown:
            msg = f"{self.path} has no column {unknown[0]!r}, whose type was given; there are {', '.join(names[:20])}"
            raise FormatError(msg)
        return types


class CsvSource(TextSource):
    """A CSV file with a header; of `.tsv`, tabs part the columns."""

    def _open(self) -> None:
        if not self.size:
            raise FormatError(f"{self.path} is empty: without a header it has no columns. Leave it out")
        self._blank_rows = False
        self._column_types: dict[str, pa.DataType] = {}
        self._reader: Any = None
        with self.named_errors():
            names = self._names = self._header()
            if self._types.csv == "text":
                self._column_types = dict.fromkeys(names, pa.string())
            self._column_types.update(self._check_named(names))
            self._blank_rows = len(names) == 1  # a line without text is then a row without text
            self._reader = self._open_reader()
            self.schema = self._reader.schema
            if self.schema.names != names:
                raise FormatError(f"{self.path}: its header is not one of CSV in UTF-8. Mend the file")

    def close(self) -> None:
        """Close the file, and what reads ahead in it before."""
        with contextlib.suppress(Exception):
            self._reader.close()
        super().close()

    def _header(self) -> list[str]:
        """Return the names of the columns. pyarrow would tell them, but by then it reads ahead in another thread."""
        head = bytes(self._bytes.unpacked(self._name.codec).read(BATCH_BYTES)).decode("utf-8-sig", "replace")
        try:
            return next(
                (row for row in csv.reader(io.StringIO(head, newline=""), delimiter=self._delimiter) if row), []
            )
        except csv.Error:
            return []

    @property
    def _delimiter(self) -> str:
        return "\t" if self._name.ending == ".tsv" else ","

    def _open_reader(self) -> Any:
        return pa_csv.open_csv(
            self._bytes.unpacked(self._name.codec),
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=BATCH_BYTES),
            parse_options=pa_csv.ParseOptions(
                delimiter=self._delimiter, newlines_in_values=True, ignore_empty_lines=not self._blank_rows
            ),
            # Text stays as it is, also where it says NA or nothing.
            convert_options=pa_csv.ConvertOptions(column_types=self._column_types, strings_can_be_null=False),
        )

    def groups(self) -> Iterator[Iterator[pa.RecordBatch]]:
        """Yield the whole file."""
        yield self._batches()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        while True:
            with self.named_errors():
                batch = next(self._reader, None)
            if batch is None:
                return
            yield batch

    def explain(self, message: str) -> str:  # noqa: PLR0911  # one for each kind of message
        """Name the row, which is the line if no value has line breaks in it, and the column."""
        if match := _CSV_VALUE.match(message):
            row = f", row {match[2]}" if match[2] else ""
            name = self._names[int(match[1])] if int(match[1]) < len(self._names) else f"number {match[1]}"
            if "UTF8" in match[4]:
                return f"{row}: the column {name!r} holds bytes that are not UTF-8. Convert the file to UTF-8 first"
            kind = match[3] or self._column_types.get(name, "its type")
            advice = f"Give its type (--column-type {name}=string, column_types=), or read all columns as text"
            return f"{row}: a value of the column {name!r} is not of the type {kind}. {advice}"
        if match := _CSV_ROW.match(message):
            row = f", row {match[1]}" if match[1] else ""
            return f"{row}: it has {match[3]} columns; the header, row 1, has {match[2]}. Mend the file"
        if "codec can't decode" in message:
            return ": its header is not one of CSV in UTF-8. Mend the file"
        if "straddling" in message:
            return f": a row is longer than {BATCH_BYTES >> 20} MiB, or a quotation mark is not closed. Mend the file"
        if "Empty CSV" in message:
            return " has no header, so no columns. Leave it out"
        return super().explain(message)


class JsonSource(TextSource):
    """A file of JSON lines: one object a line. Its types are those of all its lines, so it is read twice."""

    def _open(self) -> None:
        self._line = 0
        schemas: list[pa.Schema] = []
        with self.named_errors():
            for block in self._blocks():
                found = self._parse(block, None)
                schemas = [self._unified([*schemas, pa.schema([_without_times(field) for field in found.schema])])]
        if not schemas:
            raise FormatError(f"{self.path} has no lines, so no columns are known. Leave it out")
        types = self._check_named(schemas[0].names)
        self.schema = pa.schema([field.with_type(types.get(field.name, field.type)) for field in schemas[0]])

    def groups(self) -> Iterator[Iterator[pa.RecordBatch]]:
        """Yield the whole file."""
        yield self._batches()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self.named_errors():
            blocks = self._blocks()
        while True:
            with self.named_errors():
                block = next(blocks, None)
                batches = [] if block is None else self._parse(block, self.schema).to_batches()
            if block is None:
                return
            yield from batches

    def _blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole lines; `self._line` is the number of lines before each."""
        stream = self._bytes.unpacked(self._name.codec)
        rest = b""
        self._line = 0
        while more := stream.read(BATCH_BYTES):
            head, newline, tail = more.rpartition(b"\n")
            if newline:
                block = rest + head + newline
                rest = tail
                if block.strip():
                    yield block
                self._line += block.count(b"\n")
            else:
                rest += more
                if len(rest) > _MAX_LINE_BYTES:
                    msg = f"{self.path} has a line of more than {_MAX_LINE_BYTES >> 20} MiB: is it one object a line?"
                    raise FormatError(msg)
        if rest.strip():
            yield rest

    def _parse(self, block: bytes, schema: pa.Schema | None) -> pa.Table:
        self._block = block
        behaviour = "infer" if schema is None else "error"
        return pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block)),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behaviour),
        )

    def _unified(self, schemas: list[pa.Schema]) -> pa.Schema:
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            match = _MERGE.search(str(error))
            where = "a column" if match is None else f"the column {match[1].partition('.')[0]!r}"
            what = "of two types" if match is None else f"{match[2]} in some lines and {match[3]} in others"
            raise FormatError(f"{self.path}: {where} is {what}, which no column of a table can be") from None

    def explain(self, message: str) -> str:
        """Name the line and the column."""
        match = _JSON_ROW.search(message)
        if match is None:
            lines = f", lines {self._line + 1} to {self._line + self._block.count(bytes([10]))}"
            return (
                f"{lines}: a value is not of the type that was given for its column, or this is not one object a line"
            )
        line = self._line + self._line_of_row(int(match[2]))
        if column := _JSON_COLUMN.search(match[1]):
            what = f"was {column[2]} and is {column[3]} here" if column[2] else "is there twice"
            return f", line {line}: the column {column[1]!r} {what}. Mend the file"
        return f", line {line}: this is not one JSON object a line. Mend the file"

    def _line_of_row(self, row: int) -> int:
        """Return the number of the line of a row in a block; blank lines are no rows."""
        rows = [number for number, line in enumerate(self._block.split(b"\n"), start=1) if line.strip()]
        return rows[row] if row < len(rows) else len(rows)


def open_text(path: str, size: int, types: TextTypes) -> TextSource:
    """Open a file of text. Raises as `TableSource`."""
    return CsvSource(path, size, types) if parse_name(path).kind == "csv" else JsonSource(path, size, types)


def _without_times(field: pa.Field) -> pa.Field:
    """Return a field in which text that pyarrow took for a time is text again: JSON has no times."""
    return field.with_type(_text_for_times(field.type))


def _text_for_times(data_type: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(data_type):
        return pa.string()
    if pa.types.is_struct(data_type):
        return pa.struct([_without_times(child) for child in data_type])
    if pa.types.is_list(data_type):
        return pa.list_(_without_times(data_type.value_field))
    return data_type
