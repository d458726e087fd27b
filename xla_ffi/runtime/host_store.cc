#include "runtime/host_store.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace jaxmoe {
namespace {

// Segments start on cache lines: kernels may then use aligned loads, and no two threads share a
// line.
constexpr size_t kSegmentAlign = 64;
// A petabyte: beyond, dimensions are wrong, and sums of sizes would overflow some factors later.
constexpr int64_t kMostBytes = int64_t{1} << 50;
// One pread never returns more than 2 GiB minus a page; asking for less keeps the loop ordinary.
constexpr int64_t kReadAtMost = int64_t{1} << 30;

// The first page of a shared segment. A change of what lies where needs another version.
constexpr int64_t kSharedVersion = 2;
constexpr uint32_t kEmpty = 0, kFilling = 0x4a4d5731, kComplete = 0x4a4d5732;
struct SharedHeader {
  std::atomic<uint32_t> state;
  uint64_t layout_hash;
  uint8_t fingerprint[32];
  uint8_t unused[4096 - 48];
};
static_assert(sizeof(SharedHeader) == 4096);

Matrix matrix_at(int i) { return static_cast<Matrix>(i); }

const char* scale_type_name(ScaleType type) {
  switch (type) {
    case ScaleType::kNone:
      return "none";
    case ScaleType::kF32:
      return "float32";
    case ScaleType::kBf16:
      return "bfloat16";
    case ScaleType::kE8m0:
      return "uint8 (e8m0)";
    case ScaleType::kF32Zero:
      return "uint32 (float32 and zero point)";
    case ScaleType::kE4m3:
      return "uint8 (e4m3 and a factor)";
  }
  return "?";
}

Status pread_all(int fd, uint8_t* to, int64_t bytes, int64_t offset, const std::string& what) {
  int64_t done = 0;
  while (done < bytes) {
    ssize_t got = pread(fd, to + done, static_cast<size_t>(std::min(bytes - done, kReadAtMost)),
                        offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return Status::error("cannot read " + what + " (" + std::to_string(bytes) +
                           " bytes at offset " + std::to_string(offset) +
                           "): " + std::strerror(errno));
    }
    if (got == 0) {
      return Status::error("the file ends at byte " + std::to_string(offset + done) + ", inside " +
                           what + " (" + std::to_string(bytes) + " bytes at offset " +
                           std::to_string(offset) + "): it is truncated");
    }
    done += got;
  }
  return {};
}

}  // namespace

const char* matrix_name(Matrix which) {
  switch (which) {
    case Matrix::kGate:
      return "gate";
    case Matrix::kUp:
      return "up";
    case Matrix::kDown:
      return "down";
  }
  return "?";
}

std::pair<int64_t, int64_t> node_rows(int64_t n, int node, int num_nodes) {
  int64_t groups = (n + HostStore::kRowSplit - 1) / HostStore::kRowSplit;
  auto boundary = [&](int i) { return std::min(n, groups * i / num_nodes * HostStore::kRowSplit); };
  return {boundary(node), boundary(node + 1)};
}

