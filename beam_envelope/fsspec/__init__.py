"""`envelope::s3://bucket/part.csv`: shards for pandas, Polars, Dask, DuckDB and all that takes fsspec, without Beam."""

try:
    import fsspec.implementations.chained  # noqa: F401  # to say what is missing
except ImportError as error:
    _MSG = "envelope:: paths need fsspec 2025.10 or newer: pip install 'beam-envelope[fsspec]'"
    raise ImportError(_MSG) from error

from beam_envelope.fsspec.filesystem import EnvelopeFsspecFileSystem

__all__ = ["EnvelopeFsspecFileSystem"]
