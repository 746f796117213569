"""Saved caches that are wrong: nothing wrong is believed, and it is refused quickly in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tq_hb
from files_cases import MALFORMED, File, make_saved, right_file_caches, same
from tq_hb import file_header
from tq_hb.files import read_caches, write_caches

# What the format promises about a malformed file, beside the right error.
CPU_SECONDS = 0.05
PEAK_BYTES = 32 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


@pytest.fixture(scope="module")
def right_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("right") / "right"
    write_caches("op", path, right_file_caches())
    return path.read_bytes()


class TestMalformed:
    def test_there_are_enough_and_all_differ(self, right_file):
        contents = {hashlib.sha256(malform(right_file)).digest() for _, malform in MALFORMED.values()}
        assert len(contents) == len(MALFORMED) >= 40

    def test_taking_a_file_apart_and_together_changes_nothing(self, path, right_file):
        path.write_bytes(File.parse(right_file).build())
        assert all(map(same, read_caches("op", path), right_file_caches()))

    @pytest.mark.parametrize("name", MALFORMED)
    def test_is_refused_quickly_in_little_memory(self, path, right_file, name):
        says, malform = MALFORMED[name]
        path.write_bytes(malform(right_file))
        pattern = re.compile(rf"KVCache.load: .*({says}).* of '.*cache.safetensors' must .*, got ", re.DOTALL)

        def refused() -> float:
            start = time.process_time()
            with pytest.raises(tq_hb.InvalidArgument) as info:
                read_caches("KVCache.load", path)
            seconds = time.process_time() - start
            assert pattern.match(str(info.value)), str(info.value)
            assert len(str(info.value)) < 2000
            return seconds

        assert min(refused() for _ in range(3)) < CPU_SECONDS
        tracemalloc.start()
        try:
            refused()
            assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
        finally:
            tracemalloc.stop()

    def test_a_long_number_is_not_converted_even_where_python_would(self, path, right_file):
        path.write_bytes(MALFORMED["header_of_one_number"][1](right_file))
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        try:
            start = time.process_time()
            with pytest.raises(tq_hb.InvalidArgument, match="header of .* must have no number of more than 99 digits"):
                read_caches("op", path)
            assert time.process_time() - start < CPU_SECONDS
        finally:
            sys.set_int_max_str_digits(limit)

    def test_a_length_that_only_a_sparse_file_has_is_not_read(self, path, right_file):
        # A terabyte of nothing behind a small header.
        path.write_bytes(right_file)
        os.truncate(path, 2**40)
        with pytest.raises(tq_hb.InvalidArgument, match=r"size of .* must be \d+ bytes after the header, got 1099"):
            read_caches("op", path)

    def test_every_truncation_is_refused(self, path, right_file):
        start = 8 + int.from_bytes(right_file[:8], "little")
        ends = {*range(0, start + 8, 5), *range(start, len(right_file), 997), len(right_file) - 1}
        for end in ends:
            path.write_bytes(right_file[:end])
            with pytest.raises(tq_hb.InvalidArgument):
                read_caches("op", path)

    def test_a_file_that_changes_while_it_is_read(self, path, right_file, monkeypatch):
        path.write_bytes(right_file)
        parse = file_header.parse

        def parse_while_somebody_shortens_it(header, data_bytes):
            result = parse(header, data_bytes)
            os.truncate(path, len(right_file) - 100)
            return result

        monkeypatch.setattr(file_header, "parse", parse_while_somebody_shortens_it)
        with pytest.raises(tq_hb.InvalidArgument, match="content of .* must not change while it is read"):
            read_caches("op", path)

    def test_a_file_whose_header_changes_while_it_is_read(self, path, monkeypatch):
        # A header longer than any buffer that may still hold what was read first.
        write_caches("op", path, [make_saved(0)] * 300)
        content, parse = path.read_bytes(), file_header.parse

        def parse_while_somebody_rewrites_it(header, data_bytes):
            result = parse(header, data_bytes)
            at = content.rindex(b"U8")
            path.write_bytes(content[:at] + b"I" + content[at + 1 :])
            return result

        monkeypatch.setattr(file_header, "parse", parse_while_somebody_rewrites_it)
        with pytest.raises(tq_hb.InvalidArgument, match="content of .* must not change while it is read"):
            read_caches("op", path)

    def test_what_the_library_refuses(self, path, right_file, monkeypatch):
        def load(content):
            raise safetensors.SafetensorError("no such dtype")

        path.write_bytes(right_file)
        monkeypatch.setattr(safetensors.numpy, "load", load)
        with pytest.raises(tq_hb.InvalidArgument, match="content of .* safetensors, got 'no such dtype'"):
            read_caches("op", path)

    def test_a_newer_version_says_what_to_do(self, path, right_file):
        path.write_bytes(MALFORMED["a_newer_version_with_other_fields"][1](right_file))
        with pytest.raises(tq_hb.InvalidArgument, match="version of .* must be 1: .*newer tq_hb.*, got 2"):
            read_caches("op", path)

    def test_a_file_of_another_program_is_told_apart(self, path):
        safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, path, {"format": "pt"})
        with pytest.raises(tq_hb.InvalidArgument, match="__metadata__ of .* as in saved caches, got .*pt"):
            read_caches("op", path)


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


def place(size: int) -> st.SearchStrategy[int]:
    """Anywhere, half of the time near the front, where the header is."""
    return st.one_of(st.integers(0, min(4000, size)), st.integers(0, size))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_bytes_is_believed(fuzz_path, right_file, data):
    content = bytearray(right_file)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(place(len(content)))
        match data.draw(st.sampled_from(["flip", "delete", "insert", "overwrite", "truncate"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
            case "overwrite":
                new = data.draw(st.binary(min_size=1, max_size=16))
                content[at : at + len(new)] = new
            case "truncate":
                del content[at:]
    assume(content != right_file)
    fuzz_path.write_bytes(content)

    with pytest.raises(tq_hb.InvalidArgument):
        read_caches("op", fuzz_path)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**64),
    st.integers(-2, 40),
    st.sampled_from(["", "byte", "plane", "lloyd_max", "mlx_native", "strict", "U8", "F32", 256, 512, 5, 6, 8, 2**32]),
    st.text(max_size=5),
    st.lists(st.integers(-3, 6000), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_signed_file_is_refused_or_means_what_it_says(fuzz_path, right_file, data):
    file = File.parse(right_file)
    for _ in range(data.draw(st.integers(1, 3))):
        members = data.draw(st.sampled_from([file.metadata, *file.metadata["caches"], *file.tensors.values()]))
        members[data.draw(st.sampled_from(sorted(members)))] = data.draw(ODD)
        assume(isinstance(file.metadata["caches"], list) and all(isinstance(c, dict) for c in file.metadata["caches"]))
    fuzz_path.write_bytes(file.build())

    try:
        loaded = read_caches("op", fuzz_path)
    except tq_hb.InvalidArgument:
        return
    write_caches("op", fuzz_path, loaded)
    again = File.parse(fuzz_path.read_bytes())
    assert json.dumps(again.metadata["caches"]) == json.dumps(file.metadata["caches"], sort_keys=True)
    assert (again.tensors, again.data) == (file.tensors, file.data)