Status HostStore::create(const Topology& topology, std::vector<ExpertLayerSpec> layers,
                         Backing backing, std::shared_ptr<HostStore>* store,
                         const SharedName* shared) {
  std::shared_ptr<HostStore> result(new HostStore());
  result->layers_ = std::move(layers);
  result->backing_ = backing;
  result->num_nodes_ = static_cast<int>(topology.nodes.size());
  size_t entries = 0, scale_bytes = 0;
  for (size_t l = 0; l < result->layers_.size(); ++l) {
    const ExpertLayerSpec& spec = result->layers_[l];
    // Bounds far beyond any model, within which no size below overflows.
    constexpr int64_t kMostExperts = int64_t{1} << 16, kMostRows = int64_t{1} << 20;
    auto within = [](int64_t value, int64_t most) { return value >= 1 && value <= most; };
    if (!within(spec.num_experts, kMostExperts) || !within(spec.intermediate, kMostRows) ||
        !within(spec.hidden, kMostRows)) {
      return Status::error(
          "layer " + std::to_string(l) + " has num_experts " + std::to_string(spec.num_experts) +
          ", intermediate " + std::to_string(spec.intermediate) + ", hidden " +
          std::to_string(spec.hidden) + ": wanted 1 to 65536, 1 to 1048576 and 1 to 1048576");
    }
    for (int64_t columns : {spec.hidden, spec.intermediate}) {
      if (columns_suit(spec.format, columns)) continue;
      const FormatInfo& info = format_info(spec.format);
      return Status::error("layer " + std::to_string(l) + " of format " + info.name +
                           " has rows of " + std::to_string(columns) +
                           " weights: wanted a multiple of " + std::to_string(info.group_cols) +
                           " for hidden and intermediate");
    }
    result->first_entry_.push_back(entries);
    result->scale_offset_.push_back(scale_bytes);
    entries += static_cast<size_t>(spec.num_experts) * kNumMatrices;
    for (int m = 0; m < kNumMatrices && result->total_bytes_ <= kMostBytes; ++m) {
      int layer = static_cast<int>(l);
      const Matrix which = matrix_at(m);
      result->total_bytes_ +=
          spec.num_experts * (result->matrix_bytes(layer, which) +
                              result->rows(layer, which) * result->scale_row_bytes(layer, which));
      if (!result->info(layer).scaled_by_group()) {
        scale_bytes +=
            static_cast<size_t>(spec.num_experts * result->scale_matrix_bytes(layer, which));
      }
    }
  }
  if (result->total_bytes_ > kMostBytes) {
    return Status::error("the experts of " + std::to_string(result->num_layers()) +
                         " layers are more than a petabyte: check the model's dimensions");
  }
  if (backing == Backing::kMmap) {
    if (shared != nullptr) {
      return Status::error("a store that maps its files has nothing to share: use the arena");
    }
    result->mapped_.reset(new const uint8_t*[entries]());
  }

  std::vector<size_t> node_bytes(static_cast<size_t>(result->num_nodes_), 0);
  for (int node = 0; node < result->num_nodes_; ++node) {
    size_t bytes = 0;
    std::vector<size_t> offsets;
    for (int l = 0; l < result->num_layers(); ++l) {
      offsets.push_back(bytes);
      size_t per_expert = 0;
      for (int m = 0; m < kNumMatrices; ++m) {
        per_expert += result->data_segment_bytes(l, matrix_at(m), node) +
                      result->scale_segment_bytes(l, matrix_at(m), node);
      }
      bytes += per_expert * static_cast<size_t>(result->layers_[l].num_experts);
    }
    node_bytes[node] = bytes;
    result->layer_offset_.push_back(std::move(offsets));
  }
  result->node_bytes_ = node_bytes;
  result->scale_bytes_ = scale_bytes;
  Status status = shared != nullptr
                      ? result->place_shared(topology, node_bytes, entries, scale_bytes, *shared)
                      : result->place_private(topology, node_bytes, entries, scale_bytes);
  if (!status.ok()) return status;
  *store = std::move(result);
  return {};
}

Status HostStore::place_private(const Topology& topology, const std::vector<size_t>& node_bytes,
                                size_t num_entries, size_t scale_bytes) {
  own_marks_.reset(new Mark[num_entries]());
  marks_ = own_marks_.get();
  Status status = Arena::create(scale_bytes, -1, &own_scales_);
  if (!status.ok()) return status;
  scales_ = own_scales_->data();
  const bool bind = !topology.fake && topology.nodes.size() > 1;
  for (int node = 0; node < num_nodes_; ++node) {
    std::unique_ptr<Arena> arena;
    status = Arena::create(node_bytes[node], bind ? topology.nodes[node].node_id : -1, &arena);
    if (!status.ok()) return status;
    node_data_.push_back(arena->data());
    arenas_.push_back(std::move(arena));
  }
  return {};
}

