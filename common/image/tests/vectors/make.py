#!/usr/bin/env python3
"""Makes vectors.json and the images beside it, from docs/formats.md alone (needs python3-cryptography). No test runs it: it is how the
vectors were made, by an implementation that shares no line and no library with the crate."""
import hashlib
import hmac
import json
import os
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HERE = os.path.dirname(os.path.abspath(__file__))


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def expand(prk, info, length):
    return hmac.new(prk, info + b"\x01", hashlib.sha512).digest()[:length]


def u64(value):
    return struct.pack("<Q", value)


def make(name, dek, salt, chunk_log2, payload, lineage, serial, created, length, hints):
    plain = bytes(i % 251 for i in range(length))
    metadata = json.dumps({
        "arch": "x86_64", "builder": "vector", "filesystems": [], "inputs": {}, "kernel": None, "name": name, "os": "debian-12",
        "packages": [{"arch": "amd64", "name": "dpkg", "version": "1.21.22"}], "payload_sha256": sha256(plain).hex(),
    }, separators=(",", ":"), sort_keys=True)
    start = struct.pack("<8sHHIII4BB3x16sQQ", bytes.fromhex("894D4F4F520D0A1A"), 1, 0, 4096, 3 if dek else 2, 0,
                        1 if dek else 0, 1, 1, chunk_log2, payload, lineage, serial, created)
    assert len(start) == 64
    vector = {
        "name": name, "dek": dek.hex() if dek else None, "salt": salt.hex(), "chunk_log2": chunk_log2, "payload": payload,
        "lineage": lineage.hex(), "serial": serial, "created": created, "plaintext_length": length,
        "metadata": metadata, "hints": hints.hex(),
    }
    size = 1 << chunk_log2
    chunks = [plain[at:at + size] for at in range(0, length, size)]
    sealed_metadata, sealed_hints = metadata.encode(), hints
    if dek:
        prk = hmac.new(salt, dek, hashlib.sha512).digest()
        context = sha256(b"moor/v1 ctx", start)
        material = expand(prk, b"moor/v1 AEAD_AES_256_GCM\0" + context, 44)
        key, base = material[:32], material[32:]
        nonces = [(int.from_bytes(base, "big") ^ index).to_bytes(12, "big") for index in range(len(chunks))]
        chunks = [AESGCM(key).encrypt(nonce, chunk, None) for nonce, chunk in zip(nonces, chunks)]
        section = lambda label, data: (lambda m: AESGCM(m[:32]).encrypt(m[32:], data, None))(expand(prk, label + b"\0" + context, 44))
        sealed_metadata = section(b"moor/v1 metadata", sealed_metadata)
        sealed_hints = section(b"moor/v1 hints", hints) if hints else b""
        vector |= {"prk": prk.hex(), "context": context.hex(), "chunk_key": key.hex(), "base_nonce": base.hex(),
                   "last_nonce": nonces[-1].hex() if nonces else None, "last_tag": chunks[-1][-16:].hex() if chunks else None}
    leaves = [sha256(b"\0moor-leaf", u64(index), chunk) for index, chunk in enumerate(chunks)]
    pages = [sha256(b"\2moor-page", u64(index), *leaves[index * 2048:][:2048]) for index in range((len(leaves) + 2047) // 2048)]
    data = sum(map(len, chunks))
    table, table_length = 4096 + data, 32 * (len(pages) + len(leaves))
    after = table + table_length
    numbers = [length, len(chunks), 4096, data, table, table_length, after, len(sealed_metadata)]
    numbers += [after + len(sealed_metadata), len(sealed_hints)] if sealed_hints else [0, 0]
    key_id = sha256(b"moor/v1 key-id", dek)[:16] if dek else bytes(16)
    root = sha256(b"\1moor-root", u64(len(chunks)), *pages)
    header = start + b"".join(map(u64, numbers)) + bytes(16) + salt + key_id + bytes(16) + root
    header += sha256(sealed_metadata) + (sha256(sealed_hints) if sealed_hints else bytes(32))
    assert len(header) == 320
    mac = expand(prk, b"moor/v1 header-mac\0" + sha256(header), 32) if dek else bytes(32)
    header += mac + bytes(3712)
    digest = sha256(b"moor/v1 header", header)
    image = header + digest + b"".join(chunks) + b"".join(pages) + b"".join(leaves) + sealed_metadata + sealed_hints
    vector |= {"key_id": key_id.hex(), "first_leaf": leaves[0].hex() if leaves else None, "root": root.hex(),
               "header_mac": mac.hex(), "digest": digest.hex(), "file_length": len(image), "file_sha256": sha256(image).hex()}
    if len(image) < 8192:
        with open(os.path.join(HERE, f"{name}.moor"), "wb") as file:
            file.write(image)
    return vector


DEK = bytes(range(32))
SALT = bytes(range(0x80, 0xA0))
LINEAGE = bytes.fromhex("0d8b1d5e5a3f4a3d9d6c0a4f0c6a1b2c")
COMMON = (LINEAGE, 7, 1_700_000_000)
vectors = [
    make("sealed", DEK, SALT, 16, 3, *COMMON, 100, b"hints"),
    make("chunks", DEK, SALT, 14, 1, *COMMON, 3 * 16384 + 5, b""),
    make("pages", DEK, SALT, 14, 3, *COMMON, 2049 * 16384 + 1, b""),
    make("empty", DEK, SALT, 16, 3, *COMMON, 0, b""),
    make("plain", None, SALT, 16, 3, *COMMON, 100, b"hints"),
]
with open(os.path.join(HERE, "vectors.json"), "w") as file:
    json.dump(vectors, file, indent=1)
    file.write("\n")
