// The kernels in plain C++: slow, correct, for any processor.

#include <cstring>

#include "forms.h"

namespace torchprune {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in a float
    const float size = float(fraction) * from_bits(0x33800000);
    return sign ? -size : size;
  }
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

template <Kind K>
float value_at(const char* values, int64_t index) {
  if constexpr (K == kInt8) {
    return float(reinterpret_cast<const int8_t*>(values)[index]);
  } else if constexpr (K == kFloat32) {
    float value;
    std::memcpy(&value, values + 4 * index, 4);
    return value;
  } else {
    uint16_t bits;
    std::memcpy(&bits, values + 2 * index, 2);
    return K == kFloat16 ? half_to_float(bits) : from_bits(uint32_t(bits) << 16);
  }
}

// The index of a word's first value, as far as there are values.
int64_t values_at(const Packed& m, int64_t counted) {
  return int64_t(uint64_t(counted) < m.total ? uint64_t(counted) : m.total);
}

// Whether a row has counted as many values as it should have, and none for what is no column.
bool agrees(const Packed& m, int64_t row, int64_t counted) {
  const uint64_t beyond = m.past ? m.bits[(row + 1) * m.words - 1] & m.past : 0;
  return counted == m.starts[row + 1] && beyond == 0;
}

template <Kind K>
bool product(const Packed& m, const void* x, int64_t batch, int64_t begin, int64_t end, float* out,
             int64_t out_stride) {
  const int64_t stride = m.words * kWord;
  bool right = true;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t b = 0; b < batch; ++b) {
      const float* input = static_cast<const float*>(x) + b * stride;
      float sum = 0.0f;
      int64_t counted = m.starts[r];
      for (int64_t w = 0; w < m.words; ++w) {
        int64_t at = values_at(m, counted);
        counted += __builtin_popcountll(m.bits[r * m.words + w]);
        for (uint64_t left = m.bits[r * m.words + w]; left; left &= left - 1) {
          sum += value_at<K>(m.values, at++) * input[w * kWord + __builtin_ctzll(left)];
        }
      }
      out[b * out_stride + r] = sum;
      right &= agrees(m, r, counted);
    }
  }
  return right;
}

template <int Bytes>
bool expand(const Packed& m, int64_t begin, int64_t end, int64_t cols, char* to) {
  bool right = true;
  for (int64_t r = begin; r < end; ++r) {
    char* row = to + (r - begin) * cols * Bytes;
    std::memset(row, 0, cols * Bytes);
    int64_t counted = m.starts[r];
    for (int64_t w = 0; w < m.words; ++w) {
      const char* from = m.values + values_at(m, counted) * Bytes;
      const uint64_t word = m.bits[r * m.words + w];
      counted += __builtin_popcountll(word);
      // Nothing is written for what is no column.
      for (uint64_t left = w + 1 < m.words ? word : word & ~m.past; left;
           left &= left - 1, from += Bytes) {
        std::memcpy(row + (w * kWord + __builtin_ctzll(left)) * Bytes, from, Bytes);
      }
    }
    right &= agrees(m, r, counted);
  }
  return right;
}

void arrange(Kind, const float* from, int64_t cols, float* to, int64_t words) {
  std::memcpy(to, from, cols * sizeof(float));
  std::memset(to + cols, 0, (words * kWord - cols) * sizeof(float));
}

#define FEW(K)                                                                                  \
  {                                                                                            \
    product<K>, product<K>, product<K>, product<K>, product<K>, product<K>, product<K>,        \
        product<K>                                                                             \
  }

const Form form = {"portable",
                   arrange,
                   nullptr,
                   {FEW(kFloat32), FEW(kFloat16), FEW(kBFloat16), FEW(kInt8), {}, {}},
                   {},
                   {expand<1>, expand<2>, expand<4>}};

}  // namespace

const Form* portable_form() { return &form; }

}  // namespace torchprune
