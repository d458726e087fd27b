// The peak of tiles with their loads: 2 x 2 tiles of sums, four tiles loaded from the first-level
// cache for four products, which is what a product of any size has to do.
#include "bench/peak.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::peak_isa {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kSteps = 8;  // 64 KiB-free: 2 operands x 2 tiles x 1 KiB x 8 = 32 KiB

}  // namespace

double tiles_bf16_amx(int64_t rounds, float* sink) {
  const TileConfig config;
  alignas(64) static thread_local uint8_t operands[2][kSteps][2][1024];
  alignas(64) float out[256];
  for (auto& operand : operands) {
    for (auto& step : operand) {
      for (auto& tile : step) {
        for (int i = 0; i < 1024; i += 2) tile[i] = 0x80, tile[i + 1] = 0x3B;
      }
    }
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int s = 0; s < kSteps; ++s) {
      _tile_loadd(4, operands[0][s][0], 64);
      _tile_loadd(5, operands[0][s][1], 64);
      _tile_loadd(6, operands[1][s][0], 64);
      _tile_loadd(7, operands[1][s][1], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 64);
  *sink = out[0];
  return kSteps * 4.0 * 2 * 16 * 16 * 32;
}

}  // namespace jaxmoe::peak_isa

#else

namespace jaxmoe::peak_isa {
double tiles_bf16_amx(int64_t rounds, float* sink) { return fma_scalar(rounds, sink); }
}  // namespace jaxmoe::peak_isa

#endif
