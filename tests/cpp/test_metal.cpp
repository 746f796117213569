// The Metal backend through the device's interface, compared with the cpu backend and float64.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cache_case.h"
#include "core/bits.h"
#include "core/params.h"
#include "expect_error.h"
#include "metal/device.h"

namespace tq_hb {
namespace {

constexpr double kFloat32Nmse = 1e-11;
constexpr double kLse = 1e-5;

std::vector<std::uint8_t> bytes_of(const Buffer& buffer) {
  return {buffer.data<std::uint8_t>(), buffer.data<std::uint8_t>() + buffer.nbytes()};
}

struct EncodeCase {
  unsigned head_dim, k_bits, v_bits;
  CodebookName name;
  float scale_factor;
  float magnitude;
  Packing packing = Packing::kByte;
};

/// Encodes K and V on a device, in one op or two, and returns the cache's bytes.
std::vector<std::uint8_t> encoded(const std::string& backend, const EncodeCase& c, bool dual) {
  constexpr unsigned kTokens = 7, kHeads = 3, kCapacity = 5;
  const auto device = open_device(backend);
  std::mt19937 random(c.head_dim + c.k_bits);
  std::normal_distribution<float> normal(0.0f, c.magnitude);
  TqHadamardQuantizeArgs args{};
  args.head_dim = c.head_dim;
  args.num_kv_heads = kHeads;
  args.write_pos = 4;
  args.cache_capacity = kCapacity;
  args.is_sliding = 1;
  args.scale_factor_d512 = c.scale_factor;
  args.codebook_bits = c.k_bits;
  std::vector<QuantizeTarget> targets;
  for (const unsigned cbits : {c.k_bits, c.v_bits}) {
    QuantizeTarget target;
    target.src = device->empty(DType::kFloat32, {kTokens, kHeads, c.head_dim});
    for (std::uint64_t i = 0; i < target.src.size(); ++i) target.src.data<float>()[i] = normal(random);
    std::fill_n(target.src.row(6).data<float>(), c.head_dim, 0.0f);
    target.packed = device->empty(DType::kUint8, {kHeads, kCapacity, row_bytes(c.packing, cbits, c.head_dim)});
    Shape norms{kHeads, kCapacity};
    if (c.head_dim == 512) norms.push_back(2);
    target.norms = device->empty(DType::kFloat32, norms);
    target.codebook = &find_codebook("test", c.name, cbits);
    targets.push_back(target);
  }
  const auto encoder = device->make_encoder();
  if (dual) {
    targets[0].key = "k";
    targets[1].key = "v";
    encoder->hadamard_quantize({"hadamard_quantize_kv_hb_dual", args, targets, c.packing});
  } else {
    for (const QuantizeTarget& target : targets)
      encoder->hadamard_quantize({"hadamard_quantize_kv_hb", args, {target}, c.packing});
  }
  encoder->commit();
  encoder->wait();
  std::vector<std::uint8_t> bytes;
  for (const QuantizeTarget& target : targets) {
    for (const Buffer& part : {target.packed, target.norms}) {
      const std::vector<std::uint8_t> more = bytes_of(part);
      bytes.insert(bytes.end(), more.begin(), more.end());
    }
  }
  return bytes;
}

TEST(Metal, EncodesTheCpusBytes) {
  for (const EncodeCase& c : {EncodeCase{256, 8, 8, CodebookName::kLloydMax, 1.0f, 1.0f},
                              {256, 5, 6, CodebookName::kMlxNative, 1.0f, 1e-18f},
                              {256, 6, 8, CodebookName::kLloydMax, 1.0f, 1e15f},
                              {512, 6, 5, CodebookName::kLloydMax, 0.7f, 1.0f},
                              {512, 8, 5, CodebookName::kMlxNative, 1.0f, 1e-30f},
                              {64, 5, 6, CodebookName::kLloydMax, 1.0f, 1.0f},
                              {128, 8, 6, CodebookName::kMlxNative, 1.0f, 1e-12f},
                              {64, 5, 6, CodebookName::kLloydMax, 1.0f, 1.0f, Packing::kPlane},
                              {128, 6, 5, CodebookName::kLloydMax, 1.0f, 1.0f, Packing::kPlane},
                              {256, 5, 8, CodebookName::kMlxNative, 1.0f, 1.0f, Packing::kPlane},
                              {512, 6, 5, CodebookName::kLloydMax, 0.7f, 1e-3f, Packing::kPlane}}) {
    const std::vector<std::uint8_t> want = encoded("cpu", c, true);
    EXPECT_EQ(encoded("metal", c, true), want) << c.head_dim << ' ' << c.k_bits << ' ' << c.v_bits;
    EXPECT_EQ(encoded("metal", c, false), want) << c.head_dim << ' ' << c.k_bits << ' ' << c.v_bits;
  }
}

/// What a device makes of a cache's rows, decoded, and of rows rotated in each way.
std::vector<std::uint8_t> decoded_and_rotated(const std::string& backend, unsigned head_dim, Packing packing) {
  CacheCase test(2, 2, head_dim, 6, 5, 8, backend, packing);
  DequantizeOp op{"tq_dequantize_hb_kv",  test.quantize_op(test.q, test.k_packed, test.k_norms, *test.k_codebook).args,
                  std::uint64_t{1} << 40, test.k_packed,
                  test.k_norms,           test.device->empty(DType::kFloat32, {4, 2, head_dim}),
                  test.k_codebook,        packing};
  op.args.is_sliding = 1;
  const Buffer rows[] = {test.random({3, head_dim}, 1), test.random({3, head_dim}, 2), test.random({3, head_dim}, 3)};
  const auto encoder = test.device->make_encoder();
  encoder->dequantize(op);
  encoder->fwht({"fwht", Fwht::kPremult, rows[0]});
  encoder->fwht({"fwht", Fwht::kUndo, rows[1]});
  encoder->fwht({"fwht", Fwht::kPlain, rows[2]});
  encoder->commit();
  encoder->wait();
  std::vector<std::uint8_t> bytes = bytes_of(op.output);
  for (const Buffer& buffer : rows) {
    const std::vector<std::uint8_t> more = bytes_of(buffer);
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
  return bytes;
}

TEST(Metal, DecodesAndRotatesAsTheCpuDoes) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
      EXPECT_EQ(decoded_and_rotated("metal", head_dim, packing), decoded_and_rotated("cpu", head_dim, packing))
          << head_dim;
    }
  }
}

