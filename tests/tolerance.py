"""Every tolerance of the suite, with the reason for its value.

Two questions that are never mixed: is the arithmetic right (compared on the same codes, so only
float32 rounding is allowed), and is the format good (compared with the unquantised vectors).
"""

from __future__ import annotations

import numpy as np

# --- is the arithmetic right? ------------------------------------------------------------------

# Attention in float32 against float64 on the same codes. Rounding alone gives about 1e-13; one
# lost key among 16,384 gives 1e-5, so the limit sees any error of substance.
ATTEND_NMSE = 1e-10

# The logarithm of the softmax's denominator, over max(1, |lse|). Float32 scores of ordinary size err by a few 1e-6;
# one lost key among 16,384 shows as 6e-5.
LSE_ERROR = 1e-5

# What the two classes of precision promise: relative L2 error of the output, and the error of lse as above.
PRECISION_L2 = {"strict": 1e-5, "default": 5e-4}
PRECISION_LSE = {"strict": 1e-4, "default": 2e-3}

# R and its inverse: at most 1 + log2(512) + 1 roundings of 2^-24 each, hence 7e-7 relative.
ROTATE_NMSE = 1e-12

# One decoded value: a factor with up to two roundings, and a product. No cancellation.
DECODE_RTOL = 4 * 2.0**-24

# Decoded and un-rotated: the sum of both errors above in the 2-norm.
DECODE_UNROTATED_NMSE = 2e-12

# A norm: the rotation's error averages out; what is left is the sum of squares (16 serial and 5
# tree additions of positive terms) and one square root.
NORM_RTOL = 2e-6

# Splitting the keys otherwise changes the order of the sums, nothing else.
SPLIT_NMSE = 1e-11

# A float32 encoder may pick the neighbouring code only this close to a boundary.
BOUNDARY_MARGIN = 1e-5

# --- is the format good? -----------------------------------------------------------------------

# Mean squared error per unit of energy, from the exact density of one coordinate of a random unit
# vector of 256 dimensions: (codebook, cbits) -> error. With 64 dimensions it is up to 2.5 % less.
FORMAT_ERROR = {
    ("lloyd_max", 5): 2.47916e-3,
    ("lloyd_max", 6): 6.3752e-4,
    ("lloyd_max", 8): 4.0752e-5,
    ("mlx_native", 5): 2.47916e-3,
    ("mlx_native", 6): 6.4102e-4,
    ("mlx_native", 8): 6.2661e-5,
}

# Sampling error of the above over 2^17 values: values beyond the outermost level are rare but
# err by much, so single samples differ by up to 4 %.
FORMAT_ERROR_RTOL = 0.08

# Root mean square of what the quantiser sees; 1 by construction, up to rounding.
QUANTISER_RMS_ATOL = 0.01


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Squared error per squared magnitude; NaN (which passes no limit) if ``got`` has a NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    return float(((got - want) ** 2).sum() / (want**2).sum())


def lse_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error over max(1, |lse|), 0 where both are the same infinity; NaN (which passes no limit) for a NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    with np.errstate(invalid="ignore"):
        error = np.where(got == want, 0.0, np.abs(got - want) / np.maximum(1.0, np.abs(want)))
    return float(error.max())
