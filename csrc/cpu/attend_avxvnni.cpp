#include "cpu/float32_avx2.h"
#include "cpu/int16_avx2.h"
// Their primitives come first.
#include "cpu/float32_lookup.h"
#include "cpu/int16_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avxvnni() noexcept {
  static const IsaKernel kernel = [] {
    IsaKernel vnni = attend_kernel_avx2();
    vnni.isa = "avxvnni";
    vnni.attend_int16 = attend_int16;
    vnni.quantize_query = quantize_query;
    vnni.rescore = rescore;
    return vnni;
  }();
  return kernel;
}

}  // namespace tq_hb
