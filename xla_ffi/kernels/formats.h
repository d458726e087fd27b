// What the formats of stored weights are made of: element sizes, scales, shapes. The same table as
// jaxmoe/quant/formats.py. Not for files with instruction-set flags (see isa_tables.h): their
// decoders say what they need themselves.
#ifndef JAXMOE_KERNELS_FORMATS_H_
#define JAXMOE_KERNELS_FORMATS_H_

#include <cstdint>
#include <utility>

#include "kernels/kernels.h"

namespace jaxmoe {

struct FormatInfo {
  const char* name;
  int bits;  // of a stored weight
  ScaleType scale_type;
  int64_t group_rows, group_cols;  // that share a scale; 0 columns: all of a row
  bool whole_groups;               // k must be a multiple of group_cols
  int tail_cols = 0;               // scales' elements behind a row's own: the bytes of its factor

  bool scaled() const { return scale_type != ScaleType::kNone; }
  // Scales that each belong to one row and are many: placed and counted with the rows.
  bool scaled_by_group() const { return scaled() && group_rows == 1 && group_cols != 0; }
};

// By WeightFormat.
inline constexpr FormatInfo kFormatInfo[kNumFormats] = {
    {"f32", 32, ScaleType::kNone, 1, 0, false},
    {"bf16", 16, ScaleType::kNone, 1, 0, false},
    {"fp8_block", 8, ScaleType::kF32, kScaleBlock, kScaleBlock, false},
    {"fp8_channel", 8, ScaleType::kF32, 1, 0, false},
    {"int4_g32", 4, ScaleType::kBf16, 1, 32, true},
    {"int4_g128", 4, ScaleType::kBf16, 1, 128, true},
    {"mxfp4", 4, ScaleType::kE8m0, 1, 32, true},
    {"mxfp8", 8, ScaleType::kE8m0, 1, 32, true},
    {"uint4_g32", 4, ScaleType::kF32Zero, 1, 32, true},
    {"uint4_g128", 4, ScaleType::kF32Zero, 1, 128, true},
    {"nvfp4", 4, ScaleType::kE4m3, 1, 16, true, 4},
};

inline const FormatInfo& format_info(WeightFormat format) {
  return kFormatInfo[static_cast<int>(format)];
}

inline int64_t scale_bytes(ScaleType type) {
  switch (type) {
    case ScaleType::kNone:
      return 0;
    case ScaleType::kF32:
    case ScaleType::kF32Zero:
      return 4;
    case ScaleType::kBf16:
      return 2;
    case ScaleType::kE8m0:
    case ScaleType::kE4m3:
      return 1;
  }
  return 0;
}

// Of a row of k weights, where k suits the format.
inline int64_t weight_row_bytes(WeightFormat format, int64_t k) {
  return k * format_info(format).bits / 8;
}

// Rows and columns of the scales of a matrix [n, k]; {0, 0} for formats without.
inline std::pair<int64_t, int64_t> scale_dims(WeightFormat format, int64_t n, int64_t k) {
  const FormatInfo& info = format_info(format);
  if (!info.scaled()) return {0, 0};
  const int64_t cols = info.group_cols == 0 ? k : info.group_cols;
  return {(n + info.group_rows - 1) / info.group_rows, (k + cols - 1) / cols + info.tail_cols};
}

// Whether rows of k weights end at the end of a group.
inline bool columns_suit(WeightFormat format, int64_t k) {
  const FormatInfo& info = format_info(format);
  return !info.whole_groups || k % info.group_cols == 0;
}

}  // namespace jaxmoe

#endif  // JAXMOE_KERNELS_FORMATS_H_
