#include <limits>

#include "core/params.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TqFlashAttnVecArgs attend_args() {
  TqFlashAttnVecArgs args{};
  args.num_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 256;
  args.kv_seq_len = 64;
  args.kv_capacity = 128;
  args.scale = 0.0625f;
  args.scale_factor_d512 = 1.0f;
  args.codebook_bits = 8;
  args.nsg = 1;
  return args;
}

TqHadamardQuantizeArgs quantize_args() {
  TqHadamardQuantizeArgs args{};
  args.head_dim = 256;
  args.num_kv_heads = 2;
  args.cache_capacity = 128;
  args.scale_factor_d512 = 1.0f;
  args.codebook_bits = 8;
  return args;
}

template <class Args, class T>
void expect_refused(Args args, T Args::* field, T value, std::initializer_list<const char*> parts) {
  args.*field = value;
  expect_error([&] { validate("the_op", args); }, ErrorCode::kInvalidArgument, parts);
}

TEST(AttendParams, AcceptsTheCorners) {
  TqFlashAttnVecArgs args = attend_args();
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    args.head_dim = head_dim;
    EXPECT_NO_THROW(validate("the_op", args));
  }
  for (const unsigned nsg : {1u, 2u, 4u}) {
    args.nsg = nsg;
    EXPECT_NO_THROW(validate("the_op", args));
  }
  for (const float scale : {0.0f, -1.0f, std::numeric_limits<float>::max()}) {
    args.scale = scale;
    EXPECT_NO_THROW(validate("the_op", args));
  }
  args.kv_seq_len = args.kv_capacity;
  args.ring_start = args.kv_capacity - 1;
  EXPECT_NO_THROW(validate("the_op", args));
}

TEST(AttendParams, NamesTheOpTheFieldTheRuleAndTheValue) {
  expect_refused(attend_args(), &TqFlashAttnVecArgs::codebook_bits, 4u,
                 {"the_op: codebook_bits must be 5, 6 or 8, got 4"});
}

TEST(AttendParams, RefusesEachBrokenRule) {
  using Args = TqFlashAttnVecArgs;
  const Args args = attend_args();
  for (const unsigned value : {0u, 1u, 96u, 255u, 1024u}) {
    expect_refused(args, &Args::head_dim, value, {"head_dim must be 64, 128, 256 or 512"});
  }
  expect_refused(args, &Args::num_heads, 0u, {"num_heads must be > 0"});
  expect_refused(args, &Args::num_kv_heads, 0u, {"num_kv_heads must be > 0"});
  expect_refused(args, &Args::num_heads, 7u, {"num_heads", "!= 0", "7 and 2"});
  expect_refused(args, &Args::kv_seq_len, 0u, {"kv_seq_len must be > 0"});
  expect_refused(args, &Args::kv_seq_len, 129u, {"kv_capacity", "129", "128"});
  for (const unsigned value : {0u, 1u, 4u, 7u, 9u}) expect_refused(args, &Args::codebook_bits, value, {"5, 6 or 8"});
  for (const unsigned value : {0u, 3u, 5u, 6u, 7u, 9u, 31u, 33u}) {
    expect_refused(args, &Args::nsg, value, {"nsg must be a power of two"});
  }
  for (const unsigned value : {8u, 16u}) expect_refused(args, &Args::nsg, value, {"kernel reduce cap"});
  expect_refused(args, &Args::mask_type, 3u, {"mask_type must be 0, 1 or 2"});
  expect_refused(args, &Args::mask_type, 2u, {"sliding_window must be >= 1"});
  expect_refused(args, &Args::ring_start, 128u, {"ring_start must be < kv_capacity"});
  expect_refused(args, &Args::ring_start, 1u, {"ring_start must be 0 unless the ring is full"});
  for (const float value : {kNan, kInf, -kInf}) expect_refused(args, &Args::scale, value, {"scale must be finite"});
  for (const float value : {kNan, kInf, -1.0f}) expect_refused(args, &Args::softcap, value, {"softcap"});
  for (const float value : {kNan, kInf, 0.0f, -1.0f}) {
    expect_refused(args, &Args::scale_factor_d512, value, {"scale_factor_d512"});
  }
  expect_refused(args, &Args::scale_factor_d512, 1e-39f, {"reciprocal"});
  expect_refused(args, &Args::fuse_fwht_pre, 2u, {"fuse_fwht_pre must be 0 or 1"});
}

TEST(QuantizeParams, RefusesEachBrokenRule) {
  using Args = TqHadamardQuantizeArgs;
  const Args args = quantize_args();
  EXPECT_NO_THROW(validate("the_op", args));
  expect_refused(args, &Args::head_dim, 96u, {"head_dim"});
  expect_refused(args, &Args::num_kv_heads, 0u, {"num_kv_heads"});
  expect_refused(args, &Args::cache_capacity, 0u, {"cache_capacity"});
  expect_refused(args, &Args::is_sliding, 2u, {"is_sliding"});
  expect_refused(args, &Args::codebook_bits, 7u, {"codebook_bits"});
  for (const float value : {kNan, kInf, 0.0f, -1.0f}) {
    expect_refused(args, &Args::scale_factor_d512, value, {"scale_factor_d512"});
  }
}

TEST(TmpBufferBytes, IsTheReferenceSystems) {
  EXPECT_EQ(tmp_buffer_bytes(16, 256), 528384u);
  EXPECT_EQ(tmp_buffer_bytes(16, 512), 1052672u);
  EXPECT_EQ(tmp_buffer_bytes(16, 256, 3, 8), 16u * 3 * 8 * 258 * 4);
  EXPECT_TQ_ERROR(tmp_buffer_bytes(std::uint64_t{1} << 60, 256), ErrorCode::kInvalidArgument, "size");
  EXPECT_TQ_ERROR(tmp_buffer_bytes(0, 256), ErrorCode::kInvalidArgument, "num_heads");
}

}  // namespace
}  // namespace tq_hb
