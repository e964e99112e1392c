"""Shards in memory against the cipher alone, and reads at random places of a shard."""

from __future__ import annotations

import io
import random
import statistics
from typing import Any, Final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

from beam_envelope import KeyProvider, create_shard, open_shard
from beam_envelope.formats.output import Buffer
from beam_envelope.formats.shard_layout import HEADER_BYTES, shard_size
from benchmarks.data import check, new_key, random_buffer, touched_buffer
from benchmarks.machine import work_folder
from benchmarks.measure import Sample, interleave, timed, times_faster
from benchmarks.peers import BLOCK_BYTES, CONTEXT, NATIVE, OURS, SEALED_BLOCK_BYTES
from benchmarks.results import Measurement, Row, Target, speed_rows
from benchmarks.settings import MIB, Say, Settings

READ_BYTES: Final = 64 * 1024
MAX_CHUNKS: Final = 6
MIN_OF_NATIVE: Final = 0.85


class Drop(io.RawIOBase):
    """A sink that counts what it gets, and drops it."""

    def __init__(self) -> None:
        self.count = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]  # typeshed's Buffer is not importable on 3.10
        """Take all."""
        self.count += len(data)
        return len(data)


class Fill(Drop):
    """A sink that copies what it gets into a buffer."""

    def __init__(self, target: memoryview) -> None:
        super().__init__()
        self._target = target

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        """Take all."""
        self._target[self.count : self.count + len(data)] = data
        return super().write(data)


class MemoryBench:
    """256 MiB of random bytes, sealed and opened again and again in the same buffers."""

    def __init__(self, size: int, key: KeyProvider) -> None:
        """Make and touch all buffers."""
        self.size = size
        self._key, self._key_file = key, io.BytesIO()
        self.plain = random_buffer(size)
        self.sealed = touched_buffer(shard_size(size) + SEALED_BLOCK_BYTES)
        self.opened = touched_buffer(size + BLOCK_BYTES)
        self._scratch = touched_buffer(SEALED_BLOCK_BYTES + HEADER_BYTES)
        self._native_key = Cobblestone256Encryptor.generate_key()

    def write_ours(self, sink: Drop) -> None:
        """Seal all into `sink`."""
        self._key_file = io.BytesIO()
        with create_shard(sink, key=self._key, context=CONTEXT, key_file=self._key_file) as shard:  # type: ignore[arg-type]  # RawIOBase is a BinaryIO
            for start in range(0, self.size, BLOCK_BYTES):
                shard.write(self.plain[start : start + BLOCK_BYTES])
        check(sink.count == shard_size(self.size), "our shard has the wrong size")

    def write_native(self) -> None:
        """Seal all into a scratch buffer, as `write_ours` does into its own."""
        encryptor = Cobblestone256Encryptor(self._native_key, b"benchmark")
        for start in range(0, self.size, BLOCK_BYTES):
            encryptor.update_into(self.plain[start : start + BLOCK_BYTES], self._scratch)
        encryptor.finalize()

    def write_native_in_place(self) -> None:
        """Seal all into the large buffer."""
        encryptor, position = Cobblestone256Encryptor(self._native_key, b"benchmark"), 0
        for start in range(0, self.size, BLOCK_BYTES):
            block = self.plain[start : start + BLOCK_BYTES]
            position += encryptor.update_into(block, self.sealed[position:])
        last = encryptor.finalize()
        self.sealed[position : position + len(last)] = last

    def read_ours(self, source: io.BytesIO) -> None:
        """Open a shard that is in memory, in order, into the large buffer."""
        position = 0
        key_file = self._key_file.getvalue()
        with open_shard(source, key=self._key, context=CONTEXT, key_file=key_file) as shard:
            while count := shard.readinto(self.opened[position : position + BLOCK_BYTES]):
                position += count

    def read_native(self, sealed: memoryview) -> None:
        """Open it with the cipher alone, without any copy."""
        decryptor, position = Cobblestone256Decryptor(self._native_key, b"benchmark"), 0
        decryptor.update(sealed[:HEADER_BYTES])
        for start in range(HEADER_BYTES, len(sealed), SEALED_BLOCK_BYTES):
            block = sealed[start : start + SEALED_BLOCK_BYTES]
            position += decryptor.update_into(block, self.opened[position:])
        last = decryptor.finalize()
        self.opened[position : position + len(last)] = last

    def check_opened(self) -> None:
        """Compare what was opened with what was sealed, and forget it. Raises SystemExit."""
        check(self.opened[: self.size] == self.plain, "what was opened is not what was sealed")
        self.opened[: self.size] = bytes(self.size)


