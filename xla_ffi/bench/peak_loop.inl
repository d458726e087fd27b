// Independent sums, as many as hide the latency of one multiply-add and fit the registers. Included
// in an anonymous namespace of each instruction set's file, which first defines V, kSums, kFlops
// (of one step of one sum), set1, step(sum, a, b) and first(sum).

inline double run_sums(int64_t rounds, float* sink) {
  constexpr int kUnroll = 8;
  V sum[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) {
    sum[i] = zero();
    asm volatile("" : "+x"(sum[i]));  // equal sums would be computed once
  }
  auto a = operand(1e-3f), b = operand(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+x"(a), "+x"(b));  // new operands, as far as the compiler knows
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) sum[i] = step(sum[i], a, b);
    }
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += first(sum[i]);
  *sink = total;
  return static_cast<double>(kUnroll) * kSums * kFlops;
}
