// HostStore: the one resident copy of the routed experts' weights.
//
// Per MoE layer, expert and matrix it knows where the rows lie. Two backings:
//   arena: anonymous memory per NUMA node, filled in place by parallel reads; the default.
//   mmap:  the checkpoint files themselves, mapped read-only.
// Scales lie in memory of the store, in the type of their format (kernels/formats.h). Those that
// belong to groups of columns of a row are an eighth or so of the weights: they are placed on the
// node of their rows, behind them, and counted. The few FP32 scales of FP8 blocks and rows lie
// together.
//
// An arena may be private or lie, with its scales and the marks of what is loaded, in a named
// segment of shared memory. Such a segment stays when the process ends; a store created with the
// same name, fingerprint and layout finds everything that was loaded, and need not load it again.
//
// NUMA: the output rows of every matrix (gate and up: F rows, down: D rows) are split over the
// nodes at multiples of 8 rows, so one token uses every node's bandwidth. Whole rows stay together,
// so a result does not depend on the number of nodes. Eight rows: what the kernels take at once, so
// a split adds no ragged block.
#ifndef JAXMOE_RUNTIME_HOST_STORE_H_
#define JAXMOE_RUNTIME_HOST_STORE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/formats.h"
#include "kernels/kernels.h"
#include "runtime/memory.h"
#include "runtime/page_lock.h"
#include "runtime/pool.h"
#include "runtime/shared_segment.h"
#include "runtime/status.h"
#include "runtime/topology.h"

namespace jaxmoe {

enum class Matrix : int { kGate = 0, kUp = 1, kDown = 2 };
inline constexpr int kNumMatrices = 3;
const char* matrix_name(Matrix which);

struct ExpertLayerSpec {
  int64_t num_experts = 0;
  int64_t intermediate = 0;  // F
  int64_t hidden = 0;        // D
  WeightFormat format = WeightFormat::kBf16;
};

enum class Backing { kArena, kMmap };

// Where an arena lies that outlives its process. fingerprint: of the weights, so that those of
// another checkpoint are never taken for these.
struct SharedName {
  std::string name;  // as for shm_open
  std::array<uint8_t, 32> fingerprint = {};
};

// Rows [first, second) of n that `node` of `num_nodes` holds.
std::pair<int64_t, int64_t> node_rows(int64_t n, int node, int num_nodes);

class HostStore {
 public:
  static constexpr int64_t kRowSplit = 8;

  static Status create(const Topology& topology, std::vector<ExpertLayerSpec> layers,
                       Backing backing, std::shared_ptr<HostStore>* store,
                       const SharedName* shared = nullptr);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  int num_nodes() const { return num_nodes_; }
  Backing backing() const { return backing_; }
  bool is_shared() const { return segment_ != nullptr; }
  // Whether the store's memory may be written: an arena that is not sealed.
  bool is_writable() const { return backing_ == Backing::kArena && !sealed_; }
  const ExpertLayerSpec& layer(int index) const { return layers_[index]; }
  int64_t rows(int layer, Matrix which) const;
  int64_t cols(int layer, Matrix which) const;
  int64_t row_bytes(int layer, Matrix which) const;
  int64_t matrix_bytes(int layer, Matrix which) const {
    return rows(layer, which) * row_bytes(layer, which);
  }
  // Of a row's scales, where they lie with the rows.
  int64_t scale_row_bytes(int layer, Matrix which) const;
  int64_t scale_matrix_bytes(int layer, Matrix which) const;  // all its scales, wherever they lie
  int64_t total_bytes() const { return total_bytes_; }  // weights and the scales placed with them
  std::vector<int64_t> bytes_per_node() const;

  // Errors name layer, expert and matrix. Thread-safe for distinct matrices.
  Status check_index(int64_t layer, int64_t expert, int64_t which) const;
  Status read_matrix(int layer, int expert, Matrix which, int fd, int64_t offset);
  Status map_file(const std::string& path, int* file_idx);
  Status set_mapped(int layer, int expert, Matrix which, int file_idx, int64_t offset);
  // `type` must be the format's. A kE8m0 scale of 255, which stands for NaN, is an error.
  Status set_scale(int layer, int expert, Matrix which, ScaleType type, const void* scale,
                   int64_t rows, int64_t cols);
  // For writers that fill the arena themselves: the matrix counts as loaded from now on.
  Status mark_loaded(int layer, int expert, Matrix which);
  // Memory for the matrix is taken now, so that writing it cannot fail; for writers of a shared
  // arena that fill it themselves.
  Status reserve(int layer, int expert, Matrix which) const;
  // Whether the matrix and its scale were loaded, perhaps by an earlier process.
  bool is_loaded(int layer, int expert, Matrix which) const;
  // Everything is loaded: a shared arena becomes read-only here and others may attach to it.
  Status seal();
  Status check_has_data(int layer, int expert, Matrix which) const;
  // Fails unless all three matrices (and their scales) of the expert were loaded.
  Status check_loaded(int layer, int expert) const;