Status HostStore::place_shared(const Topology& topology, const std::vector<size_t>& node_bytes,
                               size_t num_entries, size_t scale_bytes, const SharedName& shared) {
  // Header, marks, scales; then each node's arena, from huge page to huge page.
  const size_t marks_at = sizeof(SharedHeader);
  const size_t scales_at = align_up(marks_at + num_entries, kSegmentAlign);
  std::vector<size_t> node_at;
  size_t total = align_up(scales_at + scale_bytes, kHugePageBytes);
  const size_t first = total;
  for (size_t bytes : node_bytes) {
    node_at.push_back(total);
    total += align_up(bytes, kHugePageBytes);
  }
  Status status = SharedSegment::open(shared.name, total, &segment_);
  if (!status.ok()) return status;
  if (!topology.fake && topology.nodes.size() > 1) {
    for (int node = 0; node < num_nodes_; ++node) {
      status = segment_->bind(node_at[node], align_up(node_bytes[node], kHugePageBytes),
                              topology.nodes[node].node_id);
      if (!status.ok()) return status;
    }
  }
  status = segment_->reserve(0, first);
  if (!status.ok()) return status;
  auto* header = reinterpret_cast<SharedHeader*>(segment_->data());
  const uint64_t hash = layout_hash();
  if (header->state.load(std::memory_order_acquire) == kEmpty) {
    header->layout_hash = hash;
    std::memcpy(header->fingerprint, shared.fingerprint.data(), shared.fingerprint.size());
    header->state.store(kFilling, std::memory_order_release);
  } else if (header->layout_hash != hash ||
             std::memcmp(header->fingerprint, shared.fingerprint.data(),
                         shared.fingerprint.size()) != 0) {
    return Status::error("shared memory /dev/shm" + shared.name +
                         " holds other weights or another layout of them; remove it");
  }
  marks_ = reinterpret_cast<Mark*>(segment_->data() + marks_at);
  scales_ = segment_->data() + scales_at;
  for (size_t at : node_at) node_data_.push_back(segment_->data() + at);
  if (header->state.load(std::memory_order_acquire) == kComplete) return seal();
  return {};
}

// Of everything that decides where a byte lies; FNV-1a.
uint64_t HostStore::layout_hash() const {
  uint64_t hash = 0xcbf29ce484222325;
  auto add = [&](int64_t value) {
    for (int i = 0; i < 8; ++i) {
      hash = (hash ^ static_cast<uint8_t>(value >> (8 * i))) * 0x100000001b3;
    }
  };
  add(kSharedVersion);
  add(num_nodes_);
  for (const ExpertLayerSpec& spec : layers_) {
    add(spec.num_experts);
    add(spec.intermediate);
    add(spec.hidden);
    add(static_cast<int64_t>(spec.format));
  }
  return hash;
}

Status HostStore::seal() {
  if (segment_ == nullptr || sealed_) return {};
  for (int l = 0; l < num_layers(); ++l) {
    for (int e = 0; e < layers_[l].num_experts; ++e) {
      Status status = check_loaded(l, e);
      if (!status.ok()) return status;
    }
  }
  auto* header = reinterpret_cast<SharedHeader*>(segment_->data());
  header->state.store(kComplete, std::memory_order_release);
  Status status = segment_->seal();
  if (status.ok()) sealed_ = true;
  return status;
}

int64_t HostStore::rows(int layer, Matrix which) const {
  const ExpertLayerSpec& spec = layers_[layer];
  return which == Matrix::kDown ? spec.hidden : spec.intermediate;
}

int64_t HostStore::cols(int layer, Matrix which) const {
  const ExpertLayerSpec& spec = layers_[layer];
  return which == Matrix::kDown ? spec.intermediate : spec.hidden;
}

int64_t HostStore::row_bytes(int layer, Matrix which) const {
  return weight_row_bytes(layers_[layer].format, cols(layer, which));
}

int64_t HostStore::scale_row_bytes(int layer, Matrix which) const {
  if (!info(layer).scaled_by_group()) return 0;
  return scale_shape(layer, which).second * scale_bytes(info(layer).scale_type);
}

