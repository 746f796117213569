"""Saved caches: what is written comes back, and is replaced whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import resource
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import tq_hb
from files_cases import ARRAYS, File, make_saved, right_file_caches, same
from tq_hb.files import SavedCache, load_caches, read_caches, save_caches, write_caches

HEAD_DIMS = tq_hb.supported_head_dims()
WIDTHS = tq_hb.supported_bits()
PACKINGS = ("byte", "plane")
V1 = Path(__file__).resolve().parents[1] / "data" / "saved_caches_v1.safetensors"


def round_trip(path: Path, *caches: SavedCache) -> list[SavedCache]:
    write_caches("op", path, caches)
    return read_caches("op", path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


class TestRoundTrip:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("packing", PACKINGS)
    @pytest.mark.parametrize("k_bits", WIDTHS)
    @pytest.mark.parametrize("v_bits", WIDTHS)
    def test_every_width_packing_and_head_size(self, path, k_bits, v_bits, packing, head_dim):
        saved = make_saved(33, num_kv_heads=3, head_dim=head_dim, k_bits=k_bits, v_bits=v_bits, packing=packing)
        (loaded,) = round_trip(path, saved)
        assert same(loaded, saved)

    @pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 511, 512, 513, 1025])
    def test_every_length(self, path, tokens):
        saved = make_saved(tokens, seed=tokens)
        (loaded,) = round_trip(path, saved)
        assert same(loaded, saved)

    @pytest.mark.parametrize(
        "choices",
        [
            {"capacity": 1000},
            {"capacity": 2**32 - 1},
            {"tokens": 0, "capacity": 1},
            {"codebook": "mlx_native", "k_bits": 5},
            {"precision": "strict"},
            {"k_mean": True},
            {"k_mean": True, "head_dim": 512},
            {"tokens": 0, "k_mean": True},
            {"tokens": 3, "sliding_window": 8},
            {"tokens": 0, "sliding_window": 8},
            {"tokens": 8, "sliding_window": 8, "offset": 8},
            {"tokens": 8, "sliding_window": 8, "offset": 1001},
            {"tokens": 8, "sliding_window": 8, "offset": 2**53},
            {"tokens": 12, "sliding_window": 8, "capacity": 12, "offset": 12345},
            {"tokens": 9, "sliding_window": 8, "capacity": 12, "offset": 12345},
            {"tokens": 8, "sliding_window": 8, "capacity": 12, "offset": 11},
        ],
        ids=str,
    )
    def test_every_choice(self, path, choices):
        saved = make_saved(**choices)
        (loaded,) = round_trip(path, saved)
        assert same(loaded, saved)

    def test_several_caches_keep_their_order(self, path):
        caches = [
            make_saved(tokens, head_dim=(256, 512)[tokens % 2], sliding_window=(None, 2)[tokens % 3 == 2], seed=tokens)
            for tokens in range(13)
        ]
        loaded = round_trip(path, *caches)
        assert len(loaded) == len(caches)
        assert all(map(same, loaded, caches))

    def test_arrays_need_not_be_contiguous(self, path):
        saved = make_saved(6)
        strided = dataclasses.replace(
            saved, k_codes=np.asfortranarray(saved.k_codes), v_norms=np.repeat(saved.v_norms, 2, axis=1)[:, ::2]
        )
        (loaded,) = round_trip(path, strided)
        assert same(loaded, saved)

    def test_the_same_caches_make_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            write_caches("op", tmp_path / name, right_file_caches())
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_paths_may_be_of_any_kind(self, path):
        saved = make_saved()
        write_caches("op", os.fspath(path), [saved])
        assert same(read_caches("op", path)[0], saved)

    def test_as_many_caches_as_a_large_model_has_layers(self, path):
        loaded = round_trip(path, *[make_saved(0, k_bits=5, v_bits=6, k_mean=True)] * 500)
        assert len(loaded) == 500


class TestTheFile:
    def test_any_safetensors_reader_reads_the_arrays(self, path):
        saved = right_file_caches()[1]
        write_caches("op", path, [saved])
        tensors = safetensors.numpy.load_file(path)
        assert tensors.keys() == {f"0.{name}" for name in ARRAYS}
        for name in ARRAYS:
            assert np.array_equal(tensors[f"0.{name}"], getattr(saved, name))

    def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(self, path):
        write_caches("op", path, right_file_caches())
        content = path.read_bytes()
        stated = File.parse(content).metadata["checksum"].encode()
        assert content.count(stated) == 1
        assert hashlib.sha256(content.replace(stated, b"0" * 64)).hexdigest() == stated.decode()

    def test_the_metadata_describe_the_caches(self, path):
        write_caches("op", path, right_file_caches())
        metadata = File.parse(path.read_bytes()).metadata
        first, second = metadata["caches"]
        assert (metadata["format"], metadata["version"]) == ("tq_hb.kv_caches", 1)
        assert set(metadata["tables"]) == {"lloyd_max_5", "lloyd_max_6", "lloyd_max_8"}
        tables = tq_hb.codebook(6).tobytes() + tq_hb.boundaries(6).tobytes()
        assert metadata["tables"]["lloyd_max_6"] == hashlib.sha256(tables).hexdigest()
        assert (first["length"], first["offset"], first["ring_start"], first["sliding_window"]) == (5, 5, 0, None)
        assert (second["length"], second["offset"], second["ring_start"], second["sliding_window"]) == (6, 22, 2, 4)

    def test_version_1_stays_readable(self):
        assert V1.stat().st_size < 20 << 10
        loaded = read_caches("op", V1)
        assert len(loaded) == len(version_1_caches())
        assert all(map(same, loaded, version_1_caches()))

    def test_version_1_stays_what_is_written(self, path):
        write_caches("op", path, version_1_caches())
        wanted, written = File.parse(V1.read_bytes()), File.parse(path.read_bytes())
        assert (written.metadata, written.tensors, written.data) == (wanted.metadata, wanted.tensors, wanted.data)


def version_1_caches() -> list[SavedCache]:
    """The content of the checked-in file, by a rule rather than a random generator that may change."""

    def by_rule(saved: SavedCache) -> SavedCache:
        arrays = {name: getattr(saved, name) for name in ARRAYS if getattr(saved, name) is not None}
        for index, (name, array) in enumerate(arrays.items()):
            counted = np.arange(array.size).reshape(array.shape) * 37 + index
            limit = 256 if saved.packing == "plane" else 2 ** getattr(saved, f"{name[0]}_bits")
            arrays[name] = (counted % limit).astype(array.dtype)
        return dataclasses.replace(saved, **arrays)

    return [
        by_rule(saved)
        for saved in (
            make_saved(3, codebook="mlx_native", k_bits=8, v_bits=5, precision="strict"),
            make_saved(3, sliding_window=2, capacity=4, offset=9, head_dim=512, num_kv_heads=1, k_bits=6, k_mean=True),
            make_saved(4, capacity=64, packing="plane", k_bits=5, v_bits=6, k_mean=True),
            make_saved(0),
        )
    ]


class TestKVCaches:
    """The same through the caches themselves, on every device."""

    @staticmethod
    def fill(cache: tq_hb.KVCache, tokens: int, seed: int = 0) -> None:
        shape = (tokens, cache.num_kv_heads, cache.head_dim)
        k, v = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
        cache.append(k, v)

    @staticmethod
    def agree(a: tq_hb.KVCache, b: tq_hb.KVCache) -> bool:
        """Whether two caches hold the same, and answer the same."""
        names = (
            *("num_kv_heads", "head_dim", "capacity", "k_bits", "v_bits", "sliding_window", "codebook", "packing"),
            *("precision", "offset", "bytes_per_token", "nbytes"),
        )
        q = np.random.default_rng(1).standard_normal((2 * a.num_kv_heads, a.head_dim)).astype(np.float32)
        return (
            all(getattr(a, name) == getattr(b, name) for name in names)
            and len(a) == len(b)
            and all(map(np.array_equal, a.dequantize(), b.dequantize()))
            and (len(a) == 0 or np.array_equal(a.attend(q, softcap=30.0), b.attend(q, softcap=30.0)))
        )

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("choices", [{}, {"packing": "plane"}, {"codebook": "mlx_native"}], ids=str)
    @pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (5, 6), (6, 5)])
    def test_a_loaded_cache_is_the_saved_one_and_goes_on_as_it(self, device, path, head_dim, k_bits, v_bits, choices):
        keywords = {"k_bits": k_bits, "v_bits": v_bits, "device": device, **choices}
        saved = tq_hb.KVCache(3, head_dim, **keywords)
        self.fill(saved, 33)
        saved.save(path)
        loaded = tq_hb.KVCache.load(path, device)
        assert loaded.device.backend == device.backend
        assert self.agree(saved, loaded)
        for cache in (saved, loaded):
            self.fill(cache, 40, seed=2)
        assert self.agree(saved, loaded)

    @pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 12, 13, 100])
    @pytest.mark.parametrize("trimmed", [0, 1, 4])
    def test_rings(self, device, path, tokens, trimmed):
        saved = tq_hb.KVCache(1, 256, 12, sliding_window=8, precision="strict", device=device)
        self.fill(saved, tokens)
        if tokens >= trimmed:
            saved.trim(trimmed)
        saved.save(path)
        loaded = tq_hb.KVCache.load(path, device)
        assert self.agree(saved, loaded)
        for cache in (saved, loaded):
            self.fill(cache, 5, seed=2)
        assert self.agree(saved, loaded)

    def test_the_mean_of_the_keys(self, device, path):
        mean = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
        saved = tq_hb.KVCache(2, 256, 50, k_mean=mean, device=device)
        self.fill(saved, 50)
        saved.save(path)
        assert self.agree(saved, tq_hb.KVCache.load(path, device))

    def test_a_cache_moves_between_devices(self, device, path):
        saved = tq_hb.KVCache(2, 512, device=device)
        self.fill(saved, 31)
        saved.save(path)
        loaded = tq_hb.KVCache.load(path, "cpu")
        assert loaded.device.backend == "cpu"
        loaded.save(path.with_name("again"))
        assert path.read_bytes() == path.with_name("again").read_bytes()

    def test_what_was_trimmed_or_cleared_is_not_in_the_file(self, path):
        cache = tq_hb.KVCache(1, 256, 10)
        self.fill(cache, 10)
        cache.clear()
        cache.save(path)
        empty = path.read_bytes()
        tq_hb.KVCache(1, 256, 10).save(path)
        assert path.read_bytes() == empty

    def test_all_layers_of_a_model(self, device, path):
        layers = [tq_hb.KVCache(1, 256, sliding_window=(None, 4)[i % 2], device=device) for i in range(6)]
        for i, layer in enumerate(layers):
            self.fill(layer, i + 1, seed=i)
        save_caches(path, iter(layers))
        loaded = load_caches(path, device)
        assert len(loaded) == 6
        assert all(map(self.agree, layers, loaded))
        assert len({id(layer.device) for layer in loaded}) == 1

    def test_load_refuses_several(self, path):
        save_caches(path, [tq_hb.KVCache(1, 256)] * 2)
        with pytest.raises(
            tq_hb.InvalidArgument, match=r"KVCache.load: .* must hold one cache; .*load_caches.*, got 2"
        ):
            tq_hb.KVCache.load(path)

    @pytest.mark.parametrize("caches", [[], None, 3, [3], ["cache"], {}, np.array(8)], ids=repr)
    def test_save_refuses_other_things(self, path, caches):
        with pytest.raises(
            tq_hb.InvalidArgument, match="save_caches: caches must be a sequence of one or more KVCache"
        ):
            save_caches(path, caches)

    def test_save_refuses_a_single_cache(self, path):
        with pytest.raises(tq_hb.InvalidArgument, match="save_caches: caches must be a sequence .*, got KVCache"):
            save_caches(path, tq_hb.KVCache(1, 256))

    def test_load_refuses_an_unknown_device_before_it_reads(self, path):
        with pytest.raises(tq_hb.InvalidArgument, match="load_caches: device"):
            load_caches(path, "tpu")

    def test_the_error_names_the_call(self, path):
        path.write_bytes(b"not a cache")
        for name, call in (("KVCache.load", tq_hb.KVCache.load), ("load_caches", load_caches)):
            with pytest.raises(tq_hb.InvalidArgument, match=f"^{name}: content of '.*cache.safetensors' must"):
                call(path)

    def test_what_no_cache_can_be_made_of_names_the_call(self, monkeypatch):
        calls = (("KVCache.load", "tq_hb.cache", tq_hb.KVCache.load), ("load_caches", "tq_hb.files", load_caches))
        for name, module, call in calls:
            monkeypatch.setattr(f"{module}.read_caches", lambda op, path: [make_saved(0, precision="none")])
            with pytest.raises(tq_hb.InvalidArgument, match=f"^{name}: precision must be"):
                call("cache.safetensors")

    def test_a_capacity_that_does_not_fit_takes_no_memory(self, path):
        write_caches("op", path, [make_saved(0, capacity=2**32 - 1)])
        with pytest.raises(tq_hb.OutOfMemoryError):
            tq_hb.KVCache.load(path, "cpu")


class TestRefusedOnSaving:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"k_norms": np.full((2, 5), np.nan, np.float32)}, r"caches\[1\]\.k_norms.*finite.*nan"),
            ({"v_norms": np.full((2, 5), -1, np.float32)}, r"caches\[1\]\.v_norms.*>= 0.*-1"),
            ({"v_norms": np.ones((2, 5))}, r"caches\[1\]\.v_norms.*float32.*float64"),
            ({"k_codes": np.zeros((2, 5, 128), np.uint8)}, r"caches\[1\]\.k_codes.*\(2, 5, 256\).*128"),
            ({"v_codes": np.zeros((2, 4, 256), np.uint8)}, r"caches\[1\]\.v_codes.*\(2, 5, 256\).*4"),
            ({"v_codes": np.full((2, 5, 256), 64, np.uint8), "v_bits": 6}, r"caches\[1\]\.v_codes.*2\*\*6.*64"),
            ({"k_mean": np.full((2, 256), np.inf, np.float32)}, r"caches\[1\]\.k_mean.*finite.*inf"),
            ({"k_mean": np.zeros(256, np.float32)}, r"caches\[1\]\.k_mean.*\(2, 256\).*\(256,\)"),
            ({"capacity": 4}, r"caches\[1\]\.length.*capacity 4.*5"),
            ({"offset": 6}, r"caches\[1\]\.offset.*6"),
            ({"k_bits": 7}, r"caches\[1\]\.k_bits.*5, 6 or 8.*7"),
            ({"head_dim": np.int64(256)}, r"caches\[1\]\.head_dim.*int.*256"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_what_no_cache_can_be(self, path, change, says):
        wrong = dataclasses.replace(make_saved(5), **change)
        with pytest.raises(tq_hb.InvalidArgument, match=f"^KVCache.save: {says}"):
            write_caches("KVCache.save", path, [make_saved(5), wrong])
        assert not path.exists()

    def test_no_caches(self, path):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^save_caches: caches of .* must be at least one, got 0"):
            write_caches("save_caches", path, [])

    def test_more_caches_than_the_header_holds(self, path):
        rule = r"^save_caches: caches of .* must be fewer \(their header must hold at most \d+ values\), got 1200$"
        with pytest.raises(tq_hb.InvalidArgument, match=rule):
            write_caches("save_caches", path, [make_saved(0)] * 1200)
        assert not path.exists()


class TestPaths:
    @pytest.mark.parametrize("wrong", [0, 1.5, None, b"cache", ["cache"]], ids=repr)
    def test_must_be_a_path(self, wrong):
        for call in (lambda: read_caches("op", wrong), lambda: write_caches("op", wrong, [make_saved()])):
            with pytest.raises(tq_hb.InvalidArgument, match="op: path must be a str or an os.PathLike, got "):
                call()

    def test_nul(self):
        with pytest.raises(tq_hb.InvalidArgument, match="op: path must not contain a NUL"):
            read_caches("op", "cache\0")

    def test_missing(self, path):
        with pytest.raises(FileNotFoundError):
            read_caches("op", path)
        with pytest.raises(FileNotFoundError) as raised:
            write_caches("op", path / "cache", [make_saved()])
        assert (raised.value.filename, raised.value.filename2) == (str(path / "cache"), None)

    def test_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError):
            read_caches("op", tmp_path)
        with pytest.raises(IsADirectoryError) as raised:
            write_caches("op", tmp_path, [make_saved()])
        assert (raised.value.filename, raised.value.filename2) == (str(tmp_path), None)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
    def test_unreadable(self, path):
        path.write_bytes(b"")
        path.chmod(0)
        with pytest.raises(PermissionError):
            read_caches("op", path)

    def test_a_pipe_is_not_waited_for(self, path):
        os.mkfifo(path)
        for call in (lambda: read_caches("op", path), lambda: write_caches("op", path, [make_saved()])):
            with pytest.raises(tq_hb.InvalidArgument, match="op: path must name a regular file, got '.*cache"):
                call()
        assert stat.S_ISFIFO(path.stat().st_mode)

    def test_a_symbolic_link_stays_one(self, tmp_path, path):
        link = tmp_path / "link"
        link.symlink_to(path)
        (loaded,) = round_trip(link, make_saved())
        assert same(loaded, make_saved())
        assert link.is_symlink()
        assert path.is_file()

    def test_the_mode_of_the_file_stays(self, path):
        write_caches("op", path, [make_saved(1)])
        path.chmod(0o600)
        write_caches("op", path, [make_saved(2)])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_new_file_has_the_mode_of_any_new_file(self, path):
        write_caches("op", path, [make_saved(1)])
        other = path.with_name("other")
        other.touch()
        assert path.stat().st_mode == other.stat().st_mode


class TestWholeOrNotAtAll:
    """Whatever fails, the old file is as it was and no other is left beside it."""

    @pytest.fixture(params=["replacing", "new"])
    def saving_fails(self, request, path):
        def check(kind: type[BaseException]) -> None:
            if request.param == "replacing":
                write_caches_unhurt(path, [make_saved(3)])
            before = path.read_bytes() if path.exists() else None
            with pytest.raises(kind):
                write_caches("op", path, [make_saved(700)])
            assert (path.read_bytes() if path.exists() else None) == before
            assert [p.name for p in path.parent.iterdir()] == [path.name] * (before is not None)

        original = {name: getattr(os, name) for name in ("fsync", "replace", "open")}

        def write_caches_unhurt(path: Path, caches: list[SavedCache]) -> None:
            with pytest.MonkeyPatch.context() as patch:
                for name, function in original.items():
                    patch.setattr(os, name, function)
                write_caches("op", path, caches)

        return check

    @staticmethod
    def raising(error: BaseException):
        def function(*args, **keywords):
            raise error

        return function

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("function", ["fsync", "replace", "open"])
    def test_a_step_fails(self, saving_fails, monkeypatch, function, error):
        monkeypatch.setattr(os, function, self.raising(error))
        saving_fails(type(error))

    def test_the_disk_takes_no_more(self, saving_fails):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            saving_fails(OSError)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_the_content_is_on_the_disk_before_it_has_the_name(self, path, monkeypatch):
        steps = []
        fsync, replace = os.fsync, os.replace

        def logged_fsync(fd):
            steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size} bytes")
            fsync(fd)

        def logged_replace(source, target):
            steps.append("replace")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)
        write_caches("op", path, [make_saved()])
        assert steps == [f"{path.stat().st_size} bytes", "replace", "folder"]

    @pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
    def test_a_folder_that_cannot_be_synced(self, path, monkeypatch, code, raises):
        fsync = os.fsync

        def files_only(fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", files_only)
        if raises:
            with pytest.raises(OSError, match=os.strerror(code)):
                write_caches("op", path, [make_saved()])
        else:
            write_caches("op", path, [make_saved()])
        assert same(read_caches("op", path)[0], make_saved())
        assert list(path.parent.iterdir()) == [path]

    def test_readers_see_one_whole_file_or_another(self, path):
        caches = [make_saved(tokens, seed=tokens) for tokens in (1, 40)]
        write_caches("op", path, caches[:1])

        def write(saved: SavedCache) -> None:
            for _ in range(25):
                write_caches("op", path, [saved])

        writers = [threading.Thread(target=write, args=(saved,)) for saved in caches]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            (loaded,) = read_caches("op", path)
            assert any(same(loaded, saved) for saved in caches)
        assert list(path.parent.iterdir()) == [path]