TEST(Metal, AttendsAlikeForEverySplit) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    CacheCase test(4, 2, head_dim, 150, 6, 8, "metal");
    const std::vector<double> want = test.expected();
    for (const unsigned nsg : {1u, 2u, 4u}) {
      for (const unsigned nwg : {1u, 2u, 7u, 32u}) {
        test.args.nsg = nsg;
        test.args.nwg = nwg;
        EXPECT_LT(nmse(test.attend(), want), kFloat32Nmse) << head_dim << ' ' << nsg << ' ' << nwg;
      }
    }
  }
}

std::vector<float> run(const CacheCase& test, const AttendOp& op) {
  const auto encoder = test.device->make_encoder();
  encoder->flash_attn_vec(op);
  encoder->commit();
  encoder->wait();
  return {op.output.data<float>(), op.output.data<float>() + op.output.size()};
}

TEST(Metal, GroupKernelAttendsAlikeForEveryTileAndSplit) {
  CacheCase test(10, 2, 256, 150, 8, 5, "metal");
  const std::vector<double> want = test.expected();
  AttendOp op = test.attend_op();
  op.kernel = AttendKernel::kGroup;
  for (const unsigned tile : {2u, 4u, 8u}) {
    for (const unsigned splits : {1u, 3u, 256u}) {
      op.head_tile = tile;
      op.args.nwg = splits;
      EXPECT_LT(nmse(run(test, op), want), kFloat32Nmse) << tile << ' ' << splits;
    }
  }
}

