// What the two AVX-512 forms share. To be included inside an anonymous namespace.

constexpr int kAhead = 4096;  // bytes; a page further than the hardware dares to fetch

int count(uint64_t bits) { return __builtin_popcountll(bits); }

// Packed lanes to the lanes that are set in a mask, zeros elsewhere. The loads are kept apart and
// the target is cleared first: with a memory operand the instruction is microcoded on some
// processors, and it always waits for what its target held before.
__m512i expand8(uint64_t mask, const char* from) {
  const __m512i packed = _mm512_loadu_si512(from);
  __m512i spread = _mm512_setzero_si512();
  asm("vpexpandb %1, %0 %{%2%}" : "+v"(spread) : "v"(packed), "Yk"(__mmask64(mask)));
  return spread;
}

__m512i expand16(uint64_t mask, const char* from) {
  const __m512i packed = _mm512_loadu_si512(from);
  __m512i spread = _mm512_setzero_si512();
  asm("vpexpandw %1, %0 %{%2%}" : "+v"(spread) : "v"(packed), "Yk"(__mmask32(mask)));
  return spread;
}

__m512i expand32(uint64_t mask, const char* from) {
  const __m512i packed = _mm512_loadu_si512(from);
  __m512i spread = _mm512_setzero_si512();
  asm("vpexpandd %1, %0 %{%2%}" : "+v"(spread) : "v"(packed), "Yk"(__mmask16(mask)));
  return spread;
}

template <Kind K>
constexpr int bytes_of() {
  return K == kFloat32 ? 4 : K == kInt8 || K == kInt8Pairs ? 1 : 2;
}

#include "vectors.h"

// Byte i of every 32-bit lane at its top, the rest 0: 2^24 times the byte, sign and all, without the
// shift back that `arrange` makes up for.
__m512i at_top(__m512i bytes, int i) {
  const int first = 0x00808080 | i << 24, next = 4 << 24;
  const __m512i order =
      _mm512_set4_epi32(first + 3 * next, first + 2 * next, first + next, first);
  return _mm512_shuffle_epi8(bytes, order);
}

// A word of the bitmask, 64 columns, as four vectors of 16 floats. How columns are spread over them
// is each kind's own affair, as long as `arrange` lays the input out alike: a 16-bit value is half
// of a 32-bit lane, so even and odd columns part without a shuffle, and 8-bit values part in four.
struct Floats {
  using Vector = __m512;
  static constexpr int kColumns = 16, kTaken = 4, kFewRows = 2, kRows = 4, kInputs = 6;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector fma(Vector w, Vector x, Vector sum) { return _mm512_fmadd_ps(w, x, sum); }
  static Vector load(const void* x, int64_t at) {
    return _mm512_loadu_ps(static_cast<const float*>(x) + 16 * at);
  }
  static void store(void* to, int64_t at, Vector w) {
    _mm512_storeu_ps(static_cast<float*>(to) + 16 * at, w);
  }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static void sum_four(Vector a, Vector b, Vector c, Vector d, float* to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(all),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static void ahead(const char* from) { _mm_prefetch(from + kAhead, _MM_HINT_T0); }

  template <Kind K>
  static const char* take(uint64_t bits, const char* from, Vector (&w)[4]) {
    if constexpr (K == kFloat32) {
      _mm_prefetch(from + kAhead + 64, _MM_HINT_T0);
      for (int i = 0; i < 4; ++i) {
        const uint64_t now = bits >> (16 * i) & 0xffff;
        w[i] = _mm512_castsi512_ps(expand32(now, from));
        from += 4 * count(now);
      }
    } else if constexpr (K == kInt8) {
      const __m512i bytes = expand8(bits, from);
      from += count(bits);
      for (int i = 0; i < 4; ++i) w[i] = _mm512_cvtepi32_ps(at_top(bytes, i));
    } else {
      for (int i = 0; i < 4; i += 2) {
        const uint64_t now = bits >> (16 * i) & 0xffffffff;
        const __m512i halves = expand16(now, from);
        from += 2 * count(now);
        if constexpr (K == kBFloat16) {
          const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
          w[i] = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
          w[i + 1] = _mm512_castsi512_ps(_mm512_and_si512(halves, upper));
        } else {
          w[i] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
          w[i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
        }
      }
    }
    return from;
  }
};

template <int Bytes>
bool expand(const Packed& m, int64_t begin, int64_t end, int64_t cols, char* to) {
  constexpr int kLanes = 64 / Bytes;
  bool right = true;
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t* bits = m.bits + r * m.words;
    const char* from = nullptr;
    int64_t counted = m.starts[r];
    for (int64_t at = 0; at < cols; at += kLanes) {
      if (at % kWord == 0) {
        from = values_at<Bytes>(m, counted);
        counted += count(bits[at / kWord]);
      }
      const uint64_t here = bits[at / kWord] >> (at % kWord);
      const int64_t left = cols - at < kLanes ? cols - at : kLanes;
      const uint64_t inside = ~uint64_t(0) >> (64 - left);
      _mm_prefetch(from + kAhead, _MM_HINT_T0);
      if constexpr (Bytes == 1) {
        _mm512_mask_storeu_epi8(to, inside, expand8(here, from));
        from += count(here);
      } else if constexpr (Bytes == 2) {
        _mm512_mask_storeu_epi16(to, __mmask32(inside), expand16(here, from));
        from += 2 * count(here & 0xffffffff);
      } else {
        _mm512_mask_storeu_epi32(to, __mmask16(inside), expand32(here, from));
        from += 4 * count(here & 0xffff);
      }
      to += left * Bytes;
    }
    right &= agrees(m, r, counted);
  }
  return right;
}

void arrange(Kind kind, const float* from, int64_t cols, float* to, int64_t words) {
  const int64_t all = words * kWord;
  if (kind == kFloat32 || kind == kFloat16) {
    std::memcpy(to, from, cols * sizeof(float));
    std::memset(to + cols, 0, (all - cols) * sizeof(float));
    return;
  }
  const int64_t parts = kind == kInt8 ? 4 : 2, run = 16 * parts;
  const float scale = kind == kInt8 ? 0x1p-24f : 1.0f;
  for (int64_t at = 0; at < all; at += run) {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t column = at + i * parts + part;
        *to++ = column < cols ? from[column] * scale : 0.0f;
      }
    }
  }
}

#define TORCHPRUNE_FLOATS_FEW                                                        \
  TORCHPRUNE_FEW(Floats, kFloat32), TORCHPRUNE_FEW(Floats, kFloat16),                \
      TORCHPRUNE_FEW(Floats, kBFloat16), TORCHPRUNE_FEW(Floats, kInt8)
#define TORCHPRUNE_FLOATS_MANY \
  many<Floats, kFloat32>, many<Floats, kFloat16>, many<Floats, kBFloat16>, many<Floats, kInt8>
