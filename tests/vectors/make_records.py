"""Make tests/vectors/record_v1.json, which docs/format.md explains: `python -m tests.vectors.make_records`.

Run it only for a new version of the format. Keys, salts and plaintexts are fixed, and public: never use the keys for
data. Only the wrapped keys have random nonces.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from beam_envelope.formats.keyfile import (
    DETERMINISTIC_CIPHER,
    FERNET_CIPHER,
    RAW_CELL_CIPHER,
    RECORD_CIPHER,
    Derivation,
    KeyFile,
    WrappedDataKey,
)
from beam_envelope.formats.record import cell_place, record_place
from beam_envelope.formats.record_key import RecordKey, _derive, open_record_key
from tests.vectors.make import CONTEXT, KEYRINGS, Maker, fixed_bytes, plaintext

TARGET = Path(__file__).with_name("record_v1.json")
ABOUT = (
    "Keys, key files and record envelopes of beam_envelope, version 1, under the keyring, and changes that a reader "
    "refuses. Explained in docs/format.md, section 3. The keys are public."
)
NAMES = {DETERMINISTIC_CIPHER: "dataset", FERNET_CIPHER: "group-by-encrypted-key"}
PLACES = {
    "": record_place(),
    "aad": record_place(b"order 7"),
    "cell": cell_place("customer.card"),
}
NUMBERS = (0, 1, 255, 256, 2**32 - 1)


def make_key(maker: Maker, cipher: str) -> tuple[RecordKey, dict[str, object]]:
    """Return a key, and what an implementer wants to see on the way to it."""
    material = fixed_bytes(f"data key of {cipher}")
    salt = fixed_bytes(f"salt of {cipher}")[:24]
    with maker.wrap(material, ["writer"], CONTEXT) as data_key:
        draft = KeyFile(
            (WrappedDataKey.of(data_key),),
            CONTEXT,
            uuid.UUID(bytes=fixed_bytes(f"id of {cipher}")[:16], version=4),
            cipher,
            name=NAMES.get(cipher, ""),
            created="2026-01-01T00:00:00Z",
        )
        derived = b"".join(_derive(data_key, salt, draft))
        key_file = replace(draft, derivation=Derivation(salt, derived[-32:]))
        key = open_record_key(data_key, key_file, cipher)
    return key, {
        "cipher": cipher,
        "context": CONTEXT,
        "data_key": material.hex(),
        "salt": salt.hex(),
        "binding": key_file.binding().hex(),
        "derived": derived.hex(),
        "key_id": key.key_id.hex(),
        "key_file": key_file.to_bytes().decode(),
    }


def seal(key: RecordKey, place: bytes, number: int, record: bytes) -> bytes:
    """Return an envelope; if it has a nonce, that of a given number."""
    if key.deterministic:
        return key.prefix + key.siv.encrypt(record, [key.aad + place])
    nonce = (key.base_nonce ^ number).to_bytes(12, "big")
    return key.prefix + nonce + key.gcm.encrypt(nonce, record, key.aad + place)


def make_envelopes(keys: dict[str, RecordKey]) -> list[dict[str, object]]:
    """Return all that a reader opens."""
    cases = [(RECORD_CIPHER, "", number, 16) for number in NUMBERS]
    cases += [(RECORD_CIPHER, place, 2, 100) for place in PLACES]
    cases += [(RECORD_CIPHER, "", 3, size) for size in (0, 1, 1000)]
    cases += [(DETERMINISTIC_CIPHER, place, None, size) for place in PLACES for size in (0, 1, 16, 100)]
    return [
        {
            "cipher": cipher,
            "place": PLACES[place].hex(),
            "number": number,
            "plaintext": plaintext(size).hex(),
            "envelope": seal(keys[cipher], PLACES[place], number or 0, plaintext(size)).hex(),
        }
        for cipher, place, number, size in cases
    ]


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        made = {
            cipher: make_key(maker, cipher)
            for cipher in (RECORD_CIPHER, DETERMINISTIC_CIPHER, RAW_CELL_CIPHER, FERNET_CIPHER)
        }
    document = {
        "about": ABOUT,
        "keyring": KEYRINGS["writer"],
        "keys": [entry for _, entry in made.values()],
        "envelopes": make_envelopes({cipher: key for cipher, (key, _) in made.items()}),
    }
    TARGET.write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
