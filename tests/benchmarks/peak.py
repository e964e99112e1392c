"""Prints the peak memory of a process that does nothing; `test_benchmarks.py` starts it."""

from benchmarks.measure import peak_memory

print(peak_memory())  # noqa: T201
