#include <future>
#include <limits>
#include <new>
#include <thread>

#include <gtest/gtest.h>

#include "backends.h"
#include "cache_case.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

class CommandEncoderOn : public OnEveryBackend {};
TQ_RUN_ON_EVERY_BACKEND(CommandEncoderOn);

TEST_P(CommandEncoderOn, RunsNothingBeforeCommit) {
  CacheCase test(2, 1, 256, 8, 8, 8, GetParam());
  const auto encoder = test.device->make_encoder();
  encoder->flash_attn_vec(test.attend_op());
  EXPECT_EQ(test.output.data<float>()[0], 0.0f);
  encoder->commit();
  encoder->wait();
  EXPECT_NE(test.output.data<float>()[0], 0.0f);
  EXPECT_GE(encoder->gpu_time(), 0.0);
}

TEST_P(CommandEncoderOn, RefusesUseOutOfOrder) {
  CacheCase test(2, 1, 256, 8, 8, 8, GetParam());
  const auto encoder = test.device->make_encoder();
  EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kDevice, "wait", "commit");
  EXPECT_TQ_ERROR(encoder->gpu_time(), ErrorCode::kDevice, "gpu_time");
  encoder->commit();
  EXPECT_TQ_ERROR(encoder->commit(), ErrorCode::kDevice, "commit");
  EXPECT_TQ_ERROR(encoder->memory_barrier(), ErrorCode::kDevice, "memory_barrier");
  EXPECT_TQ_ERROR(encoder->flash_attn_vec(test.attend_op()), ErrorCode::kDevice, "flash_attn_vec_tq_hb");
  encoder->wait();
  encoder->wait();
}

/// Drops its ops.
class IdleEncoder : public CommandEncoder {
 public:
  using CommandEncoder::CommandEncoder;

 private:
  void encode(QuantizeOp) override {}
  void encode(DequantizeOp) override {}
  void encode(AttendOp) override {}
  void encode(FwhtOp) override {}
  void encode_barrier() override {}
  void submit() override {}
};

/// Stays in commit() until it is let go.
class StuckEncoder final : public IdleEncoder {
 public:
  using IdleEncoder::IdleEncoder;
  std::promise<void> entered, leave;

 private:
  void submit() override {
    entered.set_value();
    leave.get_future().wait();
  }
  double finish() override { return 1.5; }
};

TEST(CommandEncoder, RefusesASecondThreadWhileItWorks) {
  CacheCase test(2, 1, 256, 8);
  StuckEncoder encoder(test.device.get());
  std::thread worker([&] { encoder.commit(); });
  encoder.entered.get_future().wait();
  EXPECT_TQ_ERROR(encoder.wait(), ErrorCode::kDevice, "wait", "another thread");
  EXPECT_TQ_ERROR(encoder.commit(), ErrorCode::kDevice, "commit", "another thread");
  EXPECT_TQ_ERROR(encoder.gpu_time(), ErrorCode::kDevice, "gpu_time", "another thread");
  EXPECT_TQ_ERROR(encoder.flash_attn_vec(test.attend_op()), ErrorCode::kDevice, "flash_attn_vec_tq_hb");
  encoder.leave.set_value();
  worker.join();
  encoder.wait();
  EXPECT_EQ(encoder.gpu_time(), 1.5);
}

/// Its ops fail in a way that no backend foresaw.
class FailingEncoder final : public IdleEncoder {
 public:
  using IdleEncoder::IdleEncoder;

 private:
  double finish() override { throw std::bad_alloc(); }
};

TEST(CommandEncoder, ThrowsWhateverWentWrongAtEveryWait) {
  CacheCase test(2, 1, 256, 8);
  FailingEncoder encoder(test.device.get());
  encoder.commit();
  for (int i = 0; i < 2; ++i) EXPECT_THROW(encoder.wait(), std::bad_alloc);
  EXPECT_TRUE(encoder.is_done());
}

TEST_P(CommandEncoderOn, LeavesABadRowAndWritesTheOthers) {
  CacheCase test(2, 2, 256, 4, 8, 8, GetParam());
  const Buffer src = test.random({3, 2, 256}, 9);
  src.data<float>()[(1 * 2 + 1) * 256 + 7] = std::numeric_limits<float>::quiet_NaN();
  const float untouched = test.k_norms.data<float>()[4 + 1];
  const float overwritten = test.k_norms.data<float>()[1];
  const auto encoder = test.device->make_encoder();
  encoder->hadamard_quantize(test.quantize_op(src, test.k_packed, test.k_norms, *test.k_codebook));
  encoder->commit();
  for (int again = 0; again < 2; ++again) {
    EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kInvalidArgument, "src", "token 1, head 1");
  }
  EXPECT_EQ(test.k_norms.data<float>()[4 + 1], untouched);
  EXPECT_NE(test.k_norms.data<float>()[1], overwritten);
}

