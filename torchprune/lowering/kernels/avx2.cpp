// The kernels for AVX2: eight columns at a time, spread by byte shuffles looked up by their mask.

#include "forms.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <cstdlib>
#include <cstring>

namespace torchprune {
namespace {

constexpr int kAhead = 4096;

// For every mask of eight columns: which packed value goes to each column; 0x80.. where none does.
struct Tables {
  alignas(16) uint8_t one[256][8];   // byte shuffles of 1-byte values
  alignas(16) uint8_t two[256][16];  // and of 2-byte values
  alignas(32) int32_t four[256][8];  // lanes of 4-byte values; any where none
  alignas(32) int32_t keep[256][8];  // -1 or 0
  uint8_t count[256];
};

constexpr Tables make_tables() {
  Tables t{};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int c = 0; c < 8; ++c) {
      const bool kept = mask >> c & 1;
      t.one[mask][c] = uint8_t(kept ? next : 0x80);
      t.two[mask][2 * c] = uint8_t(kept ? 2 * next : 0x80);
      t.two[mask][2 * c + 1] = uint8_t(kept ? 2 * next + 1 : 0x80);
      t.four[mask][c] = kept ? next : 0;
      t.keep[mask][c] = kept ? -1 : 0;
      next += kept;
    }
    t.count[mask] = uint8_t(next);
  }
  return t;
}

constexpr Tables kTables = make_tables();

__m128i spread_one(int mask, const char* from) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.one[mask]));
  return _mm_shuffle_epi8(packed, order);
}

__m128i spread_two(int mask, const char* from) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.two[mask]));
  return _mm_shuffle_epi8(packed, order);
}

__m256i spread_four(int mask, const char* from) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.four[mask]));
  const __m256i keep = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.keep[mask]));
  return _mm256_and_si256(_mm256_permutevar8x32_epi32(packed, order), keep);
}

template <Kind K>
constexpr int bytes_of() {
  return K == kFloat32 ? 4 : K == kInt8 ? 1 : 2;
}

#include "vectors.h"

// Eight columns, in their order, as a vector of floats.
struct Floats {
  using Vector = __m256;
  static constexpr int kColumns = 8, kTaken = 1, kFewRows = 1, kRows = 2, kInputs = 5;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector fma(Vector w, Vector x, Vector sum) { return _mm256_fmadd_ps(w, x, sum); }
  static Vector load(const void* x, int64_t at) {
    return _mm256_loadu_ps(static_cast<const float*>(x) + 8 * at);
  }
  static void store(void* to, int64_t at, Vector w) {
    _mm256_storeu_ps(static_cast<float*>(to) + 8 * at, w);
  }
  static float sum(Vector v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void ahead(const char* from) { _mm_prefetch(from + kAhead, _MM_HINT_T0); }

  template <Kind K>
  static const char* take(uint64_t bits, const char* from, Vector (&w)[1]) {
    const int mask = int(bits & 255);
    if constexpr (K == kFloat32) {
      w[0] = _mm256_castsi256_ps(spread_four(mask, from));
    } else if constexpr (K == kInt8) {
      w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread_one(mask, from)));
    } else if constexpr (K == kFloat16) {
      w[0] = _mm256_cvtph_ps(spread_two(mask, from));
    } else {
      const __m256i wide = _mm256_cvtepu16_epi32(spread_two(mask, from));
      w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return from + kTables.count[mask] * bytes_of<K>();
  }
};

template <int Bytes>
bool expand(const Packed& m, int64_t begin, int64_t end, int64_t cols, char* to) {
  bool right = true;
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t* bits = m.bits + r * m.words;
    const char* from = nullptr;
    int64_t counted = m.starts[r];
    for (int64_t at = 0; at < cols; at += 8) {
      if (at % kWord == 0) {
        from = values_at<Bytes>(m, counted);
        counted += __builtin_popcountll(bits[at / kWord]);
      }
      const int mask = int(bits[at / kWord] >> (at % kWord) & 255);
      alignas(32) char eight[8 * Bytes];
      if constexpr (Bytes == 1) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(eight), spread_one(mask, from));
      } else if constexpr (Bytes == 2) {
        _mm_store_si128(reinterpret_cast<__m128i*>(eight), spread_two(mask, from));
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(eight), spread_four(mask, from));
      }
      from += kTables.count[mask] * Bytes;
      const int64_t inside = cols - at < 8 ? cols - at : 8;
      std::memcpy(to, eight, inside * Bytes);
      to += inside * Bytes;
    }
    right &= agrees(m, r, counted);
  }
  return right;
}

void arrange(Kind, const float* from, int64_t cols, float* to, int64_t words) {
  std::memcpy(to, from, cols * sizeof(float));
  std::memset(to + cols, 0, (words * kWord - cols) * sizeof(float));
}

const Form form = {"AVX2",
                   arrange,
                   nullptr,
                   {TORCHPRUNE_FEW(Floats, kFloat32), TORCHPRUNE_FEW(Floats, kFloat16),
                    TORCHPRUNE_FEW(Floats, kBFloat16), TORCHPRUNE_FEW(Floats, kInt8), {}, {}},
                   {many<Floats, kFloat32>, many<Floats, kFloat16>, many<Floats, kBFloat16>,
                    many<Floats, kInt8>, nullptr, nullptr},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* avx2_form() { return &form; }

}  // namespace torchprune

#else

const torchprune::Form* torchprune::avx2_form() { return nullptr; }

#endif
