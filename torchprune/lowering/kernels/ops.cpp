// torchprune::bitmask_linear and torchprune::bitmask_unpack for CPU tensors.
//
// Fake kernels, gradients and autocast live in Python, and so do the schemas where it comes first.
// Only torch's stable interface is used, so one build serves every torch from 2.10 on.

#include <unistd.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "product.h"

namespace torchprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 1 << 20;  // bytes of a decompressed tile: it should stay in L2
constexpr int64_t kTileRows = 64;

constexpr char kInputs[] =
    "torchprune::bitmask_linear: the input must be float32, float16 or bfloat16";

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

Number number_of(ScalarType type, const char* what) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  what);
  return type == ScalarType::Float  ? Number::kFloat32
         : type == ScalarType::Half ? Number::kFloat16
                                    : Number::kBFloat16;
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
  STD_TORCH_CHECK(fits(first, bits.size(0), values.size(0)),
                  "torchprune: starts must begin with 0, and values hold 64 more beyond the last "
                  "nonzero, of which starts says that there are ",
                  first[bits.size(0)]);
  return packed_from(bits.data_ptr(), values.data_ptr(), first, bits.size(0), cols);
}

void in_threads(int64_t count, int64_t grain, const Part& part) {
  torch::stable::parallel_for(0, count, grain, part);
}

void check_agree(bool agree) {
  STD_TORCH_CHECK(agree,
                  "torchprune: bits and starts of a packed weight contradict each other: they are "
                  "parts of different weights, or damaged. Load or copy all of its parts together");
}

std::vector<float> floats_of(const std::optional<Tensor>& tensor, int64_t count, const char* what) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == count, what);
  std::vector<float> found(count);
  const Tensor flat = torch::stable::contiguous(*tensor);
  to_float(number_of(tensor->scalar_type(), what), flat.data_ptr(), count, found.data());
  return found;
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
  const Number type = number_of(x.scalar_type(), kInputs);
  const int64_t each = size_of(type);
  Tensor tile = torch::stable::new_empty(values, {std::min(step, rows), cols});
  thread_local std::vector<float> room;
  room.resize(std::max<size_t>(room.size(), step));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(begin + step, rows), count = end - begin;
    Tensor part = torch::stable::narrow(tile, 0, 0, count);
    check_agree(unpack(m, size, begin, end, cols, part.data_ptr(), in_threads));
    Tensor sums = linear(x, torch::stable::to(part, x.scalar_type()));
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
  const Number type = number_of(x.scalar_type(), kInputs);
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
  if (batch > kFew && !has_many(kind)) {
    product_by_tiles(m, values, torch::stable::view(flat, {batch, cols}), cols, rows, scale_at,
                     shift_at, out);
    return out;
  }
  check_agree(product(m, kind, type, flat.data_ptr(), batch, cols, rows, scale_at, shift_at,
                      out.data_ptr(), in_threads));
  return out;
}

Tensor bitmask_unpack(const Tensor& bits, const Tensor& values, const Tensor& starts,
                      int64_t cols) {
  kind_of(values.scalar_type());
  const Packed m = packed_of(bits, values, starts, cols);
  Tensor out = torch::stable::new_empty(values, {bits.size(0), cols});
  check_agree(unpack(m, int64_t(values.element_size()), 0, bits.size(0), cols, out.data_ptr(),
                     in_threads));
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
EXPORTED int torchprune_use_form(const char* name) { return torchprune::use_form(name); }