def measure_memory(settings: Settings, say: Say) -> Measurement:
    """Measure shards from memory to memory."""
    with work_folder(MIB, settings.folder) as folder:
        say("making buffers")
        bench = MemoryBench(settings.size, new_key(folder))
        say("writing")
        write = interleave(
            {
                OURS: lambda: timed(lambda: bench.write_ours(Drop())),
                NATIVE: lambda: timed(bench.write_native),
            },
            settings.rounds,
        )
        fill = interleave(
            {
                OURS: lambda: timed(lambda: bench.write_ours(Fill(bench.sealed))),
                NATIVE: lambda: timed(bench.write_native_in_place),
            },
            settings.rounds,
        )
        say("reading")
        bench.write_native_in_place()
        native = memoryview(bytes(bench.sealed[: shard_size(bench.size)]))
        bench.write_ours(Fill(bench.sealed))
        ours = io.BytesIO(bench.sealed[: shard_size(bench.size)])
        bench.read_native(native)
        bench.check_opened()
        bench.read_ours(ours)
        bench.check_opened()
        ours.seek(0)
        read = interleave(
            {
                OURS: lambda: timed(lambda: bench.read_ours(ours)),
                NATIVE: lambda: timed(lambda: bench.read_native(native)),
            },
            settings.rounds,
        )
    rows = [
        *speed_rows("write", write, bench.size, [OURS]),
        *speed_rows("write, kept in memory", fill, bench.size, [OURS]),
        *speed_rows("read", read, bench.size, [OURS]),
    ]
    return Measurement(
        "shards",
        f"Shards, memory to memory, {settings.size // MIB} MiB",
        "MB/s",
        f"create_shard and open_shard against the cipher they use, in blocks of {BLOCK_BYTES // MIB} MiB, from and to "
        "the same buffers, all touched before. The sealed bytes of `write` are dropped on both sides; in `write, kept "
        "in memory` a stream copies ours, while the cipher writes them where they stay.",
        tuple(rows),
        (
            Target("write, against the cipher alone", times_faster(write[OURS], write[NATIVE]), MIN_OF_NATIVE, "x"),
            Target("read, against the cipher alone", times_faster(read[OURS], read[NATIVE]), MIN_OF_NATIVE, "x"),
        ),
    )


def measure_random(settings: Settings, say: Say) -> Measurement:
    """Measure reads at random places of a shard in a file."""
    size = settings.random_bytes
    generator = random.Random(20)
    offsets = [generator.randrange(size - READ_BYTES) for _ in range(settings.random_reads)]
    with work_folder(2 * size, settings.folder) as folder:
        say("writing a shard")
        key = new_key(folder)
        plain, shard = folder / "plain.bin", folder / "shard.bin"
        block = random_buffer(min(size, 16 * MIB + 4099))  # no whole number of chunks, so that chunks differ
        with plain.open("wb") as copy, create_shard(shard, key=key, context=CONTEXT) as writer:
            for start in range(0, size, len(block)):
                copy.write(block[: size - start])
                writer.write(block[: size - start])
        say("reading")
        buffer = memoryview(bytearray(READ_BYTES))
        with open_shard(shard, key=key, context=CONTEXT) as sealed, plain.open("rb", buffering=0) as opened:
            chunks = _check_reads(sealed, opened, offsets)
            samples = interleave(
                {
                    OURS: lambda: timed(lambda: _read_all(sealed, offsets, buffer)),
                    "plain file": lambda: timed(lambda: _read_all(opened, offsets, buffer)),
                },
                settings.rounds,
            )
    return Measurement(
        "random",
        f"Random access: reads of 64 KiB in a shard of {size // MIB} MiB",
        "reads/s",
        f"{len(offsets)} reads at random places of an open shard, and of the same file unencrypted. None of the peers "
        "can start in the middle.",
        tuple(_reads_row(name, samples[OURS], runs, len(offsets)) for name, runs in samples.items()),
        (Target("most chunks decrypted for one read", max(chunks), MAX_CHUNKS, "chunks", at_least=False),),
        (f"{statistics.mean(chunks):.2f} chunks of 16 KiB were decrypted for a read on average. 64 KiB touch 4 or 5.",),
    )


def _reads_row(name: str, first: list[Sample], runs: list[Sample], count: int) -> Row:
    rates = [count / sample.wall_s for sample in runs]
    return Row(
        "read 64 KiB",
        name,
        statistics.median(rates),
        min(rates),
        max(rates),
        ours=name == OURS,
        relative=times_faster(runs, first),
    )


def _check_reads(shard: Any, plain: Any, offsets: list[int]) -> list[int]:
    """Compare all reads, and return how many chunks each decrypted."""
    chunks = []
    for offset in offsets:
        before = shard.raw.chunks_decrypted
        shard.seek(offset)
        found = shard.read(READ_BYTES)
        chunks.append(shard.raw.chunks_decrypted - before)
        plain.seek(offset)
        check(found == plain.read(READ_BYTES), f"the read at {offset} is wrong")
    return chunks


def _read_all(stream: Any, offsets: list[int], buffer: memoryview) -> None:
    for offset in offsets:
        stream.seek(offset)
        check(stream.readinto(buffer) == READ_BYTES, "a read was short")
