// A random cache on a device whose memory the host reaches, and float64 attention over what it holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <vector>

#include "core/codec.h"
#include "core/device.h"
#include "registry.h"

namespace tq_hb {

struct CacheCase {
  CacheCase(unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned capacity, unsigned k_bits = 8,
            unsigned v_bits = 8, const std::string& backend = "cpu", Packing packing_in = Packing::kByte)
      : device(open_device(backend)), packing(packing_in) {
    args = {};
    args.num_heads = heads;
    args.num_kv_heads = kv_heads;
    args.head_dim = head_dim;
    args.kv_seq_len = capacity;
    args.kv_capacity = capacity;
    args.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    args.scale_factor_d512 = 1.0f;
    args.codebook_bits = k_bits;
    args.nsg = 1;
    args.nwg = 16;
    k_codebook = &find_codebook("test", CodebookName::kLloydMax, k_bits);
    v_codebook = &find_codebook("test", CodebookName::kLloydMax, v_bits);
    q = random({heads, head_dim}, 1);
    output = device->empty(DType::kFloat32, {heads, head_dim});
    Shape norms{kv_heads, capacity};
    if (head_dim == 512) norms.push_back(2);
    k_packed = device->empty(DType::kUint8, {kv_heads, capacity, row_bytes(packing, k_bits, head_dim)});
    v_packed = device->empty(DType::kUint8, {kv_heads, capacity, row_bytes(packing, v_bits, head_dim)});
    k_norms = device->empty(DType::kFloat32, norms);
    v_norms = device->empty(DType::kFloat32, norms);
    fill(random({capacity, kv_heads, head_dim}, 2), k_packed, k_norms, *k_codebook);
    fill(random({capacity, kv_heads, head_dim}, 3), v_packed, v_norms, *v_codebook);
  }

  /// Asks `queries` at once, of which the last stands at the newest key.
  void ask(unsigned queries) {
    q = random({queries, args.num_heads, args.head_dim}, 4);
    output = device->empty(DType::kFloat32, q.shape());
  }

  Shape per_query_head() const { return {q.shape().begin(), q.shape().end() - 1}; }
  void add_sinks() { sinks = random({args.num_heads}, 5); }
  void add_score_bias() { score_bias = random(per_query_head(), 6); }
  void add_lse() { lse = device->empty(DType::kFloat32, per_query_head()); }

  Buffer random(const Shape& shape, unsigned seed) const {
    Buffer buffer = device->empty(DType::kFloat32, shape);
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    for (std::uint64_t i = 0; i < buffer.size(); ++i) buffer.data<float>()[i] = normal(engine);
    return buffer;
  }

  QuantizeOp quantize_op(const Buffer& src, const Buffer& packed, const Buffer& norms, const Codebook& codebook) const {
    TqHadamardQuantizeArgs quantize{};
    quantize.head_dim = args.head_dim;
    quantize.num_kv_heads = args.num_kv_heads;
    quantize.cache_capacity = args.kv_capacity;
    quantize.scale_factor_d512 = 1.0f;
    quantize.codebook_bits = codebook.cbits;
    return {"hadamard_quantize_kv_hb", quantize, {{src, packed, norms, &codebook, ""}}, packing};
  }

  void fill(const Buffer& src, const Buffer& packed, const Buffer& norms, const Codebook& codebook) const {
    const auto encoder = device->make_encoder();
    encoder->hadamard_quantize(quantize_op(src, packed, norms, codebook));
    encoder->commit();
    encoder->wait();
  }

  AttendOp attend_op() const {
    AttendOp op;
    op.name = "flash_attn_vec_tq_hb";
    op.args = args;
    op.q = q;
    op.k_packed = k_packed;
    op.k_norms = k_norms;
    op.v_packed = v_packed;
    op.v_norms = v_norms;
    op.output = output;
    op.k_codebook = k_codebook;
    op.v_codebook = v_codebook;
    op.packing = packing;
    op.precision = precision;
    op.query_position = query_position;
    op.sinks = sinks;
    op.score_bias = score_bias;
    op.lse = lse;
    return op;
  }

  std::vector<float> attend() const {
    const auto encoder = device->make_encoder();
    encoder->flash_attn_vec(attend_op());
    encoder->commit();
    encoder->wait();
    return {output.data<float>(), output.data<float>() + output.size()};
  }

  /// The code of coordinate j, read from the place that the format gives it.
  unsigned code(const std::uint8_t* row, const Codebook& codebook, std::size_t j) const {
    if (packing == Packing::kByte || codebook.cbits == 8) return row[j];
    const std::size_t block = std::min<std::size_t>(args.head_dim, 128);
    const auto bits = [&](const std::uint8_t* plane, unsigned width) {
      const std::size_t bytes = block * width / 8;
      const unsigned byte = plane[j / block * bytes + j % block % bytes];
      return (byte >> (j % block / bytes * width)) & ((1u << width) - 1);
    };
    return bits(row, 4) | bits(row + args.head_dim / 2, codebook.cbits - 4) << 4;
  }

