"""Ops recorded on a device's buffers, to run together."""

from __future__ import annotations

from dataclasses import dataclass

from tq_hb import _core, policy
from tq_hb.interop import Array, as_codes, as_float32, check_sinks
from tq_hb.options import check_bits, check_bool, check_format, check_params, check_precision, invalid

Buffer = _core.Buffer
Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class Node:
    """One thing that an encoder has encoded: the launch of a kernel, or a barrier.

    ``kind`` is ``"sdpa"`` for the kernels of an attention op, ``"barrier"`` or ``"other"``. Sizes are 0 where
    nothing is launched: for barriers, and on the cpu.

    >>> import tq_hb
    >>> dev = tq_hb.Device("cpu")
    >>> enc = dev.encoder()
    >>> enc.fwht_sign_premult_f32(dev.empty((1, 256)))
    >>> enc.nodes[0].kind, enc.nodes[0].kernel
    ('other', 'fwht_sign_premult_f32_d256')
    """

    kind: str
    kernel: str
    threadgroups: Size3
    threads: Size3
    threadgroup_bytes: int


class CommandEncoder:
    """Records ops on a device's buffers and runs them after :meth:`commit`.

    Nothing orders two ops but :meth:`memory_barrier`, which ``Device.encoder(auto_barrier=True)`` places by
    itself. A call is checked completely when it is recorded. Values are checked when it runs: a row that is
    not finite is left as it was, and :meth:`wait` raises InvalidArgument naming the first one. Belongs to one
    thread at a time.

    Buffers that are written must be :class:`Buffer`; inputs may be arrays, which are copied.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> dev = tq_hb.Device("cpu")
    >>> packed, norms = dev.empty((1, 8, 256), np.uint8), dev.empty((1, 8))
    >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=8)
    >>> enc = dev.encoder()
    >>> enc.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), packed, norms, hp)
    >>> enc.commit_and_wait()
    >>> float(norms.numpy()[0, 0])
    16.0
    """

    def __init__(self, device: _core.Device, core: _core.CommandEncoder) -> None:
        self._device = device
        self._core = core

    def _floats(self, op: str, field: str, x: Array) -> Buffer:
        return x if isinstance(x, Buffer) else self._device.copy_in(op, field, as_float32(op, field, x))

    def _codes(self, op: str, field: str, x: Array) -> Buffer:
        return x if isinstance(x, Buffer) else self._device.copy_in(op, field, as_codes(op, field, x))

    @staticmethod
    def _written(op: str, field: str, x: object) -> Buffer:
        if not isinstance(x, Buffer):
            raise invalid(op, field, "must be a Buffer of the encoder's device, since it is written", type(x).__name__)
        return x

    def hadamard_quantize_kv_hb(
        self,
        src: Array,
        packed: Buffer,
        norms: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the encoding of ``src`` into a cache; see :func:`tq_hb.hadamard_quantize_kv_hb`.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = dev.empty((1, 4, 256), np.uint8), dev.empty((1, 4))
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=2, cache_capacity=4)
        >>> enc = dev.encoder()
        >>> enc.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), packed, norms, hp)
        >>> enc.commit_and_wait()
        >>> norms.numpy().tolist()
        [[0.0, 0.0, 16.0, 0.0]]
        """
        op = "hadamard_quantize_kv_hb"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        target = (
            "",
            self._floats(op, "src", src),
            self._written(op, "packed", packed),
            self._written(op, "norms", norms),
            hp.codebook_bits,
        )
        self._core.hadamard_quantize(op, hp, [target], codebook, packing)

    def hadamard_quantize_kv_hb_dual(
        self,
        src_k: Array,
        src_v: Array,
        k_packed: Buffer,
        v_packed: Buffer,
        k_norms: Buffer,
        v_norms: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        v_bits: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the encoding of K and V together; see :func:`tq_hb.hadamard_quantize_kv_hb_dual`.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = dev.empty((2, 1, 4, 256), np.uint8), dev.empty((2, 1, 4))
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
        >>> k = np.ones((1, 256), np.float32)
        >>> enc = dev.encoder()
        >>> enc.hadamard_quantize_kv_hb_dual(k, 2 * k, *packed, *norms, hp, v_bits=5)
        >>> enc.commit_and_wait()
        >>> norms.numpy()[:, 0, 0].tolist()
        [16.0, 32.0]
        """
        op = "hadamard_quantize_kv_hb_dual"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        bits = hp.codebook_bits if v_bits is None else check_bits(op, "v_bits", v_bits)
        targets = [
            (
                "k",
                self._floats(op, "src_k", src_k),
                self._written(op, "k_packed", k_packed),
                self._written(op, "k_norms", k_norms),
                hp.codebook_bits,
            ),
            (
                "v",
                self._floats(op, "src_v", src_v),
                self._written(op, "v_packed", v_packed),
                self._written(op, "v_norms", v_norms),
                bits,
            ),
        ]
        self._core.hadamard_quantize(op, hp, targets, codebook, packing)

    def tq_dequantize_hb_kv(
        self,
        packed: Array,
        norms: Array,
        output: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        pos: int,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the decoding of positions ``pos`` ... ``pos + T - 1`` into float32 (T, G, D), still rotated.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = tq_hb.quantize(np.eye(4, 256).reshape(1, 4, 256), 8)
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
        >>> out = dev.empty((2, 1, 256))
        >>> enc = dev.encoder()
        >>> enc.tq_dequantize_hb_kv(packed, norms, out, hp, pos=1)
        >>> enc.commit_and_wait()
        >>> tq_hb.unrotate(out.numpy()).argmax(axis=-1).tolist()
        [[1], [2]]
        """
        op = "tq_dequantize_hb_kv"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        self._core.dequantize(
            op,
            hp,
            _core.to_uint32(op, "pos", pos),
            self._codes(op, "packed", packed),
            self._floats(op, "norms", norms),
            self._written(op, "output", output),
            codebook,
            packing,
        )

    def fwht_sign_premult_f32(self, x: Buffer) -> None:
        """Record R, in place on float32 (..., D).

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.eye(1, 256)), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit_and_wait()
        >>> np.unique(np.abs(buf.numpy())).tolist()  # a unit vector is spread evenly
        [0.0625]
        """
        op = "fwht_sign_premult_f32"
        self._core.fwht(op, _core.Fwht.PREMULT, self._written(op, "x", x))

    def fwht_sign_undo_f32(self, x: Buffer) -> None:
        """Record the inverse of R, in place on float32 (..., D).

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(tq_hb.rotate(np.eye(1, 256))), dev.encoder()
        >>> enc.fwht_sign_undo_f32(buf)
        >>> enc.commit_and_wait()
        >>> bool((buf.numpy() == np.eye(1, 256)).all())
        True
        """
        op = "fwht_sign_undo_f32"
        self._core.fwht(op, _core.Fwht.UNDO, self._written(op, "x", x))

    def fwht_standalone_f32(self, x: Buffer) -> None:
        """Record the Walsh-Hadamard transform alone, scaled to keep the norm, in place on float32 (..., D).

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.eye(1, 256)), dev.encoder()
        >>> enc.fwht_standalone_f32(buf)
        >>> enc.commit_and_wait()
        >>> np.unique(buf.numpy()).tolist()  # the first column of the matrix has no sign
        [0.0625]
        """
        op = "fwht_standalone_f32"
        self._core.fwht(op, _core.Fwht.PLAIN, self._written(op, "x", x))

    def flash_attn_vec_tq_hb(
        self,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        *,
        nwg: int | None = None,
        v_bits: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        sinks: Array | None = None,
        precision: str = "default",
        return_lse: bool = False,
        lse: Buffer | None = None,
    ) -> None:
        """Record decode attention; ``output`` stays rotated. See :func:`tq_hb.flash_attn_vec_tq_hb` for the options.

        ``tmp`` is float32 of at least :func:`tq_hb.tmp_buffer_bytes`, or None: the encoder brings its own. Where
        ``lse=`` is a float32 Buffer, (num_heads,) or (queries, num_heads), the logarithms are written to it; an
        encoder returns nothing. ``sinks=`` may be a Buffer, whose values are not checked: NaN and +inf spread.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> k = v = tq_hb.quantize(np.ones((1, 4, 256), np.float32), 8)
        >>> p = tq_hb.FlashAttnVecTqHbParams(
        ...     num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=0.0625)
        >>> out, enc = dev.empty((2, 256)), dev.encoder()
        >>> enc.flash_attn_vec_tq_hb(tq_hb.rotate(np.ones((2, 256), np.float32)), *k, *v, out, None, p)
        >>> enc.memory_barrier()
        >>> enc.fwht_sign_undo_f32(out)
        >>> enc.commit_and_wait()
        >>> out.numpy().mean(axis=1).round(2).tolist()  # every value of V is about 1
        [1.0, 1.0]
        """
        self._attend(
            "flash_attn_vec_tq_hb", False, q, k_packed, k_norms, v_packed, v_norms, output, tmp, p,
            nwg=nwg, v_bits=v_bits, codebook=codebook, packing=packing, sinks=sinks, precision=precision,
            return_lse=return_lse, lse=lse,
        )  # fmt: skip

    def flash_attn_vec_tq_hb_with_fused_undo(
        self,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        *,
        nwg: int | None = None,
        v_bits: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        sinks: Array | None = None,
        precision: str = "default",
        return_lse: bool = False,
        lse: Buffer | None = None,
    ) -> None:
        """Record decode attention with an un-rotated ``output``.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> k = v = tq_hb.quantize(np.ones((1, 4, 256), np.float32), 8)
        >>> p = tq_hb.FlashAttnVecTqHbParams(
        ...     num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=0.0625, fuse_fwht_pre=1)
        >>> out, enc = dev.empty((2, 256)), dev.encoder()
        >>> enc.flash_attn_vec_tq_hb_with_fused_undo(np.ones((2, 256), np.float32), *k, *v, out, None, p)
        >>> enc.commit_and_wait()
        >>> out.numpy().mean(axis=1).round(2).tolist()
        [1.0, 1.0]
        """
        self._attend(
            "flash_attn_vec_tq_hb_with_fused_undo", True, q, k_packed, k_norms, v_packed, v_norms, output, tmp, p,
            nwg=nwg, v_bits=v_bits, codebook=codebook, packing=packing, sinks=sinks, precision=precision,
            return_lse=return_lse, lse=lse,
        )  # fmt: skip

    def _attend(
        self,
        op: str,
        fused_undo: bool,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        *,
        nwg: int | None,
        v_bits: int | None,
        codebook: str,
        packing: str,
        sinks: Array | None,
        precision: str,
        return_lse: bool,
        lse: Buffer | None,
    ) -> None:
        check_format(op, codebook, packing)
        check_params(op, "p", p, _core.FlashAttnVecTqHbParams)
        check_precision(op, precision)
        check_bool(op, "return_lse", return_lse)
        if return_lse and lse is None:
            raise invalid(op, "return_lse", "must come with lse=, a Buffer that the recorded op writes", return_lse)
        p.validate(op)
        storage = None if tmp is None else self._written(op, "tmp", tmp)
        if not (sinks is None or isinstance(sinks, Buffer)):
            sinks = self._device.copy_in(op, "sinks", check_sinks(op, sinks, p.num_heads))
        queries = self._floats(op, "q", q)
        width = p.codebook_bits if v_bits is None else check_bits(op, "v_bits", v_bits)
        dispatch = policy.plan_attention(
            op,
            p,
            # The core refuses a call without any.
            num_queries=max(1, queries.shape[0]) if len(queries.shape) == 3 else 1,
            offers_group=self._device.offers(policy.AttendKernel.GROUP, p.head_dim, packing, p.codebook_bits, width),
            multiprocessors=self._device.num_multiprocessors,
            nwg=nwg,
            tmp_bytes=None if storage is None else storage.nbytes,
        )
        self._core.flash_attn_vec(
            op,
            queries,
            self._codes(op, "k_packed", k_packed),
            self._floats(op, "k_norms", k_norms),
            self._codes(op, "v_packed", v_packed),
            self._floats(op, "v_norms", v_norms),
            self._written(op, "output", output),
            storage,
            p,
            dispatch.kernel,
            dispatch.head_tile,
            dispatch.nwg,
            width,
            codebook,
            fused_undo,
            packing,
            sinks=sinks,
            lse=None if lse is None else self._written(op, "lse", lse),
            precision=precision,
        )

    def memory_barrier(self) -> None:
        """Order everything recorded so far before everything recorded later.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 256))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.memory_barrier()  # the next op reads what this one writes
        >>> enc.fwht_sign_undo_f32(buf)
        >>> enc.commit_and_wait()
        >>> float(buf.numpy().mean())
        1.0
        """
        self._core.memory_barrier()

    def commit(self) -> None:
        """Hand the recorded ops to the device; nothing can be recorded afterwards.

        >>> import tq_hb
        >>> enc = tq_hb.Device("cpu").encoder()
        >>> enc.commit()
        >>> enc.memory_barrier()
        Traceback (most recent call last):
        tq_hb.DeviceError: memory_barrier: the encoder has been committed; make a new one with Device.encoder()
        """
        self._core.commit()

    def wait(self) -> None:
        """Block until the committed ops are done.

        Raises
        ------
        InvalidArgument
            If an op met a row that is not finite or whose norm overflows; the other rows were written.
        DeviceError
            If the device failed, or nothing has been committed.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 256))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit()
        >>> enc.wait()
        >>> round(float(np.linalg.norm(buf.numpy())), 3)
        16.0
        """
        self._core.wait()

    def commit_and_wait(self) -> None:
        """Commit, then wait.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 512))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit_and_wait()
        >>> bool(np.array_equal(buf.numpy(), tq_hb.rotate(np.ones((1, 512)))))
        True
        """
        self._core.commit()
        self._core.wait()

    @property
    def gpu_time(self) -> float:
        """Seconds the device spent on the ops; known after :meth:`wait`.

        >>> import tq_hb
        >>> enc = tq_hb.Device("cpu").encoder()
        >>> enc.fwht_sign_premult_f32(tq_hb.Device("cpu").empty((1, 256)))
        >>> enc.commit_and_wait()
        >>> 0 <= enc.gpu_time < 10
        True
        """
        return self._core.gpu_time

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels recorded so far.

        >>> import tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> enc = dev.encoder()
        >>> enc.fwht_sign_premult_f32(dev.empty((1, 256)))
        >>> enc.kernels
        ('fwht_sign_premult_f32_d256',)
        """
        return self._core.kernels

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What has been encoded so far, barriers included.

        >>> import tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> enc = dev.encoder()
        >>> enc.fwht_sign_premult_f32(dev.empty((1, 256)))
        >>> enc.memory_barrier()
        >>> [node.kind for node in enc.nodes]
        ['other', 'barrier']
        """
        return tuple(Node(*node) for node in self._core.nodes)
