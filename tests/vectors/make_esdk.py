"""Make tests/vectors/esdk_v2.json, which docs/format.md explains: `python -m tests.vectors.make_esdk`.

The messages are written by tests/formats/esdk_messages.py, which shares no code with the package. Keys and message ids
are fixed, and public; the wrapped keys are random, so each run gives other bytes, and vectors are of use because they
stay.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path

from beam_envelope.keys.provider import WrappedKey
from tests.formats.esdk_messages import Message
from tests.vectors.make import AWS_KEY, CONTEXT, KEYRINGS, UNICODE_CONTEXT, Maker, fixed_bytes, plaintext

TARGET = Path(__file__).with_name("esdk_v2.json")
ABOUT = (
    "Messages of the AWS Encryption SDK, version 2, suite 0x0478, as beam_envelope writes them, with the data key "
    "and the keyring that open them. Byte i of each plaintext is i mod 251. The keys are public."
)
AWS_FORM = WrappedKey("aws-kms", AWS_KEY, b"".join(fixed_bytes(f"KMS blob {i}") for i in range(6))[:167])


def forms(vector: dict[str, object]) -> list[tuple[str, str, bytes]]:
    """Return the wrapped keys of a vector: provider, KMS key and bytes."""
    entries = vector["encrypted_data_keys"]
    assert isinstance(entries, list)
    return [(one["provider"], one["kms_key"], base64.b64decode(one["wrapped_key"])) for one in entries]


def vector(
    maker: Maker,
    name: str,
    size: int,
    context: dict[str, str],
    frame_bytes: int = 4096,
    before: tuple[WrappedKey, ...] = (),
) -> dict[str, object]:
    """Return one vector."""
    data_key, message_id = fixed_bytes("data key 1"), fixed_bytes(f"message id of {name}")
    wrapped = [*before, *maker.wrap(data_key, ["writer"], context).wrapped_keys]
    edks = [(form.provider.encode(), form.kms_key.encode(), form.wrapped) for form in wrapped]
    message = Message(
        "0478", data_key, context, edks, plaintext(size), frame_bytes, message_id=message_id, as_we_do=True
    )
    return {
        "name": name,
        "context": context,
        "data_key": data_key.hex(),
        "message_id": message_id.hex(),
        "frame_bytes": frame_bytes,
        "plaintext_bytes": size,
        "encrypted_data_keys": [
            {
                "provider": form.provider,
                "kms_key": form.kms_key,
                "wrapped_key": base64.b64encode(form.wrapped).decode(),
            }
            for form in wrapped
        ],
        "message": base64.b64encode(bytes(message)).decode(),
    }


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        messages = [
            *(vector(maker, f"size-{size}", size, CONTEXT) for size in (0, 1, 100, 4096, 4097)),
            vector(maker, "ten-frames", 100, CONTEXT, frame_bytes=10),
            vector(maker, "no-context", 100, {}),
            vector(maker, "unicode", 100, UNICODE_CONTEXT),
            vector(maker, "two-keys", 100, CONTEXT, before=(AWS_FORM,)),
        ]
    document = {"about": ABOUT, "keyring": KEYRINGS["writer"], "messages": messages}
    TARGET.write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
