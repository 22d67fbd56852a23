"""Mutations of files, drawn from a seeded `Random`: of their bytes, and of what their format says.

A mutation takes the content of a file and gives another. Those of a format raise ValueError for a content that is no
longer of that format (as after a mutation of its bytes).
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from random import Random

import yaml

from .json_mutations import DEEP, json_file, json_lines, json_text, parsed

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, 127, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = (
    *(b"\0", b"\n", b'"', b"\\", b"{", b"[", b"}", b"]", b",", b":", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"\x80\x04K\x01.", b"PAR1", b"\x1f\x8b\x08", b"NaN", b"1e999", b"|O"),
)


# Of bytes


def _span(data: bytes, random: Random) -> slice:
    """Some bytes: mostly few, at times many."""
    start = random.randrange(len(data) + 1)
    return slice(start, start + random.randrange(1 + random.choice((1, 8, 64, len(data)))))


def _placed(data: bytes, part: bytes, random: Random, over: bool) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + part + data[start + (len(part) if over else 0) :]


def flip_bits(data: bytes, random: Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def insert(data: bytes, random: Random) -> bytes:
    return _placed(data, random.randbytes(random.choice((1, 2, 8, 64))), random, over=False)


def delete(data: bytes, random: Random) -> bytes:
    span = _span(data, random)
    return data[: span.start] + data[span.stop :]


def duplicate(data: bytes, random: Random) -> bytes:
    return _placed(data, data[_span(data, random)] * random.choice((1, 1, 2, 100)), random, over=False)


def overwrite(data: bytes, random: Random) -> bytes:
    return _placed(data, data[_span(data, random)], random, over=True)


def fill(data: bytes, random: Random) -> bytes:
    span = _span(data, random)
    return _placed(data, bytes([random.choice((0, 0x7F, 0xFF))]) * (span.stop - span.start), random, over=True)


def number(data: bytes, random: Random) -> bytes:
    """A number of 1 to 8 bytes that lengths and offsets do not expect."""
    size = random.choice((1, 2, 4, 8))
    part = (random.choice(NUMBERS) % 256**size).to_bytes(size, random.choice(("little", "big")))
    return _placed(data, part, random, over=True)


def digits(data: bytes, random: Random) -> bytes:
    """Another number in place of one that is written in digits."""
    found = [*re.finditer(rb"\d+", data)]
    if not found:
        return number(data, random)
    span = random.choice(found)
    return data[: span.start()] + str(random.choice((*NUMBERS, -1, 10**30))).encode() + data[span.end() :]


def token(data: bytes, random: Random) -> bytes:
    return _placed(data, random.choice(TOKENS), random, over=random.random() < 0.5)


def length_first(data: bytes, random: Random) -> bytes:
    """Another number in the first bytes, where many formats (that of safetensors too) have a length."""
    return struct.pack("<Q", random.choice((*NUMBERS, len(data), len(data) - 8)) % 2**64) + data[8:]


BYTES: tuple[Mutation, ...] = (
    *(flip_bits, truncate, insert, delete, duplicate, overwrite, fill, number, digits, token, length_first),
)


# Of other formats

# Each level ten times the one before: a few hundred bytes that would be ten billion values.
_LAUGHS = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(10))
YAML_ODD: tuple[str, ...] = (
    *("!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a, b}", "!!omap [a: 1]"),
    *(
        "!!python/object/apply:os.getpid []",
        "!x y",
        "&a [*a]",
        "&a {a: *a}",
        "*b",
        "2001-99-99",
        "2001-01-01",
        "0x",
        "0b",
    ),
    *("1_000", "1:60:61", ".inf", ".nan", "~", "[", "{a", "? [a]", "? {a: 1}", "'", "|", ">", "- a", "%", "<<: 1"),
    *("{<<: [1]}", "{1: 2}", "{null: 1, a: 2}", "{[1]: 2}", f"[{_LAUGHS}]", "\0", "\ud7ff", "é" * 99),
)


def yaml_line(data: bytes, random: Random) -> bytes:
    """What YAML alone has, in place of a value."""
    lines = data.decode().split("\n")
    place = random.randrange(len(lines))
    lines[place] = f"{lines[place].partition(':')[0]}: {random.choice(YAML_ODD)}"
    return "\n".join(lines).encode()


def yaml_file(data: bytes, random: Random) -> bytes:
    if random.random() < 0.4:
        return yaml_line(data, random)
    if len(data) > 2 * DEEP or b"&a0" in data:
        raise ValueError("it would take very long")
    try:  # JSON is YAML
        return json_text(json.dumps(yaml.safe_load(data)), random).encode()
    except Exception as error:  # the parser raises much on what was mutated before
        raise ValueError("no longer YAML") from error


_SAME_WIDTH = (
    ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ"),
    ("F16", "BF16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("F64", "I64", "U64", "C64"),
    ("F4", "F6_E2M3", "x"),
)


def safetensors(data: bytes, random: Random) -> bytes:
    """Another header: a tensor of another type or shape, or any change of its JSON."""
    (length,) = struct.unpack_from("<Q", data.ljust(8, b"\0"))
    text, body = data[8 : 8 + length].decode(), data[8 + length :]
    text = _other_tensor(text, random) if random.random() < 0.5 else json_text(text, random)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def _other_tensor(text: str, random: Random) -> str:
    header = parsed(text)
    if not isinstance(header, dict):
        raise ValueError("no header")
    tensors = [each for each in header.values() if isinstance(each, dict) and {"dtype", "shape"} <= each.keys()]
    if not tensors:
        raise ValueError("no tensors")
    for each in tensors if random.random() < 0.2 else [random.choice(tensors)]:
        if random.random() < 0.6:
            same = [group for group in _SAME_WIDTH if each["dtype"] in group] or [*_SAME_WIDTH]
            each["dtype"] = random.choice(random.choice((same[0], random.choice(_SAME_WIDTH))))
        elif isinstance(each["shape"], list):
            each["shape"] = random.choice((each["shape"][::-1], [1, *each["shape"]], [0], [], [*each["shape"], 0]))
    return json.dumps(header)


def npy(data: bytes, random: Random) -> bytes:
    """Another header of an array of NumPy."""
    (length,) = struct.unpack_from("<H", data.ljust(10, b"\0"), 8)
    kind = random.choice(("<i8", "<u8", "<f8", "<i4", "|O", "|V8", "|S8", "<U2", "<M8[s]", "x", ("<i4", (2,))))
    count = max(len(data) - 10 - length, 0) // 8
    odd = ((), (0,), (-1,), (2**62,), (2**64,), (10**30,), "x", (1.5,))
    shape = random.choice(((count,), (count - 1,), (count, 1), (2, count // 2), *odd))
    header = repr({"descr": kind, "fortran_order": random.random() < 0.5, "shape": shape})
    header = random.choice((header, header, header, header.replace("}", ""), "(" * 300, "{'a': " * 100, "1+1"))
    return data[:8] + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data[10 + length :]


def gzipped(data: bytes, random: Random) -> bytes:
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError("no longer gzip") from error
    return gzip.compress(one_of((*BYTES, json_lines), content, random), mtime=0)


FORMATS: dict[str, Mutation] = {
    ".json": json_file,
    ".jsonl": json_lines,
    ".names": json_lines,
    ".yaml": yaml_file,
    ".safetensors": safetensors,
    ".npy": npy,
    ".gz": gzipped,
}


def one_of(mutations: tuple[Mutation, ...], data: bytes, random: Random) -> bytes:
    try:
        return random.choice(mutations)(data, random)
    except ValueError:
        return random.choice(BYTES)(data, random)


def mutated(name: str, files: Mapping[str, bytes], random: Random) -> bytes:
    """The file of that name after one mutation or some, of its format (told by the end of its name) or its bytes; or
    with a part of another of these files."""
    data = files[name]
    if len(files) > 1 and random.random() < 0.03:
        other = files[random.choice(sorted(files))]
        cut = random.randrange(1 + random.choice((8, len(other))))
        return other[:cut] + data[cut:] if random.random() < 0.8 else other
    by_format = next((mutation for end, mutation in FORMATS.items() if name.endswith(end)), None)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        structured = by_format is not None and random.random() < 0.7
        data = one_of((by_format,) if structured and by_format else BYTES, data, random)
    return data
