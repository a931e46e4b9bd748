"""Files from strangers: one a rule of the format, and a machine that spoils valid ones."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

INDEX = "model.safetensors.index.json"


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (bytes, or what becomes JSON) and data; ``length`` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]") -> bytes:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'.encode()


@dataclass(frozen=True)
class Wrong:
    """A file that must be refused.

    Attributes:
        content: its bytes.
        message: a part of what is said of it (a regular expression).
        library: whether the safetensors library accepts it; we are stricter there.
    """

    content: bytes
    message: str
    library: bool = False


_ONE = json.dumps(entry()).encode()
_MANY = b"{%b}" % b",".join(b'"%d":%b' % (n, raw_entry(shape="[0]", offsets="[0,0]")) for n in range(151_000))  # fmt: skip

#: One a rule: name → file.
FILES: dict[str, Wrong] = {
    # length
    "empty": Wrong(b"", "only 0 bytes"),
    "shorter than its length field": Wrong(b"1234567", "only 7 bytes"),
    "header longer than the file": Wrong(safetensors_file(b'{"a":{"dtype":"F32"', length=5000), "header alone needs 5008 bytes .* 27"),
    "header longer than is read": Wrong(safetensors_file(b'{"a"', length=20_000_001), "header of 20000001 bytes; at most 20000000"),
    "header longer than the library reads": Wrong(safetensors_file(b'{"a"', length=100_000_001), "at most 20000000"),
    "header of the largest length": Wrong(safetensors_file(b'{"a"', length=2**64 - 1), "at most 20000000"),
    "length that wraps around": Wrong(safetensors_file(b'{"a"', length=2**64 - 8), "at most 20000000"),
    "header of no bytes": Wrong(safetensors_file(b"", bytes(20)), "zeros only"),
    # JSON
    "no JSON": Wrong(safetensors_file(b'{"a":'), "header is not valid JSON"),
    "no UTF-8": Wrong(safetensors_file(b'{"\xff":1}'), "header is not valid JSON"),
    "deep": Wrong(safetensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "list": Wrong(safetensors_file([]), "not a JSON object"),
    "something after the object": Wrong(safetensors_file(b"{}{}"), "not valid JSON"),
    "padded with zeros": Wrong(safetensors_file(b'{"a":%b}\0\0' % _ONE, bytes(4)), "not valid JSON"),
    "byte order mark": Wrong(safetensors_file(b'\xef\xbb\xbf{"a":%b}' % _ONE, bytes(4)), "not a safetensors file"),
    "not a number": Wrong(safetensors_file(b'{"a":NaN}'), "not valid JSON"),
    "number of 10,000 digits": Wrong(safetensors_file(b'{"a":%b}' % raw_entry(shape=f"[{'9' * 10_000}]"), bytes(4)), "not a list of counts"),
    "less than nothing": Wrong(safetensors_file(b'{"a":%b}' % raw_entry(offsets="[-0,4]"), bytes(4)), "bad data_offsets"),
    "control character in a name": Wrong(safetensors_file(b'{"a\n":%b}' % _ONE, bytes(4)), "not valid JSON"),
    "half a character": Wrong(safetensors_file({"a\ud800": entry()}, bytes(4)), r"'a\\ud800' is not valid Unicode"),
    "half a character in metadata": Wrong(safetensors_file({"a": entry(), "__metadata__": {"k": "\udfff"}}, bytes(4)), "is not valid Unicode"),
    "name given twice": Wrong(safetensors_file(b'{"a":%b,"a":%b}' % (_ONE, _ONE), bytes(4)), "'a' twice", library=True),
    "name given twice, once escaped": Wrong(safetensors_file(b'{"a":%b,"\\u0061":%b}' % (_ONE, _ONE), bytes(4)), "'a' twice", library=True),
    "metadata key given twice": Wrong(safetensors_file(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice", library=True),
    "metadata given twice": Wrong(safetensors_file(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "field given twice": Wrong(safetensors_file(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "'dtype' twice"),
    "more tensors than are read": Wrong(safetensors_file(_MANY), "more than the 150000 tensors", library=True),
    "a list without end": Wrong(safetensors_file(b'{"a":[%b0]}' % (b"0," * 1_500_000)), "more than the 1500000 values"),
    # metadata
    "metadata is a list": Wrong(safetensors_file({"__metadata__": []}), "strings to strings"),
    "metadata of numbers": Wrong(safetensors_file({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata in metadata": Wrong(safetensors_file({"__metadata__": {"a": {"b": "c"}}}), "strings to strings"),
    "metadata of nothing": Wrong(safetensors_file({"__metadata__": {"a": None}}), "strings to strings"),
    # fields
    "missing field": Wrong(safetensors_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "needs exactly"),
    "further field": Wrong(safetensors_file({"a": {**entry(), "x": 1}}, bytes(4)), "needs exactly", library=True),
    "entry is no object": Wrong(safetensors_file({"a": 3}), "needs exactly"),
    "entry is a list": Wrong(safetensors_file({"a": ["F32", [1], [0, 4]]}, bytes(4)), "needs exactly", library=True),
    "unknown dtype": Wrong(safetensors_file({"a": entry("F33")}, bytes(4)), "unknown dtype"),
    "dtype in small letters": Wrong(safetensors_file({"a": entry("f32")}, bytes(4)), "unknown dtype"),
    "dtype is no string": Wrong(safetensors_file({"a": entry(["F32"])}, bytes(4)), "unknown dtype"),
    # shape
    "negative size": Wrong(safetensors_file({"a": entry(shape=[-1])}, bytes(4)), "not a list of counts"),
    "size is a truth value": Wrong(safetensors_file({"a": entry(shape=[True])}, bytes(4)), "not a list of counts"),
    "size is a fraction": Wrong(safetensors_file({"a": entry(shape=[1.0])}, bytes(4)), "not a list of counts"),
    "size is a text": Wrong(safetensors_file({"a": entry(shape=["1"])}, bytes(4)), "not a list of counts"),
    "shape is a number": Wrong(safetensors_file({"a": entry(shape=1)}, bytes(4)), "not a list of counts"),
    "size beyond 64 bits": Wrong(safetensors_file({"a": entry(shape=[2**65])}, bytes(4)), "not a list of counts|not valid JSON"),
    "size beyond what torch counts": Wrong(safetensors_file({"a": entry(shape=[0, 2**63], offsets=[0, 0])}), "not a list of counts", library=True),
    "sizes that overflow": Wrong(safetensors_file({"a": entry(shape=[2**62, 2**62])}, bytes(4)), "larger than can be counted"),
    "sizes that overflow to the right one": Wrong(safetensors_file({"a": entry(shape=[2**32, 2**32 + 1, 1])}, bytes(4)), "larger than can be counted"),
    "sizes that overflow, then nothing": Wrong(safetensors_file({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}), "larger than can be counted"),
    "200,000 huge sizes": Wrong(safetensors_file({"a": entry(shape=[2**62] * 200_000)}, bytes(4)), "larger than can be counted"),
    "shape larger than the data": Wrong(safetensors_file({"a": entry(shape=[2])}, bytes(4)), "does not fill"),
    "shape smaller than the data": Wrong(safetensors_file({"a": entry(shape=[1], offsets=[0, 8])}, bytes(8)), "does not fill"),
    "half a byte": Wrong(safetensors_file({"a": entry("F4", [1], [0, 1])}, bytes(1)), "does not fill"),
    # offsets
    "offsets backwards": Wrong(safetensors_file({"a": entry(offsets=[4, 0])}, bytes(4)), "bad data_offsets"),
    "three offsets": Wrong(safetensors_file({"a": entry(offsets=[0, 4, 4])}, bytes(4)), "bad data_offsets"),
    "one offset": Wrong(safetensors_file({"a": entry(offsets=[0])}, bytes(4)), "bad data_offsets"),
    "negative offset": Wrong(safetensors_file({"a": entry(offsets=[-4, 0])}, bytes(4)), "bad data_offsets"),
    "offset beyond 64 bits": Wrong(safetensors_file({"a": entry(offsets=[2**64, 2**64 + 4])}, bytes(4)), "bad data_offsets"),
    "hole at the start": Wrong(safetensors_file({"a": entry(offsets=[4, 8])}, bytes(8)), "leaves a hole"),
    "hole": Wrong(safetensors_file({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "leaves a hole"),
    "overlap": Wrong(safetensors_file({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "overlaps"),
    "one place for two tensors": Wrong(safetensors_file({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
    "empty tensor inside another": Wrong(safetensors_file({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, bytes(4)), "overlaps"),
    "data past the end": Wrong(safetensors_file({"a": entry(), "b": entry(offsets=[4, 8])}, bytes(4)), "cut short: "),
    "cut short": Wrong(safetensors_file({"a": entry()}, bytes(3)), "cut short: [0-9]+ bytes by its header, [0-9]+ on disk"),
    "too long": Wrong(safetensors_file({"a": entry()}, bytes(5)), "too long"),
    # what is something else
    "Git-LFS pointer": Wrong(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git-LFS pointer of 70 bytes, not the file itself of 12345 bytes; run 'git lfs pull'"),
    "git-annex pointer": Wrong(b"/annex/objects/SHA256E-s12345--4d7a.safetensors\n", "git annex get"),
    "web page": Wrong(b"<!DOCTYPE html><html><body>Not found</body></html>", "web page of 50 bytes"),
    "web page after empty lines": Wrong(b"\n\n<html>" + b" " * 100, "web page"),
    "a server's refusal": Wrong(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "a server's error as JSON": Wrong(b'{"error":"Repository not found"}', "server's error message"),
    "download not begun": Wrong(bytes(5000), "zeros only, as an unfinished download"),
    "PyTorch's zip": Wrong(b"PK\x03\x04" + bytes(100), "pickle.*'know convert'"),
    "bare pickle": Wrong(b"\x80\x02}q\x00." + bytes(100), "pickle.*'know convert'"),
    "HDF5": Wrong(b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "GGUF": Wrong(b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
    "NumPy": Wrong(b"\x93NUMPY\x01\0" + bytes(100), "NumPy"),
    "gzip": Wrong(b"\x1f\x8b\x08" + bytes(100), "is compressed"),
    "Keras": Wrong(b"PK\x03\x04" + bytes(22) + b"\x0d\0\0\0metadata.json" + bytes(100), "Keras file"),
    "NumPy's archive": Wrong(b"PK\x03\x04" + bytes(22) + b"\x05\0\0\0w.npy" + bytes(100), "NumPy archive"),
    "ONNX": Wrong(b"\x08\x08\x12\x07pytorch\x1a\x052.4.0" + bytes(100), "ONNX"),
    "Flax's msgpack": Wrong(b"\x82\xa6params\x81\xa5dense" + bytes(100), "msgpack"),
    "cut short, and looks like msgpack": Wrong(struct.pack("<Q", 0xA688) + b'{"a":', "cut short"),
    "noise": Wrong(struct.pack("<Q", 2**63) + bytes(100), "not a safetensors file"),
}  # fmt: skip


def _shard(value: float = 1.0) -> bytes:
    content: bytes = save({"w": torch.full((3,), value)}, {"format": "pt"})
    return content


def _folder(folder: Path, index: Any) -> None:
    (folder / "a.safetensors").write_bytes(_shard())
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / INDEX).write_bytes(text)


def _pointing(shard: object) -> Callable[[Path], None]:
    return lambda folder: _folder(folder, {"weight_map": {"w": shard}})


def _indexed(text: bytes) -> Callable[[Path], None]:
    return lambda folder: _folder(folder, text)


def _linked_shard(folder: Path) -> None:
    (folder.parent / "private.safetensors").write_bytes(_shard())
    (folder / "b.safetensors").symlink_to("../private.safetensors")
    _folder(folder, {"weight_map": {"w": "b.safetensors"}})


def _linked_index(folder: Path) -> None:
    _folder(folder, {"weight_map": {"w": "a.safetensors"}})
    (folder / INDEX).replace(folder.parent / "elsewhere.json")
    (folder / INDEX).symlink_to(folder.parent / "elsewhere.json")


def _pipe_for_an_index(folder: Path) -> None:
    os.mkfifo(folder / INDEX)


def _pipe_for_a_shard(folder: Path) -> None:
    os.mkfifo(folder / "b.safetensors")
    _folder(folder, {"weight_map": {"w": "b.safetensors"}})


def _same_shard_twice(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(_shard())
    _folder(folder, {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}})


def _long_index(folder: Path) -> None:
    _folder(folder, {"weight_map": {"w": "a.safetensors"}})
    os.truncate(folder / INDEX, 20_000_001)


#: One a rule: name → (fills a folder, what is said of it).
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard in the folder above": (_pointing("../private.safetensors"), "bare name"),
    "shard by an absolute path": (_pointing("/etc/passwd.safetensors"), "bare name"),
    "shard in a sub-folder": (_pointing("sub/a.safetensors"), "bare name"),
    "shard behind a backslash": (_pointing("..\\a.safetensors"), "bare name"),
    "shard with a zero in its name": (_pointing("a\0.safetensors"), "bare name"),
    "shard with half a character in its name": (_pointing("a\ud800.safetensors"), "bare name"),
    "shard that is the folder above": (_pointing(".."), "bare name"),
    "shard without a name": (_pointing(""), "bare name"),
    "shard of another kind": (_pointing("config.json"), "bare name"),
    "shard that is a number": (_pointing(3), "bare name"),
    "shard that is missing": (_pointing("b.safetensors"), "b.safetensors: no such file"),
    "shard with a name too long": (_pointing("b" * 300 + ".safetensors"), "name too long"),
    "shard that is a link out of the folder": (_linked_shard, "link that leads out of the folder"),
    "index that is a link out of the folder": (_linked_index, "link that leads out of the folder"),
    "index that is a pipe": (_pipe_for_an_index, "is not a file"),
    "shard that is a pipe": (_pipe_for_a_shard, "is not a file"),
    "index without end": (_long_index, "is too long: 20000001 bytes"),
    "index that is no JSON": (_indexed(b"{"), "not valid JSON"),
    "index that is no UTF-8": (_indexed(b'{"weight_map":{"\xff":"a.safetensors"}}'), "not valid JSON"),
    "index that is deep": (_indexed(b"[" * 100_000 + b"]" * 100_000), "not valid JSON"),
    "index that is a list": (_indexed(b"[]"), "no weight_map"),
    "index with an empty map": (_indexed(b'{"weight_map":{}}'), "no weight_map"),
    "index with a tensor twice": (_indexed(b'{"weight_map":{"w":"a.safetensors","w":"a.safetensors"}}'), "'w' twice"),
    "index with a tensor that is not there": (_indexed(b'{"weight_map":{"w":"a.safetensors","v":"a.safetensors"}}'), "does not have tensor 'v'"),
    "index without a tensor that is there": (_indexed(b'{"weight_map":{"v":"a.safetensors"}}'), "does not have tensor 'v'"),
    "tensor in two shards": (_same_shard_twice, "is in a.safetensors as well"),
}  # fmt: skip


# ---------------------------------------------------------------------------------- mutations


def corpus() -> list[bytes]:
    """Valid files that differ in what they have."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(2, 2, 3, 3, generator=generator),
        "fc.weight": torch.randn(4, 3, generator=generator).half(),
        "fc.bias": torch.randn(4, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 4),
        "größe/x y": torch.tensor([True, False]),
    }
    return [
        save({}),
        save({"w": torch.arange(3.0)}),
        save(state, {"format": "pt", "know.session": "0"}),
        save({f"layer{n}.weight": torch.full((2, 2), float(n)) for n in range(12)}),
        save({"z": torch.tensor(1.5), "c": torch.ones(2, dtype=torch.complex64)}, {"a": "b"}),
        safetensors_file(b'  {"w":%b}   ' % raw_entry(), bytes(4)),
    ]