int64_t HostStore::scale_matrix_bytes(int layer, Matrix which) const {
  auto [rows, cols] = scale_shape(layer, which);
  return rows * cols * scale_bytes(info(layer).scale_type);
}

std::pair<int64_t, int64_t> HostStore::scale_shape(int layer, Matrix which) const {
  return scale_dims(layers_[layer].format, rows(layer, which), cols(layer, which));
}

std::pair<int64_t, int64_t> HostStore::scale_rows(int layer, Matrix which, int node) const {
  if (info(layer).scaled_by_group()) return node_rows(rows(layer, which), node, num_nodes_);
  return {0, node == 0 ? scale_shape(layer, which).first : 0};
}

std::vector<int64_t> HostStore::bytes_per_node() const {
  std::vector<int64_t> bytes(num_nodes_, 0);
  for (int node = 0; node < num_nodes_; ++node) {
    for (int l = 0; l < num_layers(); ++l) {
      for (int m = 0; m < kNumMatrices; ++m) {
        auto [begin, end] = node_rows(rows(l, matrix_at(m)), node, num_nodes_);
        bytes[node] += layers_[l].num_experts * (end - begin) *
                       (row_bytes(l, matrix_at(m)) + scale_row_bytes(l, matrix_at(m)));
      }
    }
  }
  return bytes;
}

std::string HostStore::name(int layer, int expert, Matrix which) const {
  return "layer " + std::to_string(layer) + " expert " + std::to_string(expert) + " " +
         matrix_name(which);
}

size_t HostStore::entry_index(int layer, int expert, Matrix which) const {
  return first_entry_[layer] + static_cast<size_t>(expert) * kNumMatrices +
         static_cast<size_t>(which);
}

Status HostStore::check_index(int64_t layer, int64_t expert, int64_t which) const {
  if (layer < 0 || layer >= num_layers()) {
    return Status::error("MoE layer " + std::to_string(layer) + " of a store that has " +
                         std::to_string(num_layers()));
  }
  if (expert < 0 || expert >= layers_[layer].num_experts) {
    return Status::error("expert " + std::to_string(expert) + " of MoE layer " +
                         std::to_string(layer) + ", which has " +
                         std::to_string(layers_[layer].num_experts));
  }
  if (which < 0 || which >= kNumMatrices) {
    return Status::error("matrix " + std::to_string(which) +
                         ": wanted 0 (gate), 1 (up) or 2 (down)");
  }
  return {};
}

size_t HostStore::data_segment_bytes(int layer, Matrix which, int node) const {
  if (backing_ != Backing::kArena) return 0;
  auto [begin, end] = node_rows(rows(layer, which), node, num_nodes_);
  return align_up(static_cast<size_t>((end - begin) * row_bytes(layer, which)), kSegmentAlign);
}

size_t HostStore::scale_segment_bytes(int layer, Matrix which, int node) const {
  auto [begin, end] = node_rows(rows(layer, which), node, num_nodes_);
  return align_up(static_cast<size_t>((end - begin) * scale_row_bytes(layer, which)),
                  kSegmentAlign);
}

// Where the node's part of a matrix begins: its rows, if they are in the arena, then their scales.
uint8_t* HostStore::place(int layer, int expert, Matrix which, int node) const {
  size_t before = 0, per_expert = 0;
  for (int m = 0; m < kNumMatrices; ++m) {
    const size_t bytes = data_segment_bytes(layer, matrix_at(m), node) +
                         scale_segment_bytes(layer, matrix_at(m), node);
    if (m < static_cast<int>(which)) before += bytes;
    per_expert += bytes;
  }
  return node_data_[node] + layer_offset_[node][layer] + per_expert * static_cast<size_t>(expert) +
         before;
}

uint8_t* HostStore::segment(int layer, int expert, Matrix which, int node) const {
  return backing_ == Backing::kArena ? place(layer, expert, which, node) : nullptr;
}

