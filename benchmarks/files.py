"""One file into another: this package, the cipher alone, age, the AWS Encryption SDK and `cp`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from beam_envelope.formats.keyfile import key_file_name
from benchmarks import peers
from benchmarks.data import check_equal, new_key, random_file
from benchmarks.machine import file_system, work_folder
from benchmarks.measure import Sample, Samples, interleave, timed, times_faster
from benchmarks.peers import Convert, Peer
from benchmarks.results import Measurement, Target, speed_rows
from benchmarks.settings import MIB, Say, Settings

TIMES_ESDK: Final = 15.0


def measure_files(settings: Settings, say: Say) -> Measurement:
    """Measure the fast peers on a large file and the slow one on a smaller, each beside this package."""
    with work_folder(6 * settings.size, settings.folder) as folder:
        kind = file_system(folder)
        ours = peers.ours(new_key(folder))
        fast = [ours, peers.native(), peers.age(), peers.cp()]
        slow = [ours, peers.esdk()]
        write, read = _compare(fast, folder, settings.size, settings.rounds, say)
        slow_write, slow_read = _compare(slow, folder, settings.slow_size, settings.rounds, say)
        drop_write, drop_read = _compare(slow, folder, settings.slow_size, settings.rounds, say, drop=True)
    large, small = (f"{size / MIB:.4g} MiB" for size in (settings.size, settings.slow_size))
    groups = (
        (f"write {large}", write, settings.size),
        (f"read {large}", read, settings.size),
        (f"write {small}, beside the AWS SDK", slow_write, settings.slow_size),
        (f"read {small}, beside the AWS SDK", slow_read, settings.slow_size),
        (f"write {small}, result dropped", drop_write, settings.slow_size),
        (f"read {small}, result dropped", drop_read, settings.slow_size),
    )
    dropped = " and ".join(f"{_times_esdk(samples):.1f}" for samples in (drop_write, drop_read))
    kept = " and ".join(f"{_times_esdk(samples):.1f}" for samples in (slow_write, slow_read))
    note = (
        f"The targets compare the tools: the same file, the result dropped ({dropped} times). From file to file, write "
        f"and read are {kept} times as fast as aws-encryption-sdk; what is missing there is the time that the system "
        "needs to make a new file, for any program: see cp."
    )
    return Measurement(
        "files",
        f"One file into another, {large}, and {small} beside the slower peer",
        "MB/s",
        f"The same random file for all in a group, in a folder on {kind}, read from memory (a warm page cache); the "
        "target is a new file each time, and its fsync is part of the time. `result dropped`: the target is /dev/null. "
        "aws-encryption-sdk: streaming, suite 0x0478, frames of 4 KiB, a raw AES key and no KMS.",
        tuple(row for name, samples, size in groups for row in speed_rows(name, samples, size, [peers.OURS])),
        tuple(
            Target(f"{verb} a file, against aws-encryption-sdk streaming", _times_esdk(samples), TIMES_ESDK, "x")
            for verb, samples in (("write", drop_write), ("read", drop_read))
        ),
        (note,),
    )


def _times_esdk(samples: Samples) -> float:
    return times_faster(samples[peers.OURS], samples[peers.ESDK])


def _compare(
    contenders: list[Peer], folder: Path, size: int, rounds: int, say: Say, *, drop: bool = False
) -> tuple[Samples, Samples]:
    """Measure how fast each writes, then how fast each reads what it wrote, and check what they read."""
    source = random_file(folder / "plain.bin", size)
    sealed = {peer.name: folder / f"sealed-{number}.bin" for number, peer in enumerate(contenders)}
    opened, scratch = folder / "opened.bin", folder / "scratch.bin"
    for peer in contenders:  # the warm-up, the check, and what is read later
        peer.encrypt(source, sealed[peer.name])
        peer.decrypt(sealed[peer.name], opened)
        check_equal(opened, source)
        _remove(opened)

    def run(convert: Convert, start: Path) -> Sample:
        target = peers.NOWHERE if drop else scratch
        sample = timed(partial(convert, start, target))
        if not drop:
            _remove(scratch)
        return sample

    def show(verb: str, number: int) -> None:
        say(f"{verb} {size / MIB:.4g} MiB{' into nothing' if drop else ''}, round {number} of {rounds}")

    write = interleave(
        {peer.name: partial(run, peer.encrypt, source) for peer in contenders},
        rounds,
        warm_up=False,
        before_round=partial(show, "writing"),
    )
    read = interleave(
        {peer.name: partial(run, peer.decrypt, sealed[peer.name]) for peer in contenders},
        rounds,
        warm_up=False,
        before_round=partial(show, "reading"),
    )
    _remove(source, *sealed.values())
    return write, read


def _remove(*paths: Path) -> None:
    """Remove files and their key files, so that each run makes its target anew."""
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_name(key_file_name(path.name)).unlink(missing_ok=True)
