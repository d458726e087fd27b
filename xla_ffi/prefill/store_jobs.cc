#include "prefill/store_jobs.h"

#include <algorithm>

#include "kernels/formats.h"

namespace jaxmoe {
namespace {

// Enqueueing a copy costs a few microseconds on both sides, as much as 0.1 to 0.3 MB take on the
// bus: copies below this are worth gathering.
constexpr size_t kSmallBytes = size_t{1} << 20;

struct Piece {
  size_t dst = 0;
  const uint8_t* src = nullptr;
  size_t bytes = 0;
};

// Appends to `pieces`, or lengthens the last.
void add_piece(std::vector<Piece>* pieces, const Piece& piece) {
  if (piece.bytes == 0) return;
  if (!pieces->empty()) {
    Piece& last = pieces->back();
    if (last.dst + last.bytes == piece.dst && last.src + last.bytes == piece.src) {
      last.bytes += piece.bytes;
      return;
    }
  }
  pieces->push_back(piece);
}

// Pieces of one size at equal distances, from `first` on: how many.
size_t count_rows(const std::vector<Piece>& pieces, size_t first) {
  size_t end = first + 1;
  while (end < pieces.size() && pieces[end].bytes == pieces[first].bytes &&
         pieces[end].dst - pieces[end - 1].dst == pieces[first + 1].dst - pieces[first].dst &&
         pieces[end].src - pieces[end - 1].src == pieces[first + 1].src - pieces[first].src) {
    ++end;
  }
  return end - first;
}

void add_copies(int buffer, const std::vector<Piece>& pieces, const PageLock* lock,
                std::vector<SlotCopy>* copies) {
  for (size_t i = 0; i < pieces.size();) {
    const Piece& first = pieces[i];
    const size_t rows = first.bytes < kSmallBytes ? count_rows(pieces, i) : 1;
    if (rows > 1 && pieces[i + 1].src > first.src) {
      const auto src_pitch = static_cast<size_t>(pieces[i + 1].src - first.src);
      const size_t span = src_pitch * (rows - 1) + first.bytes;
      const size_t length = lock != nullptr ? lock->run_length(first.src) : 0;
      if (src_pitch >= first.bytes && (length == 0 || length >= span)) {
        copies->push_back({buffer, first.dst, first.src, first.bytes, rows,
                           pieces[i + 1].dst - first.dst, src_pitch});
        i += rows;
        continue;
      }
    }
    append_cut(buffer, first.dst, first.src, first.bytes, lock, copies);
    ++i;
  }
}

ScaleType scale_type(const HostStore& store, int layer) {
  return format_info(store.layer(layer).format).scale_type;
}

// What an expert's matrix, or its scales, is made of in the store: runs of bytes in the matrix's
// order.
std::vector<Piece> pieces_of(const HostStore& store, int layer, int expert, Matrix which,
                             bool scales) {
  std::vector<Piece> pieces;
  if (scales) {
    const auto stride = static_cast<size_t>(store.scale_shape(layer, which).second *
                                            scale_bytes(scale_type(store, layer)));
    for (int node = 0; node < store.num_nodes(); ++node) {
      auto [begin, end] = store.scale_rows(layer, which, node);
      add_piece(&pieces,
                {static_cast<size_t>(begin) * stride, store.scale(layer, expert, which, node),
                 static_cast<size_t>(end - begin) * stride});
    }
    return pieces;
  }
  for (int node = 0; node < store.num_nodes(); ++node) {
    auto [begin, end] = node_rows(store.rows(layer, which), node, store.num_nodes());
    const WeightView view = store.view(layer, expert, which, node);
    const auto stride = static_cast<size_t>(view.row_stride_bytes);
    const size_t offset = static_cast<size_t>(begin) * stride;
    // Only the node's own rows are behind its view: by number, for the address of row 0 may be
    // none.
    const auto* src =
        reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(view.data) + offset);
    add_piece(&pieces, {offset, src, static_cast<size_t>(end - begin) * stride});
  }
  return pieces;
}

void add_matrix(const HostStore& store, const ExpertGroup& group, Matrix which, bool scales,
                std::vector<SlotCopy>* copies) {
  // Node by node, so that equal distances show.
  std::vector<std::vector<Piece>> by_node;
  size_t per_expert = 0;
  for (int i = 0; i < group.num_experts; ++i) {
    std::vector<Piece> pieces =
        pieces_of(store, group.layer, group.first_expert + i, which, scales);
    if (i == 0) {
      by_node.resize(pieces.size());
      per_expert = pieces.back().dst + pieces.back().bytes;
    }
    by_node.resize(std::max(by_node.size(), pieces.size()));
    for (size_t n = 0; n < pieces.size(); ++n) {
      pieces[n].dst += static_cast<size_t>(i) * per_expert;
      add_piece(&by_node[n], pieces[n]);
    }
  }
  const int buffer = static_cast<int>(which) + (scales ? kNumMatrices : 0);
  for (const std::vector<Piece>& pieces : by_node) {
    add_copies(buffer, pieces, store.page_lock(), copies);
  }
}

}  // namespace

void append_cut(int buffer, size_t dst, const uint8_t* src, size_t bytes, const PageLock* lock,
                std::vector<SlotCopy>* copies) {
  while (bytes > 0) {
    size_t length = lock != nullptr ? lock->run_length(src) : 0;
    length = length == 0 ? bytes : std::min(bytes, length);
    copies->push_back({buffer, dst, src, length});
    dst += length;
    src += length;
    bytes -= length;
  }
}

Status append_store_jobs(const std::shared_ptr<HostStore>& store,
                         const std::vector<ExpertGroup>& groups, SlotJobs* jobs) {
  for (const ExpertGroup& group : groups) {
    const int64_t last = int64_t{group.first_expert} + group.num_experts - 1;
    for (int64_t expert : {int64_t{group.first_expert}, last}) {
      Status status = store->check_index(group.layer, expert, 0);
      if (!status.ok()) return status;
    }
    if (group.num_experts < 1) {
      return Status::error("a group of " + std::to_string(group.num_experts) +
                           " experts; wanted at least one");
    }
    for (int i = 0; i < group.num_experts; ++i) {
      Status status = store->check_loaded(group.layer, group.first_expert + i);
      if (!status.ok()) return status;
    }
    SlotJob job;
    job.slot = group.slot;
    job.name = "MoE layer " + std::to_string(group.layer) + ", experts " +
               std::to_string(group.first_expert) + " to " + std::to_string(last);
    const bool has_scales = scale_type(*store, group.layer) != ScaleType::kNone;
    for (int m = 0; m < kNumMatrices; ++m) {
      add_matrix(*store, group, static_cast<Matrix>(m), false, &job.copies);
      if (has_scales) add_matrix(*store, group, static_cast<Matrix>(m), true, &job.copies);
    }
    if (store->page_lock() == nullptr) {
      for (const SlotCopy& copy : job.copies) {
        jobs->unlocked_bytes += static_cast<int64_t>(copy.bytes());
      }
    }
    jobs->jobs.push_back(std::move(job));
  }
  jobs->keep.push_back(store);
  return {};
}

}  // namespace jaxmoe
