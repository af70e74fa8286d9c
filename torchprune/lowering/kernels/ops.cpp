// torchprune::bitmask_linear and torchprune::bitmask_unpack for CPU tensors.
//
// Fake kernels, gradients and autocast live in Python, and so do the schemas where it comes first.
// Only torch's stable interface is used, so one build serves every torch from 2.10 on.

#include <unistd.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "forms.h"

namespace torchprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 16;      // weights below which a thread is not worth waking
constexpr int64_t kTile = 1 << 20;       // bytes of a decompressed tile: it should stay in L2
constexpr int64_t kTileRows = 64;
constexpr int64_t kAtOnce = 512;         // rows of input, which bounds the room for their sums

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

Kind kind_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Char:
      return kInt8;
    default:
      STD_TORCH_CHECK(false, "torchprune: values must be float32, float16, bfloat16 or int8");
  }
}

// A matrix whose parts fit together as far as their sizes go. Kernels see to the rest.
Packed packed_of(const Tensor& bits, const Tensor& values, const Tensor& starts, int64_t cols) {
  STD_TORCH_CHECK(cols >= 0, "torchprune: a matrix cannot have ", cols, " columns");
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Long && bits.dim() == 2 &&
                      bits.is_contiguous() && bits.size(1) == (cols + kWord - 1) / kWord,
                  "torchprune: bits must be contiguous int64, (rows, ceil(cols / 64))");
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.dim() == 1 &&
                      starts.is_contiguous() && starts.size(0) == bits.size(0) + 1,
                  "torchprune: starts must be contiguous int32, (rows + 1,)");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(),
                  "torchprune: values must be contiguous, (nonzeros + slack,)");
  const auto* first = static_cast<const int32_t*>(starts.data_ptr());
  const int64_t total = first[bits.size(0)];
  STD_TORCH_CHECK(first[0] == 0 && total >= 0 && values.size(0) - total >= kSlack,
                  "torchprune: starts must begin with 0, and values hold 64 more beyond the last "
                  "nonzero, of which starts says that there are ",
                  total);
  const uint64_t past = cols % kWord ? ~uint64_t(0) << (cols % kWord) : 0;
  return {static_cast<const uint64_t*>(bits.data_ptr()),
          static_cast<const char*>(values.data_ptr()),
          first,
          bits.size(1),
          past,
          uint64_t(total)};
}

// Run over rows in threads; an error if any of them found that its bits and starts disagree.
template <class Run>
void over_rows(int64_t begin, int64_t end, int64_t grain, const Run& run) {
  std::atomic<bool> right{true};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t until) {
    if (!run(from, until)) right.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(right.load(),
                  "torchprune: bits and starts of a packed weight contradict each other: they are "
                  "parts of different weights, or damaged. Load or copy all of its parts together");
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

void to_float(ScalarType type, const void* from, int64_t count, float* to) {
  if (count == 0) return;  // there may be no memory at all then
  if (type == ScalarType::Float) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (type == ScalarType::BFloat16) {
    const auto* typed = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = widened(typed[i]);
  } else {
    const auto* typed = static_cast<const torch::headeronly::Half*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = float(typed[i]);
  }
}

// Scale the sums, add the bias, round to the output's dtype. Spoils the sums.
void finish(ScalarType type, float* sums, int64_t count, const float* scales, const float* bias,
            void* to) {
  if (scales) {
    for (int64_t i = 0; i < count; ++i) sums[i] *= scales[i];
  }
  if (bias) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
  }
  if (type == ScalarType::Float) {
    std::memcpy(to, sums, count * sizeof(float));
  } else if (type == ScalarType::BFloat16) {
    auto* typed = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) typed[i] = narrowed(sums[i]);
  } else {
    auto* typed = static_cast<torch::headeronly::Half*>(to);
    for (int64_t i = 0; i < count; ++i) typed[i] = torch::headeronly::Half(sums[i]);
  }
}

std::vector<float> floats_of(const std::optional<Tensor>& tensor, int64_t count, const char* what) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == count, what);
  const ScalarType type = tensor->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  what);
  std::vector<float> found(count);
  const Tensor flat = torch::stable::contiguous(*tensor);
  to_float(type, flat.data_ptr(), count, found.data());
  return found;
}

