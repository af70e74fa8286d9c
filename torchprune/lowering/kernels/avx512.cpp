// The kernels for AVX-512 with VBMI2: values are expanded to their columns in registers.

#include "forms.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>

#include <cstdlib>
#include <cstring>

namespace torchprune {
namespace {

#include "avx512.h"

const Form form = {"AVX-512",
                   arrange,
                   nullptr,
                   {TORCHPRUNE_FLOATS_FEW, {}, {}, {}},
                   {TORCHPRUNE_FLOATS_MANY, nullptr, nullptr, nullptr},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* avx512_form() { return &form; }

}  // namespace torchprune

#else

const torchprune::Form* torchprune::avx512_form() { return nullptr; }

#endif
