"""Builds the engines that the tests of this folder run on, from package registries alone: `make engines`.

Each part has a folder of its own in the cache, named after its version: a folder that is there is whole, and is not
built again. Needs no package. The cache is `~/.cache/beam_envelope/engines`, or what BEAM_ENVELOPE_ENGINES says.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent

GO_PROGRAMS = {
    "prism": "github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0",  # Beam's own portable runner
    "container": "github.com/apache/beam/sdks/v2/python/container@v2.77.0",  # what starts a worker in Beam's images
    "versitygw": "github.com/versity/versitygw/cmd/versitygw@v1.8.0",  # S3 over a folder; it checks signatures
}
JOB_SERVERS = {"flink": [HERE / "flink-pom.xml", HERE / "FlinkJobServer.java"], "spark": [HERE / "spark-pom.xml"]}
PARTS = (*GO_PROGRAMS, *JOB_SERVERS)


def cache():
    """Return the folder of all parts."""
    chosen = os.environ.get("BEAM_ENVELOPE_ENGINES")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "beam_envelope" / "engines"


def folder(part):
    """Return where a part is, once it is built."""
    if part in GO_PROGRAMS:
        return cache() / f"{part}-{GO_PROGRAMS[part].partition('@')[2]}"
    sources = b"".join(path.read_bytes() for path in JOB_SERVERS[part])  # the versions are in there
    return cache() / f"{part}-{hashlib.sha256(sources).hexdigest()[:12]}"


def program(part):
    """Return the path of a Go program."""
    return folder(part) / part


def missing():
    """Return the parts that are not built."""
    return [part for part in PARTS if not folder(part).exists()]


def build(part):
    """Build a part: in a folder beside its own, which is renamed when it is whole."""
    target = folder(part)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as name:
        work = Path(name)
        if part in GO_PROGRAMS:
            result = work
            run("go", "install", GO_PROGRAMS[part], GOBIN=str(work))
        else:
            result = work / "target"
            pom, *classes = JOB_SERVERS[part]
            shutil.copy(pom, work / "pom.xml")
            (work / "src" / "main" / "java").mkdir(parents=True)
            for source in classes:
                shutil.copy(source, work / "src" / "main" / "java")
            run("mvn", "--quiet", "--batch-mode", "--file", str(work / "pom.xml"), "package")
        built = target.with_name(f"{work.name}-done")
        result.rename(built) if result != work else shutil.copytree(work, built)
        try:
            built.rename(target)
        except OSError:  # another build was faster
            shutil.rmtree(built)


def run(*command, **environment):
    """Run a command, or end this program with its status."""
    status = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if status != 0:
        sys.exit(f"{' '.join(command)} failed with status {status}. Is the package registry reached?")


def main():
    """Build what is missing."""
    wanted = missing()
    needs = {"go": any(part in GO_PROGRAMS for part in wanted), "mvn": any(part in JOB_SERVERS for part in wanted)}
    needs["java"] = needs["mvn"]
    absent = [tool for tool, needed in needs.items() if needed and shutil.which(tool) is None]
    if absent:
        names = {"go": "Go 1.26", "java": "Java 17 (a JDK)", "mvn": "Maven 3.6 or newer"}
        sys.exit(f"To build the engines, install {' and '.join(names[tool] for tool in absent)} first.")
    for part in wanted:
        start = time.monotonic()
        print(f"Building {part} in {folder(part)} (once) ...", flush=True)
        build(part)
        print(f"  built in {time.monotonic() - start:.0f} s", flush=True)
    print(f"The engines are in {cache()}: {', '.join(PARTS)}.")


if __name__ == "__main__":
    main()
