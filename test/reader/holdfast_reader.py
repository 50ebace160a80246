#!/usr/bin/env python3
"""A second reader of Holdfast's repository format, written from docs/format.md alone.

It exists so that a repository does not depend on the program that wrote it: with this file, a
passphrase and a directory that holds the objects, every disk can be had back. It shares no code with
Holdfast and is written to be read, not to be fast.

    holdfast_reader.py REPO points                     list the restore points
    holdfast_reader.py REPO verify [--keyless]         chain, signatures, digests; with a passphrase every item
    holdfast_reader.py REPO disk POINT DISK FILE       write a disk as a sparse raw file
    holdfast_reader.py REPO restore POINT DIRECTORY    write all disks as DISK.raw, and the VM's configuration

The passphrase is taken from HOLDFAST_PASSPHRASE, the file that HOLDFAST_PASSPHRASE_FILE names, or a prompt.
Debian: apt install python3-cryptography python3-argon2 python3-zstandard. BLAKE3, Snappy and CRC-32C are below.
Section numbers (§) are those of docs/format.md.
"""

import argparse
import getpass
import hashlib
import hmac
import json
import os
import re
import struct
import sys
from collections import namedtuple

import zstandard
from argon2.low_level import Type, hash_secret_raw
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

CHUNK = 65536
FANOUT = 256
MAX_CLEAR = MAX_SEALED = 32 << 20
MAX_ITEM = 1 << 20
MAX_CONTENT = 128 << 20
MAX_PACK = 64 << 20
MAX_ITEMS = 1 << 20
HEADER = 64
TAG = 16
KINDS = {1: "add", 2: "commit", 3: "forget", 4: "keep", 5: "revoke", 6: "quarantine", 7: "sweep",
         8: "keys", 9: "checkpoint", 10: "distrust", 11: "locks", 12: "tiers"}
CHECKPOINT = {"points", "keep", "forgotten", "pinned", "added", "quarantine", "distrust", "over", "keyring", "removed",
              "quarantined", "moved", "mended", "committed", "tiers", "locks", "before"}


class Damage(Exception):
    """What was read breaks the format."""


def need(condition, text):
    if not condition:
        raise Damage(text)


# ---------------------------------------------------------------- CRC-32C

def _crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


CRC_TABLE = _crc_table()


def crc32c(data):
    c = 0xFFFFFFFF
    for b in data:
        c = CRC_TABLE[(c ^ b) & 0xFF] ^ (c >> 8)
    return c ^ 0xFFFFFFFF


# ---------------------------------------------------------------- Snappy, one raw block