uint8_t* HostStore::scale(int layer, int expert, Matrix which, int node) const {
  if (!info(layer).scaled()) return nullptr;
  if (info(layer).scaled_by_group()) {
    return place(layer, expert, which, node) + data_segment_bytes(layer, which, node);
  }
  size_t before = 0, per_expert = 0;
  for (int m = 0; m < kNumMatrices; ++m) {
    const size_t bytes = static_cast<size_t>(scale_matrix_bytes(layer, matrix_at(m)));
    if (m < static_cast<int>(which)) before += bytes;
    per_expert += bytes;
  }
  return scales_ + scale_offset_[layer] + per_expert * static_cast<size_t>(expert) + before;
}

Status HostStore::read_matrix(int layer, int expert, Matrix which, int fd, int64_t offset) {
  if (backing_ != Backing::kArena) {
    return Status::error(
        "read_matrix fills the arena backing; this store maps its files: use set_mapped");
  }
  if (offset < 0) return Status::error("negative file offset " + std::to_string(offset));
  if (sealed_) return Status::error(name(layer, expert, which) + " is loaded and sealed");
  Status reserved = reserve(layer, expert, which);
  if (!reserved.ok()) return reserved;
  const int64_t stride = row_bytes(layer, which);
  for (int node = 0; node < num_nodes_; ++node) {
    auto [begin, end] = node_rows(rows(layer, which), node, num_nodes_);
    Status status = pread_all(fd, segment(layer, expert, which, node), (end - begin) * stride,
                              offset + begin * stride, name(layer, expert, which));
    if (!status.ok()) return status;
  }
  marks_[entry_index(layer, expert, which)].fetch_or(kHasData, std::memory_order_release);
  return {};
}

Status HostStore::map_file(const std::string& path, int* file_idx) {
  if (backing_ != Backing::kMmap) {
    return Status::error(
        "map_file is for the mmap backing; this store has an arena: use read_matrix");
  }
  std::unique_ptr<MappedFile> file;
  Status status = MappedFile::open(path, &file);
  if (!status.ok()) return status;
  std::lock_guard<std::mutex> lock(files_mutex_);
  *file_idx = static_cast<int>(files_.size());
  files_.push_back(std::move(file));
  return {};
}

Status HostStore::set_mapped(int layer, int expert, Matrix which, int file_idx, int64_t offset) {
  const MappedFile* file = nullptr;
  {
    std::lock_guard<std::mutex> lock(files_mutex_);
    if (file_idx < 0 || file_idx >= static_cast<int>(files_.size())) {
      return Status::error("mapped file " + std::to_string(file_idx) + " of " +
                           std::to_string(files_.size()) + ": call map_file first");
    }
    file = files_[file_idx].get();
  }
  int64_t bytes = matrix_bytes(layer, which);
  if (offset < 0 || static_cast<uint64_t>(offset) > file->bytes() ||
      static_cast<uint64_t>(bytes) > file->bytes() - static_cast<uint64_t>(offset)) {
    return Status::error(name(layer, expert, which) + " needs bytes " + std::to_string(offset) +
                         " to " + std::to_string(offset + bytes) + " of " + file->path() +
                         ", which has " + std::to_string(file->bytes()));
  }
  if (offset % std::max(1, info(layer).bits / 8) != 0) {
    return Status::error(name(layer, expert, which) + " starts at byte " + std::to_string(offset) +
                         " of " + file->path() +
                         ", which is no multiple of its element's size: use the arena backing");
  }
  file->will_need(static_cast<size_t>(offset), static_cast<size_t>(bytes));
  mapped_[entry_index(layer, expert, which)] = file->data() + offset;
  marks_[entry_index(layer, expert, which)].fetch_or(kHasData, std::memory_order_release);
  return {};
}

