"""Make tests/vectors/shard_v1.json, which docs/format.md explains: `python -m tests.vectors.make`.

Run it only for a new version of the formats: salts and nonces are random, so each run gives other bytes, and
vectors are of use because they stay. Keys and plaintexts are fixed, and public: never use the keys for data.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.formats.keyfile import KeyFile, WrappedDataKey
from beam_envelope.formats.output import StreamOutput
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import DataKey, WrappedKey

TARGET = Path(__file__).with_name("shard_v1.json")
ABOUT = (
    "Shards, key files and keyrings of beam_envelope, version 1, with the keys that open them, and changes "
    "that a reader refuses. Explained in docs/format.md, section 6. The keys are public."
)
CONTEXT = {"dataset": "vectors", "tenant": "a"}
UNICODE_CONTEXT = {
    "10": "a key that looks like a number",
    "9": "sorted after 10",
    "control": 'tab \t, newline \n, \x01, delete \x7f, line separator \u2028, "quotes" and back\\slash',
    "ключ": "значение",
    "\uffee": "before the emoji in UTF-8, after it in UTF-16",
    "\U0001f600": "grin",
}
UNICODE_NAME = 'Größe "Ω" \\ \U0001f600.csv'
AWS_KEY = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def fixed_bytes(label: str) -> bytes:
    """Return 32 bytes that depend on a label only."""
    return hashlib.sha256(f"beam-envelope test vector: {label}".encode()).digest()


def plaintext(size: int) -> bytes:
    """Return the plaintext of that size: byte i is i mod 251."""
    return bytes(i % 251 for i in range(size))


def derived(data_key: bytes, salt_and_context: bytes) -> bytes:
    """Return Cobblestone's key, base nonce and commitment (c2sp.org/chunked-encryption, "Key derivation")."""
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00" + salt_and_context
    return HKDFExpand(hashes.SHA512(), 32 + 12 + 32, info).derive(data_key)


def keyring(key: str, *, like: str | None = None) -> dict[str, object]:
    """Return a keyring of one key; `like`: with the name and id of another."""
    key_id = fixed_bytes(f"id of {like or key}")[:16].hex()
    material = base64.b64encode(fixed_bytes(key)).decode()
    entry = {"created": "2026-01-01T00:00:00+00:00", "id": key_id, "key": material, "name": "default"}
    return {"format": "beam-envelope keyring", "keys": [entry], "version": 1}


KEYRINGS = {
    "writer": keyring("writer"),
    "recovery": keyring("recovery"),
    "stranger": keyring("stranger"),
    "impostor": keyring("impostor", like="writer"),
}


class Maker:
    """Makes shards under the keyrings, which it keeps in a folder."""

    def __init__(self, folder: Path) -> None:
        """Write the keyrings."""
        self.kms = {}
        for name, document in KEYRINGS.items():
            path = folder / f"{name}.json"
            path.touch(mode=0o600)
            path.write_text(json.dumps(document))
            self.kms[name] = LocalKms(str(path))

    def wrap(self, data_key: bytes, opened_by: list[str], context: dict[str, str]) -> DataKey:
        """Return a data key with a wrapped form under each keyring."""
        with DataKey(data_key) as bare:
            return DataKey(data_key, [self.kms[name].wrap(bare, context) for name in opened_by])

    def shard(
        self,
        name: str,
        about: str,
        size: int,
        *,
        key: str = "data key 1",
        file_name: str | None = None,
        context: dict[str, str] | None = None,
        opened_by: tuple[str, ...] = ("writer",),
        compression: str = "none",
        before: tuple[WrappedKey, ...] = (),
    ) -> dict[str, object]:
        """Return one vector; `before`: wrapped forms that come first."""
        context = CONTEXT if context is None else context
        data_key = self.wrap(fixed_bytes(key), list(opened_by), context)
        data_key.wrapped_keys = before + data_key.wrapped_keys
        stream, key_file = io.BytesIO(), io.BytesIO()
        output = StreamOutput(stream, key_file.write)
        shard_name = f"{name}.bin" if file_name is None else file_name
        with ShardWriter(output, data_key, context, compression=compression, name=shard_name) as writer:
            writer.write(plaintext(size))
        return vector(name, about, size, opened_by, fixed_bytes(key), key_file.getvalue(), stream.getvalue())


