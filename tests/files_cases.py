"""Saved caches to write, files taken apart and put together again, and the ways in which a file can be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from tq_hb.files import SavedCache

ARRAYS = ("k_codes", "k_norms", "v_codes", "v_norms", "k_mean")
NO_CHECKSUM = "0" * 64


def row_bytes(packing: str, bits: int, head_dim: int) -> int:
    return head_dim * bits // 8 if packing == "plane" else head_dim


def make_saved(
    tokens: int = 5,
    *,
    num_kv_heads: int = 2,
    head_dim: int = 256,
    capacity: int | None = None,
    k_bits: int = 8,
    v_bits: int = 8,
    sliding_window: int | None = None,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    precision: str = "default",
    offset: int | None = None,
    k_mean: bool = False,
    seed: int = 0,
) -> SavedCache:
    """A cache of random content with ``tokens`` tokens held."""
    rng = np.random.default_rng(seed)
    lead = (num_kv_heads, tokens)

    def side(bits: int) -> tuple[np.ndarray, np.ndarray]:
        codes = rng.integers(
            0, 2**bits if packing == "byte" else 256, (*lead, row_bytes(packing, bits, head_dim)), np.uint8
        )
        return codes, rng.random((*lead, 2) if head_dim == 512 else lead, np.float32)

    (k_codes, k_norms), (v_codes, v_norms) = side(k_bits), side(v_bits)
    return SavedCache(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        capacity=max(tokens, sliding_window or 0) if capacity is None else capacity,
        grows=capacity is None and sliding_window is None,
        k_bits=k_bits,
        v_bits=v_bits,
        sliding_window=sliding_window,
        codebook=codebook,
        packing=packing,
        precision=precision,
        offset=tokens if offset is None else offset,
        k_mean=rng.standard_normal((num_kv_heads, head_dim), np.float32) if k_mean else None,
        k_codes=k_codes,
        k_norms=k_norms,
        v_codes=v_codes,
        v_norms=v_norms,
    )


def same(a: SavedCache, b: SavedCache) -> bool:
    """Whether two saved caches agree in every field and every bit."""
    for name in (member.name for member in fields(SavedCache)):
        x, y = getattr(a, name), getattr(b, name)
        if name not in ARRAYS or x is None or y is None:
            if type(x) is not type(y) or x != y:
                return False
        elif (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
            return False
    return True


@dataclass
class File:
    """A file taken apart: the header's tensors, the metadata, and the data."""

    tensors: dict[str, Any]
    metadata: Any
    data: bytes
    others: dict[str, Any] = field(default_factory=dict)  # further members of __metadata__

    @classmethod
    def parse(cls, content: bytes) -> File:
        start = 8 + int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8:start])
        return cls(tensors, json.loads(tensors.pop("__metadata__")["tq_hb"]), content[start:])

    def build(self) -> bytes:
        """Put the file together under a right checksum, whatever it says."""
        text = self.metadata if isinstance(self.metadata, str) else json.dumps(self.metadata)
        return sign(json.dumps({"__metadata__": {"tq_hb": text} | self.others, **self.tensors}), self.data)

    def array(self, name: str) -> np.ndarray:
        """View of a tensor that writes through to a copy of the data."""
        self.data = bytearray(self.data)
        entry = self.tensors[name]
        begin, end = entry["data_offsets"]
        dtype = {"U8": np.uint8, "F32": np.float32}[entry["dtype"]]
        return np.frombuffer(self.data, np.uint8)[begin:end].view(dtype).reshape(entry["shape"])


