#include "cpu/device.h"

#include <chrono>
#include <limits>
#include <new>
#include <optional>
#include <utility>
#include <variant>

#include <unistd.h>

#include "cpu/attend.h"
#include "cpu/codec_ops.h"
#include "cpu/host_storage.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace tq_hb {
namespace {

/// Bytes of memory in this machine: no single buffer can usefully be larger.
std::uint64_t physical_memory() noexcept {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGESIZE);
  if (pages <= 0 || page <= 0) return static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  return static_cast<std::uint64_t>(pages) * static_cast<std::uint64_t>(page);
}

class BorrowedStorage final : public Storage {
 public:
  BorrowedStorage(const Device* device, std::byte* data, std::uint64_t size, std::shared_ptr<void> owner)
      : Storage(device, data, size), owner_(std::move(owner)) {}

 private:
  std::shared_ptr<void> owner_;
};

/// Records ops and runs them at commit, in order: a barrier has nothing left to do.
class CpuEncoder final : public CommandEncoder {
 public:
  using CommandEncoder::CommandEncoder;

 private:
  using Op = std::variant<QuantizeOp, DequantizeOp, AttendOp, FwhtOp>;

  void encode(QuantizeOp op) override {
    note_kernel(op.targets.size() == 1 ? "hadamard_quantize_kv_hb_d" : "hadamard_quantize_kv_hb_dual_d",
                op.args.head_dim);
    ops_.emplace_back(std::move(op));
  }
  void encode(DequantizeOp op) override {
    note({NodeKind::kOther, "tq_dequantize_hb_kv", {}, {}});
    ops_.emplace_back(std::move(op));
  }
  void encode(AttendOp op) override {
    if (attend_precision(op, attend_kernel()) == Precision::kDefault) note_default_precision();
    note_kernel("flash_attn_vec_tq_hb_dk", op.args.head_dim, NodeKind::kSdpa);
    note_kernel(op.fused_undo ? "flash_attn_vec_reduce_tq_hb_undo_dk" : "flash_attn_vec_reduce_dk", op.args.head_dim,
                NodeKind::kSdpa);
    ops_.emplace_back(std::move(op));
  }
  void encode(FwhtOp op) override {
    note_kernel(kernel_prefix(op.kind), op.data.shape().back());
    ops_.emplace_back(std::move(op));
  }
  void encode_barrier() override {}

  void note_kernel(const char* kernel, std::uint64_t head_dim, NodeKind kind = NodeKind::kOther) {
    note({kind, kernel + std::to_string(head_dim), {}, {}});
  }

  void submit() override {
    const auto start = std::chrono::steady_clock::now();
    for (const Op& op : ops_) {
      try {
        std::visit([](const auto& one) { run(one); }, op);
      } catch (const Error& error) {
        if (!op_failure_) op_failure_ = error;
      } catch (const std::bad_alloc&) {
        if (!op_failure_) op_failure_ = Error(ErrorCode::kOutOfMemory, "cpu: no memory for the op's working storage");
      }
    }
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ops_.clear();
  }

  double finish() override {
    if (op_failure_) throw *op_failure_;
    return seconds_;
  }

  static void run(const QuantizeOp& op) {
    std::vector<BadRows> bad_rows(op.targets.size());
    for (std::size_t i = 0; i < op.targets.size(); ++i) {
      quantize(op, op.targets[i], ThreadPool::instance(), bad_rows[i]);
    }
    for (std::size_t i = 0; i < op.targets.size(); ++i) {
      bad_rows[i].check(op.name, op.targets[i].src_name(), RowRule::kEncodable, op.args.num_kv_heads);
    }
  }
  static void run(const DequantizeOp& op) { tq_hb::dequantize(op, ThreadPool::instance()); }
  static void run(const AttendOp& op) {
    BadRows bad_rows;
    attend(op, ThreadPool::instance(), bad_rows);
    bad_rows.check(op.name, "q", RowRule::kFinite, op.args.num_heads);
  }
  static void run(const FwhtOp& op) { tq_hb::fwht(op, ThreadPool::instance()); }

  std::vector<Op> ops_;
  std::optional<Error> op_failure_;
  double seconds_ = 0.0;
};

class CpuDevice final : public Device {
 public:
  std::string name() const override { return std::string("cpu (") + cpu_isa() + ")"; }
  std::string backend() const override { return "cpu"; }
  DeviceLimits limits() const override { return {physical_memory(), cpu_num_threads(), 0, 0}; }

 private:
  std::shared_ptr<Storage> allocate(std::uint64_t size) const override { return allocate_host_storage(this, size); }
  std::shared_ptr<Storage> borrow_host(std::byte* data, std::uint64_t size,
                                       std::shared_ptr<void> owner) const override {
    return std::make_shared<BorrowedStorage>(this, data, size, std::move(owner));
  }
  std::unique_ptr<CommandEncoder> new_encoder(bool auto_barrier) const override {
    return std::make_unique<CpuEncoder>(this, auto_barrier);
  }
  void prepare(const std::vector<unsigned>&) const override { ThreadPool::instance().start(); }
};

}  // namespace

const std::shared_ptr<Device>& cpu_device() {
  // Never freed: threads that outlast static destruction go on using it.
  static const std::shared_ptr<Device>& device = *new std::shared_ptr<Device>(std::make_shared<CpuDevice>());
  return device;
}

const char* cpu_isa() {
  return attend_kernel().isa;
}
std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const IsaKernel* kernel : available_kernels()) names.emplace_back(kernel->isa);
  return names;
}
void set_cpu_isa(const std::string& op, const std::string& field, const std::string& isa) {
  set_attend_kernel(op, field, isa);
}
unsigned cpu_num_threads() noexcept {
  return ThreadPool::instance().num_threads();
}
void set_cpu_num_threads(unsigned count) {
  ThreadPool::instance().set_num_threads(count);
}

}  // namespace tq_hb