Status HostStore::set_scale(int layer, int expert, Matrix which, ScaleType type, const void* scale,
                            int64_t rows, int64_t cols) {
  if (!info(layer).scaled()) {
    return Status::error(name(layer, expert, which) + " has no scales: its format is " +
                         info(layer).name);
  }
  if (sealed_) return Status::error(name(layer, expert, which) + " is loaded and sealed");
  if (type != info(layer).scale_type) {
    return Status::error("scale of " + name(layer, expert, which) + " is " + scale_type_name(type) +
                         "; wanted " + scale_type_name(info(layer).scale_type) + " for format " +
                         info(layer).name);
  }
  auto [want_rows, want_cols] = scale_shape(layer, which);
  if (rows != want_rows || cols != want_cols) {
    return Status::error("scale of " + name(layer, expert, which) + " is [" + std::to_string(rows) +
                         ", " + std::to_string(cols) + "]; wanted [" + std::to_string(want_rows) +
                         ", " + std::to_string(want_cols) + "] for a matrix of [" +
                         std::to_string(this->rows(layer, which)) + ", " +
                         std::to_string(this->cols(layer, which)) + "]");
  }
  const int64_t row_bytes = cols * scale_bytes(type);
  if (type == ScaleType::kE8m0) {
    const void* nan = std::memchr(scale, 255, static_cast<size_t>(rows * cols));
    if (nan != nullptr) {
      const int64_t at = static_cast<const uint8_t*>(nan) - static_cast<const uint8_t*>(scale);
      return Status::error("scale of " + name(layer, expert, which) + " is 255, NaN, at [" +
                           std::to_string(at / cols) + ", " + std::to_string(at % cols) +
                           "]: the weights are damaged");
    }
  }
  // Beyond them kernels would give neither an error nor the weights meant.
  const uint8_t* bytes = static_cast<const uint8_t*>(scale);
  for (int64_t i = 0; type == ScaleType::kF32Zero && i < rows * cols; ++i) {
    if ((bytes[4 * i] & 31) > 16) {
      return Status::error("zero point of " + name(layer, expert, which) + " is " +
                           std::to_string(bytes[4 * i] & 31) + " at [" + std::to_string(i / cols) +
                           ", " + std::to_string(i % cols) + "]; wanted 0 to 16");
    }
  }
  for (int64_t i = 0; type == ScaleType::kE4m3 && i < rows * cols; ++i) {
    if (i % cols < cols - info(layer).tail_cols && (bytes[i] & 127) == 127) {
      return Status::error("scale of " + name(layer, expert, which) + " is NaN at [" +
                           std::to_string(i / cols) + ", " + std::to_string(i % cols) +
                           "]: the weights are damaged");
    }
  }
  Status reserved = reserve_scale(layer, expert, which);
  if (!reserved.ok()) return reserved;
  for (int node = 0; node < num_nodes_; ++node) {
    auto [begin, end] = scale_rows(layer, which, node);
    if (begin == end) continue;
    std::memcpy(this->scale(layer, expert, which, node),
                static_cast<const uint8_t*>(scale) + begin * row_bytes,
                static_cast<size_t>((end - begin) * row_bytes));
  }
  marks_[entry_index(layer, expert, which)].fetch_or(kHasScale, std::memory_order_release);
  return {};
}

Status HostStore::mark_loaded(int layer, int expert, Matrix which) {
  if (!is_writable()) {
    return Status::error(
        name(layer, expert, which) + " cannot be written: this store " +
        (sealed_ ? "is sealed" : "maps its files read-only; use backing=\"arena\""));
  }
  marks_[entry_index(layer, expert, which)].fetch_or(kHasData, std::memory_order_release);
  return {};
}

Status HostStore::reserve(int layer, int expert, Matrix which) const {
  if (segment_ == nullptr || sealed_) return {};
  for (int node = 0; node < num_nodes_; ++node) {
    auto [begin, end] = node_rows(rows(layer, which), node, num_nodes_);
    const uint8_t* start = segment(layer, expert, which, node);
    Status status = segment_->reserve(static_cast<size_t>(start - segment_->data()),
                                      static_cast<size_t>((end - begin) * row_bytes(layer, which)));
    if (!status.ok()) return status;
  }
  return {};
}

