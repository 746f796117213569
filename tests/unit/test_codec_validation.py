"""What the tables, the rotations and the codec on arrays refuse, and which shapes they take."""

from __future__ import annotations

import numpy as np
import pytest

import tq_hb
from refusals import INF, NAN, refusal


class TestCodec:
    @pytest.mark.parametrize("cbits", [0, 4, 7, 9, -8, 5.5, "8"])
    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_an_unknown_width(self, table, cbits):
        with refusal(table.__name__, "bits", f"must be 5, 6 or 8, got {cbits!r}"):
            table(cbits)

    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_an_unknown_name(self, table):
        with refusal(table.__name__, "name", "lloyd_max", "got", "uniform"):
            table(8, "uniform")

    @pytest.mark.parametrize("name", [None, 8, np.array(["lloyd_max", "mlx_native"])], ids=["None", "8", "array"])
    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_what_is_no_name(self, table, name):
        with refusal(table.__name__, "name", "lloyd_max", "got"):
            table(8, name)

    @pytest.mark.parametrize("keyword", ["codebook", "packing", "device"])
    def test_names_are_strings(self, keyword):
        with refusal("quantize", keyword, "got"):
            tq_hb.quantize(np.ones(256, np.float32), 8, **{keyword: np.array(["cpu", "byte"])})

    @pytest.mark.parametrize("head_dim", [0, 1, 96, 255, 1024, -256, 2.5])
    def test_signs_refuse_an_unknown_size(self, head_dim):
        with refusal("signs", "head_dim", "got"):
            tq_hb.signs(head_dim)

    @pytest.mark.parametrize("op", [tq_hb.rotate, tq_hb.unrotate], ids=["rotate", "unrotate"])
    @pytest.mark.parametrize(
        "x", [np.ones(96, np.float32), np.float32(1), np.ones((2, 0), np.float32)], ids=["96", "scalar", "0"]
    )
    def test_rotations_refuse_a_bad_last_axis(self, op, x):
        with refusal(op.__name__, "\\w+", "got"):
            op(x)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.complex64, bool, object])
    def test_quantize_takes_floats_only(self, dtype):
        with refusal("quantize", "x", "got"):
            tq_hb.quantize(np.ones((2, 256), dtype), 8)

    @pytest.mark.parametrize("cbits", [4, 7, -8, 8.5])
    def test_quantize_refuses_an_unknown_width(self, cbits):
        with refusal("quantize", "bits", f"must be 5, 6 or 8, got {cbits!r}"):
            tq_hb.quantize(np.ones((2, 256), np.float32), cbits)

    @pytest.mark.parametrize(
        ("changes", "name", "rule"),
        [
            ({"bits": 7}, "bits", "5, 6 or 8"),
            ({"bits": 5.5}, "bits", ""),
            ({"head_dim": 96}, "head_dim", "64, 128, 256 or 512"),
            ({"head_dim": 512}, "codes", "512"),
            ({"source": "nibble"}, "source", "byte, plane"),
            ({"target": None}, "target", "byte, plane"),
            ({"source": "plane"}, "codes", "160"),
            ({"codes": np.zeros((3, 256), np.int8)}, "codes", "uint8"),
            ({"codes": np.uint8(3)}, "codes", "last axis"),
            ({"codes": "codes"}, "codes", "array"),
        ],
        ids=str,
    )
    def test_convert_packing_refuses_what_does_not_fit(self, changes, name, rule):
        good = {"codes": np.zeros((3, 256), np.uint8), "bits": 5, "head_dim": 256, "source": "byte", "target": "plane"}
        values = {**good, **changes}
        with refusal("convert_packing", name, rule, "got"):
            tq_hb.convert_packing(values.pop("codes"), values.pop("bits"), **values)

    def test_dequantize_refuses_rows_of_the_other_packing(self):
        norms = np.zeros(3, np.float32)
        with refusal("dequantize", "codes", "160 bytes", "got (3, 256)"):
            tq_hb.dequantize(np.zeros((3, 256), np.uint8), norms, 5, head_dim=256, packing="plane")
        with refusal("dequantize", "codes", "256 bytes", "got (3, 160)"):
            tq_hb.dequantize(np.zeros((3, 160), np.uint8), norms, 5, head_dim=256)

    @pytest.mark.parametrize(
        ("codes", "norms"),
        [
            (np.zeros((3, 256), np.uint8), np.zeros(4, np.float32)),
            (np.zeros((3, 256), np.uint8), np.zeros((3, 2), np.float32)),
            (np.zeros((3, 512), np.uint8), np.zeros(3, np.float32)),
            (np.zeros((3, 128), np.uint8), np.zeros(3, np.float32)),
            (np.zeros((3, 256), np.int32), np.zeros(3, np.float32)),
            (np.zeros((3, 256), np.uint8), np.zeros(3, np.int32)),
        ],
        ids=["count", "norms of 512", "norms of 256", "width", "codes dtype", "norms dtype"],
    )
    def test_dequantize_refuses_arrays_that_do_not_fit(self, codes, norms):
        with refusal("dequantize", "(codes|norms)", "got"):
            tq_hb.dequantize(codes, norms, 8, head_dim=512 if codes.shape[-1] == 512 else 256)

    @pytest.mark.parametrize("factor", [0.0, -1.0, NAN, INF])
    def test_dequantize_refuses_a_bad_scale_factor(self, factor):
        with refusal("dequantize", "scale_factor_d512", "got"):
            tq_hb.dequantize(
                np.zeros((3, 512), np.uint8), np.zeros((3, 2), np.float32), 8, head_dim=512, scale_factor_d512=factor
            )

    @pytest.mark.parametrize("packing", ["byte", "plane"])
    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    def test_empty_leading_shapes_give_empty_results(self, head_dim, packing):
        x = np.zeros((3, 0, head_dim), np.float32)

        codes, norms = tq_hb.quantize(x, 6, packing=packing)

        assert codes.shape == (3, 0, head_dim if packing == "byte" else head_dim * 6 // 8)
        assert codes.dtype == np.uint8
        assert norms.shape == ((3, 0, 2) if head_dim == 512 else (3, 0))
        assert tq_hb.dequantize(codes, norms, 6, head_dim=head_dim, packing=packing).shape == x.shape
        assert tq_hb.rotate(x).shape == tq_hb.unrotate(x).shape == x.shape
        other = tq_hb.convert_packing(codes, 6, head_dim=head_dim, source=packing, target="byte")
        assert other.shape == x.shape

    @pytest.mark.parametrize("packing", ["byte", "plane"])
    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    def test_a_single_vector_needs_no_leading_axis(self, head_dim, packing):
        codes, norms = tq_hb.quantize(np.ones(head_dim, np.float32), 5, packing=packing)

        assert codes.shape == (head_dim if packing == "byte" else head_dim * 5 // 8,)
        assert norms.shape == ((2,) if head_dim == 512 else ())
        assert tq_hb.dequantize(codes, norms, 5, head_dim=head_dim, packing=packing).shape == (head_dim,)
        assert tq_hb.convert_packing(codes, 5, head_dim=head_dim, source=packing, target="byte").shape == (head_dim,)


@pytest.mark.parametrize("rotated", ["no", 1, None, np.array([1, 2])], ids=repr)
def test_rotated_is_true_or_false(rotated):
    codes, norms = tq_hb.quantize(np.ones((3, 64), np.float32), 8)
    with pytest.raises(tq_hb.InvalidArgument, match="^dequantize: rotated must be True or False, got "):
        tq_hb.dequantize(codes, norms, 8, head_dim=64, rotated=rotated)
