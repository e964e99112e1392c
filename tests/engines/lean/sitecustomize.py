# ruff: noqa: INP001  # a folder of a path, not a package
"""Python imports this by itself: the processes of jobs get what `pip install beam-envelope` gives, and no more.

Beam imports these if they are there, as they are for the tests; without them a worker starts in half the time.
"""

import sys


class Absent:
    """Finds no such modules, and lets nobody else look for them."""

    names = ("apitools", "dask", "distributed", "google.cloud", "pandas")

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # noqa: ARG003
        """Raise for what is not to be there; otherwise leave it to others."""
        if name in cls.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent)
