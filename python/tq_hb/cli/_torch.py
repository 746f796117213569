"""Sets torch up for the commands that run models."""

from __future__ import annotations

import os

import tq_hb


def set_up(threads: int | None) -> None:
    """Give torch and tq_hb as many threads, by default all that this process may use; to be called before torch loads.

    torch's waiting threads would otherwise spin, and take the cores from everything else, tq_hb included.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Of the libraries that read models, whose bars would break into ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    if threads is not None:
        tq_hb.set_num_threads(threads)
    torch.set_num_threads(tq_hb.num_threads())
