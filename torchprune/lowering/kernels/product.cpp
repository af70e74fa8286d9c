// See product.h. Neither torch nor another runtime is linked to this.

#include "product.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

namespace torchprune {
namespace {

constexpr int64_t kGrain = 1 << 16;  // weights below which a thread is not worth waking
constexpr int64_t kAtOnce = 256;     // rows of input, which bounds the room for their sums

std::atomic<const Form*> chosen{nullptr};

std::array<const Form*, 4> forms() {
  return {avx512_bf16_form(), avx512_form(), avx2_form(), portable_form()};
}

bool runs_here(const Form* form) {
  if (!form) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi2");
  if (form == avx2_form()) return avx2;
  if (form == avx512_form()) return avx512;
  if (form == avx512_bf16_form()) {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return true;
}

// Run over rows in threads; whether in all of them bits and starts agree.
template <class Run>
bool over_rows(int64_t begin, int64_t end, int64_t grain, const Threads& threads, const Run& run) {
  std::atomic<bool> right{true};
  threads(end - begin, grain, [&](int64_t from, int64_t until) {
    if (!run(begin + from, begin + until)) right.store(false, std::memory_order_relaxed);
  });
  return right.load();
}

float widened(uint16_t bfloat16) {
  const uint32_t bits = uint32_t(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t narrowed(float value) {  // to the nearest bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t(value == value ? rounded : 0x7fc0);
}

// Whether numbers are of 16 bits, and none is inf or NaN.
bool is_finite_half(Number type, const void* x, int64_t count) {
  if (type == Number::kFloat32) return false;
  const uint16_t exponent = type == Number::kBFloat16 ? 0x7f80 : 0x7c00;
  const auto* bits = static_cast<const uint16_t*>(x);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= (bits[i] & exponent) != exponent;
  return finite;
}

// Rows that a thread takes at the least.
int64_t grain(const Packed& m) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.words * kWord));
}

// As many rows of input as one pass over the weights serves.
bool pass(const Packed& m, Kind kind, Number type, const char* x, int64_t batch, int64_t cols,
          int64_t rows, const float* scales, const float* bias, char* out, const Threads& threads) {
  thread_local std::vector<float> room;
  const Form& now = form();
  const bool pairs = type == Number::kBFloat16 && now.arrange_pairs &&
                     (kind == kBFloat16 || (kind == kInt8 && batch > 1));
  const bool fixed = kind == kInt8 && batch == 1 && now.few[kInt8Fixed][0] &&
                     m.words > 0 && m.words <= kFixedWords && is_finite_half(type, x, cols);
  const Kind how = pairs ? (kind == kInt8 ? kInt8Pairs : kPairs) : fixed ? kInt8Fixed : kind;
  const int64_t wide = m.words * kWord, size = size_of(type);
  // Bfloat16 of whole words is what the products with pairs read as it is.
  const bool as_it_is = how == kPairs && cols == wide;
  const int64_t held = as_it_is ? 0 : batch * wide;
  room.resize(std::max<size_t>(room.size(), 16 + held + batch * rows));
  float* arranged = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) / 4;
  float* sums = arranged + held;
  const int64_t apiece = std::max<int64_t>(1, kGrain / std::max(wide, rows));
  if (!as_it_is && cols > 0) {
    threads(batch, apiece, [&](int64_t begin, int64_t end) {
      std::vector<float> plain(cols);
      for (int64_t b = begin; b < end; ++b) {
        const char* from = x + b * cols * size;
        if (pairs) {
          now.arrange_pairs(how, reinterpret_cast<const uint16_t*>(from), cols,
                            reinterpret_cast<uint16_t*>(arranged) + b * wide, m.words);
        } else {
          to_float(type, from, cols, plain.data());
          now.arrange(how, plain.data(), cols, arranged + b * wide, m.words);
        }
      }
    });
  }
  const void* input = as_it_is ? static_cast<const void*>(x) : arranged;
  const Product run = batch <= kFew ? now.few[how][batch - 1] : now.many[how];
  const bool right = over_rows(0, rows, grain(m), threads, [&](int64_t begin, int64_t end) {
    return run(m, input, batch, begin, end, sums, rows);
  });
  threads(batch, apiece, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      finish(type, sums + b * rows, rows, scales, bias, out + b * rows * size);
    }
  });
  return right;
}

}  // namespace

const Form& form() {
  const Form* now = chosen.load(std::memory_order_acquire);
  if (!now) {
    for (const Form* candidate : forms()) {
      if (runs_here(candidate)) {
        now = candidate;
        break;
      }
    }
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

bool use_form(const char* name) {
  for (const Form* form : forms()) {
    if (form && std::strcmp(form->name, name) == 0 && runs_here(form)) {
      chosen.store(form);
      return true;
    }
  }
  return false;
}

bool fits(const int32_t* starts, int64_t rows, int64_t count) {
  const int64_t total = starts[rows];
  return starts[0] == 0 && total >= 0 && count - total >= kSlack;
}

Packed packed_from(const void* bits, const void* values, const int32_t* starts, int64_t rows,
                   int64_t cols) {
  const uint64_t past = cols % kWord ? ~uint64_t(0) << (cols % kWord) : 0;
  return {static_cast<const uint64_t*>(bits), static_cast<const char*>(values), starts,
          (cols + kWord - 1) / kWord,         past,                            uint64_t(starts[rows])};
}

bool has_many(Kind kind) { return form().many[kind] != nullptr; }

bool product(const Packed& m, Kind kind, Number type, const void* x, int64_t batch, int64_t cols,
             int64_t rows, const float* scales, const float* bias, void* out,
             const Threads& threads) {
  const int64_t most = has_many(kind) ? kAtOnce : kFew, size = size_of(type);
  bool right = true;
  for (int64_t at = 0; at < batch; at += most) {
    right &= pass(m, kind, type, static_cast<const char*>(x) + at * cols * size,
                  std::min(most, batch - at), cols, rows, scales, bias,
                  static_cast<char*>(out) + at * rows * size, threads);
  }
  return right;
}

bool unpack(const Packed& m, int64_t size, int64_t begin, int64_t end, int64_t cols, void* to,
            const Threads& threads) {
  if (cols == 0) return true;
  const auto run = form().expand[size == 1 ? 0 : size == 2 ? 1 : 2];
  return over_rows(begin, end, grain(m), threads, [&](int64_t from, int64_t until) {
    return run(m, from, until, cols, static_cast<char*>(to) + (from - begin) * cols * size);
  });
}

void to_float(Number type, const void* from, int64_t count, float* to) {
  if (count == 0) return;  // there may be no memory at all then
  if (type == Number::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (type == Number::kBFloat16) {
    const auto* typed = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = widened(typed[i]);
  } else {
    const auto* typed = static_cast<const torch::headeronly::Half*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = float(typed[i]);
  }
}

void finish(Number type, float* sums, int64_t count, const float* scales, const float* bias,
            void* to) {
  if (scales) {
    for (int64_t i = 0; i < count; ++i) sums[i] *= scales[i];
  }
  if (bias) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
  }
  if (type == Number::kFloat32) {
    std::memcpy(to, sums, count * sizeof(float));
  } else if (type == Number::kBFloat16) {
    auto* typed = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) typed[i] = narrowed(sums[i]);
  } else {
    auto* typed = static_cast<torch::headeronly::Half*>(to);
    for (int64_t i = 0; i < count; ++i) typed[i] = torch::headeronly::Half(sums[i]);
  }
}

}  // namespace torchprune
