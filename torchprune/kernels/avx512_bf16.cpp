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
  static void ahead(const char* from) { Floats::ahead(from); }

  template <Kind K>
  static const char* take(uint64_t bits, const char* from, Vector (&w)[2]) {
    w[0] = _mm512_castsi512_ps(expand16(bits & 0xffffffff, from));
    from += 2 * count(bits & 0xffffffff);
    w[1] = _mm512_castsi512_ps(expand16(bits >> 32, from));
    return from + 2 * count(bits >> 32);
  }
};

const Form form = {"AVX-512 BF16",
                   arrange,
                   {TORCHPRUNE_FLOATS_FEW, TORCHPRUNE_FEW(Pairs, kPairs)},
                   {TORCHPRUNE_FLOATS_MANY, many<Pairs, kPairs>},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* avx512_bf16_form() { return &form; }

}  // namespace torchprune

#else

const torchprune::Form* torchprune::avx512_bf16_form() { return nullptr; }

#endif