AttendOp group_op(const CacheCase& test, unsigned tile, unsigned splits) {
  AttendOp op = test.attend_op();
  op.kernel = AttendKernel::kGroup;
  op.head_tile = tile;
  op.args.nwg = splits;
  return op;
}

TEST(Metal, GroupKernelTakesSeveralQueriesOfEveryFormat) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const auto& [packing, k_bits, v_bits] :
         {std::tuple{Packing::kByte, 8u, 6u}, {Packing::kPlane, 5u, 6u}, {Packing::kPlane, 6u, 8u}}) {
      CacheCase test(6, 2, head_dim, 100, k_bits, v_bits, "metal", packing);
      test.args.ring_start = 33;
      test.args.mask_type = 2;
      test.args.softcap = 20.0f;
      test.ask(5);
      test.add_lse();
      test.add_sinks();
      test.add_score_bias();
      for (const unsigned window : {1u, 40u, 200u}) {
        test.args.sliding_window = window;
        const CacheCase::Expected want = test.expected_with_lse();
        for (const unsigned tile : {2u, 4u, 8u}) {
          EXPECT_LT(nmse(run(test, group_op(test, tile, 2)), want.output), kFloat32Nmse) << head_dim << ' ' << window;
          EXPECT_TRUE(close(*test.lse, want.lse, kLse)) << head_dim << ' ' << window;
        }
      }
    }
  }
}

TEST(Metal, GroupKernelTakesQueriesThatSeeFewKeysOrNone) {
  CacheCase test(4, 2, 128, 70, 8, 5, "metal", Packing::kPlane);
  test.args.mask_type = 2;
  test.args.sliding_window = 8;
  test.ask(5);
  test.add_lse();
  for (const unsigned position : {4u, 31u, 69u, 70u, 74u, 79u, 90u, 4000000000u}) {
    test.query_position = position;
    const CacheCase::Expected want = test.expected_with_lse();
    const std::vector<float> got = run(test, group_op(test, 4, 2));
    EXPECT_TRUE(close(test.output, want.output, kLse)) << position;
    EXPECT_TRUE(close(*test.lse, want.lse, kLse)) << position;
    if (position >= 90) {
      EXPECT_EQ(got, std::vector<float>(got.size(), 0.0f)) << position;
    }
  }
}

TEST(Metal, ANormThatIsNaNShowsWhereItsKeyIsSeenAlone) {
  for (const unsigned head_dim : {64u, 512u}) {
    CacheCase test(4, 2, head_dim, 70, 8, 8, "metal");
    test.args.mask_type = 2;
    test.args.sliding_window = 20;
    test.ask(4);
    AttendOp direct = test.attend_op(), split = test.attend_op();
    direct.args.nsg = 4;
    split.args.nwg = 3;
    for (const AttendOp& op : {group_op(test, 4, 2), direct, split}) {
      const std::vector<float> want = run(test, op);
      // The first query sees ages 47 to 66, the last 50 to 69; nobody sees the key before.
      for (const Buffer* side : {&test.k_norms, &test.v_norms}) {
        float* norms = side->data<float>();
        const std::vector<float> kept(norms, norms + side->size());
        const std::uint64_t of_key = side->size() / 140;
        for (const std::uint64_t age : {46u, 47u, 69u}) {
          std::fill_n(norms + age * of_key, of_key, std::numeric_limits<float>::quiet_NaN());
        }
        const std::vector<float> got = run(test, op);
        std::copy(kept.begin(), kept.end(), norms);
        for (std::size_t query = 0; query < 4; ++query) {
          const bool touched = query == 0 || query == 3;
          for (std::size_t i = 0; i < 2 * head_dim; ++i) {
            const std::size_t at = query * 4 * head_dim + i;
            ASSERT_TRUE(touched ? std::isnan(got[at]) : got[at] == want[at]) << query << ' ' << i;
          }
        }
      }
    }
  }
}

