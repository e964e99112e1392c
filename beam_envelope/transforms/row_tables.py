"""Beam's rows with a schema as Arrow tables, and back, a batch at a time; columns.py works on the tables between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.portability.api import schema_pb2
from apache_beam.typehints import arrow_type_compatibility, schemas


def without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """Return a schema of types that Beam's rows have."""
    return pa.schema([_plain(schema.field(number)) for number in range(len(schema))])


def _plain(of: pa.Field) -> pa.Field:
    kind = of.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    elif pa.types.is_struct(kind):
        kind = pa.struct([_plain(kind.field(number)) for number in range(kind.num_fields)])
    return pa.field(of.name, kind, of.nullable)


class RowsToTables(beam.DoFn):
    """Takes rows as Beam has batched them, and emits each batch as one element."""

    @beam.DoFn.yields_elements
    def process_batch(self, batch: Any) -> Iterator[Any]:
        """Emit the batch."""
        yield batch

    def get_input_batch_type(self, input_element_type: Any) -> type:
        """Say to Beam that batches are tables."""
        return pa.Table

    def infer_output_type(self, input_type: Any) -> type:
        """Say to Beam that elements are tables."""
        return pa.Table


class TablesToRows(beam.DoFn):
    """Emits each table as a batch of rows of a schema."""

    def __init__(self, schema: pa.Schema) -> None:
        try:
            self._row = arrow_type_compatibility.beam_schema_from_arrow_schema(schema).SerializeToString()
        except ValueError as error:
            raise ValueError(
                f"Beam's rows cannot have such a column: {error}. Take tables: ReadFromParquetBatched gives them"
            ) from None
        self._schema = schema

    @beam.DoFn.yields_batches
    def process(self, table: Any) -> Iterator[Any]:
        """Emit the table's rows."""
        yield table.cast(self._schema)

    def get_output_batch_type(self, input_element_type: Any) -> type:
        """Say to Beam that batches are tables."""
        return pa.Table

    def infer_output_type(self, input_type: Any) -> Any:
        """Say to Beam what the rows are."""
        return schemas.named_tuple_from_schema(schema_pb2.Schema.FromString(self._row))
