"""One attend call on one cache or several: its arguments checked, its arrays staged, its results handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core, policy
from tq_hb.cache_format import CacheFormat
from tq_hb.interop import (
    Array,
    Float32Array,
    as_float32,
    as_out,
    check_sinks,
    finish,
    like,
    require_disjoint,
    require_rows,
    result_dtype,
)
from tq_hb.options import check_attention, invalid
from tq_hb.staging import Staging
from tq_hb.visibility import Placement


@dataclass(frozen=True)
class _Buffers:
    """Arguments and results of a call on the device, with a leading axis if they are for several sequences."""

    q: _core.Buffer
    output: _core.Buffer
    sinks: _core.Buffer | None
    score_bias: _core.Buffer | None
    lse: _core.Buffer | None

    def of_sequence(self, index: int) -> _Buffers:
        return _Buffers(
            self.q[index],
            self.output[index],
            self.sinks,
            None if self.score_bias is None else self.score_bias[index],
            None if self.lse is None else self.lse[index],
        )


class AttentionCall:
    """What all sequences of a call share, and the buffers that each has its rows in.

    Nothing is written before :meth:`run`: it runs what :meth:`record` and :meth:`leave_empty` have noted.
    """

    def __init__(
        self,
        op: str,
        form: CacheFormat,
        q: Array,
        *,
        batched: bool,
        scale: float | None,
        softcap: float,
        sinks: Array | None,
        return_lse: bool,
        out: Array | None,
    ) -> None:
        check_attention(op, precision=form.precision, return_lse=return_lse)
        rows = as_float32(op, "q", q)
        form.check_query(op, rows, batched=batched)
        self.op, self._form, self._batched = op, form, batched
        self._q, self._out, self._dtype = q, out, result_dtype(op, "q", q)
        per_sequence = rows.shape[1:] if batched else rows.shape
        self.num_heads = per_sequence[-2]
        self.num_queries = per_sequence[0] if len(per_sequence) == 3 else 1
        self.scale = form.head_dim**-0.5 if scale is None else _core.to_float32(op, "scale", scale)
        self.softcap = _core.to_float32(op, "softcap", softcap)
        self._sinks = None if sinks is None else check_sinks(op, sinks, self.num_heads)
        self._writable = self._check_out(rows.shape)
        if batched:
            for index, sequence in enumerate(rows):
                require_rows(op, f"q[{index}]", sequence, as_query=True)
        else:
            require_rows(op, "q", rows, as_query=True)
        self._result: Float32Array = np.empty(rows.shape, np.float32)
        if self._writable is not None and self._dtype == "float32":
            self._result = self._writable
        self._lse = np.empty(rows.shape[:-1], np.float32) if return_lse else None

        # Softmax does not see what is added to all scores alike, unless something else comes in with them.
        enters = self.softcap != 0 or self._sinks is not None or return_lse
        bias = form.score_bias(rows, self.scale) if enters else None
        core = form.device._core
        self._staging, self.encoder = Staging(op, core), core.make_encoder()
        self._buffers = _Buffers(
            self._staging.read("q", rows),
            self._staging.fill("out", self._result),
            None if self._sinks is None else self._staging.read("sinks", self._sinks),
            None if bias is None else self._staging.read("q", bias),
            None if self._lse is None else self._staging.fill("lse", self._lse),
        )
        self._empty: list[int] = []
        self._records = False

    def _check_out(self, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        if self._out is None:
            return None
        writable = as_out(self.op, self._out, shape, self._dtype)
        require_disjoint(self.op, "out", writable, "q", self._q)
        if self._sinks is not None:
            require_disjoint(self.op, "out", writable, "sinks", self._sinks)
        return writable

    def require_sequences(self, count: int) -> None:
        """Raise unless q holds the queries of so many sequences."""
        if len(self._result) != count:
            raise invalid(
                self.op, "q", f"must hold queries for {count} sequences, one for each slot", len(self._result)
            )

    def record(
        self,
        index: int,
        sides: tuple[_core.Buffer, _core.Buffer, _core.Buffer, _core.Buffer],
        params: _core.FlashAttnVecTqHbParams,
        dispatch: policy.Dispatch,
        placement: Placement,
    ) -> None:
        """Record attention of a sequence's queries on its codes and norms."""
        buffers = self._buffers.of_sequence(index) if self._batched else self._buffers
        self.encoder.flash_attn_vec(
            self.op,
            buffers.q,
            *sides,
            buffers.output,
            None,
            params,
            dispatch.kernel,
            dispatch.head_tile,
            dispatch.nwg,
            self._form.v_bits,
            self._form.codebook,
            True,
            self._form.packing,
            placement.query_position,
            buffers.sinks,
            buffers.score_bias,
            buffers.lse,
            self._form.precision,
        )
        self._records = True

    def leave_empty(self, index: int) -> None:
        """Note that a sequence holds no keys: its queries see none."""
        self._empty.append(index)

    def run(self) -> None:
        """Do what was noted."""
        if self._records:
            self._staging.run(self.encoder)
        for index in self._empty:
            where = index if self._batched else ...
            self._result[where] = 0
            if self._lse is not None:
                self._lse[where] = -np.inf if self._sinks is None else self._sinks

    def results(self) -> Array | tuple[Array, Array]:
        """Hand over the output, and lse if it was asked for."""
        output = finish(self._q, self._out, self._writable, self._result, self._dtype)
        return output if self._lse is None else (output, like(self._q, self._lse))
