// Read a shard under a local keyring, without beam_envelope: `node read_shard.mjs SHARD KEYRING > plain`.
//
// Written from docs/format.md alone, whose sections the comments name. Node.js 18 or newer, no packages; compressed
// shards need Node.js 22.15 or newer. What it prints is authentic as far as it goes; it is whole only if the exit code
// is 0.

import { createDecipheriv, createHmac, timingSafeEqual } from "node:crypto";
import { closeSync, openSync, readFileSync, readSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import * as zlib from "node:zlib";

const SEALED_CHUNK_BYTES = 16400;
const TAG_BYTES = 16;
const MAX_KEY_FILE_BYTES = 1 << 20;
const MAX_WRAPPED_BYTES = 6144;
const MAX_FORMS = 10;

function refuse(why) {
  throw new Error(why);
}

// RFC 5869, 2.3. (Node's own hkdf also does the Extract step.)
function expand(key, info, size) {
  let block = Buffer.alloc(0);
  let output = Buffer.alloc(0);
  for (let i = 1; output.length < size; i += 1) {
    block = createHmac("sha512", key).update(block).update(info).update(Buffer.of(i)).digest();
    output = Buffer.concat([output, block]);
  }
  return output.subarray(0, size);
}

function openGcm(key, nonce, sealed, aad) {
  if (sealed.length < TAG_BYTES) refuse("the ciphertext was cut short");
  const decipher = createDecipheriv("aes-256-gcm", key, nonce, { authTagLength: TAG_BYTES });
  decipher.setAAD(aad);
  decipher.setAuthTag(sealed.subarray(-TAG_BYTES));
  return Buffer.concat([decipher.update(sealed.subarray(0, -TAG_BYTES)), decipher.final()]);
}

function number(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

const framed = (...parts) => Buffer.concat(parts.flatMap((part) => [number(part.length), part]));

// UTF-8; a string with half a surrogate pair, which JSON can hold, has none.
function utf8(text) {
  const bytes = Buffer.from(text, "utf8");
  return bytes.toString("utf8") === text ? bytes : refuse("a string is not Unicode");
}

// Section 1.4: a count, then the pairs, sorted by the bytes of their keys (JavaScript's own order is another).
const sortedPairs = (context) =>
  Object.entries(context)
    .map(([key, value]) => [utf8(key), utf8(value)])
    .sort(([a], [b]) => Buffer.compare(a, b));

function encodeContext(context) {
  const pairs = sortedPairs(context);
  return Buffer.concat([number(pairs.length), ...pairs.map((pair) => framed(...pair))]);
}

// Section 1: rebuild the one encoding from the fields that are known, and compare.
function parseKeyFile(raw) {
  if (raw.length > MAX_KEY_FILE_BYTES) refuse("the key file is too large");
  const found = JSON.parse(raw.toString("utf8"));
  const [dataKey, ...more] = found.data_keys;
  const uuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
  if (more.length || !uuid.test(found.shard_id) || !/^[0-9a-f]{32}$/.test(dataKey.key_id)) refuse("a field is wrong");
  const text = (value) => (typeof value === "string" && utf8(value) ? value : refuse("a field is no string"));
  // A context is written by hand: an object would move keys that look like numbers to the front.
  const pairs = sortedPairs(found.context).map((pair) => pair.map((part) => JSON.stringify(part.toString())).join(": "));
  const document = {
    format: "beam-envelope key file",
    version: 1,
    shard_id: found.shard_id,
    cipher: "cobblestone-256",
    content: {
      compression: text(found.content.compression),
      created: text(found.content.created),
      name: text(found.content.name),
    },
    context: 0,
    data_keys: [
      {
        key_id: dataKey.key_id,
        wrapped_keys: dataKey.wrapped_keys.map((form) => ({
          provider: text(form.provider),
          kms_key: text(form.kms_key),
          wrapped_key: Buffer.from(form.wrapped_key, "base64").toString("base64"),
        })),
      },
    ],
  };
  const context = pairs.length ? `{\n${pairs.map((pair) => `    ${pair}`).join(",\n")}\n  }` : "{}";
  const encoded = JSON.stringify(document, null, 2).replace('\n  "context": 0,', () => `\n  "context": ${context},`);
  if (!Buffer.from(`${encoded}\n`).equals(raw)) refuse("the key file was changed, or is of another version");
  if (!["none", "zstd"].includes(found.content.compression)) refuse("the compression is unknown");
  const forms = dataKey.wrapped_keys;
  if (forms.length > MAX_FORMS || forms.some((form) => form.wrapped_key.length > (MAX_WRAPPED_BYTES / 3) * 4)) {
    refuse("a limit is passed");
  }
  return { ...document, context: found.context };
}

// Sections 3, 4.1 and 5: open any wrapped form under a key that the caller has, and check the key id.
function unwrap(keyFile, keyring) {
  const keys = new Map(keyring.keys.map((key) => [`${key.name}/${key.id}`, Buffer.from(key.key, "base64")]));
  const [dataKey] = keyFile.data_keys;
  for (const form of dataKey.wrapped_keys) {
    if (form.provider !== "local-kms" || !keys.has(form.kms_key)) continue;
    const wrapped = Buffer.from(form.wrapped_key, "base64");
    const aad = Buffer.concat([framed(utf8(form.kms_key)), encodeContext(keyFile.context)]);
    try {
      const material = openGcm(keys.get(form.kms_key), wrapped.subarray(0, 12), wrapped.subarray(12), aad);
      const keyId = expand(material, Buffer.from("beam-envelope/key-id@v1\0"), 16);
      if (keyId.toString("hex") === dataKey.key_id) return material;
    } catch {
      // This form was changed; another may open.
    }
  }
  return refuse("no key of the keyring opens it, or the key file was changed");
}

// Reads up to `size` bytes; fewer only at the end of the file.
function read(file, size) {
  const bytes = Buffer.alloc(size);
  let done = 0;
  for (let count = 1; count > 0 && done < size; done += count) count = readSync(file, bytes, done, size - done, null);
  return bytes.subarray(0, done);
}

// Sections 2.1 to 2.3: check the commitment, then yield each chunk once it is authenticated.
function* decrypt(file, material, keyFile) {
  const { compression, created, name } = keyFile.content;
  const binding = Buffer.concat([
    Buffer.from("beam-envelope/shard@v1\0"),
    framed(
      Buffer.from(keyFile.shard_id.replaceAll("-", ""), "hex"),
      ...[keyFile.cipher, compression, created, name].map(utf8),
    ),
    encodeContext(keyFile.context),
  ]);
  const [salt, commitment] = [read(file, 24), read(file, 32)];
  const label = Buffer.from("c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0");
  const derived = expand(material, Buffer.concat([label, salt, binding]), 32 + 12 + 32);
  if (commitment.length !== 32 || !timingSafeEqual(derived.subarray(44), commitment)) {
    refuse("the shard and its key file do not belong together, or the shard was cut short");
  }
  let sealed;
  let chunk = 0n;
  do {
    sealed = read(file, SEALED_CHUNK_BYTES);
    const nonce = Buffer.from(derived.subarray(32, 44));
    nonce.writeBigUInt64BE(nonce.readBigUInt64BE(4) ^ chunk, 4);
    yield openGcm(derived.subarray(0, 32), nonce, sealed, Buffer.alloc(0));
    chunk += 1n;
  } while (sealed.length === SEALED_CHUNK_BYTES); // the last chunk is the one that is shorter
}

// Section 2.4: one Zstandard frame.
function decompressor() {
  return zlib.createZstdDecompress?.() ?? refuse("the shard is compressed with zstd: use Node.js 22.15 or newer");
}

async function main(shard, keyring) {
  const keyFile = parseKeyFile(readFileSync(join(dirname(shard), `_KEY_FOR_${basename(shard)}.json`)));
  const material = unwrap(keyFile, JSON.parse(readFileSync(keyring, "utf8")));
  const file = openSync(shard, "r");
  const pieces = Readable.from(decrypt(file, material, keyFile), { objectMode: true });
  const stages = keyFile.content.compression === "zstd" ? [decompressor()] : [];
  try {
    await pipeline(pieces, ...stages, process.stdout);
  } finally {
    closeSync(file);
  }
}

main(...process.argv.slice(2)).catch((error) => {
  process.stderr.write(`${process.argv.slice(2).join(" ")}: ${error.message}\n`);
  process.exitCode = 1;
});
