// FP32 arithmetic on 512-bit vectors, and the two formats whose decoding every AVX-512 machine does
// alike. Included after matmul_rows.inl inside an anonymous namespace.
struct Avx512Base {
  using Elem = float;
  using Acc = __m512;
  using Weights = __m512;
  using Scale = float;
  struct Flag {};
  static constexpr int kElems = 16;
  static constexpr int kAccFloats = 16;
  // 32 registers hold a tile of 12 sums, 12 partial sums, 3 activations and 1 weight vector.
  static constexpr int kRows = 4;
  static constexpr int kTokens = 3;
  // Sums of 96 activation rows are 24 KiB: second-level cache, touched once a chunk of columns.
  static constexpr int64_t kTokenChunk = 96;
  // 4 decoded rows of a chunk are 8 KiB of FP32, those of three activation rows 6 KiB: less than
  // half a first-level cache.
  static constexpr int64_t kChunkBlocks = 4;
  // Eight streams keep memory busy at one row of activations.
  static constexpr int kFewRows = 8;
  static constexpr int kMaxFew = 2;
  static constexpr int one_stream_rows(int m) { return m == 1 ? 4 : 2; }
  static constexpr int kMaxFewOneStream = 4;
  static constexpr float kScaleFold = 1.0f;
  static constexpr bool kShareActivations = false;
  static constexpr int kScaleChunk = 0;
  static constexpr int kWidenedBytes = 0;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store_weights(float* p, __m512 a) { _mm512_storeu_ps(p, a); }
  static __m512 load_acc(const float* p) { return _mm512_loadu_ps(p); }
  static void store_acc(float* p, __m512 a) { _mm512_storeu_ps(p, a); }
  static __m512 mac(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
  static __m512 flush(__m512 sum, __m512 part, float scale) {
    return _mm512_fmadd_ps(part, _mm512_set1_ps(scale), sum);
  }
  static float reduce(__m512 a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static bool any_nan(Flag) { return false; }
};

struct Avx512F32 : Avx512Base {
  static constexpr int kWeightBits = 32;
  static constexpr int kGroupVecs = 1;
  static constexpr int column(int i) { return i; }
  static void decode(const uint8_t* src, __m512 (&out)[1], Flag&) { out[0] = _mm512_loadu_ps(src); }
};

struct Avx512Bf16 : Avx512Base {
  static constexpr int kWeightBits = 16;
  static constexpr int kGroupVecs = 2;
  // 32-bit lanes hold two weights: the even columns of 32 first, then the odd ones.
  static constexpr int column(int i) { return i / 32 * 32 + i % 16 * 2 + i % 32 / 16; }
  static void decode(const uint8_t* src, __m512 (&out)[2], Flag&) {
    const __m512i pairs = _mm512_loadu_si512(src);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};
