// Every kernel of the Metal backend, in every form that a pipeline is made for, on one small shape each.
//
// The sanitizers' drivers run what the simulator records of these.

#include <gtest/gtest.h>

#include "cache_case.h"
#include "core/params.h"

namespace tq_hb {
namespace {

constexpr double kFloat32Nmse = 1e-11;
constexpr double kLse = 1e-5;

template <class Record>
void run(const Device& device, const Record& record) {
  const auto encoder = device.make_encoder();
  record(*encoder);
  encoder->commit();
  encoder->wait();
}

struct Format {
  Packing packing;
  unsigned k_bits, v_bits;
};

class MetalVariants : public testing::TestWithParam<std::tuple<unsigned, Format>> {
 protected:
  unsigned head_dim() const { return std::get<0>(GetParam()); }
  CacheCase cache(unsigned heads, unsigned capacity) const {
    const Format format = std::get<1>(GetParam());
    return CacheCase(heads, 2, head_dim(), capacity, format.k_bits, format.v_bits, "metal", format.packing);
  }

  void expect_right(const CacheCase& test, AttendOp op, const CacheCase::Expected& want) {
    run(*test.device, [&](CommandEncoder& encoder) { encoder.flash_attn_vec(op); });
    EXPECT_LT(nmse({op.output.data<float>(), op.output.data<float>() + op.output.size()}, want.output), kFloat32Nmse);
    if (op.lse) {
      EXPECT_TRUE(close(*op.lse, want.lse, kLse));
    }
    op.fused_undo = true;
    run(*test.device, [&](CommandEncoder& encoder) { encoder.flash_attn_vec(op); });
    run(*test.device, [&](CommandEncoder& encoder) { encoder.fwht({"fwht", Fwht::kPremult, op.output}); });
    EXPECT_LT(nmse({op.output.data<float>(), op.output.data<float>() + op.output.size()}, want.output), kFloat32Nmse);
  }
};

TEST_P(MetalVariants, Attend) {
  CacheCase test = cache(6, 70);
  test.ask(2);
  test.add_score_bias();
  AttendOp direct = test.attend_op();
  direct.args.nwg = 1;
  expect_right(test, direct, test.expected_with_lse());
  test.add_sinks();
  test.add_lse();
  const CacheCase::Expected want = test.expected_with_lse();
  AttendOp op = test.attend_op();
  for (const unsigned nsg : {1u, 4u}) {
    for (const unsigned nwg : {1u, 3u}) {
      op.args.nsg = nsg;
      op.args.nwg = nwg;
      expect_right(test, op, want);
    }
  }
  op.kernel = AttendKernel::kGroup;
  op.args.nwg = 2;
  for (const unsigned tile : {2u, 4u, 8u}) {
    op.head_tile = tile;
    expect_right(test, op, want);
  }
}

TEST_P(MetalVariants, Codec) {
  const CacheCase test = cache(2, 3);
  const Buffer src = test.random({2, 2, head_dim()}, 4);
  QuantizeOp op = test.quantize_op(src, test.k_packed, test.k_norms, *test.k_codebook);
  const DequantizeOp dequantize{
      "tq_dequantize_hb_kv", op.args,      1,
      test.k_packed,         test.k_norms, test.device->empty(DType::kFloat32, {2, 2, head_dim()}),
      test.k_codebook,       test.packing};
  run(*test.device, [&](CommandEncoder& encoder) { encoder.hadamard_quantize(op); });
  op.name = "hadamard_quantize_kv_hb_dual";
  op.targets[0].key = "k";
  op.targets.push_back({src, test.v_packed, test.v_norms, test.v_codebook, "v"});
  run(*test.device, [&](CommandEncoder& encoder) { encoder.hadamard_quantize(op); });
  run(*test.device, [&](CommandEncoder& encoder) { encoder.dequantize(dequantize); });
  const std::vector<double> row = test.decoded(test.k_packed, test.k_norms, *test.k_codebook, 1, 2);
  for (unsigned j = 0; j < head_dim(); ++j) {
    EXPECT_FLOAT_EQ(dequantize.output.row(1).row(1).data<float>()[j], static_cast<float>(row[j])) << j;
  }
  for (const Fwht kind : {Fwht::kPremult, Fwht::kUndo, Fwht::kPlain, Fwht::kPlain}) {
    run(*test.device, [&](CommandEncoder& encoder) { encoder.fwht({"fwht", kind, src}); });
  }
  const Buffer same = test.random({2, 2, head_dim()}, 4);
  for (std::uint64_t i = 0; i < src.size(); ++i) EXPECT_NEAR(src.data<float>()[i], same.data<float>()[i], 1e-5);
}

INSTANTIATE_TEST_SUITE_P(All, MetalVariants,
                         testing::Combine(testing::Values(64u, 128u, 256u, 512u),
                                          testing::Values(Format{Packing::kByte, 8, 8}, Format{Packing::kByte, 6, 6},
                                                          Format{Packing::kByte, 5, 5}, Format{Packing::kByte, 8, 6},
                                                          Format{Packing::kPlane, 5, 5}, Format{Packing::kPlane, 6, 6},
                                                          Format{Packing::kPlane, 6, 8},
                                                          Format{Packing::kPlane, 8, 5})));

}  // namespace
}  // namespace tq_hb