// Scales that lie together were reserved when the segment was opened.
Status HostStore::reserve_scale(int layer, int expert, Matrix which) const {
  if (segment_ == nullptr || sealed_ || !info(layer).scaled_by_group()) return {};
  for (int node = 0; node < num_nodes_; ++node) {
    const uint8_t* start = scale(layer, expert, which, node);
    Status status = segment_->reserve(static_cast<size_t>(start - segment_->data()),
                                      scale_segment_bytes(layer, which, node));
    if (!status.ok()) return status;
  }
  return {};
}

uint8_t HostStore::wanted_marks(int layer) const {
  return info(layer).scaled() ? kHasData | kHasScale : kHasData;
}

bool HostStore::is_loaded(int layer, int expert, Matrix which) const {
  const uint8_t wanted = wanted_marks(layer);
  uint8_t state = marks_[entry_index(layer, expert, which)].load(std::memory_order_acquire);
  return (state & wanted) == wanted;
}

Status HostStore::check_has_data(int layer, int expert, Matrix which) const {
  if (marks_[entry_index(layer, expert, which)].load(std::memory_order_acquire) & kHasData) {
    return {};
  }
  return Status::error(name(layer, expert, which) + " was not loaded yet");
}

Status HostStore::check_loaded(int layer, int expert) const {
  const uint8_t wanted = wanted_marks(layer);
  for (int m = 0; m < kNumMatrices; ++m) {
    uint8_t state =
        marks_[entry_index(layer, expert, matrix_at(m))].load(std::memory_order_acquire);
    if ((state & wanted) != wanted) {
      return Status::error(name(layer, expert, matrix_at(m)) +
                           (state & kHasData ? " has no scale yet" : " was not loaded yet"));
    }
  }
  return {};
}

WeightView HostStore::view(int layer, int expert, Matrix which, int node) const {
  WeightView view;
  view.format = layers_[layer].format;
  view.n = rows(layer, which);
  view.k = cols(layer, which);
  view.row_stride_bytes = row_bytes(layer, which);
  if (backing_ == Backing::kArena) {
    // Element [0, 0] of the whole matrix as seen from this node's rows; only those are ever
    // dereferenced.
    int64_t first = node_rows(view.n, node, num_nodes_).first;
    view.data = reinterpret_cast<const uint8_t*>(
        reinterpret_cast<uintptr_t>(segment(layer, expert, which, node)) -
        static_cast<uintptr_t>(first * view.row_stride_bytes));
  } else {
    view.data = mapped_[entry_index(layer, expert, which)];
  }
  // Scales likewise.
  const int64_t scale_stride_bytes = scale_row_bytes(layer, which);
  const int64_t first = scale_stride_bytes == 0 ? 0 : node_rows(view.n, node, num_nodes_).first;
  view.scale = reinterpret_cast<const uint8_t*>(
      reinterpret_cast<uintptr_t>(scale(layer, expert, which, node)) -
      static_cast<uintptr_t>(first * scale_stride_bytes));
  view.scale_stride = scale_shape(layer, which).second;
  return view;
}

std::vector<MemoryRange> HostStore::memory_ranges() const {
  std::vector<MemoryRange> ranges;
  for (size_t node = 0; node < node_data_.size(); ++node) {
    ranges.push_back({"the experts of NUMA node " + std::to_string(node), node_data_[node],
                      node_bytes_[node], sealed_});
  }
  {
    std::lock_guard<std::mutex> lock(files_mutex_);
    for (const auto& file : files_) {
      ranges.push_back({file->path(), const_cast<uint8_t*>(file->data()), file->bytes(), true});
    }
  }
  if (scale_bytes_ > 0) {
    ranges.push_back(
        {"the experts' scales", scales_, scale_bytes_, segment_ != nullptr && sealed_});
  }
  return ranges;
}

Status HostStore::lock_pages(std::shared_ptr<DeviceDriver> driver,
                             const PageLock::Progress& progress, size_t part_bytes) {
  if (page_lock_ != nullptr) return {};
  return PageLock::create(std::move(driver), memory_ranges(), progress, &page_lock_, part_bytes);
}

}  // namespace jaxmoe
