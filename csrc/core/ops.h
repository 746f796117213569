// What an encoder can record: one struct per op, with everything that the call depends on.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/abi.h"
#include "core/buffer.h"
#include "core/codebook.h"
#include "core/packing.h"

namespace tq_hb {

/// One tensor of the cache and the rows that go into it.
struct QuantizeTarget {
  Buffer src;     ///< float32 (G, D) or (T, G, D)
  Buffer packed;  ///< uint8 (G, capacity, row_bytes)
  Buffer norms;   ///< float32 (G, capacity) or (G, capacity, 2)
  const Codebook* codebook = nullptr;
  std::string key;  ///< "" for a single tensor, "k" or "v" for a pair: part of the names in messages

  std::string src_name() const { return key.empty() ? "src" : "src_" + key; }
  std::string packed_name() const { return key.empty() ? "packed" : key + "_packed"; }
  std::string norms_name() const { return key.empty() ? "norms" : key + "_norms"; }
};

/// Encodes one tensor, or K and V together.
struct QuantizeOp {
  std::string name;
  TqHadamardQuantizeArgs args;
  std::vector<QuantizeTarget> targets;
  Packing packing = Packing::kByte;

  std::uint64_t num_tokens() const { return targets[0].src.shape().size() == 3 ? targets[0].src.shape()[0] : 1; }
  /// Of a run longer than the ring only the newest tokens survive: so many come before them, and are not written, since
  /// two tokens must not race for a slot.
  std::uint64_t num_skipped() const {
    return num_tokens() > args.cache_capacity ? num_tokens() - args.cache_capacity : 0;
  }
};

/// Rebuilds consecutive positions from `first_position` on, still rotated.
struct DequantizeOp {
  std::string name;
  TqHadamardQuantizeArgs args;
  std::uint64_t first_position;
  Buffer packed;
  Buffer norms;
  Buffer output;  ///< float32 (G, D) for one position or (T, G, D)
  const Codebook* codebook = nullptr;
  Packing packing = Packing::kByte;

  std::uint64_t num_tokens() const { return output.shape().size() == 3 ? output.shape()[0] : 1; }
};

/// How attention is shared out: a query head at a time, or a tile of the heads that share a KV head.
enum class AttendKernel { kPerHead, kGroup };

/// How exact attention is asked to be. A backend whose fast path is strict has no other.
enum class Precision { kDefault, kStrict };

/// Parses "default" or "strict".
Precision parse_precision(const std::string& op, const std::string& name);
const char* name_of(Precision precision) noexcept;

struct AttendOp {
  std::string name;
  TqFlashAttnVecArgs args;
  Buffer q;  ///< float32 (H, D) or (N, H, D); the last query is the newest
  Buffer k_packed, k_norms, v_packed, v_norms;
  Buffer output;              ///< float32, q's shape
  std::optional<Buffer> tmp;  ///< float32, at least tmp_buffer_bytes; the encoder brings its own otherwise
  const Codebook* k_codebook = nullptr;
  const Codebook* v_codebook = nullptr;
  Packing packing = Packing::kByte;
  Precision precision = Precision::kDefault;
  bool fused_undo = false;
  std::optional<Buffer> sinks;       ///< float32 (H,): one more logit per head in the sum of weights; -inf for none
  std::optional<Buffer> score_bias;  ///< float32 (H,) or (N, H): added to a query's scores before softcap
  std::optional<Buffer> lse;         ///< float32 (H,) or (N, H), written: log of the sum of exp(score), sink included
  /// Where the last query stands, in slots from the oldest token on; by default at the newest.
  std::optional<std::uint32_t> query_position;
  AttendKernel kernel = AttendKernel::kPerHead;
  unsigned head_tile = 1;  ///< rows of q that share a decode: 2, 4 or 8 with kGroup, else 1

  std::uint64_t num_queries() const { return q.shape().size() == 3 ? q.shape()[0] : 1; }
};

/// Multiply by signs and transform (the rotation R), transform and multiply by signs (its inverse), or only transform.
enum class Fwht { kPremult, kUndo, kPlain };

/// The kernel's name, to which the head size is appended.
const char* kernel_prefix(Fwht kind) noexcept;

struct FwhtOp {
  std::string name;
  Fwht kind;
  Buffer data;  ///< float32 (..., D), transformed in place
};

/// The memory an op touches.
struct Accesses {
  std::vector<const Buffer*> reads, writes;
};

Accesses accesses_of(const QuantizeOp& op);
Accesses accesses_of(const DequantizeOp& op);
Accesses accesses_of(const AttendOp& op);
Accesses accesses_of(const FwhtOp& op);

}  // namespace tq_hb
