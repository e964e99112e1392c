"""The arguments for tables: of `encrypt --format=parquet`, and of `decrypt`. Imports no Beam; see arguments.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any, Final

FORMATS: Final = ("shard", "parquet")
CSV_TYPES: Final = ("text", "inferred")
LAYOUTS: Final = ("compact", "raw")
CODECS: Final = ("none", "zstd", "snappy", "gzip", "lz4", "brotli")
ON_DENIED: Final = ("error", "null", "drop")

_NAMES_AND_KEY: Final = re.compile(r"(?P<names>.*?)=(?P<key>[a-z][a-z0-9+.-]*://.*)", re.DOTALL)
_OF_TABLES: Final = (
    "columns",
    "cells",
    "keys",
    "deterministic",
    "layout",
    "csv_types",
    "column_type",
    "row_group_rows",
)
_OF_SHARDS: Final = ("split_lines", "header_lines")


def add_encrypt_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what an encrypting job has for tables."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="shard",
        help="shard: encrypt files byte for byte (default). parquet: read Parquet, CSV or JSON lines, and write "
        "Parquet that is encrypted column by column",
    )
    group = parser.add_argument_group("with --format=parquet")
    group.add_argument(
        "--columns",
        action="append",
        metavar="NAME[,NAME...][=KEY]",
        help="columns with a KMS key of their own: ssn,address.zip=aws-kms://alias/pii. Give it again for more. All "
        "other columns, and those without KEY, are under --key. With --cells: the columns to encrypt",
    )
    group.add_argument(
        "--cells",
        action="store_true",
        help="write plain Parquet in which each value of --columns is encrypted on its own, for engines that know no "
        "encrypted Parquet",
    )
    _add_cell_arguments(group, "a column whose equal values stay equal, for joins; within SCOPE, across columns")
    group.add_argument(
        "--layout", choices=LAYOUTS, help="of cells: compact (default), or raw, which the functions of SQL engines read"
    )
    group.add_argument(
        "--csv-types",
        choices=CSV_TYPES,
        help="CSV columns are text (default), or inferred from each file's first 4 MiB",
    )
    group.add_argument(
        "--column-type",
        action="append",
        metavar="NAME=TYPE",
        help="the Arrow type of a column of CSV or JSON lines: age=int64, born=date32, paid='decimal128(12, 2)'",
    )
    group.add_argument(
        "--row-group-rows", type=int, metavar="N", help="rows in a row group (default: those of Parquet input are kept)"
    )


def add_decrypt_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a decrypting job has for tables."""
    group = parser.add_argument_group("for encrypted Parquet, which is found by its key file")
    group.add_argument(
        "--columns", action="append", metavar="NAME[,NAME...]", help="write these columns only (default: all)"
    )
    group.add_argument(
        "--on-denied",
        choices=ON_DENIED,
        default="error",
        help="when --key may not open a column: stop (default), write nulls, or leave it out",
    )
    group.add_argument("--cells", action="store_true", help="read plain Parquet with encrypted cells")
    _add_cell_arguments(group, "a deterministic column that was encrypted under another scope than its own name")
    group.add_argument(
        "--compression", choices=CODECS, help="of the Parquet that is written (default: snappy; of cells, the input's)"
    )
    group.add_argument("--row-group-rows", type=int, metavar="N", help="rows in a row group (default: as in the input)")


def _add_cell_arguments(group: argparse._ArgumentGroup, text: str) -> None:
    group.add_argument("--keys", metavar="FOLDER", help="of cells: the key store, where the key files are")
    group.add_argument("--deterministic", action="append", metavar="NAME[=SCOPE]", help=f"of cells: {text}")


def refuse_other_format(arguments: argparse.Namespace) -> None:
    """Refuse what goes with the other format only. Raises ValueError."""
    parquet = arguments.format == "parquet"
    for name in _OF_SHARDS if parquet else _OF_TABLES:
        if getattr(arguments, name):
            other = FORMATS[0] if parquet else FORMATS[1]
            raise ValueError(f"--{name.replace('_', '-')} goes with --format={other}")


def encrypt_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the arguments say to EncryptTables beyond what all transforms have. Raises ValueError."""
    return {
        "columns": parse_columns(arguments.columns or ()),
        "cells": arguments.cells,
        "keys": arguments.keys,
        "deterministic": parse_scopes(arguments.deterministic or ()),
        "layout": arguments.layout or "compact",
        "csv_types": arguments.csv_types or "text",
        "column_types": _parse_pairs(arguments.column_type or (), "--column-type", "NAME=TYPE, such as age=int64"),
        "row_group_rows": arguments.row_group_rows,
        "compression": arguments.compression,
    }


def decrypt_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the arguments say to DecryptTables beyond what all transforms have. Raises ValueError."""
    columns = None if arguments.columns is None else parse_columns(arguments.columns)
    for name in columns or ():
        if "://" in name:
            raise ValueError(f"--columns {name}: write the name only; the keys that may be used are those of --key")
    return {
        "columns": columns,
        "cells": arguments.cells,
        "keys": arguments.keys,
        "deterministic": parse_scopes(arguments.deterministic or ()),
        "on_denied": arguments.on_denied,
        "row_group_rows": arguments.row_group_rows,
        "compression": arguments.compression,
    }


def parse_columns(texts: Iterable[str]) -> dict[str, list[str] | None]:
    """Return the columns that texts like `ssn,zip=aws-kms://alias/pii` name, each with its keys.

    What is behind the first `=` that a URI follows is the key, whatever is in it; so a key may hold `:`, `,` and `=`.
    A name may not hold a comma or `=`: Parquet libraries could not encrypt it alone anyway.

    Raises:
        ValueError: a text is not of this form.
    """
    columns: dict[str, list[str] | None] = {}
    for text in texts:
        match = _NAMES_AND_KEY.fullmatch(text)
        names = (text if match is None else match["names"]).split(",")
        if not all(names) or (match is None and "=" in text) or (match is not None and "=" in match["names"]):
            raise ValueError(
                f"--columns {text}: write NAME, or NAME=KEY with the URI of a key, such as ssn=aws-kms://alias/pii; "
                "several names have commas between them"
            )
        for name in names:
            if match is None:
                columns.setdefault(name, None)
            else:
                columns[name] = [*(columns.get(name) or []), match["key"]]
    return columns


def parse_scopes(texts: Iterable[str]) -> dict[str, str]:
    """Return the scopes of columns by texts like `email` or `email=address`. Raises ValueError."""
    return _parse_pairs((text if "=" in text else f"{text}={text}" for text in texts), "--deterministic", "NAME=SCOPE")


def _parse_pairs(texts: Iterable[str], option: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator and value) or name in pairs:
            raise ValueError(f"{option} {text}: write {form}, each name once")
        pairs[name] = value
    return pairs
