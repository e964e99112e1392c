"""fsspec's own conformance suite, over the local disk and over memory."""

import fsspec
import pytest
from fsspec.tests import abstract

from beam_envelope.fsspec import EnvelopeFsspecFileSystem


class OverTheLocalDisk(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, options):
        return EnvelopeFsspecFileSystem(fs=fsspec.filesystem("file", auto_mkdir=True), **options)

    @pytest.fixture
    def fs_path(self, tmp_path):
        return str(tmp_path)


class OverMemory(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, options):
        return EnvelopeFsspecFileSystem(fs=fsspec.filesystem("memory"), **options)

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self):
        return ""


class TestLocalCopy(OverTheLocalDisk, abstract.AbstractCopyTests):
    pass


class TestLocalGet(OverTheLocalDisk, abstract.AbstractGetTests):
    pass


class TestLocalPut(OverTheLocalDisk, abstract.AbstractPutTests):
    pass


class TestLocalOpen(OverTheLocalDisk, abstract.AbstractOpenTests):
    pass


class TestLocalPipe(OverTheLocalDisk, abstract.AbstractPipeTests):
    pass


class TestMemoryCopy(OverMemory, abstract.AbstractCopyTests):
    pass


class TestMemoryGet(OverMemory, abstract.AbstractGetTests):
    pass


class TestMemoryPut(OverMemory, abstract.AbstractPutTests):
    pass


class TestMemoryOpen(OverMemory, abstract.AbstractOpenTests):
    pass


class TestMemoryPipe(OverMemory, abstract.AbstractPipeTests):
    pass
