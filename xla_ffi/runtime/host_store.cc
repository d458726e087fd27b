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

Matrix matrix_at(int i) { return static_cast<Matrix>(i); }

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

int64_t element_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return 4;
    case WeightFormat::kBf16:
      return 2;
    case WeightFormat::kFp8Block:
      return 1;
  }
  return 0;
}

std::pair<int64_t, int64_t> node_rows(int64_t n, int node, int num_nodes) {
  int64_t groups = (n + HostStore::kRowSplit - 1) / HostStore::kRowSplit;
  auto boundary = [&](int i) { return std::min(n, groups * i / num_nodes * HostStore::kRowSplit); };
  return {boundary(node), boundary(node + 1)};
}

Status HostStore::create(const Topology& topology, std::vector<ExpertLayerSpec> layers,
                         Backing backing, std::shared_ptr<HostStore>* store) {
  std::shared_ptr<HostStore> result(new HostStore());
  result->layers_ = std::move(layers);
  result->backing_ = backing;
  result->num_nodes_ = static_cast<int>(topology.nodes.size());
  size_t entries = 0, scale_floats = 0;
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
    result->first_entry_.push_back(entries);
    result->scale_offset_.push_back(scale_floats);
    entries += static_cast<size_t>(spec.num_experts) * kNumMatrices;
    for (int m = 0; m < kNumMatrices && result->total_bytes_ <= kMostBytes; ++m) {
      int layer = static_cast<int>(l);
      result->total_bytes_ += spec.num_experts * result->matrix_bytes(layer, matrix_at(m));
      auto [rows, cols] = result->scale_shape(layer, matrix_at(m));
      if (spec.format == WeightFormat::kFp8Block) {
        scale_floats += static_cast<size_t>(spec.num_experts * rows * cols);
      }
    }
  }
  if (result->total_bytes_ > kMostBytes) {
    return Status::error("the experts of " + std::to_string(result->num_layers()) +
                         " layers are more than a petabyte: check the model's dimensions");
  }
  result->entries_.reset(new Entry[entries]);
  Status status = Arena::create(scale_floats * sizeof(float), -1, &result->scales_);
  if (!status.ok()) return status;

  if (backing == Backing::kArena) {
    for (int node = 0; node < result->num_nodes_; ++node) {
      size_t bytes = 0;
      std::vector<size_t> offsets;
      for (int l = 0; l < result->num_layers(); ++l) {
        offsets.push_back(bytes);
        size_t per_expert = 0;
        for (int m = 0; m < kNumMatrices; ++m) {
          auto [begin, end] = node_rows(result->rows(l, matrix_at(m)), node, result->num_nodes_);
          per_expert +=
              align_up(static_cast<size_t>((end - begin) * result->row_bytes(l, matrix_at(m))),
                       kSegmentAlign);
        }
        bytes += per_expert * static_cast<size_t>(result->layers_[l].num_experts);
      }
      bool bind = !topology.fake && topology.nodes.size() > 1;
      std::unique_ptr<Arena> arena;
      status = Arena::create(bytes, bind ? topology.nodes[node].node_id : -1, &arena);
      if (!status.ok()) return status;
      result->arenas_.push_back(std::move(arena));
      result->layer_offset_.push_back(std::move(offsets));
    }
  }
  *store = std::move(result);
  return {};
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
  return cols(layer, which) * element_bytes(layers_[layer].format);
}

std::pair<int64_t, int64_t> HostStore::scale_shape(int layer, Matrix which) const {
  return {(rows(layer, which) + kScaleBlock - 1) / kScaleBlock,
          (cols(layer, which) + kScaleBlock - 1) / kScaleBlock};
}