TEST_P(CommandEncoderOn, WritesAPairAsEachOfItAlone) {
  for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
    CacheCase test(2, 2, 128, 8, 5, 6, GetParam(), packing);
    const Buffer k = test.random({8, 2, 128}, 9), v = test.random({8, 2, 128}, 10);
    const auto written = [&](const auto& record) {
      const auto encoder = test.device->make_encoder();
      record(*encoder);
      encoder->commit();
      encoder->wait();
      std::vector<std::uint8_t> bytes;
      for (const Buffer* buffer : {&test.k_packed, &test.k_norms, &test.v_packed, &test.v_norms}) {
        const auto* data = reinterpret_cast<std::uint8_t*>(buffer->host());
        bytes.insert(bytes.end(), data, data + buffer->nbytes());
      }
      return bytes;
    };
    const QuantizeOp k_op = test.quantize_op(k, test.k_packed, test.k_norms, *test.k_codebook);
    const QuantizeOp v_op = test.quantize_op(v, test.v_packed, test.v_norms, *test.v_codebook);
    const std::vector<std::uint8_t> before = written([](CommandEncoder&) {});
    QuantizeOp pair = k_op;
    pair.name = "hadamard_quantize_kv_hb_dual";
    pair.targets[0].key = "k";
    pair.targets.push_back({v, test.v_packed, test.v_norms, test.v_codebook, "v"});
    const std::vector<std::uint8_t> together =
        written([&](CommandEncoder& encoder) { encoder.hadamard_quantize(pair); });
    EXPECT_NE(together, before);
    const std::vector<std::uint8_t> apart = written([&](CommandEncoder& encoder) {
      encoder.hadamard_quantize(
          test.quantize_op(test.random(k.shape(), 11), test.k_packed, test.k_norms, *test.k_codebook));
      encoder.hadamard_quantize(
          test.quantize_op(test.random(v.shape(), 12), test.v_packed, test.v_norms, *test.v_codebook));
      encoder.memory_barrier();
      encoder.hadamard_quantize(k_op);
      encoder.hadamard_quantize(v_op);
    });
    EXPECT_EQ(apart, together);
  }
}

TEST_P(CommandEncoderOn, LeavesTheOutputOfABadQuery) {
  CacheCase test(2, 1, 256, 8, 8, 8, GetParam());
  test.q.data<float>()[256] = std::numeric_limits<float>::infinity();
  test.output.data<float>()[256] = 42.0f;
  const auto encoder = test.device->make_encoder();
  encoder->flash_attn_vec(test.attend_op());
  encoder->commit();
  EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kInvalidArgument, "q", "token 0, head 1");
  EXPECT_EQ(test.output.data<float>()[256], 42.0f);
  EXPECT_NE(test.output.data<float>()[0], 0.0f);
}

TEST_P(CommandEncoderOn, ChecksBuffersBeforeItRecords) {
  CacheCase test(2, 1, 256, 8, 8, 8, GetParam());
  const auto encoder = test.device->make_encoder();
  const auto refuse = [&](AttendOp op, std::initializer_list<const char*> parts) {
    expect_error([&] { encoder->flash_attn_vec(std::move(op)); }, ErrorCode::kInvalidArgument, parts);
  };
  AttendOp op = test.attend_op();
  op.k_norms = test.device->empty(DType::kFloat32, {1, 7});
  refuse(op, {"k_norms must have shape (1, 8)", "(1, 7)"});
  op = test.attend_op();
  op.v_packed = test.device->empty(DType::kUint16, {1, 8, 256});
  refuse(op, {"v_packed must have dtype uint8", "uint16"});
  op = test.attend_op();
  op.output = op.q;
  refuse(op, {"output must not overlap q"});
  op = test.attend_op();
  op.tmp = test.device->empty(DType::kFloat32, {100});
  refuse(op, {"tmp must hold at least 66048 bytes", "400"});
  op = test.attend_op();
  op.args.nwg = 33;
  refuse(op, {"nwg must be from 1 to 32", "33"});
  EXPECT_TRUE(encoder->kernels().empty());
}

TEST_P(CommandEncoderOn, ARunLongerThanTheRingKeepsTheNewest) {
  CacheCase test(1, 1, 256, 4, 8, 8, GetParam());
  const Buffer src = test.random({11, 1, 256}, 5);
  QuantizeOp op = test.quantize_op(src, test.k_packed, test.k_norms, *test.k_codebook);
  op.args.is_sliding = 1;
  op.args.write_pos = 3;
  const auto encoder = test.device->make_encoder();
  encoder->hadamard_quantize(op);
  encoder->commit();
  encoder->wait();
  for (std::size_t token = 7; token < 11; ++token) {
    std::uint8_t codes[256];
    float norm;
    ASSERT_TRUE(encode_row(src.data<float>() + token * 256, 256, 1.0f, *test.k_codebook, codes, &norm));
    EXPECT_EQ(test.k_norms.data<float>()[(3 + token) % 4], norm);
  }
}

}  // namespace
}  // namespace tq_hb