TEST(Metal, PlanesGiveTheBitsOfBytes) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const unsigned bits : {5u, 6u}) {
      CacheCase planes(8, 2, head_dim, 45, bits, bits, "metal", Packing::kPlane);
      const CacheCase bytes(8, 2, head_dim, 45, bits, bits, "metal");
      EXPECT_EQ(planes.attend(), bytes.attend()) << head_dim << ' ' << bits;
      EXPECT_EQ(run(planes, group_op(planes, 4, 2)), run(bytes, group_op(bytes, 4, 2))) << head_dim << ' ' << bits;
    }
  }
}

TEST(Metal, ABiasThatIsNotFiniteIsABadRow) {
  for (const bool group : {false, true}) {
    CacheCase test(4, 2, 256, 40, 8, 8, "metal");
    test.ask(3);
    test.add_score_bias();
    test.add_lse();
    std::fill_n(test.output.data<float>(), test.output.size(), 42.0f);
    std::fill_n(test.lse->data<float>(), test.lse->size(), 42.0f);
    const CacheCase::Expected want = test.expected_with_lse();
    test.score_bias->data<float>()[6] = std::numeric_limits<float>::infinity();
    const auto encoder = test.device->make_encoder();
    encoder->flash_attn_vec(group ? group_op(test, 4, 2) : test.attend_op());
    encoder->commit();
    EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kInvalidArgument, "q ", "token 1, head 2");
    for (std::size_t row = 0; row < 12; ++row) {
      const float* got = test.output.data<float>() + row * 256;
      if (row == 6) {
        EXPECT_EQ(std::vector<float>(got, got + 256), std::vector<float>(256, 42.0f));
        EXPECT_EQ(test.lse->data<float>()[row], 42.0f);
      } else {
        EXPECT_NEAR(static_cast<double>(got[7]), want.output[row * 256 + 7], 1e-5) << row;
      }
    }
  }
}

TEST(Metal, FusedUndoIsTheUndoOfThePlainResult) {
  for (const AttendKernel kernel : {AttendKernel::kPerHead, AttendKernel::kGroup}) {
    for (const unsigned nwg : {1u, 5u}) {
      CacheCase test(4, 2, 512, 70, 8, 8, "metal");
      AttendOp op = test.attend_op();
      op.kernel = kernel;
      op.head_tile = kernel == AttendKernel::kGroup ? 2 : 1;
      op.args.nwg = nwg;
      std::vector<float> want = run(test, op);
      for (unsigned h = 0; h < 4; ++h) unrotate_row(want.data() + h * 512, 512);
      op.fused_undo = true;
      const std::vector<float> got = run(test, op);
      EXPECT_LT(nmse(got, std::vector<double>(want.begin(), want.end())), kFloat32Nmse) << nwg;
    }
  }
}

TEST(Metal, RefusesABadSplitOrTile) {
  CacheCase test(4, 2, 256, 8, 8, 8, "metal");
  const auto refuse = [&](unsigned tile, unsigned splits, const char* message) {
    AttendOp op = test.attend_op();
    op.kernel = AttendKernel::kGroup;
    op.head_tile = tile;
    op.args.nwg = splits;
    EXPECT_TQ_ERROR(test.device->make_encoder()->flash_attn_vec(op), ErrorCode::kInvalidArgument, message);
  };
  refuse(1, 1, "head_tile must be 2, 4 or 8, got 1");
  refuse(2, 0, "nwg must be from 1 to 256, got 0");
  refuse(2, 257, "nwg must be from 1 to 256, got 257");
  AttendOp op = test.attend_op();
  op.kernel = AttendKernel::kGroup;
  op.head_tile = 2;
  op.args.nwg = 256;
  op.tmp = test.device->empty(DType::kFloat32, {tmp_buffer_bytes(4, 256) / 4});
  EXPECT_TQ_ERROR(test.device->make_encoder()->flash_attn_vec(op), ErrorCode::kInvalidArgument, "tmp must hold");
}

