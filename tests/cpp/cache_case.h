// A random cache on a device whose memory the host reaches, and float64 attention over what it holds.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "core/codec.h"
#include "core/device.h"
#include "registry.h"

namespace tq_hb {

struct CacheCase {
  CacheCase(unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned capacity, unsigned k_bits = 8,
            unsigned v_bits = 8, const std::string& backend = "cpu")
      : device(open_device(backend)) {
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
    k_packed = device->empty(DType::kUint8, {kv_heads, capacity, head_dim});
    v_packed = device->empty(DType::kUint8, {kv_heads, capacity, head_dim});
    k_norms = device->empty(DType::kFloat32, norms);
    v_norms = device->empty(DType::kFloat32, norms);
    fill(random({capacity, kv_heads, head_dim}, 2), k_packed, k_norms, *k_codebook);
    fill(random({capacity, kv_heads, head_dim}, 3), v_packed, v_norms, *v_codebook);
  }

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
    return {"hadamard_quantize_kv_hb", quantize, {{src, packed, norms, &codebook, ""}}};
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
    return op;
  }

  std::vector<float> attend() const {
    const auto encoder = device->make_encoder();
    encoder->flash_attn_vec(attend_op());
    encoder->commit();
    encoder->wait();
    return {output.data<float>(), output.data<float>() + output.size()};
  }

  std::vector<double> decoded(const Buffer& packed, const Buffer& norms, const Codebook& codebook, std::size_t head,
                              std::size_t slot) const {
    const std::size_t at = head * args.kv_capacity + slot;
    const std::size_t per_row = norms_per_row(args.head_dim);
    std::vector<double> row(args.head_dim);
    for (std::size_t j = 0; j < args.head_dim; ++j) {
      const double norm = static_cast<double>(norms.data<float>()[at * per_row + (per_row == 2 ? j / 256 : 0)]);
      const double level = static_cast<double>(codebook.levels[packed.data<std::uint8_t>()[at * args.head_dim + j]]);
      row[j] = level * (per_row == 2 ? norm : norm / std::sqrt(static_cast<double>(args.head_dim)));
    }
    return row;
  }

  /// Attention by the formula, in float64, over the slots that args make visible.
  std::vector<double> expected() const {
    const std::size_t group = args.num_heads / args.num_kv_heads;
    std::vector<double> out(std::size_t{args.num_heads} * args.head_dim);
    const std::size_t first =
        args.mask_type == 2 && args.sliding_window < args.kv_seq_len ? args.kv_seq_len - args.sliding_window : 0;
    for (std::size_t h = 0; h < args.num_heads; ++h) {
      std::vector<double> scores;
      std::vector<std::vector<double>> values;
      double max = -HUGE_VAL, sum = 0.0;
      for (std::size_t age = first; age < args.kv_seq_len; ++age) {
        const std::size_t slot = (args.ring_start + age) % args.kv_capacity;
        const std::vector<double> key = decoded(k_packed, k_norms, *k_codebook, h / group, slot);
        values.push_back(decoded(v_packed, v_norms, *v_codebook, h / group, slot));
        double score = 0.0;
        for (std::size_t j = 0; j < args.head_dim; ++j) {
          score += key[j] * static_cast<double>(q.data<float>()[h * args.head_dim + j]);
        }
        score *= static_cast<double>(args.scale);
        const double cap = static_cast<double>(args.softcap);
        scores.push_back(cap > 0.0 ? cap * std::tanh(score / cap) : score);
        max = std::max(max, scores.back());
      }
      for (double& score : scores) sum += score = std::exp(score - max);
      for (std::size_t t = 0; t < scores.size(); ++t) {
        for (std::size_t j = 0; j < args.head_dim; ++j) out[h * args.head_dim + j] += scores[t] / sum * values[t][j];
      }
    }
    return out;
  }

  std::shared_ptr<Device> device;
  TqFlashAttnVecArgs args;
  const Codebook* k_codebook;
  const Codebook* v_codebook;
  Buffer q, k_packed, k_norms, v_packed, v_norms, output;
};

inline double nmse(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0.0, energy = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    energy += want[i] * want[i];
  }
  return error / energy;
}

}  // namespace tq_hb
