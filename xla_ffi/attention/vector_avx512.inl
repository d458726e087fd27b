// What attention_core.inl is given by the files of every instruction set that has AVX-512.

template <int N>
struct Constant {
  static constexpr int value = N;
};

#include "attention/simd_avx512.inl"

constexpr int kScoreKeys = 4;  // 4 x 4 sums, 8 operands: 24 of 32 registers