TEST(Metal, CpuOffersNoGroupKernel) {
  CacheCase test(4, 2, 256, 8);
  AttendOp op = test.attend_op();
  op.kernel = AttendKernel::kGroup;
  op.head_tile = 2;
  EXPECT_TQ_ERROR(test.device->make_encoder()->flash_attn_vec(op), ErrorCode::kUnsupported, "group kernel", "cpu");
}

TEST(Metal, NodesTellWhatWasLaunched) {
  CacheCase test(4, 2, 256, 64, 6, 8, "metal");
  const auto encoder = test.device->make_encoder();
  AttendOp op = test.attend_op();
  op.args.nwg = 3;
  op.args.nsg = 2;
  encoder->flash_attn_vec(op);
  encoder->memory_barrier();
  op.args.nwg = 1;
  encoder->flash_attn_vec(op);
  const std::vector<Node> nodes = encoder->nodes();
  ASSERT_EQ(nodes.size(), 5u);
  EXPECT_EQ(nodes[0].kind, NodeKind::kSdpa);
  EXPECT_EQ(nodes[0].kernel, "flash_attn_vec_tq_hb_dk256");
  EXPECT_EQ(nodes[0].threadgroups.height, 4u);
  EXPECT_EQ(nodes[0].threadgroups.depth, 3u);
  EXPECT_EQ(nodes[0].threads.width, 32u);
  EXPECT_EQ(nodes[0].threads.height, 2u);
  EXPECT_GT(nodes[0].threadgroup_bytes, 0u);
  EXPECT_EQ(nodes[1].kind, NodeKind::kBarrier);
  EXPECT_EQ(nodes[2].kernel, "flash_attn_vec_reduce_dk256");
  EXPECT_EQ(nodes[2].kind, NodeKind::kSdpa);
  EXPECT_EQ(nodes[3].kind, NodeKind::kBarrier);
  EXPECT_EQ(nodes[4].threadgroups.depth, 1u);
  EXPECT_EQ(encoder->kernels().size(), 3u);
}

TEST(Metal, EveryQueryAndHeadIsARow) {
  CacheCase test(6, 2, 128, 64, 6, 8, "metal");
  test.ask(5);
  const auto encoder = test.device->make_encoder();
  AttendOp op = test.attend_op();
  op.args.nwg = 1;
  encoder->flash_attn_vec(op);
  encoder->memory_barrier();
  encoder->flash_attn_vec(group_op(test, 8, 3));
  const std::vector<Node> nodes = encoder->nodes();
  ASSERT_EQ(nodes.size(), 5u);
  EXPECT_EQ(nodes[0].threadgroups.width, 5u);
  EXPECT_EQ(nodes[0].threadgroups.height, 6u);
  EXPECT_EQ(nodes[2].threadgroups.width, 2u);  // 15 rows of each KV head in tiles of 8
  EXPECT_EQ(nodes[2].threadgroups.height, 2u);
  EXPECT_EQ(nodes[2].threadgroups.depth, 3u);
  EXPECT_EQ(nodes[4].threadgroups.width, 30u);
}

TEST(Metal, SinksAndLseAreTheReductions) {
  CacheCase test(2, 1, 64, 8, 8, 8, "metal");
  test.args.nwg = 1;
  const auto launches = [&] {
    const auto encoder = test.device->make_encoder();
    encoder->flash_attn_vec(test.attend_op());
    return encoder->kernels().size();
  };
  EXPECT_EQ(launches(), 1u);
  test.add_score_bias();
  EXPECT_EQ(launches(), 1u);
  test.add_lse();
  EXPECT_EQ(launches(), 2u);
  test.lse.reset();
  test.add_sinks();
  EXPECT_EQ(launches(), 2u);
}

