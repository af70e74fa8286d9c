// The AVX-512 kernels, and for inputs that are bfloat16 too, products of pairs of bfloat16, summed in
// float32: one instruction for 32 columns. It takes subnormal numbers (below 1.2e-38) for 0. And
// products of bytes (VNNI), for int8 weights and one row of input.

#include "forms.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace torchprune {
namespace {

#include "avx512.h"

// Weights and inputs are 32 bfloat16 in the bits of a vector of floats; sums are floats.
struct Pairs {
  using Vector = __m512;
  static constexpr int kColumns = 32, kTaken = 2, kFewRows = 2, kRows = 4, kInputs = 6;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector fma(Vector w, Vector x, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static Vector load(const void* x, int64_t at) { return Floats::load(x, at); }
  static void store(void* to, int64_t at, Vector w) { Floats::store(to, at, w); }
  static float sum(Vector v) { return Floats::sum(v); }
  static void sum_four(Vector a, Vector b, Vector c, Vector d, float* to) {
    Floats::sum_four(a, b, c, d, to);
  }
  static void ahead(const char* from) { Floats::ahead(from); }

  template <Kind K>
  static const char* take(uint64_t bits, const char* from, Vector (&w)[2]) {
    if constexpr (K == kInt8Pairs) {
      Vector quarters[4];
      from = Floats::take<kInt8>(bits, from, quarters);
      for (int i = 0; i < 2; ++i) {
        w[i] = (Vector)_mm512_cvtne2ps_pbh(quarters[2 * i + 1], quarters[2 * i]);
      }
      return from;
    }
    for (int i = 0; i < 2; ++i) {
      const uint64_t now = bits >> (32 * i) & 0xffffffff;
      w[i] = _mm512_castsi512_ps(expand16(now, from));
      from += 2 * count(now);
    }
    return from;
  }
};

float widened(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void arrange_pairs(Kind kind, const uint16_t* from, int64_t cols, uint16_t* to, int64_t words) {
  const int64_t all = words * kWord;
  if (kind == kPairs) {
    std::memcpy(to, from, cols * 2);
    std::memset(to + cols, 0, (all - cols) * 2);
    return;
  }
  for (int64_t at = 0; at < all; at += kWord) {  // as `take` deals out the bytes of a lane
    for (int64_t part = 0; part < 4; ++part) {
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t column = at + 4 * i + part;
        const float scaled = column < cols ? widened(from[column]) * 0x1p-24f : 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &scaled, sizeof bits);
        *to++ = uint16_t(bits >> 16);  // exact, but for what is too small for a normal number
      }
    }
  }
}

// One row of input as whole numbers of 23 bits, in three signed digits of a byte: x is about
// unit * (65536 a + 256 b + c), within 2^-22 of the largest. Products with int8 weights are then
// exact, and one instruction makes 64 of a digit's, where floats take twelve. The unit stands
// first; then come, for every word of the bitmask, its columns' digits a, b and c.
constexpr int kDigits = 3;

void arrange_fixed(Kind kind, const float* from, int64_t cols, float* to, int64_t words) {
  if (kind != kInt8Fixed) return arrange(kind, from, cols, to, words);
  float largest = 0.0f;
  for (int64_t c = 0; c < cols; ++c) largest = std::max(largest, std::fabs(from[c]));
  int exponent = 0;
  std::frexp(largest, &exponent);  // largest < 2^exponent
  const float up = float(std::ldexp(1.0, std::min(22 - exponent, 126)));
  to[0] = 1.0f / up;
  auto* digits = reinterpret_cast<char*>(to) + 64;
  for (int64_t at = 0; at < words; ++at, digits += kDigits * kWord) {
    for (int64_t i = 0; i < kWord; i += 16) {
      const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, cols - at * kWord - i));
      const __m512 x = _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), from + at * kWord + i);
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(up)));
      for (int d = kDigits - 1; d >= 0; --d) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * kWord + i),
                         _mm512_cvtepi32_epi8(digit));
        whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, digit), 8);
      }
    }
  }
}

// The instruction multiplies unsigned bytes with signed ones, so weights are raised by 128, and sums
// begin at what that will have added by their end.
bool one_fixed(const Packed& m, const void* x, int64_t, int64_t begin, int64_t end, float* out,
               int64_t) {
  const float unit = *static_cast<const float*>(x);
  const char* digits = static_cast<const char*>(x) + 64;
  const __m512i raise = _mm512_set1_epi8(char(0x80));
  __m512i first[kDigits] = {};
  for (int64_t at = 0; at < m.words; ++at) {
    UNROLLED for (int d = 0; d < kDigits; ++d) {
      const __m512i now = _mm512_loadu_si512(digits + (at * kDigits + d) * kWord);
      first[d] = _mm512_dpbusd_epi32(first[d], raise, now);
    }
  }
  bool right = true;
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t* bits = m.bits + r * m.words;
    int64_t counted = m.starts[r];
    __m512i sums[kDigits];
    UNROLLED for (int d = 0; d < kDigits; ++d) {
      sums[d] = _mm512_sub_epi32(_mm512_setzero_si512(), first[d]);
    }
    for (int64_t at = 0; at < m.words; ++at) {
      const char* from = values_at<1>(m, counted);
      Floats::ahead(from);
      const __m512i weights = _mm512_xor_si512(expand8(bits[at], from), raise);
      counted += count(bits[at]);
      UNROLLED for (int d = 0; d < kDigits; ++d) {
        const __m512i now = _mm512_loadu_si512(digits + (at * kDigits + d) * kWord);
        sums[d] = _mm512_dpbusd_epi32(sums[d], weights, now);
      }
    }
    __m512 sum = _mm512_setzero_ps();
    UNROLLED for (int d = 0; d < kDigits; ++d) {
      sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[d]));
    }
    out[r] = unit * _mm512_reduce_add_ps(sum);
    right &= agrees(m, r, counted);
  }
  return right;
}

const Form form = {"AVX-512 BF16",
                   arrange_fixed,
                   arrange_pairs,
                   {TORCHPRUNE_FLOATS_FEW, TORCHPRUNE_FEW(Pairs, kPairs),
                    TORCHPRUNE_FEW(Pairs, kInt8Pairs), {one_fixed}},
                   {TORCHPRUNE_FLOATS_MANY, many<Pairs, kPairs>, many<Pairs, kInt8Pairs>, nullptr},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* avx512_bf16_form() { return &form; }

}  // namespace torchprune

#else

const torchprune::Form* torchprune::avx512_bf16_form() { return nullptr; }

#endif
