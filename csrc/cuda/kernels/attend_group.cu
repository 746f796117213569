// Which instance of the group kernel serves a call. Every head size has a file of its own, since they take long to
// compile.

#include "cuda/kernels/kernels.h"

namespace tq_hb {

template <unsigned kHeadDim>
void set_group_block(const AttendCall& call, Launch& sizes);
template <unsigned kHeadDim>
void launch_attend_group(const AttendCall& call, const Launch& sizes, cudaStream_t stream);

Launch attend_group_launch(const AttendCall& call) {
  const TqU32 sharing = call.args.num_heads / call.args.num_kv_heads * call.args.num_queries;
  // Tiles, of which there may be more than a grid has room for but in x, and which read the same keys.
  Launch sizes{{(sharing + call.head_tile - 1) / call.head_tile, call.args.num_kv_heads, call.args.nwg}, {}};
  switch (call.args.head_dim) {
    case 128:
      set_group_block<128>(call, sizes);
      break;
    case 256:
      set_group_block<256>(call, sizes);
      break;
    default:
      set_group_block<512>(call, sizes);
  }
  return sizes;
}

void launch_attend_group(const AttendCall& call, cudaStream_t stream) {
  const Launch sizes = attend_group_launch(call);
  switch (call.args.head_dim) {
    case 128:
      return launch_attend_group<128>(call, sizes, stream);
    case 256:
      return launch_attend_group<256>(call, sizes, stream);
    default:
      launch_attend_group<512>(call, sizes, stream);
  }
}

}  // namespace tq_hb