TEST(Metal, HonoursOffsets) {
  CacheCase test(2, 1, 256, 40, 8, 8, "metal");
  const std::vector<float> want = test.attend();
  AttendOp op = test.attend_op();
  for (Buffer* buffer : {&op.q, &op.k_packed, &op.k_norms, &op.v_packed, &op.v_norms, &op.output}) {
    Shape shape = buffer->shape();
    shape.insert(shape.begin(), 3);
    const Buffer stacked = test.device->empty(buffer->dtype(), shape);
    std::memset(stacked.host(), 0xFF, stacked.nbytes());
    const Buffer middle = stacked.row(1);
    std::memcpy(middle.host(), buffer->host(), buffer->nbytes());
    *buffer = middle;
  }
  EXPECT_EQ(run(test, op), want);
}

TEST(Metal, RefusesRowsThatAreNotAligned) {
  CacheCase test(2, 1, 256, 40, 8, 8, "metal");
  const Buffer bytes = test.device->empty(DType::kFloat32, {1000});
  const Buffer shifted(bytes.storage(), DType::kFloat32, {2, 256}, 4);
  EXPECT_TQ_ERROR(test.device->make_encoder()->fwht({"fwht", Fwht::kPlain, shifted}), ErrorCode::kInvalidArgument,
                  "x must start at a multiple of 16 bytes", "4");
}

TEST(Metal, CodesMayStartAtAnyMultipleOf8) {
  CacheCase test(2, 1, 64, 3, 5, 5, "metal", Packing::kPlane);
  AttendOp op = test.attend_op();
  const std::vector<float> want = run(test, op);
  const std::vector<float> want_group = run(test, group_op(test, 2, 1));
  const auto moved = [&](const Buffer& codes, std::uint64_t offset) {
    const Buffer larger = test.device->empty(DType::kUint8, {256});
    std::memcpy(larger.data<std::uint8_t>() + offset, codes.host(), codes.nbytes());
    return Buffer(larger.storage(), DType::kUint8, codes.shape(), offset);
  };
  test.k_packed = moved(test.k_packed, 40);
  test.v_packed = moved(test.v_packed, 120);
  EXPECT_EQ(run(test, test.attend_op()), want);
  EXPECT_EQ(run(test, group_op(test, 2, 1)), want_group);
  test.k_packed = moved(test.k_packed, 4);
  EXPECT_TQ_ERROR(test.device->make_encoder()->flash_attn_vec(test.attend_op()), ErrorCode::kInvalidArgument,
                  "k_packed must start at a multiple of 8 bytes", "4");
}

TEST(Metal, RefusesBuffersOfAnotherDevice) {
  CacheCase test(2, 1, 256, 8, 8, 8, "metal");
  for (const auto& stranger : {make_metal_device(), open_device("cpu")}) {
    AttendOp op = test.attend_op();
    op.k_norms = stranger->empty(DType::kFloat32, {1, 8});
    EXPECT_TQ_ERROR(test.device->make_encoder()->flash_attn_vec(op), ErrorCode::kInvalidArgument, "k_norms",
                    "another device");
  }
}

TEST(Metal, FreshMemoryIsZero) {
  const Buffer buffer = open_device("metal")->empty(DType::kUint8, {70000});
  EXPECT_EQ(bytes_of(buffer), std::vector<std::uint8_t>(70000));
  EXPECT_EQ(open_device("metal")->empty(DType::kFloat32, {0, 4}).nbytes(), 0u);
}

