// The AVX-512 kernels, and products of pairs of bfloat16, summed in float32, for inputs that are
// bfloat16 too: one instruction for 32 columns. It takes subnormal numbers (below 1.2e-38) for 0.

#include "forms.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

#include <immintrin.h>

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

const Form form = {"AVX-512 BF16",
                   arrange,
                   arrange_pairs,
                   {TORCHPRUNE_FLOATS_FEW, TORCHPRUNE_FEW(Pairs, kPairs),
                    TORCHPRUNE_FEW(Pairs, kInt8Pairs)},
                   {TORCHPRUNE_FLOATS_MANY, many<Pairs, kPairs>, many<Pairs, kInt8Pairs>},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* avx512_bf16_form() { return &form; }

}  // namespace torchprune

#else

const torchprune::Form* torchprune::avx512_bf16_form() { return nullptr; }

#endif