_NUMBERS = [
    "-1", "0", "-0", "1", "2", "3", "4", "1.0", "1e0", "0.5", "true", "null", '"4"', "[]", "{}",
    str(2**31), str(2**32), str(2**53), str(2**62), str(2**63), str(2**64 - 1), str(2**64), "9" * 30,
    "NaN", "Infinity", "01", "+1",
]  # fmt: skip
_WORDS = [
    b'"F32"', b'"F16"', b'"BF16"', b'"F4"', b'"F64"', b'"BOOL"', b'"I64"', b'"C64"', b'"f32"', b'""',
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"a"', b'"\\ud800"', b'"\\u0061"',
    b'"\xff"', b'"\x00"', b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\\", b'"', b"\xef\xbb\xbf",
]  # fmt: skip


def mutate(chance: random.Random, files: list[bytes]) -> bytes:
    """A valid file, spoilt in one to three ways (which may, rarely, leave it valid)."""
    content = chance.choice(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        content = chance.choice(_WAYS)(chance, content, files)
    return content


def _flip(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    spoilt = bytearray(content)
    if spoilt:
        # Mostly in the header, where it matters.
        end = (
            len(spoilt) if chance.random() < 0.3 else min(len(spoilt), 8 + _header_length(content))
        )
        spoilt[chance.randrange(max(end, 1))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def _cut(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _extend(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    return content + chance.randbytes(chance.randint(1, 16))


def _splice(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    other = chance.choice(files)
    return content[: chance.randrange(len(content) + 1)] + other[chance.randrange(len(other) + 1) :]


def _insert(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.choice(_WORDS) + content[place:]


def _lie_about_length(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    length = _header_length(content)
    wrong = chance.choice(
        (length - 1, length + 1, length + 8, 0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1, chance.randrange(2 * length + 2))
    )  # fmt: skip
    return struct.pack("<Q", wrong % 2**64) + content[8:]


def _numbers(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    """Another number in the header, whose length is put right: what the JSON says is wrong."""
    text = _header(content)
    places = [n for n, sign in enumerate(text) if 48 <= sign <= 57]
    if not places:
        return _insert(chance, content, files)
    start = end = chance.choice(places)
    while start > 0 and 48 <= text[start - 1] <= 57:
        start -= 1
    while end < len(text) and 48 <= text[end] <= 57:
        end += 1
    return _with_header(content, text[:start] + chance.choice(_NUMBERS).encode() + text[end:])


def _words(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    """Another word somewhere in the header, whose length is put right."""
    text = _header(content)
    quotes = [n for n, sign in enumerate(text) if sign == 34]
    if len(quotes) < 2:
        return _insert(chance, content, files)
    first = chance.randrange(len(quotes) - 1)
    replaced = text[: quotes[first]] + chance.choice(_WORDS) + text[quotes[first + 1] + 1 :]
    return _with_header(content, replaced)


def _repeat(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    """A piece of the header twice, whose length is put right."""
    text = _header(content)
    start = chance.randrange(len(text) + 1)
    end = chance.randrange(start, len(text) + 1)
    return _with_header(content, text[:end] + text[start:end] + text[end:])


def _restructure(chance: random.Random, content: bytes, files: list[bytes]) -> bytes:
    """Another structure of valid JSON."""
    try:
        header = json.loads(_header(content))
    except ValueError:
        return _insert(chance, content, files)
    if not isinstance(header, dict) or not header:
        return _with_header(content, chance.choice((b"[]", b"0", b'"a"', b"null")))
    name = chance.choice(sorted(header))
    fields = header[name]
    if isinstance(fields, dict) and fields:
        field = chance.choice(sorted(fields))
        way = chance.randrange(4)
        if way == 0:
            del fields[field]
        elif way == 1:
            fields[field] = chance.choice((None, 0, "x", [], {}, [0], [0, 0], [1, 2, 3], True))
        elif way == 2:
            fields["more"] = 1
        else:
            header[chance.choice(("", "copy", "__metadata__"))] = dict(fields)
    else:
        header[name] = chance.choice((None, 0, "x", [], {}))
    return _with_header(content, json.dumps(header).encode())


_WAYS = (
    _flip, _cut, _extend, _splice, _insert, _lie_about_length, _numbers, _numbers, _words, _repeat,
    _restructure,
)  # fmt: skip


def _header_length(content: bytes) -> int:
    if len(content) < 8:
        return 0
    (length,) = struct.unpack("<Q", content[:8])
    return min(int(length), len(content) - 8)


def _header(content: bytes) -> bytes:
    return content[8 : 8 + _header_length(content)]


def _with_header(content: bytes, header: bytes) -> bytes:
    return safetensors_file(header, content[8 + _header_length(content) :])
