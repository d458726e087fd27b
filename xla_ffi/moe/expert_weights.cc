#include "moe/expert_weights.h"

#include "kernels/formats.h"

namespace jaxmoe {
namespace {

int64_t matrix_scale_bytes(WeightFormat format, int64_t n, int64_t k) {
  auto [rows, cols] = scale_dims(format, n, k);
  return rows * cols * scale_bytes(format_info(format).scale_type);
}

}  // namespace

int64_t ExpertWeights::row_bytes(Matrix which) const {
  const int64_t k = cols(which);
  const int64_t scales =
      format_info(spec_.format).scaled_by_group() ? matrix_scale_bytes(spec_.format, 1, k) : 0;
  return weight_row_bytes(spec_.format, k) + scales;
}

int64_t ExpertWeights::expert_bytes() const {
  int64_t bytes = 0;
  for (Matrix which : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
    const int64_t n = rows(which), k = cols(which);
    bytes += n * weight_row_bytes(spec_.format, k) + matrix_scale_bytes(spec_.format, n, k);
  }
  return bytes;
}

WeightView BufferExperts::view(int expert, Matrix which, int) const {
  const WeightFormat format = spec().format;
  WeightView view;
  view.format = format;
  view.n = rows(which);
  view.k = cols(which);
  view.row_stride_bytes = weight_row_bytes(format, view.k);
  view.data = data_[static_cast<int>(which)] + expert * view.n * view.row_stride_bytes;
  if (format_info(format).scaled()) {
    view.scale =
        scales_[static_cast<int>(which)] + expert * matrix_scale_bytes(format, view.n, view.k);
    view.scale_stride = scale_dims(format, view.n, view.k).second;
  }
  return view;
}

}  // namespace jaxmoe