def with_size(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def sign(header: str, data: bytes = b"") -> bytes:
    """Fill in the right checksum where the header states one."""
    start = header.find('checksum\\": \\"') + len('checksum\\": \\"')
    if start < len('checksum\\": \\"'):
        return with_size(header, data)
    stated = header[start : start + 64]
    zeros = with_size(header.replace(stated, NO_CHECKSUM), data)
    return zeros.replace(NO_CHECKSUM.encode(), hashlib.sha256(zeros).hexdigest().encode())


# -- ways to be wrong --------------------------------------------------------------------------------------
# Name -> what the message must name, and a function of a right file's bytes.

Malform = Callable[[bytes], bytes]
MALFORMED: dict[str, tuple[str, Malform]] = {}
HEADER_LIMIT = 1 << 20


def add(name: str, says: str, malform: Malform) -> None:
    assert name not in MALFORMED
    MALFORMED[name] = says, malform


def edited(edit: Callable[[File], Any]) -> Malform:
    """Change a file's parts and sign it again."""

    def malform(content: bytes) -> bytes:
        file = File.parse(content)
        edit(file)
        return file.build()

    return malform


def replaced(old: str, new: str, *, signed: bool = True) -> Malform:
    """Change the header's text once."""

    def malform(content: bytes) -> bytes:
        if signed:
            content = File.parse(content).build()
        start = 8 + int.from_bytes(content[:8], "little")
        text = content[8:start].decode()
        assert old in text
        text = text.replace(old, new, 1)
        return sign(text, content[start:]) if signed else with_size(text, content[start:])

    return malform


def stated(checksum: str) -> Malform:
    """State another checksum."""
    return lambda content: content.replace(File.parse(content).metadata["checksum"].encode(), checksum.encode())


def filled(prefix: str, item: str, suffix: str = "") -> Malform:
    """A header of exactly the largest size that is mostly one thing repeated."""
    count = (HEADER_LIMIT - len(prefix) - len(suffix)) // len(item)
    header = (prefix + item * count + suffix).ljust(HEADER_LIMIT)
    return lambda content: with_size(header, b"\0" * 64)


# What is wrong before the header is read as JSON, or as bytes.
add("empty", "size", lambda c: b"")
add("seven_bytes", "size", lambda c: c[:7])
add("text", "content", lambda c: b"Keys and values of a cache, in words.\n")
add("eight_bytes_of_text", "content", lambda c: b"8 bytes\n")
add("header_longer_than_any_file", "header length", lambda c: b"\xff" * 8 + c[8:])
add("header_longer_than_the_file", "header length", lambda c: (len(c) - 7).to_bytes(8, "little") + c[8:])
add("header_over_the_limit", "header length", lambda c: with_size(b" " * (HEADER_LIMIT + 1)))
add("cut_in_the_header", "header length", lambda c: c[:100])
add("one_byte_short", "size", lambda c: c[:-1])
add("one_byte_more", "size", lambda c: c + b"\0")
add("no_data", "size", lambda c: c[: 8 + int.from_bytes(c[:8], "little")])
add("header_of_nothing", "header", lambda c: with_size(""))
add("header_of_spaces", "header", lambda c: with_size(" " * 64))
add("header_of_zeros", "header", lambda c: with_size(b"\0" * 64))
add("zeros", "header", lambda c: bytes(len(c)))
add("header_not_ascii", "header", replaced('"F32"', '"F32é"', signed=False))
add("header_with_escapes", "header", replaced('"F32"', '"\\u004632"'))
add("header_not_json", "header", lambda c: with_size("{'a': 1}"))
add("header_is_a_list", "header", lambda c: with_size("[]"))
add("header_is_a_number", "header", lambda c: with_size("17"))
add("header_with_more_after_it", "header", replaced("}}", "}} {}"))
add("header_of_opening_brackets", "header", filled("", "["))
add("header_of_opening_braces", "header", filled("", '{"a":'))
add("header_nested_below_the_item_limit", "header", lambda c: with_size('{"a":' * 20000))
add("header_of_empty_objects", "header", filled('{"a":[{}', ",{}", "]}"))
add("header_of_numbers", "header", filled('{"a":[1', ",1", "]}"))
add("header_of_one_number", "header", filled('{"a":', "1", "}"))
add("header_of_one_string", "__metadata__", filled('{"__metadata__":"', "a", '"}'))
add("header_of_objects_below_the_item_limit", "__metadata__", lambda c: with_size(f'{{"a":[{{}}{",{}" * 16000}]}}'))
add("header_of_members_below_the_item_limit", "__metadata__",
    lambda c: with_size("{" + ",".join(f'"{i}":1' for i in range(32000)) + "}"))  # fmt: skip
add("header_with_nan", "header", replaced("[0, ", "[NaN, "))
add("header_with_infinity", "header", replaced("[0, ", "[-Infinity, "))
add("header_with_a_fraction", "header", replaced("[0, ", "[0.0, "))
add("header_with_an_overflowing_fraction", "header", replaced("[0, ", "[1e999, "))
add("tensor_named_twice", "header", replaced('"0.k_norms"', '"0.v_norms"'))
add("member_named_twice", "header", replaced('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'))
add("metadata_named_twice", "header", replaced('{"__metadata__"', '{"__metadata__": {}, "__metadata__"'))
add("metadata_field_named_twice", "metadata", replaced('\\"version\\": 1', '\\"version\\": 1, \\"version\\": 1'))

# What the checksum alone can see.
add("checksum_of_another_file", "checksum", stated("0123456789abcdef" * 4))
add("last_bit_of_the_data", "checksum", lambda c: c[:-1] + bytes([c[-1] ^ 1]))
add("another_precision", "checksum", replaced('precision\\":\\"default', 'precision\\":\\"strict', signed=False))
add("a_space_more", "checksum", replaced('"dtype":', '"dtype": ', signed=False))

# What is wrong under a right checksum: the metadata,
add("no_metadata", "__metadata__", lambda c: with_size(json.dumps(File.parse(c).tensors), File.parse(c).data))
add("metadata_of_another_program", "__metadata__", lambda c: with_size('{"__metadata__": {"format": "pt"}}'))
add("metadata_is_a_list", "__metadata__", lambda c: with_size('{"__metadata__": ["tq_hb"]}'))
add("more_metadata", "__metadata__", edited(lambda f: f.others.update(note="x")))
add("metadata_string_is_a_number", "__metadata__", lambda c: with_size('{"__metadata__": {"tq_hb": 1}}'))
add("metadata_not_json", "metadata", edited(lambda f: setattr(f, "metadata", "{")))
add("metadata_is_null", "metadata", edited(lambda f: setattr(f, "metadata", "null")))
add("metadata_nested", "metadata", edited(lambda f: setattr(f, "metadata", "[" * 30000)))
add("format_of_something_else", "format", edited(lambda f: f.metadata.update(format="tq_hb.weights")))
add("format_is_null", "format", edited(lambda f: f.metadata.update(format=None)))
for value in (0, -1, 2, 10**15, True, "1", None, [1]):
    add(f"version_{value!r}", "version", edited(lambda f, value=value: f.metadata.update(version=value)))
add("a_newer_version_with_other_fields", "version", edited(lambda f: f.metadata.update(version=2, chunks=3)))
for name in ("checksum", "tables", "caches"):
    add(f"no_{name}", "metadata", edited(lambda f, name=name: f.metadata.pop(name)))
add("an_unknown_field", "metadata", edited(lambda f: f.metadata.update(comment="")))
add("checksum_is_a_number", "checksum", edited(lambda f: f.metadata.update(checksum=5)))
add("checksum_in_capitals", "checksum", stated("AB" * 32))
add("checksum_with_a_newline", "checksum", stated("ab" * 31 + "a" + r"\\n"))
add("checksum_stated_twice", "checksum", edited(lambda f: f.tensors.update({f.metadata["checksum"]: {}})))
add("tables_is_empty", "tables", edited(lambda f: f.metadata.update(tables={})))
add("a_table_more", "tables", edited(lambda f: f.metadata["tables"].update(lloyd_max_7="00")))
add("another_table", "tables", edited(lambda f: f.metadata["tables"].update(lloyd_max_5="ab" * 32)))
add("tables_is_a_list", "tables", edited(lambda f: f.metadata.update(tables=[])))
add("no_caches_listed", "caches", edited(lambda f: f.metadata.update(caches=[])))
add("caches_is_an_object", "caches", edited(lambda f: f.metadata.update(caches={"0": f.metadata["caches"][0]})))
add("cache_is_a_list", r"caches\[0\]", edited(lambda f: f.metadata.update(caches=[[]])))
add("a_field_less", r"caches\[0\]", edited(lambda f: f.metadata["caches"][0].pop("grows")))
add("a_field_more", r"caches\[0\]", edited(lambda f: f.metadata["caches"][0].update(seed=1)))


def cache_field(name: str, *values: object, index: int = 0, says: str | None = None) -> None:
    for value in values:
        add(
            f"cache{index}_{name}_{value!r}",
            says or rf"caches\[{index}\]\.{name}",
            edited(lambda f, value=value: f.metadata["caches"][index].update({name: value})),
        )


# of the first cache: linear, fixed capacity 9, 5 tokens held;
cache_field("num_kv_heads", 0, -2, 2**32, "2", None, True, [2])
cache_field("num_kv_heads", 3, 2**32 - 1, says=r"0\.k_codes\.shape")
cache_field("head_dim", 0, 32, 96, 257, 2**20)
cache_field("head_dim", 512, says=r"0\.k_codes\.shape")
cache_field("capacity", 0, -1, 2**32, None)
cache_field("capacity", 4, says=r"caches\[0\]\.length")
cache_field("grows", 0, 1, None, "false")
cache_field("k_bits", 0, 4, 7, 16, None, "5")
cache_field("v_bits", 0, 4, 9, True)
cache_field("v_bits", 5, says="tables|v_codes")
cache_field("sliding_window", 0, -1, 10, True, "9")
cache_field("codebook", "", "uniform", None, 3)
cache_field("packing", "", "nibble", None)
cache_field("precision", "", "fast", None)
cache_field("length", -1, 10, 2**32 - 1, None, [5])
cache_field("length", 4, says=r"caches\[0\]\.offset")
cache_field("offset", 4, 6, -1, 2**63, None)
cache_field("offset", 2**53 + 1, index=1)
cache_field("ring_start", 1, -1, None)
cache_field("k_mean", 0, None, "false")
cache_field("k_mean", True, says="tensors")
# of the second: a ring of capacity 7 and window 4 that is at token 22 and holds 6 after a trim, with a k_mean.
cache_field("sliding_window", 7, index=1, says=r"caches\[1\]\.length")
cache_field("sliding_window", 8, index=1)
cache_field("capacity", 5, index=1, says=r"caches\[1\]\.length")
cache_field("offset", 5, index=1, says=r"caches\[1\]\.length")
cache_field("offset", 24, index=1, says=r"caches\[1\]\.ring_start")
cache_field("ring_start", 0, 3, 6, 9, index=1)
cache_field("grows", True, index=1)
cache_field("k_mean", False, index=1, says="tensors")


# the tensors,
def tensor(name: str, **change: object) -> Malform:
    return edited(lambda f: f.tensors[name].update(change))


EMPTY_TENSOR = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def swap_offsets(f: File) -> None:
    a, b = f.tensors["0.k_norms"], f.tensors["0.v_codes"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def shift(f: File) -> None:
    """One byte between the first tensor in the file and the rest."""
    f.data = f.data[:1] + f.data
    for entry in f.tensors.values():
        entry["data_offsets"] = [x + 1 for x in entry["data_offsets"]]


def overlap(f: File) -> None:
    f.tensors["0.v_norms"]["data_offsets"] = f.tensors["0.k_norms"]["data_offsets"]


def make_all_huge(f: File) -> None:
    """Sizes that agree with each other, and with no file."""
    cache = f.metadata["caches"][0]
    cache.update(num_kv_heads=2**20, length=2**30, offset=2**30, capacity=2**30)
    f.metadata["caches"], position = [cache, copy.deepcopy(cache)], 0
    f.metadata["tables"].pop("lloyd_max_8")
    f.tensors = {name: entry for name, entry in f.tensors.items() if name.startswith("0.")}
    f.tensors |= {f"1{name[1:]}": copy.deepcopy(entry) for name, entry in f.tensors.items()}
    for entry in f.tensors.values():
        entry["shape"][:2] = [2**20, 2**30]
        nbytes = (4 if entry["dtype"] == "F32" else 1) * int(np.prod(entry["shape"], dtype=object))
        entry["data_offsets"] = [position, position + nbytes]
        position += nbytes


add("no_tensors", "tensors", edited(lambda f: f.tensors.clear()))
add("a_tensor_less", "tensors", edited(lambda f: f.tensors.pop("1.v_norms")))
add("a_tensor_more", "tensors", edited(lambda f: f.tensors.update({"2.k_codes": EMPTY_TENSOR})))
add("a_tensor_by_another_name", "tensors", edited(lambda f: f.tensors.update({"0.K": f.tensors.pop("0.k_codes")})))
add("a_cache_less", "tables", edited(lambda f: f.metadata["caches"].pop()))
add("a_cache_more", "tensors", edited(lambda f: f.metadata["caches"].append(copy.deepcopy(f.metadata["caches"][0]))))
add("caches_in_another_order", "tensors", edited(lambda f: f.metadata["caches"].reverse()))
add("tensor_is_a_list", "0.k_norms", edited(lambda f: f.tensors.update({"0.k_norms": []})))
add("tensor_is_null", "0.k_norms", edited(lambda f: f.tensors.update({"0.k_norms": None})))
add("tensor_member_less", "0.k_norms", edited(lambda f: f.tensors["0.k_norms"].pop("dtype")))
add("tensor_member_more", "0.k_norms", tensor("0.k_norms", device="cpu"))
for dtype in ("F64", "I8", "BOOL", "u8", "", None, 8):
    add(f"codes_of_dtype_{dtype!r}", r"0\.k_codes\.dtype", tensor("0.k_codes", dtype=dtype))
add("norms_of_dtype_I32", r"0\.v_norms\.dtype", tensor("0.v_norms", dtype="I32"))
for shape in ([5, 2, 256], [2, 5], [2, 1280], [2560], [], [2, 5, 256, 1], [2, 5, 255], [-2, -5, 256], [2, 5.5, 256],
              [2**32, 5, 256], [2**63, 2, 2**63], [True, 5, 256], "2x5x256", None, {"2": 5}):  # fmt: skip
    says = "header" if shape == [2, 5.5, 256] else r"0\.k_codes\.shape"
    add(f"codes_of_shape_{shape!r}", says, tensor("0.k_codes", shape=shape))
for offsets in ([0, 1], [0, 2561], [2560, 0], [-2560, 0], [0], [0, 1, 2], [], [0, 2**64 - 1], [2**63, 2**63 + 2560],
                [2560, 5120], ["0", "2560"], [False, 2560], None, 0, {"0": 2560}):  # fmt: skip
    add(f"codes_at_{offsets!r}", r"data_offsets", tensor("0.k_codes", data_offsets=offsets))
add("number_of_too_many_digits", "header", tensor("0.k_codes", data_offsets=[0, 10**99]))
add("tensors_exchanged", "data_offsets", edited(swap_offsets))
add("tensors_overlap", "data_offsets", edited(overlap))
add("a_gap_before_the_tensors", "data_offsets", edited(shift))
add("a_gap_after_the_tensors", "size", edited(lambda f: setattr(f, "data", f.data + b"\0")))
add("data_cut_short", "size", edited(lambda f: setattr(f, "data", f.data[:-1])))
add("sizes_that_agree_but_are_not_there", "size", edited(make_all_huge))


# and the values.
def value(name: str, x: float) -> Malform:
    def edit(f: File) -> None:
        f.array(name).flat[3] = x

    return edited(edit)


for name in ("0.k_norms", "0.v_norms", "1.k_norms", "1.v_norms"):
    index, _, array = name.partition(".")
    for x in (np.nan, np.inf, -np.inf, -1.0, -1e-45):
        add(f"{name}_{x}", rf"caches\[{index}\]\.{array}", value(name, x))
add("k_mean_nan", r"caches\[1\]\.k_mean", value("1.k_mean", np.nan))
add("k_mean_infinite", r"caches\[1\]\.k_mean", value("1.k_mean", -np.inf))
for code in (32, 33, 128, 255):
    add(f"code_{code}_of_5_bits", r"caches\[0\]\.k_codes", value("0.k_codes", code))
add("code_of_6_bits", r"caches\[0\]\.v_codes", value("0.v_codes", 64))


def right_file_caches() -> list[SavedCache]:
    """What the wrong files are made from: see the comments on the first and the second cache above."""
    return [
        make_saved(5, capacity=9, k_bits=5, v_bits=6),
        make_saved(6, capacity=7, sliding_window=4, offset=22, packing="plane", k_bits=5, head_dim=512, k_mean=True),
    ]
