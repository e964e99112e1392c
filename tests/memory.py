"""How much memory something takes."""

import tracemalloc


def peak_of(work):
    """Return what some work returns, and the most memory in bytes that it had while it ran."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