def vector(
    name: str,
    about: str,
    size: int,
    opened_by: tuple[str, ...],
    data_key: bytes,
    key_file: bytes,
    shard: bytes,
) -> dict[str, object]:
    """Return a vector with what an implementer wants to see on the way."""
    parsed = KeyFile.from_bytes(key_file, name)
    return {
        "name": name,
        "about": about,
        "opened_by": list(opened_by),
        "context": dict(parsed.context),
        "data_key": data_key.hex(),
        "binding": parsed.binding().hex(),
        "derived": derived(data_key, shard[:24] + parsed.binding()).hex(),
        "plaintext_bytes": size,
        "plaintext_sha256": hashlib.sha256(plaintext(size)).hexdigest(),
        "key_file": key_file.decode(),
        "shard": base64.b64encode(shard).decode(),
    }


def make_shards(maker: Maker) -> list[dict[str, object]]:
    """Return all that a reader opens."""
    sizes = {
        0: "No plaintext: one empty chunk. All size-* share one data key, as the shards of a bundle do.",
        1: "One byte.",
        16383: "The most that fits in one chunk.",
        16384: "One full chunk, and an empty last chunk.",
        16385: "One full chunk, and one byte.",
        40000: "Three chunks.",
    }
    make = maker.shard
    aws = WrappedKey("aws-kms", AWS_KEY, b"".join(fixed_bytes(f"KMS blob {i}") for i in range(6))[:167])
    strange = {"file_name": UNICODE_NAME, "context": UNICODE_CONTEXT}
    both = {"key": "data key 2", "opened_by": ("writer", "recovery")}
    two_keys = make("two-keys", "Wrapped by two KMS keys: either opens it.", 100, **both)
    return [
        *(make(f"size-{size}", about, size) for size, about in sizes.items()),
        make("zstd", "The Cobblestone message holds one Zstandard frame.", 40000, compression="zstd"),
        make("zstd-empty", "Nothing, compressed: there is a frame all the same.", 0, compression="zstd"),
        make(
            "unicode",
            "A name and context that need escapes and have another order in UTF-16.",
            100,
            **strange,
        ),
        make("bare", "No context and no name, as written to a stream.", 100, file_name="", context={}),
        make("aws-first", "The first form is of another KMS (made-up bytes).", 100, before=(aws,)),
        two_keys,
        *with_other_forms(maker, two_keys),
    ]


def with_other_forms(maker: Maker, two_keys: dict[str, object]) -> list[dict[str, object]]:
    """Return two-keys with other wrapped forms of its data key."""
    key_file = KeyFile.from_bytes(str(two_keys["key_file"]).encode(), "two-keys")
    (data_key,) = key_file.data_keys
    first, second = data_key.wrapped_keys
    broken = WrappedKey(first.provider, first.kms_key, bytes(len(first.wrapped)))
    rewrapped = maker.kms["writer"].rewrap(first, key_file.context, maker.kms["recovery"])
    changes = {
        "one-form-changed": ("two-keys, its first form zeroed: the second still opens it.", (broken, second)),
        "rotated": ("two-keys, rewrapped: the shard is the same, byte for byte.", (rewrapped,)),
    }
    shard = base64.b64decode(str(two_keys["shard"]))
    return [
        vector(
            name,
            about,
            100,
            ("recovery",),
            fixed_bytes("data key 2"),
            key_file.with_wrapped_keys([WrappedDataKey(data_key.key_id, forms)]).to_bytes(),
            shard,
        )
        for name, (about, forms) in changes.items()
    ]


def refusal(name: str, error: str, *edits: dict[str, object], **more: object) -> dict[str, object]:
    """Return a vector that a reader refuses: changes to size-40000 or, with `of`, to another vector."""
    return {"name": name, "of": "size-40000", **more, "edits": list(edits), "error": error}


def shard(do: str, **how: object) -> dict[str, object]:
    """Return a change to the shard."""
    return {"file": "shard", "do": do, **how}


def key_file(do: str, **how: object) -> dict[str, object]:
    """Return a change to the key file."""
    return {"file": "key_file", "do": do, **how}


def replaced(old: str, new: str) -> dict[str, object]:
    """Return a change of one piece of text in the key file."""
    return key_file("replace", old=old, new=new)