TEST(Metal, WrapsWholePagesInPlace) {
  const auto device = open_device("metal");
  const auto page = static_cast<std::size_t>(getpagesize());
  const std::unique_ptr<std::byte, void (*)(void*)> memory(static_cast<std::byte*>(std::aligned_alloc(page, 2 * page)),
                                                           &std::free);
  auto* values = reinterpret_cast<float*>(memory.get());
  for (int i = 0; i < 512; ++i) values[i] = static_cast<float>(i % 7);
  std::vector<float> want(values, values + 512);
  for (int row = 0; row < 2; ++row) rotate_row(want.data() + row * 256, 256);

  auto owner = std::make_shared<int>(1);
  const std::weak_ptr<int> is_owned = owner;
  {
    const auto storage = device->wrap_host(memory.get(), 512 * sizeof(float), std::move(owner));
    ASSERT_NE(storage, nullptr);
    EXPECT_EQ(storage->host(), memory.get());
    EXPECT_EQ(storage->size(), 2048u);
    const auto encoder = device->make_encoder();
    encoder->fwht({"fwht", Fwht::kPremult, Buffer(storage, DType::kFloat32, {2, 256})});
    encoder->commit();
    encoder->wait();
    EXPECT_FALSE(is_owned.expired());
  }
  EXPECT_TRUE(is_owned.expired());
  EXPECT_EQ(std::vector<float>(values, values + 512), want);
  EXPECT_EQ(device->wrap_host(memory.get() + 16, 16, nullptr), nullptr);
  EXPECT_EQ(device->wrap_host(memory.get(), 0, nullptr), nullptr);
}

TEST(Metal, AnEncoderKeepsItsBuffersUntilTheCommandsAreDone) {
  CacheCase test(2, 1, 256, 40, 8, 8, "metal");
  const std::vector<float> want = test.attend();
  const auto encoder = test.device->make_encoder();
  {
    AttendOp op = test.attend_op();
    op.q = test.device->empty(DType::kFloat32, {2, 256});
    std::memcpy(op.q.host(), test.q.host(), op.q.nbytes());
    op.tmp = test.device->empty(DType::kFloat32, {tmp_buffer_bytes(2, 256) / 4});
    encoder->flash_attn_vec(op);
  }
  encoder->commit();
  encoder->wait();
  EXPECT_EQ(std::vector<float>(test.output.data<float>(), test.output.data<float>() + 512), want);
}

TEST(Metal, OpsWithoutTmpDoNotShareIt) {
  CacheCase test(2, 1, 256, 200, 8, 8, "metal");
  const std::vector<float> want = test.attend();
  const auto encoder = test.device->make_encoder();
  std::vector<Buffer> outputs;
  for (int i = 0; i < 4; ++i) {
    AttendOp op = test.attend_op();
    op.output = test.device->empty(DType::kFloat32, {2, 256});
    outputs.push_back(op.output);
    encoder->flash_attn_vec(op);
  }
  encoder->commit();
  encoder->wait();
  for (const Buffer& output : outputs) {
    EXPECT_EQ(std::vector<float>(output.data<float>(), output.data<float>() + 512), want);
  }
}

TEST(Metal, AnEncoderMayBeDroppedAtAnyTime) {
  CacheCase test(2, 1, 256, 8, 8, 8, "metal");
  test.device->make_encoder();
  {
    const auto encoder = test.device->make_encoder();
    encoder->flash_attn_vec(test.attend_op());
  }
  {
    const auto encoder = test.device->make_encoder();
    encoder->flash_attn_vec(test.attend_op());
    encoder->commit();
  }
  const auto empty = test.device->make_encoder();
  empty->memory_barrier();
  empty->commit();
  empty->wait();
  EXPECT_EQ(empty->gpu_time(), 0.0);
}

TEST(Metal, EmptyOpsLaunchNothing) {
  CacheCase test(2, 1, 256, 8, 8, 8, "metal");
  const auto encoder = test.device->make_encoder();
  const Buffer none = test.device->empty(DType::kFloat32, {0, 1, 256});
  encoder->hadamard_quantize(test.quantize_op(none, test.k_packed, test.k_norms, *test.k_codebook));
  encoder->fwht({"fwht", Fwht::kPlain, none});
  EXPECT_TRUE(encoder->nodes().empty());
}

