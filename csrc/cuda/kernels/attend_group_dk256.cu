#include "cuda/kernels/attend_group.cuh"

namespace tq_hb {

template void set_group_block<256>(const AttendCall& call, Launch& sizes);
template void launch_attend_group<256>(const AttendCall& call, const Launch& sizes, cudaStream_t stream);

}  // namespace tq_hb