  // Rows node_rows(n, node, num_nodes()) of the matrix may be read through the view, by their own
  // numbers.
  WeightView view(int layer, int expert, Matrix which, int node) const;
  // Start of the node's rows in the arena; nullptr with mmap backing.
  uint8_t* segment(int layer, int expert, Matrix which, int node) const;
  // The scales [first, second) of scale_rows that `node` holds; nullptr for formats without. Where
  // they do not lie with the rows, node 0 holds all of them.
  uint8_t* scale(int layer, int expert, Matrix which, int node) const;
  std::pair<int64_t, int64_t> scale_rows(int layer, Matrix which, int node) const;
  std::pair<int64_t, int64_t> scale_shape(int layer, Matrix which) const;

  // Where weights and scales lie: each node's arena, or the mapped files, and the scales.
  std::vector<MemoryRange> memory_ranges() const;
  // Page-locks all of it, for every device of the driver's kind, until the store is destroyed.
  // Everything must be in its place: a file that is mapped later is not locked.
  Status lock_pages(std::shared_ptr<DeviceDriver> driver, const PageLock::Progress& progress = {},
                    size_t part_bytes = PageLock::kPartBytes);
  const PageLock* page_lock() const { return page_lock_.get(); }  // nullptr: not locked

 private:
  HostStore() = default;
  using Mark = std::atomic<uint8_t>;  // kHasData | kHasScale
  static_assert(Mark::is_always_lock_free && sizeof(Mark) == 1, "marks lie in shared memory");
  static constexpr uint8_t kHasData = 1, kHasScale = 2;

  Status place_private(const Topology& topology, const std::vector<size_t>& node_bytes,
                       size_t num_entries, size_t scale_bytes);
  Status place_shared(const Topology& topology, const std::vector<size_t>& node_bytes,
                      size_t num_entries, size_t scale_bytes, const SharedName& shared);
  uint64_t layout_hash() const;

  const FormatInfo& info(int layer) const { return format_info(layers_[layer].format); }
  // Bytes of a matrix's rows on a node, and of the scales with them, each a whole number of lines.
  size_t data_segment_bytes(int layer, Matrix which, int node) const;
  size_t scale_segment_bytes(int layer, Matrix which, int node) const;
  uint8_t* place(int layer, int expert, Matrix which, int node) const;
  Status reserve_scale(int layer, int expert, Matrix which) const;
  uint8_t wanted_marks(int layer) const;

  std::string name(int layer, int expert, Matrix which) const;
  size_t entry_index(int layer, int expert, Matrix which) const;

  std::vector<ExpertLayerSpec> layers_;
  Backing backing_ = Backing::kArena;
  int num_nodes_ = 1;
  int64_t total_bytes_ = 0;
  std::vector<size_t> first_entry_;  // [layer]
  Mark* marks_ = nullptr;            // [layer][expert][matrix]
  std::unique_ptr<Mark[]> own_marks_;
  std::unique_ptr<const uint8_t*[]> mapped_;  // mmap backing: element [0, 0] of each entry
  std::vector<std::vector<size_t>>
      layer_offset_;                 // [node][layer]: where its experts begin in the arena
  std::vector<uint8_t*> node_data_;  // [node]: start of its arena
  std::vector<size_t> node_bytes_;   // [node]
  std::vector<std::unique_ptr<Arena>> arenas_;  // [node], where private; mmap: of scales alone
  std::vector<size_t> scale_offset_;            // [layer], where its scales lie together
  uint8_t* scales_ = nullptr;
  size_t scale_bytes_ = 0;
  std::unique_ptr<Arena> own_scales_;
  std::unique_ptr<SharedSegment> segment_;
  bool sealed_ = false;
  mutable std::mutex files_mutex_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::unique_ptr<PageLock> page_lock_;  // last: undone before the memory goes
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_HOST_STORE_H_