std::vector<int64_t> HostStore::bytes_per_node() const {
  std::vector<int64_t> bytes(num_nodes_, 0);
  for (int node = 0; node < num_nodes_; ++node) {
    for (int l = 0; l < num_layers(); ++l) {
      for (int m = 0; m < kNumMatrices; ++m) {
        auto [begin, end] = node_rows(rows(l, matrix_at(m)), node, num_nodes_);
        bytes[node] += layers_[l].num_experts * (end - begin) * row_bytes(l, matrix_at(m));
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

uint8_t* HostStore::segment(int layer, int expert, Matrix which, int node) const {
  if (backing_ != Backing::kArena) return nullptr;
  size_t before = 0, per_expert = 0;
  for (int m = 0; m < kNumMatrices; ++m) {
    auto [begin, end] = node_rows(rows(layer, matrix_at(m)), node, num_nodes_);
    size_t bytes = align_up(static_cast<size_t>((end - begin) * row_bytes(layer, matrix_at(m))),
                            kSegmentAlign);
    if (m < static_cast<int>(which)) before += bytes;
    per_expert += bytes;
  }
  return arenas_[node]->data() + layer_offset_[node][layer] +
         per_expert * static_cast<size_t>(expert) + before;
}

Status HostStore::read_matrix(int layer, int expert, Matrix which, int fd, int64_t offset) {
  if (backing_ != Backing::kArena) {
    return Status::error(
        "read_matrix fills the arena backing; this store maps its files: use set_mapped");
  }
  if (offset < 0) return Status::error("negative file offset " + std::to_string(offset));
  const int64_t stride = row_bytes(layer, which);
  for (int node = 0; node < num_nodes_; ++node) {
    auto [begin, end] = node_rows(rows(layer, which), node, num_nodes_);
    Status status = pread_all(fd, segment(layer, expert, which, node), (end - begin) * stride,
                              offset + begin * stride, name(layer, expert, which));
    if (!status.ok()) return status;
  }
  entries_[entry_index(layer, expert, which)].state.fetch_or(kHasData, std::memory_order_release);
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
  if (offset % element_bytes(layers_[layer].format) != 0) {
    return Status::error(name(layer, expert, which) + " starts at byte " + std::to_string(offset) +
                         " of " + file->path() +
                         ", which is no multiple of its element's size: use the arena backing");
  }
  file->will_need(static_cast<size_t>(offset), static_cast<size_t>(bytes));
  Entry& entry = entries_[entry_index(layer, expert, which)];
  entry.mapped = file->data() + offset;
  entry.state.fetch_or(kHasData, std::memory_order_release);
  return {};
}

Status HostStore::set_scale(int layer, int expert, Matrix which, const float* scale, int64_t rows,
                            int64_t cols) {
  if (layers_[layer].format != WeightFormat::kFp8Block) {
    return Status::error(name(layer, expert, which) +
                         " has no scales: its format is not fp8_block");
  }
  auto [want_rows, want_cols] = scale_shape(layer, which);
  if (rows != want_rows || cols != want_cols) {
    return Status::error("scale of " + name(layer, expert, which) + " is [" + std::to_string(rows) +
                         ", " + std::to_string(cols) + "]; wanted [" + std::to_string(want_rows) +
                         ", " + std::to_string(want_cols) + "] for a matrix of [" +
                         std::to_string(this->rows(layer, which)) + ", " +
                         std::to_string(this->cols(layer, which)) + "]");
  }
  std::memcpy(const_cast<float*>(this->scale(layer, expert, which)), scale,
              static_cast<size_t>(rows * cols) * sizeof(float));
  entries_[entry_index(layer, expert, which)].state.fetch_or(kHasScale, std::memory_order_release);
  return {};
}

Status HostStore::mark_loaded(int layer, int expert, Matrix which) {
  if (backing_ != Backing::kArena) {
    return Status::error(
        name(layer, expert, which) +
        " cannot be written: this store maps its files read-only; use backing=\"arena\"");
  }
  entries_[entry_index(layer, expert, which)].state.fetch_or(kHasData, std::memory_order_release);
  return {};
}

Status HostStore::check_has_data(int layer, int expert, Matrix which) const {
  if (entries_[entry_index(layer, expert, which)].state.load(std::memory_order_acquire) &
      kHasData) {
    return {};
  }
  return Status::error(name(layer, expert, which) + " was not loaded yet");
}

Status HostStore::check_loaded(int layer, int expert) const {
  const uint8_t wanted =
      layers_[layer].format == WeightFormat::kFp8Block ? kHasData | kHasScale : kHasData;
  for (int m = 0; m < kNumMatrices; ++m) {
    uint8_t state =
        entries_[entry_index(layer, expert, matrix_at(m))].state.load(std::memory_order_acquire);
    if ((state & wanted) != wanted) {
      return Status::error(name(layer, expert, matrix_at(m)) +
                           (state & kHasData ? " has no scale yet" : " was not loaded yet"));
    }
  }
  return {};
}

const float* HostStore::scale(int layer, int expert, Matrix which) const {
  if (layers_[layer].format != WeightFormat::kFp8Block) return nullptr;
  size_t before = 0, per_expert = 0;
  for (int m = 0; m < kNumMatrices; ++m) {
    auto [rows, cols] = scale_shape(layer, matrix_at(m));
    if (m < static_cast<int>(which)) before += static_cast<size_t>(rows * cols);
    per_expert += static_cast<size_t>(rows * cols);
  }
  return reinterpret_cast<const float*>(scales_->data()) + scale_offset_[layer] +
         per_expert * static_cast<size_t>(expert) + before;
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
    view.data = entries_[entry_index(layer, expert, which)].mapped;
  }
  view.scale = scale(layer, expert, which);
  view.scale_stride = view.scale != nullptr ? scale_shape(layer, which).second : 0;
  return view;
}

}  // namespace jaxmoe
