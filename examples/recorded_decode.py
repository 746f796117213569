"""Decode several sequences with ops recorded on a device's own buffers, as an engine that manages memory would.

Every sequence has its caches in buffers of the device. A step is recorded for all of them in one encoder: the new
tokens are encoded into the caches and, behind a barrier, their queries attend to everything there. Nothing runs before
the commit, and nothing is copied but the new tokens' q, k and v.

Run it: ``python examples/recorded_decode.py``
"""

from __future__ import annotations

import numpy as np

import tq_hb

HEADS, KV_HEADS, HEAD_DIM, K_BITS, V_BITS = 8, 2, 128, 8, 6


class Sequence:
    """The buffers of one sequence, for one layer of a model."""

    def __init__(self, device: tq_hb.Device, capacity: int) -> None:
        self.q, self.output = (device.empty((HEADS, HEAD_DIM)) for _ in range(2))
        self.k, self.v = (device.empty((KV_HEADS, HEAD_DIM)) for _ in range(2))
        k_codes, v_codes = (
            device.empty((KV_HEADS, capacity, HEAD_DIM * bits // 8), np.uint8) for bits in (K_BITS, V_BITS)
        )
        k_norms, v_norms = (device.empty((KV_HEADS, capacity)) for _ in range(2))
        self.written = k_codes, v_codes, k_norms, v_norms  # in the order of the op that writes them
        self.read = k_codes, k_norms, v_codes, v_norms  # and of the one that reads them
        # Partial results. Sequences attend at the same time, so they cannot share it.
        self.tmp = device.empty(tq_hb.tmp_buffer_bytes(HEADS, HEAD_DIM) // 4)
        self.length = 0
        self.encoding = tq_hb.HadamardQuantizeKvHbParams(
            head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, write_pos=0, cache_capacity=capacity, codebook_bits=K_BITS
        )
        self.attention = tq_hb.FlashAttnVecTqHbParams(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            kv_seq_len=1,
            kv_capacity=capacity,
            scale=HEAD_DIM**-0.5,
            codebook_bits=K_BITS,
            fuse_fwht_pre=1,
        )

    def record_append(self, encoder: tq_hb.CommandEncoder) -> None:
        """Record that what will be in ``k`` and ``v`` goes into the next slot of the cache."""
        params = self.encoding.replace(write_pos=self.length)
        encoder.hadamard_quantize_kv_hb_dual(self.k, self.v, *self.written, params, v_bits=V_BITS, packing="plane")
        self.length += 1

    def record_attend(self, encoder: tq_hb.CommandEncoder) -> None:
        """Record that what will be in ``q`` attends to the cache; the result goes to ``output``."""
        params = self.attention.replace(kv_seq_len=self.length, nsg=tq_hb.compute_nsg(self.length))
        encoder.flash_attn_vec_tq_hb_with_fused_undo(
            self.q, *self.read, self.output, self.tmp, params, v_bits=V_BITS, packing="plane"
        )


def step(device: tq_hb.Device, sequences: list[Sequence]) -> tq_hb.CommandEncoder:
    """Decode a token of every sequence, from its ``q``, ``k`` and ``v``."""
    encoder = device.encoder()
    for sequence in sequences:
        sequence.record_append(encoder)
    encoder.memory_barrier()  # attention reads what is written above; sequences need no order among themselves
    for sequence in sequences:
        sequence.record_attend(encoder)
    encoder.commit_and_wait()
    return encoder


def main() -> None:
    """Decode three sequences, which begin one after the other, and compare them with caches that do it all."""
    device, rng = tq_hb.Device("auto"), np.random.default_rng(0)
    sequences = [Sequence(device, capacity=64) for _ in range(3)]
    caches = [
        tq_hb.KVCache(KV_HEADS, HEAD_DIM, 64, k_bits=K_BITS, v_bits=V_BITS, packing="plane", device=device)
        for _ in sequences
    ]
    worst = 0.0
    for token in range(48):
        running = [i for i in range(3) if token >= 16 * i]
        for i in running:
            # A model's layer would write these; here they come from the host.
            for buffer in (sequences[i].q, sequences[i].k, sequences[i].v):
                buffer.copy_from(rng.standard_normal(buffer.shape, dtype=np.float32))
        encoder = step(device, [sequences[i] for i in running])
        for i in running:
            caches[i].append(sequences[i].k.numpy(), sequences[i].v.numpy())
            want = caches[i].attend(sequences[i].q.numpy())
            worst = max(worst, float(np.abs(sequences[i].output.numpy() - want).max()))
    print(f"lengths {[sequence.length for sequence in sequences]} on {device.name}")
    print(f"the last step: {[node.kernel or node.kind for node in encoder.nodes]}")
    print(f"largest difference from KVCache: {worst:.1e}")


if __name__ == "__main__":
    main()