def changed_shards() -> list[dict[str, object]]:
    """Return changes to the shard."""
    swapped = [[0, 56], [16456, 32856], [56, 16456], [32856, 40104]]
    dropped = [[0, 16456], [32856, 40104]]
    doubled = [[0, 16456], [56, 40104]]
    return [
        refusal("salt", "WrongKeyError", shard("xor", at=0, byte="01")),
        refusal("commitment", "WrongKeyError", shard("xor", at=55, byte="80")),
        refusal("first-chunk", "TamperedError", shard("xor", at=56, byte="01")),
        refusal("middle-chunk", "TamperedError", shard("xor", at=56 + 16400 + 9000, byte="10")),
        refusal("last-tag", "TamperedError", shard("xor", at=40103, byte="01")),
        refusal("empty-file", "TruncatedError", shard("cut", size=0)),
        refusal("cut-in-salt", "TruncatedError", shard("cut", size=23)),
        refusal("cut-in-commitment", "TruncatedError", shard("cut", size=55)),
        refusal("cut-after-commitment", "TruncatedError", shard("cut", size=56)),
        refusal("cut-in-first-tag", "TruncatedError", shard("cut", size=71)),
        refusal("cut-after-chunk", "TruncatedError", shard("cut", size=56 + 16400)),
        refusal("cut-short-of-tag", "TruncatedError", shard("cut", size=56 + 2 * 16400 + 15)),
        refusal("cut-in-chunk", "TamperedError", shard("cut", size=56 + 16400 + 16)),
        refusal("cut-last-byte", "TamperedError", shard("cut", size=40103)),
        refusal("no-last-chunk", "TruncatedError", shard("cut", size=56 + 16400), of="size-16384"),
        refusal("longer", "TamperedError", shard("append", hex="00", times=1)),
        refusal("longer-by-a-tag", "TamperedError", shard("append", hex="00", times=16)),
        refusal("longer-by-a-chunk", "TamperedError", shard("append", hex="00", times=16400)),
        refusal("chunks-swapped", "TamperedError", shard("ranges", ranges=swapped)),
        refusal("chunk-dropped", "TamperedError", shard("ranges", ranges=dropped)),
        refusal("chunk-doubled", "TamperedError", shard("ranges", ranges=doubled)),
        refusal("chunk-of-another", "TamperedError", shard("copy", of="size-16385", start=56, end=16456)),
        refusal("shard-of-another", "WrongKeyError", shard("take", of="size-16385")),
    ]


def changed_key_files(maker: Maker, text: str, other_text: str) -> list[dict[str, object]]:
    """Return changes to what the key file says; `other_text` is another key file."""
    document = json.loads(text)
    (entry,) = document["data_keys"]
    (form,) = entry["wrapped_keys"]
    with maker.wrap(fixed_bytes("data key 2"), ["writer"], CONTEXT) as other:
        other_id, other_wrapped = other.key_id.hex(), other.wrapped_keys[0].wrapped
    other_form = replaced(form["wrapped_key"], base64.b64encode(other_wrapped).decode())
    return [
        # What is bound to the shard.
        refusal("key-file-of-another", "WrongKeyError", key_file("take", of="size-16385")),
        refusal("shard-id", "WrongKeyError", replaced(document["shard_id"], json.loads(other_text)["shard_id"])),
        refusal("name", "WrongKeyError", replaced("size-40000.bin", "size-40001.bin")),
        refusal("created", "WrongKeyError", replaced(document["content"]["created"], "2020-01-01T00:00:00Z")),
        refusal("compression", "WrongKeyError", replaced('"none"', '"zstd"')),
        refusal("compression-dropped", "WrongKeyError", replaced('"zstd"', '"none"'), of="zstd"),
        refusal("another-data-key", "WrongKeyError", replaced(entry["key_id"], other_id), other_form),
        # What the KMS and the key id protect.
        refusal("context", "TamperedError", replaced('"tenant": "a"', '"tenant": "b"')),
        refusal("key-id", "TamperedError", replaced(entry["key_id"], "0" * 32)),
        refusal("form-of-another-data-key", "TamperedError", other_form),
        refusal("form-changed", "TamperedError", replaced(form["wrapped_key"], "A" * 80)),
        refusal("form-short", "TamperedError", replaced(form["wrapped_key"], "AAAA")),
        refusal("form-of-another-key", "WrongKeyError", replaced(form["kms_key"], "default/" + "0" * 32)),
        refusal("form-of-another-provider", "WrongKeyError", replaced("local-kms", "aws-kms")),
        refusal("keyring-of-a-stranger", "WrongKeyError", keyring="stranger"),
        refusal("keyring-of-an-impostor", "TamperedError", keyring="impostor"),
        # What the caller says.
        refusal("another-context", "ContextMismatchError", context={"dataset": "vectors", "tenant": "b"}),
        refusal("part-of-the-context", "ContextMismatchError", context={"dataset": "vectors"}),
        refusal("more-context", "ContextMismatchError", context={**CONTEXT, "region": "eu"}),
        refusal("context-forgotten", "ContextMismatchError", context={}),
    ]