// Whether numbers are of 16 bits, and none is inf or NaN.
bool is_finite_half(ScalarType type, const void* x, int64_t count) {
  if (type == ScalarType::Float) return false;
  const uint16_t exponent = type == ScalarType::BFloat16 ? 0x7f80 : 0x7c00;
  const auto* bits = static_cast<const uint16_t*>(x);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= (bits[i] & exponent) != exponent;
  return finite;
}

// Rows that a thread takes at the least.
int64_t grain(const Packed& m) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.words * kWord));
}

void product(const Packed& m, Kind kind, ScalarType type, const char* x, int64_t batch, int64_t cols,
             int64_t rows, const float* scales, const float* bias, char* out) {
  thread_local std::vector<float> room;
  const Form& now = form();
  const bool pairs = type == ScalarType::BFloat16 && now.arrange_pairs &&
                     (kind == kBFloat16 || (kind == kInt8 && batch > 1));
  const bool fixed = kind == kInt8 && batch == 1 && now.few[kInt8Fixed][0] &&
                     m.words > 0 && m.words <= kFixedWords && is_finite_half(type, x, cols);
  const Kind how = pairs ? (kind == kInt8 ? kInt8Pairs : kPairs) : fixed ? kInt8Fixed : kind;
  const int64_t wide = m.words * kWord, size = type == ScalarType::Float ? 4 : 2;
  // Bfloat16 of whole words is what the products with pairs read as it is.
  const bool as_it_is = how == kPairs && cols == wide;
  const int64_t held = as_it_is ? 0 : batch * wide;
  room.resize(std::max<size_t>(room.size(), 16 + held + batch * rows));
  float* arranged = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) / 4;
  float* sums = arranged + held;
  const int64_t apiece = std::max<int64_t>(1, kGrain / std::max(wide, rows));
  if (!as_it_is && cols > 0) {
    torch::stable::parallel_for(0, batch, apiece, [&](int64_t begin, int64_t end) {
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
  over_rows(0, rows, grain(m), [&](int64_t begin, int64_t end) {
    return run(m, input, batch, begin, end, sums, rows);
  });
  torch::stable::parallel_for(0, batch, apiece, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      finish(type, sums + b * rows, rows, scales, bias, out + b * rows * size);
    }
  });
}