  std::vector<double> decoded(const Buffer& packed, const Buffer& norms, const Codebook& codebook, std::size_t head,
                              std::size_t slot) const {
    const std::size_t at = head * args.kv_capacity + slot;
    const std::size_t per_row = norms_per_row(args.head_dim);
    const std::uint8_t* codes = packed.data<std::uint8_t>() + at * packed.shape().back();
    std::vector<double> row(args.head_dim);
    for (std::size_t j = 0; j < args.head_dim; ++j) {
      const double norm = static_cast<double>(norms.data<float>()[at * per_row + (per_row == 2 ? j / 256 : 0)]);
      const double level = static_cast<double>(codebook.levels[code(codes, codebook, j)]);
      row[j] = level * (per_row == 2 ? norm : norm / std::sqrt(static_cast<double>(args.head_dim)));
    }
    return row;
  }

  struct Expected {
    std::vector<double> output, lse;
  };

  /// Attention by the formula, in float64, over the slots that each query sees.
  Expected expected_with_lse() const {
    const std::size_t heads = args.num_heads, dim = args.head_dim;
    const std::size_t queries = q.size() / (heads * dim);
    Expected expected{std::vector<double>(q.size()), {}};
    std::vector<std::vector<std::vector<double>>> keys(args.num_kv_heads), values(args.num_kv_heads);
    for (std::size_t g = 0; g < args.num_kv_heads; ++g) {
      for (std::size_t age = 0; age < args.kv_seq_len; ++age) {
        const std::size_t slot = (args.ring_start + age) % args.kv_capacity;
        keys[g].push_back(decoded(k_packed, k_norms, *k_codebook, g, slot));
        values[g].push_back(decoded(v_packed, v_norms, *v_codebook, g, slot));
      }
    }
    for (std::size_t row = 0; row < queries * heads; ++row) {
      const std::size_t g = row % heads / (heads / args.num_kv_heads);
      const std::int64_t newest = query_position ? std::int64_t{*query_position} : std::int64_t{args.kv_seq_len} - 1;
      const std::int64_t position = newest - static_cast<std::int64_t>(queries - 1 - row / heads);
      std::vector<double> scores;
      std::vector<std::size_t> ages;
      double max = sinks ? static_cast<double>(sinks->data<float>()[row % heads]) : -HUGE_VAL;
      for (std::int64_t age = 0; age < std::int64_t{args.kv_seq_len}; ++age) {
        if (age > position || (args.mask_type == 2 && position - age >= std::int64_t{args.sliding_window})) continue;
        ages.push_back(static_cast<std::size_t>(age));
        double score = 0.0;
        for (std::size_t j = 0; j < dim; ++j) {
          score += keys[g][ages.back()][j] * static_cast<double>(q.data<float>()[row * dim + j]);
        }
        score *= static_cast<double>(args.scale);
        if (score_bias) score += static_cast<double>(score_bias->data<float>()[row]);
        const double cap = static_cast<double>(args.softcap);
        scores.push_back(cap > 0.0 ? cap * std::tanh(score / cap) : score);
        max = std::max(max, scores.back());
      }
      double sum =
          max == -HUGE_VAL || !sinks ? 0.0 : std::exp(static_cast<double>(sinks->data<float>()[row % heads]) - max);
      for (double& score : scores) sum += score = std::exp(score - max);
      for (std::size_t t = 0; t < scores.size(); ++t) {
        for (std::size_t j = 0; j < dim; ++j) {
          expected.output[row * dim + j] += scores[t] / sum * values[g][ages[t]][j];
        }
      }
      expected.lse.push_back(sum > 0.0 ? max + std::log(sum) : -HUGE_VAL);
    }
    return expected;
  }

  std::vector<double> expected() const { return expected_with_lse().output; }

  std::shared_ptr<Device> device;
  TqFlashAttnVecArgs args;
  const Codebook* k_codebook;
  const Codebook* v_codebook;
  Buffer q, k_packed, k_norms, v_packed, v_norms, output;
  Packing packing;
  Precision precision = Precision::kStrict;
  std::optional<std::uint32_t> query_position;
  std::optional<Buffer> sinks, score_bias, lse;
};

/// Whether every value is that of float64 up to `limit` times its size, or infinite alike.
inline bool close(const Buffer& got, const std::vector<double>& want, double limit) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double value = static_cast<double>(got.data<float>()[i]);
    if (value != want[i] && !(std::fabs(value - want[i]) <= limit * std::max(1.0, std::fabs(want[i])))) return false;
  }
  return got.size() == want.size();
}

inline double nmse(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0.0, energy = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    energy += want[i] * want[i];
  }
  return error / energy;
}

}  // namespace tq_hb
