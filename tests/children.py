"""Runs a function in a forked child of this process, with the memory that this process has at that moment."""

import os
import pickle


class Child:
    """A forked child that runs one function; `result()` waits for what it returns."""

    def __init__(self, function):
        self._reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                with os.fdopen(writer, "wb") as stream:
                    stream.write(pickle.dumps(function()))
                status = 0
            finally:
                os._exit(status)  # an exception must not go on with the tests
        os.close(writer)

    def result(self):
        """Return what the function returned; fail if it raised."""
        with os.fdopen(self._reader, "rb") as stream:
            found = stream.read()
        assert os.waitpid(self._pid, 0)[1] == 0, "the child failed"
        return pickle.loads(found)