def other_encodings(text: str) -> list[dict[str, object]]:
    """Return key files that are not in the one encoding."""
    document = json.loads(text)
    (entry,) = document["data_keys"]
    (form,) = entry["wrapped_keys"]
    created = f'    "created": "{document["content"]["created"]}",\n'
    tenant = '    "tenant": "a"'
    long_form = {**form, "wrapped_key": base64.b64encode(bytes(6145)).decode()}
    size = len(text.encode())
    reordered = dict(sorted(document.items()))

    def bad(name: str, edit: dict[str, object]) -> dict[str, object]:
        return refusal(name, "FormatError", edit)

    def rewritten(**changes: object) -> dict[str, object]:
        return key_file("text", text=json.dumps({**document, **changes}, indent=2) + "\n")

    return [
        bad("key-file-cut", key_file("cut", size=size - 3)),
        bad("no-newline", key_file("cut", size=size - 1)),
        bad("empty-key-file", key_file("cut", size=0)),
        bad("trailing-space", key_file("append", hex="20", times=1)),
        bad("huge-key-file", key_file("append", hex="20", times=1 << 20)),
        bad("compact", key_file("text", text=json.dumps(document))),
        bad("byte-order-mark", key_file("text", text="\ufeff" + text)),
        bad("carriage-returns", key_file("text", text=text.replace("\n", "\r\n"))),
        bad("needless-escape", replaced("size-40000.bin", "size-40000\\u002ebin")),
        bad("half-a-surrogate-pair", replaced("size-40000.bin", "\\ud800")),
        bad("upper-case-id", replaced(entry["key_id"], entry["key_id"].upper())),
        bad("short-key-id", replaced(entry["key_id"], entry["key_id"][:-2])),
        bad("context-unsorted", rewritten(context=dict(reversed(CONTEXT.items())))),
        bad("fields-in-another-order", key_file("text", text=json.dumps(reordered, indent=2) + "\n")),
        bad("key-twice", replaced(tenant, f"{tenant},\n{tenant}")),
        bad("unknown-field", rewritten(comment="hello")),
        bad("missing-field", replaced(created, "")),
        bad("number-for-text", replaced('"tenant": "a"', '"tenant": 1')),
        bad("another-format", replaced("beam-envelope key file", "another key file")),
        bad("version-2", replaced('"version": 1', '"version": 2')),
        bad("version-1.0", replaced('"version": 1', '"version": 1.0')),
        bad("version-true", replaced('"version": 1', '"version": true')),
        bad("another-cipher", replaced("cobblestone-256", "cobblestone-128")),
        bad("another-compression", replaced('"none"', '"gzip"')),
        bad("no-data-key", rewritten(data_keys=[])),
        bad("two-data-keys", rewritten(data_keys=[entry, entry])),
        bad("no-form", rewritten(data_keys=[{**entry, "wrapped_keys": []}])),
        bad("eleven-forms", rewritten(data_keys=[{**entry, "wrapped_keys": [form] * 11}])),
        bad("long-form", rewritten(data_keys=[{**entry, "wrapped_keys": [form, long_form]}])),
    ]


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        shards = make_shards(maker)
        text, other_text = (str(shards[i]["key_file"]) for i in (5, 4))
        refusals = changed_shards() + changed_key_files(maker, text, other_text) + other_encodings(text)
    document = {"about": ABOUT, "keyrings": KEYRINGS, "shards": shards, "refusals": refusals}
    TARGET.write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
