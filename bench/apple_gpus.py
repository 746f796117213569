"""What is published about Apple's GPUs, as far as a bound on a kernel's time needs it.

Apple publishes cores and bandwidth, and hardly ever a clock. FP32 rates are therefore cores x 128 lanes x 2 x clock,
with the highest clock that a source names, so that a bound made from it stays a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

# FP32 lanes of a core: metal-benchmarks, "ALU Layout" (M1 to M2), and every listing of the later chips.
LANES_PER_CORE = 128
SIMD_WIDTH = 32
# Lanes per clock and core of what does not run at the full rate: metal-benchmarks, "Instruction Throughputs" (M1 Max).
# BROADCAST32 and SHUFFLE32 take 2.04 clocks instead of 1, BITEXTRACT32 and EXP2_32 take 4, SUM<F32> takes 14.54.
SHUFFLE_CLOCKS = 2.04
SPECIAL_CLOCKS = 4.0
REDUCTION_CLOCKS = 14.54
# 671 GB/s over 8 cores at 1.278 GHz: Chips and Cheese, "iGPU Cache Setups Compared, Including M1" (M1).
THREADGROUP_BYTES_PER_CLOCK = 64.0
# What a core can take in from outside: metal-benchmarks, "Overview" (M1, M2).
LOAD_BYTES_PER_CLOCK = 32.0


@dataclass(frozen=True)
class Gpu:
    """The largest configuration sold under a name."""

    name: str
    cores: int
    clock_ghz: float
    bandwidth_gb_s: float
    clock_source: str
    bandwidth_source: str

    @property
    def fp32_tflops(self) -> float:
        """Multiply-adds of all lanes, two operations each."""
        return self.cores * LANES_PER_CORE * 2 * self.clock_ghz / 1e3


_METAL_BENCHMARKS = "metal-benchmarks"
_HMC = "hmc-tech.com"

GPUS = (
    Gpu("M1", 8, 1.278, 68.3, _METAL_BENCHMARKS, "128 bits of LPDDR4X-4266; Apple gives none"),
    Gpu("M1 Max", 32, 1.296, 400, _METAL_BENCHMARKS, "Apple, October 2021"),
    Gpu("M1 Ultra", 64, 1.296, 800, _METAL_BENCHMARKS, "Apple, March 2022"),
    Gpu("M2", 10, 1.398, 100, _METAL_BENCHMARKS, "Apple, June 2022"),
    Gpu("M2 Max", 38, 1.398, 400, _HMC, "Apple, January 2023"),
    Gpu("M2 Ultra", 76, 1.398, 800, f"{_METAL_BENCHMARKS}, as a minimum", "Apple, June 2023"),
    Gpu("M3", 10, 1.398, 100, _HMC, "Apple, MacBook Air and iMac specifications"),
    Gpu("M3 Max", 40, 1.398, 400, _HMC, "Apple, MacBook Pro specifications, 2023"),
    Gpu("M4", 10, 1.578, 120, f"{_HMC}, its 8-core M4", "Apple, May 2024"),
    Gpu("M4 Pro", 20, 1.578, 273, "as M4; hmc-tech.com has 1.470", "Apple, October 2024"),
    Gpu("M4 Max", 40, 1.678, 546, f"{_HMC}, its 32-core M4 Max", "Apple, October 2024"),
    Gpu("M5", 10, 1.740, 153, f"{_HMC}; 1.578 was measured on a MacBook Air", "Apple, October 2025"),
    Gpu("M5 Max", 40, 1.750, 614, "estimate of T. Zakharko's A19/M5 microbenchmarks", "Apple, March 2026"),
)
