#include <gtest/gtest.h>

#include "backends.h"
#include "cache_case.h"

namespace tq_hb {
namespace {

class AutoBarrier : public OnEveryBackend {
 protected:
  AutoBarrier()
      : test_(4, 2, 256, 40, 8, 8, GetParam()),
        encoder_(test_.device->make_encoder(true)),
        src_(test_.random({1, 2, 256}, 4)) {}

  void quantize_k() {
    encoder_->hadamard_quantize(test_.quantize_op(src_, test_.k_packed, test_.k_norms, *test_.k_codebook));
  }
  void undo(const Buffer& data) { encoder_->fwht({"fwht_sign_undo_f32", Fwht::kUndo, data}); }
  /// Barriers since the last call.
  std::size_t new_barriers() {
    std::size_t count = 0;
    for (const Node& node : encoder_->nodes()) count += node.kind == NodeKind::kBarrier;
    std::swap(count, seen_);
    return seen_ - count;
  }

  CacheCase test_;
  std::unique_ptr<CommandEncoder> encoder_;
  Buffer src_;
  std::size_t seen_ = 0;
};
TQ_RUN_ON_EVERY_BACKEND(AutoBarrier);

TEST_P(AutoBarrier, SeparatesAReadFromTheWriteBeforeIt) {
  quantize_k();
  EXPECT_EQ(new_barriers(), 0u);
  encoder_->dequantize({"tq_dequantize_hb_kv", test_.quantize_op(src_, {}, {}, *test_.k_codebook).args, 0,
                        test_.k_packed, test_.k_norms, test_.device->empty(DType::kFloat32, {2, 256}),
                        test_.k_codebook});
  EXPECT_EQ(new_barriers(), 1u);
}

TEST_P(AutoBarrier, SeparatesAWriteFromTheReadBeforeIt) {
  quantize_k();
  undo(src_);
  EXPECT_EQ(new_barriers(), 1u);
}

TEST_P(AutoBarrier, SeparatesTwoWrites) {
  undo(test_.q);
  undo(test_.q);
  EXPECT_EQ(new_barriers(), 1u);
}

TEST_P(AutoBarrier, LeavesIndependentOpsAlone) {
  const Buffer rows = test_.device->empty(DType::kFloat32, {4, 256});
  undo(rows.slice(0, 2));
  undo(rows.slice(2, 4));
  quantize_k();
  encoder_->hadamard_quantize(test_.quantize_op(src_, test_.v_packed, test_.v_norms, *test_.v_codebook));
  EXPECT_EQ(new_barriers(), 0u);
}

TEST_P(AutoBarrier, StartsAfreshAfterABarrierOfTheCallers) {
  quantize_k();
  encoder_->memory_barrier();
  EXPECT_EQ(new_barriers(), 1u);
  undo(src_);
  EXPECT_EQ(new_barriers(), 0u);
}

TEST_P(AutoBarrier, WaitsForWhatAttentionWrites) {
  encoder_->flash_attn_vec(test_.attend_op());
  new_barriers();
  undo(test_.output);
  EXPECT_EQ(new_barriers(), 1u);
}

TEST_P(AutoBarrier, GivesTheResultsOfAStepByStepRun) {
  const auto decode_step = [&](CommandEncoder& encoder, bool by_hand) {
    encoder.hadamard_quantize(test_.quantize_op(src_, test_.k_packed, test_.k_norms, *test_.k_codebook));
    if (by_hand) encoder.memory_barrier();
    encoder.flash_attn_vec(test_.attend_op());
    if (by_hand) encoder.memory_barrier();
    encoder.fwht({"fwht_sign_undo_f32", Fwht::kUndo, test_.output});
    encoder.commit();
    encoder.wait();
    return std::vector<float>(test_.output.data<float>(), test_.output.data<float>() + test_.output.size());
  };
  const std::vector<float> automatic = decode_step(*encoder_, false);
  EXPECT_EQ(automatic, decode_step(*test_.device->make_encoder(), true));
}

TEST_P(AutoBarrier, IsOffUnlessAskedFor) {
  const auto encoder = test_.device->make_encoder();
  encoder->fwht({"fwht_sign_undo_f32", Fwht::kUndo, test_.q});
  encoder->fwht({"fwht_sign_undo_f32", Fwht::kUndo, test_.q});
  EXPECT_EQ(encoder->nodes().size(), 2u);
}

}  // namespace
}  // namespace tq_hb
