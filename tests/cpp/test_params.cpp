#include <limits>

#include "cache_case.h"
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
  expect_refused(args, &Args::softcap, std::numeric_limits<float>::denorm_min(),
                 {"softcap", "0 or at least", "1.4013e-45"});
  for (const float value : {kNan, kInf, 0.0f, -1.0f}) {
    expect_refused(args, &Args::scale_factor_d512, value, {"scale_factor_d512"});
  }
  expect_refused(args, &Args::scale_factor_d512, 1e-39f, {"reciprocal"});
  expect_refused(args, &Args::fuse_fwht_pre, 2u, {"fuse_fwht_pre must be 0 or 1"});
}

template <class Break>
void expect_call_refused(const CacheCase& test, const Break& breaks, std::initializer_list<const char*> parts) {
  AttendOp op = test.attend_op();
  breaks(op);
  expect_error([&] { validate(op, test.device.get()); }, ErrorCode::kInvalidArgument, parts);
}

TEST(AttendCall, AcceptsOptionalBuffersOfItsShape) {
  CacheCase test(4, 2, 128, 8, 5, 6, "cpu", Packing::kPlane);
  for (const unsigned queries : {0u, 1u, 8u}) {
    if (queries != 0) test.ask(queries);
    test.add_sinks();
    test.add_score_bias();
    test.add_lse();
    EXPECT_NO_THROW(validate(test.attend_op(), test.device.get())) << queries;
  }
}

TEST(AttendCall, ChecksOptionalBuffers) {
  CacheCase test(4, 2, 128, 8);
  test.ask(3);
  const auto empty = [&](DType dtype, const Shape& shape) { return test.device->empty(dtype, shape); };
  expect_call_refused(test, [&](AttendOp& op) { op.sinks = empty(DType::kFloat32, {3, 4}); },
                      {"sinks must have shape (4,)", "(3, 4)"});
  expect_call_refused(test, [&](AttendOp& op) { op.score_bias = empty(DType::kFloat32, {4}); },
                      {"score_bias must have shape (3, 4)", "(4,)"});
  expect_call_refused(test, [&](AttendOp& op) { op.lse = empty(DType::kFloat32, {4}); },
                      {"lse must have shape (3, 4)", "(4,)"});
  expect_call_refused(test, [&](AttendOp& op) { op.sinks = empty(DType::kUint8, {4}); }, {"sinks must have dtype"});
  expect_call_refused(test, [&](AttendOp& op) { op.lse = empty(DType::kUint8, {3, 4}); }, {"lse must have dtype"});
  expect_call_refused(test, [&](AttendOp& op) { op.output = empty(DType::kFloat32, {4, 128}); },
                      {"output must have shape (3, 4, 128)"});
}

TEST(AttendCall, RefusesResultsThatOverlap) {
  CacheCase test(4, 2, 128, 8);
  test.ask(2);
  test.add_sinks();
  test.add_score_bias();
  test.add_lse();
  expect_call_refused(test, [&](AttendOp& op) { op.lse = op.score_bias; }, {"lse must not overlap score_bias"});
  const std::shared_ptr<Storage> storage = test.device->empty(DType::kFloat32, {1 << 20}).storage();
  const auto at = [&](std::uint64_t first, const Shape& shape) {
    return Buffer(storage, DType::kFloat32, shape, first * sizeof(float));
  };
  const Buffer output = at(0, {2, 4, 128});
  for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{1023}}) {
    const auto lse = [&](AttendOp& op) { op.output = output, op.lse = at(first, {2, 4}); };
    const auto sinks = [&](AttendOp& op) { op.output = output, op.sinks = at(first, {4}); };
    const auto bias = [&](AttendOp& op) { op.output = output, op.score_bias = at(first, {2, 4}); };
    const auto tmp = [&](AttendOp& op) { op.tmp = at(0, {1 << 20}), op.lse = at(first, {2, 4}); };
    expect_call_refused(test, lse, {"lse must not overlap output"});
    expect_call_refused(test, sinks, {"output must not overlap sinks"});
    expect_call_refused(test, bias, {"output must not overlap score_bias"});
    expect_call_refused(test, tmp, {"tmp must not overlap lse"});
  }
  AttendOp op = test.attend_op();
  op.output = output;
  op.lse = at(1024, {2, 4});
  op.sinks = at(1032, {4});
  EXPECT_NO_THROW(validate(op, test.device.get()));
}

TEST(AttendCall, RefusesMoreQueriesThanPositions) {
  CacheCase test(4, 2, 128, 8);
  test.ask(9);
  expect_call_refused(test, [](AttendOp&) {}, {"q must hold at most 8 queries", "got 9"});
  expect_call_refused(test, [](AttendOp& op) { op.query_position = 7; }, {"q must hold at most 8 queries"});
  test.query_position = 8;
  EXPECT_NO_THROW(validate(test.attend_op(), test.device.get()));
  test.q = test.device->empty(DType::kFloat32, {0, 4, 128});
  expect_call_refused(test, [](AttendOp&) {}, {"q must hold at least one query"});
}

TEST(AttendCall, KnowsTheRowSizeOfEachSidesPlanes) {
  CacheCase test(4, 2, 128, 8, 5, 6, "cpu", Packing::kPlane);
  expect_call_refused(test, [](AttendOp& op) { op.packing = Packing::kByte; },
                      {"k_packed must have shape (2, 8, 128)", "(2, 8, 80)"});
  expect_call_refused(test, [](AttendOp& op) { op.v_packed = op.k_packed; },
                      {"v_packed must have shape (2, 8, 96)", "(2, 8, 80)"});
}

TEST(AttendCall, NeedsRoomForThePartialsOfAllQueries) {
  CacheCase test(4, 2, 128, 8);
  test.ask(3);
  const std::uint64_t floats = 3 * 4 * 32 * 130;
  expect_call_refused(test, [&](AttendOp& op) { op.tmp = test.device->empty(DType::kFloat32, {floats - 1}); },
                      {"tmp must hold at least 199680 bytes"});
  AttendOp op = test.attend_op();
  op.tmp = test.device->empty(DType::kFloat32, {floats});
  EXPECT_NO_THROW(validate(op, test.device.get()));
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

TEST(EveryCall, RefusesWhatIsNotGiven) {
  CacheCase test(4, 2, 128, 8);
  expect_call_refused(test, [](AttendOp& op) { op.q = Buffer(); }, {"q must be given"});
  expect_call_refused(test, [](AttendOp& op) { op.k_norms = Buffer(); }, {"k_norms must be given"});
  expect_call_refused(test, [](AttendOp& op) { op.v_codebook = nullptr; }, {"codebook must be given"});
  const Buffer keys = test.random({8, 2, 128}, 1);
  const auto expect_encoding_refused = [&](const auto& spoil, const char* message) {
    QuantizeOp op = test.quantize_op(keys, test.k_packed, test.k_norms, *test.k_codebook);
    spoil(op);
    EXPECT_TQ_ERROR(test.device->make_encoder()->hadamard_quantize(op), ErrorCode::kInvalidArgument, message);
  };
  expect_encoding_refused([](QuantizeOp& op) { op.targets.clear(); }, "targets must be at least one");
  expect_encoding_refused([](QuantizeOp& op) { op.targets[0].codebook = nullptr; }, "codebook must be given");
  expect_encoding_refused([](QuantizeOp& op) { op.targets[0].packed = Buffer(); }, "packed must be given");
  EXPECT_TQ_ERROR(test.device->make_encoder()->fwht({"op", Fwht::kPlain, Buffer()}), ErrorCode::kInvalidArgument,
                  "x must be given");
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
