"""One attend call on one cache or several: its arguments checked, its arrays staged, its results handed over."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tq_hb import _core, gpu_arrays, policy
from tq_hb.cache_format import CacheFormat
from tq_hb.gpu_arrays import is_on_gpu
from tq_hb.interop import (
    Array,
    Rows,
    as_out,
    as_rows_with_dtype,
    check_sinks,
    finish,
    like,
    require_disjoint,
    require_queries,
)
from tq_hb.options import allocate, check_bool, invalid
from tq_hb.staging import Outstanding, Staging


class AttentionRun(NamedTuple):
    """How the queries of one sequence are attended to."""

    params: _core.FlashAttnVecTqHbParams  # shared by runs: not to be changed
    dispatch: policy.Dispatch
    plan: _core.AttendPlan  # both, and where the last query stands


class AttentionCall:
    """What all sequences of a call share, and the arrays that each has its rows in.

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
        check_bool(op, "return_lse", return_lse)
        core = form.device._core
        rows, self._dtype = as_rows_with_dtype(op, "q", q, core)
        self.num_queries, self.num_heads = form.check_query(op, rows.shape, batched=batched)
        # Where q is on a GPU, all arrays are.
        self._gpu = None if isinstance(rows, np.ndarray) else Staging(op, core, beside=q)
        self.stream = None if self._gpu is None else self._gpu.stream  # None for the device's own
        self.op, self._form, self._batched = op, form, batched
        self._q, self._out = q, out
        self._rows: Array = rows
        self.scale = form.head_dim**-0.5 if scale is None else _core.to_float32(op, "scale", scale)
        self.softcap = _core.to_float32(op, "softcap", softcap)
        self._sinks: Array | None = None if sinks is None else self._check_sinks(sinks)
        self._writable = None if out is None else self._check_out(rows.shape)
        writes_in_place = self._writable is not None and self._dtype == "float32"
        self._result: Any = self._writable if writes_in_place else self._allocate(rows.shape)
        self._lse = self._allocate(rows.shape[:-1]) if return_lse else None

        # Softmax does not see what is added to all scores alike, unless something else comes in with them.
        enters = self.softcap != 0 or self._sinks is not None or return_lse
        self._bias: Array | None = None
        if enters and form.k_mean is not None:
            require_queries(op, rows, batched=batched)  # before their products are judged
            self._bias = form.score_bias(op, rows, q, self.scale)
        self._runs: list[_core._AttentionRun] = []
        self._empty: list[int] = []

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        return allocate(self.op, "the result", shape) if self._gpu is None else self._gpu.allocate(shape)

    def _check_sinks(self, sinks: Array) -> Rows:
        if not is_on_gpu(sinks):
            return check_sinks(self.op, sinks, self.num_heads)
        # Nobody looks at the values. The call may be on another stream than theirs, as queries of the host's are.
        is_in_order = gpu_arrays.stream(sinks) == self.stream
        logits = gpu_arrays.as_float32(self.op, "sinks", sinks, self._form.device._core, on_its_stream=is_in_order)
        if logits.shape != (self.num_heads,):
            raise invalid(self.op, "sinks", f"must have shape ({self.num_heads},), one per query head", logits.shape)
        return logits

    def _check_out(self, shape: tuple[int, ...]) -> Any:
        if self._gpu is not None or is_on_gpu(self._out):
            return self._check_out_on_gpu(shape)
        writable = as_out(self.op, self._out, shape, self._dtype)
        require_disjoint(self.op, "out", writable, "q", self._q)
        if self._sinks is not None:
            require_disjoint(self.op, "out", writable, "sinks", self._sinks)
        return writable

    def _check_out_on_gpu(self, shape: tuple[int, ...]) -> Any:
        """Return the output array, which must be beside q."""
        if self._out is None or not (self._gpu is not None and is_on_gpu(self._out)):
            raise invalid(self.op, "out", "must be where q is", "one on a GPU and one in host memory")
        if gpu_arrays.dtype_name(self._out) != self._dtype:
            raise invalid(self.op, "out", f"must have dtype {self._dtype}", gpu_arrays.dtype_name(self._out))
        if tuple(self._out.shape) != shape:
            raise invalid(self.op, "out", f"must have shape {shape}", tuple(self._out.shape))
        return self._out

    def require_sequences(self, count: int) -> None:
        """Raise unless q holds the queries of so many sequences."""
        if len(self._result) != count:
            raise invalid(
                self.op, "q", f"must hold queries for {count} sequences, one for each slot", len(self._result)
            )

    def record(self, index: int, buffers: _core.CacheBuffers, plan: _core.AttendPlan) -> None:
        """Note attention of a sequence's queries on its codes and norms."""
        self._runs.append((index, buffers, plan))

    def leave_empty(self, index: int) -> None:
        """Note that a sequence holds no keys: its queries see none."""
        self._empty.append(index)

    def run(self, outstanding: Outstanding) -> list[_core.Launched]:
        """Do what was noted, and say what it launched; on a GPU's arrays without waiting for it."""
        if self._gpu is not None:
            launched = self._run_on_gpu(self._gpu, outstanding) if self._runs else []
        else:
            launched = _core.attend(
                self._form.device._core,
                self.op,
                self._form.core_format,
                self._batched,
                self._rows,
                self._result,
                self._sinks,
                self._bias,
                self._lse,
                self._runs,
            )
        for index in self._empty:
            self._fill(self._result, index, 0.0)
            if self._lse is not None:
                self._fill(self._lse, index, -np.inf if self._sinks is None else self._sinks)
        return launched

    def _run_on_gpu(self, staging: Staging, outstanding: Outstanding) -> list[_core.Launched]:
        encoder = staging.make_encoder()
        launched = _core.record_attention(
            encoder,
            self.op,
            self._form.core_format,
            self._batched,
            staging.read("q", self._rows),
            staging.fill("out", self._result),
            None if self._sinks is None else staging.read("sinks", self._sinks),
            None if self._bias is None else staging.read("q", self._bias),
            None if self._lse is None else staging.fill("lse", self._lse),
            self._runs,
        )
        outstanding.run(self._form.device._core, staging.stream, encoder)
        return launched

    def _fill(self, array: Any, index: int, values: Any) -> None:
        rows = array[index] if self._batched else array
        if self._gpu is not None:
            gpu_arrays.overwrite(rows, values)
        else:
            rows[...] = values.numpy() if isinstance(values, _core.Buffer) else values

    def results(self) -> Array | tuple[Array, Array]:
        """Hand over the output, and lse if it was asked for."""
        if self._gpu is not None:
            return self._results_on_gpu(self._gpu)
        output = finish(self.op, self._q, self._out, self._writable, self._result, self._dtype)
        return output if self._lse is None else (output, like(self.op, self._q, self._lse))

    def _results_on_gpu(self, staging: Staging) -> Array | tuple[Array, Array]:
        if self._out is None:
            output = staging.hand_over(self._q, self._result, self._dtype)
        else:
            output = self._out
            if self._result is not output:
                gpu_arrays.overwrite(output, self._result)
        return output if self._lse is None else (output, staging.hand_over(self._q, self._lse))