void unpack_rows(const Packed& m, int64_t size, int64_t begin, int64_t end, int64_t cols, char* to) {
  if (cols == 0) return;
  const auto run = form().expand[size == 1 ? 0 : size == 2 ? 1 : 2];
  over_rows(begin, end, grain(m), [&](int64_t from, int64_t until) {
    return run(m, from, until, cols, to + (from - begin) * cols * size);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(std::optional<Tensor>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Many rows of input where the form has no product for them: torch's own, with one decompressed tile
// of the weights after the other.
void product_by_tiles(const Packed& m, const Tensor& values, const Tensor& x, int64_t cols,
                      int64_t rows, const float* scales, const float* bias, Tensor& out) {
  const int64_t batch = x.size(0), size = int64_t(values.element_size());
  const int64_t fit = kTile / std::max<int64_t>(1, cols * size);
  const int64_t step = std::max(kTileRows, fit / kTileRows * kTileRows);
  const ScalarType type = x.scalar_type();
  const int64_t each = type == ScalarType::Float ? 4 : 2;
  Tensor tile = torch::stable::new_empty(values, {std::min(step, rows), cols});
  thread_local std::vector<float> room;
  room.resize(std::max<size_t>(room.size(), step));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(begin + step, rows), count = end - begin;
    Tensor part = torch::stable::narrow(tile, 0, 0, count);
    unpack_rows(m, size, begin, end, cols, static_cast<char*>(part.data_ptr()));
    Tensor sums = linear(x, torch::stable::to(part, type));
    char* to = static_cast<char*>(out.data_ptr()) + begin * each;
    const char* from = static_cast<const char*>(sums.data_ptr());
    for (int64_t b = 0; b < batch; ++b, from += count * each, to += rows * each) {
      if (!scales && !bias) {
        std::memcpy(to, from, count * each);
        continue;
      }
      to_float(type, from, count, room.data());
      finish(type, room.data(), count, scales ? scales + begin : nullptr,
             bias ? bias + begin : nullptr, to);
    }
  }
}

Tensor bitmask_linear(const Tensor& x, const Tensor& bits, const Tensor& values,
                      const Tensor& starts, const std::optional<Tensor>& scales,
                      const std::optional<Tensor>& bias, int64_t cols) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "torchprune::bitmask_linear: the input must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == cols,
                  "torchprune::bitmask_linear: the input's last size must be ", cols);
  const Kind kind = kind_of(values.scalar_type());
  const Packed m = packed_of(bits, values, starts, cols);
  const int64_t rows = bits.size(0);
  std::vector<int64_t> shape;
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    batch *= x.size(d);
  }
  shape.push_back(rows);
  Tensor out = torch::stable::new_empty(x, shape);
  if (batch == 0 || rows == 0) return out;
  const auto scale = floats_of(scales, rows, "torchprune: scales must be (rows,)");
  const auto shift = floats_of(bias, rows, "torchprune: the bias must be (rows,)");
  const float* scale_at = scales ? scale.data() : nullptr;
  const float* shift_at = bias ? shift.data() : nullptr;
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t size = type == ScalarType::Float ? 4 : 2;
  if (batch > kFew && !form().many[kind]) {
    product_by_tiles(m, values, torch::stable::view(flat, {batch, cols}), cols, rows, scale_at,
                     shift_at, out);
    return out;
  }
  for (int64_t at = 0; at < batch; at += kAtOnce) {
    product(m, kind, type, static_cast<const char*>(flat.data_ptr()) + at * cols * size,
            std::min(kAtOnce, batch - at), cols, rows, scale_at, shift_at,
            static_cast<char*>(out.data_ptr()) + at * rows * size);
  }
  return out;
}

Tensor bitmask_unpack(const Tensor& bits, const Tensor& values, const Tensor& starts,
                      int64_t cols) {
  kind_of(values.scalar_type());
  const Packed m = packed_of(bits, values, starts, cols);
  Tensor out = torch::stable::new_empty(values, {bits.size(0), cols});
  unpack_rows(m, int64_t(values.element_size()), 0, bits.size(0), cols,
              static_cast<char*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace torchprune

// Define an operator unless somebody did: Python, or another copy of this library in the process.
template <class Library>
static bool defines(Library& m, const char* schema) {
  try {
    m.def(schema);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// The operator "kernels" is a mark that nobody calls: the copy that defines it has the kernels.
static bool first = false;

// Python, where it defined the operators, says so while it loads this for them.
STABLE_TORCH_LIBRARY_FRAGMENT(torchprune, m) {
  first = defines(m, "kernels() -> ()");
  const char* defined = std::getenv("TORCHPRUNE_OPERATORS_DEFINED_IN");
  if (defined && std::to_string(getpid()) == defined) return;
  defines(m,
          "bitmask_linear(Tensor x, Tensor bits, Tensor values, Tensor starts, Tensor? scales, "
          "Tensor? bias, int cols) -> Tensor");
  defines(m, "bitmask_unpack(Tensor bits, Tensor values, Tensor starts, int cols) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchprune, CPU, m) {
  if (!first) return;
  m.impl("bitmask_linear", TORCH_BOX(&torchprune::bitmask_linear));
  m.impl("bitmask_unpack", TORCH_BOX(&torchprune::bitmask_unpack));
}

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The name of the form in use.
EXPORTED const char* torchprune_form() { return torchprune::form().name; }

// Use a form by name; returns whether it exists and runs on this processor.
EXPORTED int torchprune_use_form(const char* name) {
  using namespace torchprune;
  for (const Form* form : forms()) {
    if (form && std::strcmp(form->name, name) == 0 && runs_here(form)) {
      chosen.store(form);
      return 1;
    }
  }
  return 0;
}
