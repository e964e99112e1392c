"""Make tests/vectors/manifest_v1.json, which docs/format.md explains: `python -m tests.vectors.make_manifest`.

Run it only for a new version of the format; see make.py. The keys are public: never use them for data.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

from beam_envelope.formats.manifest import Manifest, ManifestEntry
from beam_envelope.formats.rotation import Rotation, Rotator
from beam_envelope.keys.local import LocalKms
from tests.vectors.make import keyring

TARGET = Path(__file__).with_name("manifest_v1.json")
ABOUT = (
    "Manifests of beam_envelope, version 1, with the keys that authenticate them. Explained in docs/format.md. "
    "The keys are public."
)
CONTEXT = {"dataset": "vectors", "tenant": "a"}


def entry(number: int, plaintext_bytes: int | None = None, records: int | None = None) -> ManifestEntry:
    """Return an entry whose shard id is made of a number."""
    return ManifestEntry(
        uuid.UUID(int=number << 64 | 0x4 << 76 | 0x8 << 60).hex, 100 + number, plaintext_bytes, records
    )


def vector(
    name: str, about: str, manifest: Manifest, keys: dict[str, LocalKms], opened_by: list[str]
) -> dict[str, Any]:
    """Return a manifest, and what is on the way to its MACs."""
    data_keys = []
    for section, ring in zip(manifest.sections, opened_by, strict=True):
        form = next(form for form in section.data_key.wrapped_keys if keys[ring].may_open(form))
        with keys[ring].unwrap(form, section.context) as data_key:
            data_keys.append(data_key.material.hex())
    text = manifest.to_bytes().decode()
    return {"name": name, "about": about, "opened_by": opened_by, "data_keys": data_keys, "manifest": text}


def refusals(manifests: dict[str, Manifest]) -> list[dict[str, str]]:
    """Return changed manifests, and the error of each: on parsing, or on checking the MAC of each section."""
    text = manifests["appended"].to_bytes().decode()
    first, second, third = manifests["appended"].sections

    def replaced(name: str, old: str, new: str, error: str) -> dict[str, str]:
        assert old in text, name
        return {"name": name, "of": "appended", "manifest": text.replace(old, new, 1), "error": error}

    def of(name: str, *sections: Any, error: str = "ManifestError") -> dict[str, str]:
        return {"name": name, "of": "appended", "manifest": Manifest(sections).to_bytes().decode(), "error": error}

    return [
        replaced("another-size", '"stored_bytes": 101', '"stored_bytes": 102', "ManifestError"),
        replaced("another-path", '"part-2"', '"part-3"', "ManifestError"),
        replaced("another-context", '"tenant": "a"', '"tenant": "b"', "ManifestError"),
        of("without-the-first", second, third),
        of("in-another-order", second, first, third),
        of("one-twice", first, second, second, third),
        of("of-another-dataset", *manifests["one"].sections, *manifests["appended"].sections[1:]),
        replaced("version-2", '"version": 1', '"version": 2', "FormatError"),
        replaced("a-path-above", '"part-2"', '"../part-2"', "FormatError"),
        replaced("another-layout", '"records": 2}', '"records": 2 }', "FormatError"),
        replaced("more-fields", '"records": 2}', '"records": 2, "x": 1}', "FormatError"),
        {"name": "cut", "of": "appended", "manifest": text[:-2], "error": "FormatError"},
    ]


def make() -> dict[str, Any]:
    """Return the document."""
    keyrings = {name: keyring(f"manifest {name}") for name in ("first", "second", "third")}
    with tempfile.TemporaryDirectory() as folder:
        keys = {}
        for name, document in keyrings.items():
            path = Path(folder, f"{name}.json")
            path.touch(mode=0o600)
            path.write_text(json.dumps(document))
            keys[name] = LocalKms(path)

        def added(manifest: Manifest, ring: str, context: dict[str, str], shards: dict[str, Any]) -> Manifest:
            with keys[ring].generate_data_key(context) as data_key:
                return manifest.with_section(data_key, context, shards)

        shards = {
            "part-0": entry(0),
            "part-1": entry(1, 50, 2),
            "part-2": entry(2, 0, 0),
            'sub/ü "q"': entry(3, 2**63 - 1),
        }
        one = added(Manifest(), "first", CONTEXT, shards)
        appended = added(Manifest(), "first", CONTEXT, shards)
        appended = added(appended, "second", {}, {"part-0": entry(4, 4), "part-9": entry(9)})
        appended = added(appended, "first", CONTEXT, {"part-1": None})
        rotated = Rotator(Rotation((keys["first"],), to=keys["third"])).rotate(appended, "the vector")
        manifests = [
            vector("one", "what one job wrote", one, keys, ["first"]),
            vector("appended", "three jobs; the last removed part-1", appended, keys, ["first", "second", "first"]),
            vector("rotated", "appended, under another KMS key", rotated, keys, ["third", "second", "third"]),
        ]
    return {
        "about": ABOUT,
        "keyrings": keyrings,
        "manifests": manifests,
        "refusals": refusals({"one": one, "appended": appended}),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