def unsnappy(data, limit):
    size = shift = at = 0
    while True:
        need(at < len(data) and shift < 35, "snappy: no length")
        b = data[at]
        at += 1
        size |= (b & 0x7F) << shift
        shift += 7
        if not b & 0x80:
            break
    need(size <= limit, "snappy: longer than allowed")
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        kind = tag & 3
        if kind == 0:
            length = (tag >> 2) + 1
            if length > 60:
                extra = length - 60
                need(at + extra <= len(data), "snappy: cut off")
                length = int.from_bytes(data[at:at + extra], "little") + 1
                at += extra
            need(at + length <= len(data), "snappy: cut off")
            out += data[at:at + length]
            at += length
        else:
            width = (1, 2, 4)[kind - 1]
            need(at + width <= len(data), "snappy: cut off")
            offset = int.from_bytes(data[at:at + width], "little")
            at += width
            length = (tag >> 2) + 1
            if kind == 1:
                offset |= (tag >> 5) << 8
                length = ((tag >> 2) & 7) + 4
            need(0 < offset <= len(out), "snappy: copy from before the beginning")
            start = len(out) - offset
            if offset >= length:
                out += out[start:start + length]
            else:  # the copy overlaps what it makes: a repeated pattern
                pattern = bytes(out[start:])
                out += (pattern * (length // offset + 1))[:length]
        need(len(out) <= size, "snappy: longer than told")
    need(len(out) == size, "snappy: shorter than told")
    return bytes(out)


# ---------------------------------------------------------------- keyed BLAKE3
# Many compressions side by side: a "word" is a Python integer with one 32-bit word per 64-bit lane.

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTE = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, ROOT, KEYED_HASH = 1, 2, 4, 8, 16


def _spread(words):
    return int.from_bytes(struct.pack("<%dQ" % len(words), *words), "little")


def _gather(x, lanes):
    return struct.unpack("<%dQ" % lanes, x.to_bytes(8 * lanes, "little"))


def _compress(cv, block, counter, length, flags, lanes):
    """cv: 8 words, block: 16 words, counter: one word, all in lanes; length and flags are the same in each lane."""
    ones = _spread([1] * lanes)
    mask = ones * 0xFFFFFFFF
    v = list(cv) + [ones * IV[0], ones * IV[1], ones * IV[2], ones * IV[3], counter, 0, ones * length, ones * flags]
    m = list(block)
    for turn in range(7):
        for i, (a, b, c, d) in enumerate(QUARTERS):
            v[a] = (v[a] + v[b] + m[2 * i]) & mask
            x = v[d] ^ v[a]
            v[d] = ((x >> 16) | (x << 16)) & mask
            v[c] = (v[c] + v[d]) & mask
            x = v[b] ^ v[c]
            v[b] = ((x >> 12) | (x << 20)) & mask
            v[a] = (v[a] + v[b] + m[2 * i + 1]) & mask
            x = v[d] ^ v[a]
            v[d] = ((x >> 8) | (x << 24)) & mask
            v[c] = (v[c] + v[d]) & mask
            x = v[b] ^ v[c]
            v[b] = ((x >> 7) | (x << 25)) & mask
        m = [m[p] for p in PERMUTE]
    return [v[i] ^ v[i + 8] for i in range(8)]


def blake3_keyed(key, data):
    key = struct.unpack("<8I", key)
    full = max(0, (len(data) - 1) // 1024)  # the last part, whole or not, is taken alone
    nodes = []
    if full:
        words = struct.unpack("<%dI" % (256 * full), data[:1024 * full])
        cv = [_spread([k] * full) for k in key]
        counter = _spread(list(range(full)))
        for b in range(16):
            flags = KEYED_HASH | (CHUNK_START if b == 0 else 0) | (CHUNK_END if b == 15 else 0)
            block = [_spread(words[16 * b + w::256]) for w in range(16)]
            cv = _compress(cv, block, counter, 64, flags, full)
        nodes = list(zip(*(_gather(x, full) for x in cv)))
    last = data[1024 * full:]
    blocks = [last[i:i + 64] for i in range(0, len(last), 64)] or [b""]
    cv = list(key)
    for b, block in enumerate(blocks):
        flags = KEYED_HASH | (CHUNK_START if b == 0 else 0)
        if b == len(blocks) - 1:
            flags |= CHUNK_END | (0 if full else ROOT)
        cv = _compress(cv, struct.unpack("<16I", block.ljust(64, b"\0")), full, len(block), flags, 1)
    nodes.append(tuple(cv))
    while len(nodes) > 1:  # pairs become parents; an odd one is carried up
        pairs = len(nodes) // 2
        flags = KEYED_HASH | PARENT | (ROOT if len(nodes) == 2 else 0)
        block = [_spread([nodes[2 * p + w // 8][w % 8] for p in range(pairs)]) for w in range(16)]
        cv = _compress([_spread([k] * pairs) for k in key], block, 0, 64, flags, pairs)
        nodes = list(zip(*(_gather(x, pairs) for x in cv))) + nodes[2 * pairs:]
    return struct.pack("<8I", *nodes[0])


# ---------------------------------------------------------------- HKDF, sealing, codecs

def hkdf(key, salt, info, length=32):
    prk = hmac.new(salt or bytes(32), key, hashlib.sha256).digest()
    out = block = b""
    n = 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([n]), hashlib.sha256).digest()
        out += block
        n += 1
    return out[:length]


def unseal(key, nonce, sealed, associated):
    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        raise Damage("does not open: damaged, or sealed by another key") from None


def decode(plain, limit, pack):
    """§3.2: codec byte and payload."""
    need(plain, "empty content")
    codec, payload = plain[0], plain[1:]
    if codec == 0:
        need(len(payload) <= limit, "content is longer than allowed")
        return payload
    if codec == 1:
        try:
            size = zstandard.frame_content_size(payload)
            need(0 <= size <= limit, "zstd: no content size, or more than allowed")
            out = zstandard.ZstdDecompressor().decompress(payload) if size else b""
        except zstandard.ZstdError as e:
            raise Damage("zstd: %s" % e) from None
        need(len(out) == size, "zstd: length differs")
        return out
    if codec == 2 and pack:
        return unsnappy(payload, limit)
    raise Damage("unknown codec %d" % codec)


# ---------------------------------------------------------------- objects (§1)

Header = namedtuple("Header", "magic kind master repo salt")
Document = namedtuple("Document", "header clear sealed before whole")


def parse_header(data, magic):
    need(len(data) >= HEADER, "shorter than a header")
    got, version, kind, master, crc, repo, salt = struct.unpack("<4sHHII16s32s", data[:HEADER])
    need(crc == crc32c(data[:12] + bytes(4) + data[16:HEADER]), "the header's checksum is wrong")
    need(got == magic, "it is %r, not %r" % (got, magic))
    if version != 1:
        sys.exit("format version %d: this reader knows 1" % version)
    return Header(got, kind, master, repo, salt)


def parse_document(data, magic):
    header = parse_header(data, magic)
    need(len(data) >= HEADER + 8, "cut off")
    c, s = struct.unpack("<II", data[HEADER:HEADER + 8])
    need(c <= MAX_CLEAR and s <= MAX_SEALED, "lengths beyond the bounds")
    signature = 64 if magic in (b"HFCF", b"HFIX", b"HFCE") else 0
    need(len(data) == HEADER + 8 + c + s + signature, "the length does not add up")
    split = HEADER + 8 + c
    try:
        clear = json.loads(data[HEADER + 8:split].decode("utf-8"))
    except ValueError as e:
        raise Damage("clear part: %s" % e) from None
    need(isinstance(clear, dict), "clear part is no object")
    return Document(header, clear, data[split:split + s], data[:split], data)


def check_signature(doc, verify_key):
    signed = b"holdfast v1 signature\0" + hashlib.sha256(doc.whole[:-64]).digest()
    try:
        Ed25519PublicKey.from_public_bytes(verify_key).verify(doc.whole[-64:], signed)
    except InvalidSignature:
        raise Damage("the signature is wrong") from None


def open_sealed(doc, key, purpose):
    key = hkdf(key, doc.header.salt, b"holdfast v1 " + purpose)
    return decode(unseal(key, bytes(12), doc.sealed, doc.before), MAX_CONTENT, False)


Place = namedtuple("Place", "pack item at sealed")


class Pack:
    """One pack (§3), its header and directory read and checked."""

    def __init__(self, repo, digest):
        self.digest = digest
        self.path = repo.path("packs/%s/%s" % (digest[:2], digest))
        self.size = os.path.getsize(self.path)
        need(HEADER + 16 <= self.size <= MAX_PACK, "pack %s: size %d" % (digest, self.size))
        self.raw_header = self.read(0, HEADER)
        self.header = parse_header(self.raw_header, b"HFPK")
        need(self.header.repo == repo.id, "pack %s belongs to another repository" % digest)
        need(self.header.kind in (1, 2), "pack %s: kind %d" % (digest, self.header.kind))
        need(self.header.master in repo.masters, "pack %s: no master key %d" % (digest, self.header.master))
        self.key = hkdf(repo.masters[self.header.master], self.header.salt, b"holdfast v1 pack")

    def read(self, at, size):
        with open(self.path, "rb") as f:
            f.seek(at)
            data = f.read(size)
        need(len(data) == size, "pack %s is cut off" % self.digest)
        return data

    def directory(self):
        """The items as (id, Place), in order."""
        trailer = self.read(self.size - 16, 16)
        count, length, crc, magic = struct.unpack("<III4s", trailer)
        need(magic == b"HFPE" and crc == crc32c(trailer[:8]), "pack %s: its trailer is damaged" % self.digest)
        need(count <= MAX_ITEMS and HEADER + length + 16 <= self.size, "pack %s: trailer out of bounds" % self.digest)
        sealed = self.read(self.size - 16 - length, length)
        plain = unseal(self.key, b"\xff" * 8 + bytes(4), sealed, self.raw_header + b"directory")
        need(len(plain) == 40 * count, "pack %s: directory length" % self.digest)
        out, at = [], HEADER
        for i in range(count):
            ident, stored, size = struct.unpack("<32sII", plain[40 * i:40 * i + 40])
            out.append((ident, size, Place(self.digest, i, at, stored)))
            at += stored
        need(at == self.size - 16 - length, "pack %s: items and directory do not meet" % self.digest)
        return out

    def item(self, ident, place):
        sealed = self.read(place.at, place.sealed)
        nonce = struct.pack("<Q", place.item) + bytes(4)
        return decode(unseal(self.key, nonce, sealed, self.raw_header + ident), MAX_ITEM, True)


class Repository:
    def __init__(self, root):
        self.root = root
        self.complaints = []
        self.masters = {}
        self.packs = {}
        self.places = {1: {}, 2: {}}  # kind of pack → id → [Place]
        self.rebuilt = False
        config = self.document("config", b"HFCF")
        self.id = config.header.repo
        self.verify_key = bytes.fromhex(config.clear["verify_key"])
        check_signature(config, self.verify_key)
        if config.clear.get("features"):
            sys.exit("this repository uses features this reader does not know: %s" % config.clear["features"])
        need(config.clear["chunk_size"] == CHUNK and config.clear["fanout"] == FANOUT, "config: other chunk size or fan-out")
        self.config_digest = hashlib.sha256(config.whole).hexdigest()

    # -- store

    def path(self, name):
        return os.path.join(self.root, *name.split("/"))

    def document(self, name, magic):
        with open(self.path(name), "rb") as f:
            return parse_document(f.read(), magic)

    def names(self, prefix, pattern):
        directory = self.path(prefix)
        found = os.listdir(directory) if os.path.isdir(directory) else []
        return sorted(n for n in found if re.fullmatch(pattern, n))

    def complain(self, text):
        self.complaints.append(text)
        print("holdfast_reader: " + text, file=sys.stderr)

    # -- keys (§2)

    def unlock(self, passphrase):
        root = self.root_key(passphrase)
        for name in reversed(self.names("keyring", r"[0-9]{8}-[0-9a-f]{8}")):
            try:
                doc = self.document("keyring/" + name, b"HFKR")
                if doc.header.repo != self.id:
                    continue
                ring = json.loads(open_sealed(doc, root, b"keyring"))
                break
            except Damage:
                continue
        else:
            raise Damage("no keyring opens: it is lost, or damaged")
        ids = bytes.fromhex(ring["ids"])
        self.id_keys = {1: hkdf(ids, b"", b"holdfast v1 chunk id"), 2: hkdf(ids, b"", b"holdfast v1 node id")}
        self.masters = {m["number"]: bytes.fromhex(m["key"]) for m in ring["masters"]}
        seed = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(ring["sign"]))
        public = seed.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        need(public == self.verify_key, "config was not signed by this repository's key")

    def root_key(self, passphrase):
        for name in self.names("keys", r"[0-9a-f]{16}"):
            try:
                doc = self.document("keys/" + name, b"HFKS")
                c = doc.clear
                salt = bytes.fromhex(c["salt"])
                if doc.header.repo != self.id or c["kdf"] != "argon2id":
                    continue
                need(1 <= c["time"] <= 64 and 8 <= c["memory_kib"] <= 4194304 and 1 <= c["threads"] <= 64
                     and 16 <= len(salt) <= 64, "key slot %s: parameters out of bounds" % name)
                key = hash_secret_raw(passphrase, salt, c["time"], c["memory_kib"], c["threads"], 32, Type.ID)
                root = open_sealed(doc, key, b"slot")
                need(len(root) == 32, "key slot %s: no root key in it" % name)
                return root
            except Damage:
                continue
        sys.exit("no key slot opens with this passphrase")

    def master(self, doc):
        need(doc.header.master in self.masters, "no master key %d" % doc.header.master)
        return self.masters[doc.header.master]

    # -- chain (§6)

    def entries(self):
        """The entries from the newest checkpoint on, checked without a key; gaps are told.

        Entries before the chain's start (§6.4) may be there or not."""
        names = self.names("chain", r"[0-9]{12}")
        out, gaps, previous, expect, start = [], [], self.config_digest, 1, 0
        for name in names:
            number = int(name)
            try:
                doc = self.document("chain/" + name, b"HFCE")
                need(doc.header.repo == self.id, "it belongs to another repository")
                check_signature(doc, self.verify_key)
                need(doc.clear["number"] == number, "its number is another")
                if doc.header.kind not in KINDS:
                    sys.exit("chain entry %d is of a kind this reader does not know: %d" % (number, doc.header.kind))
            except Damage as e:
                self.complain("chain entry %d: %s" % (number, e))
                continue  # a gap: told when the next one is met
            if number != expect:
                gaps.append((expect, number - 1))
            elif doc.clear["previous"] != previous:
                self.complain("chain entry %d does not follow the one before" % number)
            start = max(start, doc.clear.get("start", 0))
            out.append((number, doc))
            previous, expect = hashlib.sha256(doc.whole).hexdigest(), number + 1
        checkpoints = [number for number, doc in out if KINDS[doc.header.kind] == "checkpoint"]
        newest = checkpoints[-1] if checkpoints else 0
        for first, last in gaps:
            if last >= start:
                self.complain("chain entries %d to %d are missing" % (first, last))
            if last >= newest:
                self.gap = True
        return [(number, doc) for number, doc in out if number >= newest]

    gap = False

    def inventory(self, entries):
        live = {}
        for _, doc in entries:
            for digest in doc.clear.get("adds") or []:
                live[digest] = True
            for digest in doc.clear.get("drops") or []:
                live.pop(digest, None)
        return list(live)

    def index(self, digest):
        with open(self.path("index/" + digest), "rb") as f:
            data = f.read()
        need(hashlib.sha256(data).hexdigest() == digest, "its name is not its digest")
        doc = parse_document(data, b"HFIX")
        need(doc.header.repo == self.id, "it belongs to another repository")
        check_signature(doc, self.verify_key)
        return doc

    def load(self):
        """Reads the chain and the inventory with the keys: points and places."""
        entries = self.entries()
        self.points, self.distrusted = {}, set()
        for number, doc in entries:
            try:
                self.apply(number, KINDS[doc.header.kind], json.loads(open_sealed(doc, self.master(doc), b"chain")))
            except Damage as e:
                self.complain("chain entry %d: %s" % (number, e))
                self.gap = True
        for digest in self.inventory(entries):
            try:
                self.load_index(digest)
            except (Damage, OSError) as e:
                self.complain("index %s: %s" % (digest, e))
                self.gap = True

    def apply(self, number, kind, body):
        if kind == "commit":
            self.points[body["point"]["id"]] = body["point"]
        elif kind == "forget":
            for ident in body["points"]:
                self.points.pop(ident, None)
        elif kind == "checkpoint":
            unknown = set(body) - CHECKPOINT
            if unknown:
                sys.exit("checkpoint %d has parts this reader does not know: %s" % (number, ", ".join(sorted(unknown))))
            self.points = {p["id"]: p for p in body.get("points") or []}
            self.distrusted = {(d["pack"], bytes.fromhex(d["id"])) for d in body.get("distrust") or []}
        elif kind == "distrust":
            self.distrusted |= {(d["pack"], bytes.fromhex(d["id"])) for d in body["items"]}

    def load_index(self, digest):
        doc = self.index(digest)
        plain = open_sealed(doc, self.master(doc), b"index")
        at = 0
        for pack, size, kind in doc.clear["packs"]:
            (count,) = struct.unpack_from("<I", plain, at)
            at += 4
            need(kind in (1, 2) and count <= MAX_ITEMS and at + 36 * count <= len(plain), "it does not add up")
            offset = HEADER
            for i in range(count):
                ident, sealed = struct.unpack_from("<32sI", plain, at)
                at += 36
                self.places[kind].setdefault(ident, []).append(Place(pack, i, offset, sealed))
                offset += sealed
        need(at == len(plain), "it does not add up")

    def rebuild(self):
        """§5: what lost entries or index objects listed is found in the packs' own directories."""
        self.rebuilt = True
        for pack in self.pack_names():
            try:
                p = self.pack(pack)
                for ident, _, place in p.directory():
                    known = self.places[p.header.kind].setdefault(ident, [])
                    if place not in known:
                        known.append(place)
            except (Damage, OSError) as e:
                self.complain("pack %s: %s" % (pack, e))

    def pack_names(self):
        for two in self.names("packs", r"[0-9a-f]{2}"):
            yield from self.names("packs/" + two, r"[0-9a-f]{64}")

    def pack(self, digest):
        if digest not in self.packs:
            self.packs[digest] = Pack(self, digest)
        return self.packs[digest]

    # -- content (§3, §4)

    def content(self, kind, ident):
        """The plain bytes of a chunk (kind 1) or node (kind 2), from the first copy that proves itself."""
        reasons = []
        for _ in range(2):
            copies = self.places[kind].get(ident, [])
            for place in sorted(copies, key=lambda p: (p.pack, ident) in self.distrusted):
                try:
                    data = self.pack(place.pack).item(ident, place)
                    need(blake3_keyed(self.id_keys[kind], data) == ident, "content is not what its id says")
                    return data
                except (Damage, OSError) as e:
                    reasons.append("pack %s: %s" % (place.pack, e))
            if self.rebuilt:
                break
            self.rebuild()
        raise Damage("%s %s: no good copy (%s)" % ("chunk" if kind == 1 else "node", ident.hex(), "; ".join(reasons) or "in no pack"))

    def chunks(self, root, size):
        """The chunks of a map as (offset, bytes), ascending; what is not told is zeros."""
        if root == "zero":
            return
        levels, _, ident = root.partition(":")
        need(re.fullmatch(r"[0-9]+", levels) and re.fullmatch(r"[0-9a-f]{64}", ident), "root %r" % root)
        least = 1
        while CHUNK * FANOUT ** least < size:
            least += 1
        need(int(levels) == least, "root %r does not fit a disk of %d bytes" % (root, size))
        yield from self.node(bytes.fromhex(ident), least - 1, 0, size)

    def node(self, ident, level, start, size):
        data = self.content(2, ident)
        need(len(data) >= 36, "node %s is cut off" % ident.hex())
        got, zero, count = struct.unpack_from("<BBH", data)
        bitmap = int.from_bytes(data[4:36], "little")
        need(got == level and zero == 0 and 0 < count == bin(bitmap).count("1") and len(data) == 36 + 32 * count,
             "node %s does not add up" % ident.hex())
        at = 36
        for i in range(FANOUT):
            if not bitmap >> i & 1:
                continue
            child = data[at:at + 32]
            at += 32
            offset = start + i * CHUNK * FANOUT ** level
            need(offset < size, "node %s reaches beyond the disk" % ident.hex())
            if level:
                yield from self.node(child, level - 1, offset, size)
                continue
            chunk = self.content(1, child)
            need(len(chunk) == CHUNK, "chunk %s is %d bytes" % (child.hex(), len(chunk)))
            need(not any(chunk[size - offset:]), "chunk %s: the padding is not zeros" % child.hex())
            yield offset, chunk[:size - offset]

    def write(self, root, size, target):
        with open(target, "xb") as f:
            for offset, data in self.chunks(root, size):
                f.seek(offset)
                f.write(data)
            f.truncate(size)
            f.flush()
            os.fsync(f.fileno())

    # -- verify (§7)

    def verify_keyless(self):
        entries = self.entries()
        packs = {}
        for digest in self.inventory(entries):
            try:
                for pack, size, _ in self.index(digest).clear["packs"]:
                    packs[pack] = size
            except (Damage, OSError) as e:
                self.complain("index %s: %s" % (digest, e))
        for pack, size in sorted(packs.items()):
            try:
                with open(self.path("packs/%s/%s" % (pack[:2], pack)), "rb") as f:
                    data = f.read()
                need(len(data) == size, "its size is %d, not %d" % (len(data), size))
                need(hashlib.sha256(data).hexdigest() == pack, "its name is not its digest")
            except (Damage, OSError) as e:
                self.complain("pack %s: %s" % (pack, e))
        return {"entries": len(entries), "packs": len(packs), "bytes": sum(packs.values())}

    def verify_points(self):
        for point in self.points.values():
            for part in (point.get("disks") or []) + (point.get("files") or []):
                try:
                    for _ in self.chunks(part["root"], part["size"]):
                        pass
                except Damage as e:
                    self.complain("point %s: %s: %s" % (point["id"], part.get("id", part.get("name")), e))


# ---------------------------------------------------------------- command line

def passphrase():
    name = os.environ.get("HOLDFAST_PASSPHRASE_FILE")
    if name:
        with open(name, "rb") as f:
            return f.read().rstrip(b"\r\n")
    if "HOLDFAST_PASSPHRASE" in os.environ:
        return os.environb[b"HOLDFAST_PASSPHRASE"]
    return getpass.getpass("passphrase: ").encode()


def find_point(repo, wanted):
    found = [p for ident, p in repo.points.items() if ident.startswith(wanted)]
    if len(found) != 1:
        sys.exit("%d restore points begin with %r" % (len(found), wanted))
    return found[0]


def restore_disk(repo, args):
    point = find_point(repo, args.point)
    for disk in point.get("disks") or []:
        if disk["id"] == args.disk:
            return repo.write(disk["root"], disk["size"], args.file)
    sys.exit("point %s has no disk %s" % (point["id"], args.disk))


def restore(repo, args):
    os.makedirs(args.directory, exist_ok=True)
    point = find_point(repo, args.point)
    parts = [(d["id"] + ".raw", d) for d in point.get("disks") or []] + [(f["name"], f) for f in point.get("files") or []]
    for name, part in parts:
        need(name not in ("", ".", "..") and not re.search(r"[/\\\0]", name), "name %r" % name)
        repo.write(part["root"], part["size"], os.path.join(args.directory, name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repo")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("points")
    verify = commands.add_parser("verify")
    verify.add_argument("--keyless", action="store_true")
    disk = commands.add_parser("disk")
    everything = commands.add_parser("restore")
    for p, rest in ((disk, ("point", "disk", "file")), (everything, ("point", "directory"))):
        for name in rest:
            p.add_argument(name)
    args = parser.parse_args()
    try:
        repo = Repository(args.repo)
        if not (args.command == "verify" and args.keyless):
            repo.unlock(passphrase())
            repo.load()
        if args.command == "points":
            json.dump(sorted(repo.points.values(), key=lambda p: p["time"]), sys.stdout, indent=1)
            print()
        elif args.command == "verify":
            seen = len(repo.complaints)
            json.dump(repo.verify_keyless(), sys.stdout)
            print()
            if not args.keyless:
                repo.verify_points()
            return 1 if repo.complaints or seen else 0
        elif args.command == "disk":
            restore_disk(repo, args)
        else:
            restore(repo, args)
    except (Damage, OSError) as e:
        sys.exit("holdfast_reader: %s" % e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