TEST(Metal, ReportsTheFirstOpsBadRowAndCountsSkippedTokens) {
  CacheCase test(2, 2, 256, 4, 8, 8, "metal");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Buffer good = test.random({11, 2, 256}, 5);
  const Buffer bad = test.random({11, 2, 256}, 6);
  bad.data<float>()[(2 * 2 + 1) * 256] = nan;  // of a token that is skipped
  bad.data<float>()[(9 * 2 + 1) * 256] = nan;
  QuantizeOp op = test.quantize_op(good, test.k_packed, test.k_norms, *test.k_codebook);
  op.args.is_sliding = 1;
  op.targets[0].key = "k";
  op.targets.push_back({bad, test.v_packed, test.v_norms, test.v_codebook, "v"});
  QuantizeOp later = test.quantize_op(bad, test.device->empty(DType::kUint8, {2, 4, 256}),
                                      test.device->empty(DType::kFloat32, {2, 4}), *test.k_codebook);
  later.args.is_sliding = 1;
  const auto encoder = test.device->make_encoder();
  encoder->hadamard_quantize(op);
  encoder->hadamard_quantize(later);
  encoder->commit();
  EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kInvalidArgument, "src_v", "token 9, head 1");
}

TEST(Metal, ManyOpsEachHaveTheirOwnStatus) {
  CacheCase test(2, 2, 256, 4, 8, 8, "metal");
  const Buffer good = test.random({1, 2, 256}, 5);
  const Buffer bad = test.random({1, 2, 256}, 6);
  bad.data<float>()[256] = std::numeric_limits<float>::infinity();
  const auto encoder = test.device->make_encoder();
  for (int i = 0; i < 300; ++i) {
    QuantizeOp op = test.quantize_op(i == 290 ? bad : good, test.k_packed, test.k_norms, *test.k_codebook);
    op.name = "op " + std::to_string(i);
    encoder->hadamard_quantize(op);
    encoder->memory_barrier();
  }
  encoder->commit();
  EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kInvalidArgument, "op 290", "token 0, head 1");
}

TEST(Metal, WarmUpTakesTheKnownWidths) {
  open_device("metal")->warm_up({8});
  EXPECT_TQ_ERROR(open_device("metal")->warm_up({7}), ErrorCode::kInvalidArgument, "5, 6 or 8", "7");
}

TEST(Metal, AForkedChildIsRefusedAtOnce) {
  CacheCase test(2, 1, 256, 8, 8, 8, "metal");
  const auto recording = test.device->make_encoder();
  recording->flash_attn_vec(test.attend_op());
  const auto committed = test.device->make_encoder();
  committed->flash_attn_vec(test.attend_op());
  committed->commit();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto refuse = [](const auto& use) { EXPECT_TQ_ERROR(use(), ErrorCode::kDevice, "forked child"); };
    refuse([&] { open_device("metal"); });
    refuse([&] { test.device->empty(DType::kFloat32, {1}); });
    refuse([&] { test.device->make_encoder(); });
    refuse([&] { test.device->wrap_host(nullptr, 0, nullptr); });
    refuse([&] { test.device->wrap_native(nullptr, nullptr); });
    refuse([&] { test.device->warm_up({8}); });
    refuse([&] { recording->flash_attn_vec(test.attend_op()); });
    refuse([&] { recording->memory_barrier(); });
    refuse([&] { recording->commit(); });
    refuse([&] { committed->wait(); });
    refuse([&] { committed->gpu_time(); });
    refuse([&] { committed->nodes(); });
    {
      CacheCase released = std::move(test);
    }
    std::_Exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  committed->wait();
}

}  // namespace
}  // namespace tq_hb
