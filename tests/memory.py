"""How much memory something takes."""

import tracemalloc


def peak_of(work):
    """Return what some work returns, and the most bytes that it had at once; modules that it imports count too."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
