// torchprune's operator for ONNX Runtime, in a library that a session registers:
//
//   BitmaskLinear(x, bits, values, starts, scales?, bias?) -> y      attribute: cols
//
// of the domain "torchprune", version 1. x is (..., cols), float32 or float16, y is (..., rows) like
// it; bits, values, starts and scales are those of `torchprune.lowering.bitmask.Bitmask`, bias is
// (rows,) and of x's dtype.
//
//   BitmaskUnpack(bits, values, starts) -> w                           attribute: cols
//
// w is (rows, cols) and of the values' dtype. What the parts say of each other is checked in every
// call.

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "product.h"

namespace torchprune {
namespace {

namespace ort = onnxruntime_abi;

constexpr size_t kInputs = 6, kParts = 3;
constexpr int64_t kPieces = 64;  // most that work is cut into; the runtime's threads share them
constexpr char kDisagree[] =
    "torchprune: bits and starts of a packed weight contradict each other: they are parts of "
    "different weights, or damaged";

// An error of the runtime, or one of ours.
struct Failure {
  ort::Status* status;
};

struct Kernel {
  const ort::Api* api;
  int64_t cols;
};

struct Tensor {
  const void* data;
  int element;
  std::vector<int64_t> sizes;

  int64_t count() const {
    int64_t found = 1;
    for (int64_t size : sizes) found *= size;
    return found;
  }
};

void check(ort::Status* status) {
  if (status) throw Failure{status};
}

void require(const ort::Api* api, bool right, const std::string& message) {
  if (!right) throw Failure{ort::create_status(api, ort::kInvalidArgument, message.c_str())};
}

std::optional<Tensor> input_of(const Kernel& kernel, const ort::KernelContext* context,
                               size_t index) {
  const ort::Api* api = kernel.api;
  const ort::Value* value = nullptr;
  check(ort::input(api, context, index, &value));
  if (!value) return {};
  Tensor found{};
  ort::TensorInfo* info = nullptr;
  check(ort::tensor_info(api, value, &info));
  size_t count = 0;
  ort::Status* failed = ort::element(api, info, &found.element);
  if (!failed) failed = ort::dimensions_count(api, info, &count);
  if (!failed) {
    found.sizes.resize(count);
    failed = ort::dimensions(api, info, found.sizes.data(), count);
  }
  ort::release_tensor_info(api, info);
  check(failed);
  void* data = nullptr;
  check(ort::data(api, const_cast<ort::Value*>(value), &data));
  found.data = data;
  return found;
}

// All numbers of an optional (rows,) input.
std::vector<float> floats_of(const Kernel& kernel, const std::optional<Tensor>& tensor, int64_t rows,
                             const char* what) {
  if (!tensor) return {};
  require(kernel.api,
          tensor->sizes == std::vector<int64_t>{rows} &&
              (tensor->element == ort::kFloat || tensor->element == ort::kHalf),
          std::string("torchprune: the ") + what + " must be (rows,), float32 or float16");
  std::vector<float> found(rows);
  to_float(tensor->element == ort::kFloat ? Number::kFloat32 : Number::kFloat16, tensor->data, rows,
           found.data());
  return found;
}

Kind kind_of(const Kernel& kernel, int element) {
  switch (element) {
    case ort::kFloat:
      return kFloat32;
    case ort::kHalf:
      return kFloat16;
    case ort::kBFloat16:
      return kBFloat16;
    default:
      require(kernel.api, element == ort::kInt8,
              "torchprune: values must be float32, float16, bfloat16 or int8");
      return kInt8;
  }
}

struct Job {
  const Part* part;
  int64_t count, pieces;
};

void run_piece(void* given, size_t index) {
  const Job& job = *static_cast<const Job*>(given);
  const int64_t at = int64_t(index);
  (*job.part)(job.count * at / job.pieces, job.count * (at + 1) / job.pieces);
}

// A matrix of three inputs that fit together as far as their sizes go.
Packed packed_of(const Kernel& kernel, const std::optional<Tensor>* parts) {
  const ort::Api* api = kernel.api;
  const int64_t cols = kernel.cols;
  require(api, parts[0] && parts[1] && parts[2],
          "torchprune: an operator needs bits, values and starts");
  const Tensor &bits = *parts[0], &values = *parts[1], &starts = *parts[2];
  require(api,
          bits.element == ort::kInt64 && bits.sizes.size() == 2 &&
              bits.sizes[1] == (cols + kWord - 1) / kWord,
          "torchprune: bits must be int64, (rows, ceil(cols / 64))");
  const int64_t rows = bits.sizes[0];
  require(api, starts.element == ort::kInt32 && starts.sizes == std::vector<int64_t>{rows + 1},
          "torchprune: starts must be int32, (rows + 1,)");
  const auto* first = static_cast<const int32_t*>(starts.data);
  require(api, values.sizes.size() == 1 && fits(first, rows, values.sizes[0]),
          "torchprune: starts must begin with 0, and values hold 64 more beyond the last nonzero");
  return packed_from(bits.data, values.data, first, rows, cols);
}

void* output_of(const Kernel& kernel, ort::KernelContext* context,
                const std::vector<int64_t>& sizes) {
  ort::Value* out = nullptr;
  check(ort::output(kernel.api, context, 0, sizes.data(), sizes.size(), &out));
  void* to = nullptr;
  check(ort::data(kernel.api, out, &to));
  return to;
}

// Do something with the runtime's threads that tells whether bits and starts agree.
template <class Run>
void in_threads(const Kernel& kernel, ort::KernelContext* context, const Run& run) {
  const ort::Api* api = kernel.api;
  ort::Status* failed = nullptr;
  const Threads threads = [&](int64_t count, int64_t grain, const Part& part) {
    const int64_t pieces = std::clamp<int64_t>(count / std::max<int64_t>(1, grain), 1, kPieces);
    if (pieces == 1) return part(0, count);
    Job job{&part, count, pieces};
    ort::Status* status = ort::parallel_for(api, context, run_piece, size_t(pieces), size_t(0),
                                            static_cast<void*>(&job));
    if (status) failed = status;
  };
  const bool agree = run(threads);
  check(failed);
  require(api, agree, kDisagree);
}

void compute_linear(const Kernel& kernel, ort::KernelContext* context) {
  const ort::Api* api = kernel.api;
  std::array<std::optional<Tensor>, kInputs> given;
  for (size_t index = 0; index < kInputs; ++index) given[index] = input_of(kernel, context, index);
  require(api, given[0].has_value(), "torchprune: BitmaskLinear needs x");
  const Tensor& x = *given[0];
  const int64_t cols = kernel.cols;
  require(api, !x.sizes.empty() && x.sizes.back() == cols,
          "torchprune: the input's last size must be " + std::to_string(cols));
  const Packed m = packed_of(kernel, &given[1]);
  const int64_t rows = given[1]->sizes[0];
  const Kind kind = kind_of(kernel, given[2]->element);
  require(api, kind != kInt8 || given[4], "torchprune: int8 values need scales");
  const auto scales = floats_of(kernel, given[4], rows, "scales");
  const auto bias = floats_of(kernel, given[5], rows, "bias");
  std::vector<int64_t> sizes = x.sizes;
  sizes.back() = rows;
  void* to = output_of(kernel, context, sizes);
  int64_t batch = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) batch *= sizes[d];
  if (batch == 0 || rows == 0) return;
  const Number type = x.element == ort::kFloat ? Number::kFloat32 : Number::kFloat16;
  in_threads(kernel, context, [&](const Threads& threads) {
    return product(m, kind, type, x.data, batch, cols, rows, given[4] ? scales.data() : nullptr,
                   given[5] ? bias.data() : nullptr, to, threads);
  });
}

void compute_unpack(const Kernel& kernel, ort::KernelContext* context) {
  std::array<std::optional<Tensor>, kParts> given;
  for (size_t index = 0; index < kParts; ++index) given[index] = input_of(kernel, context, index);
  const Packed m = packed_of(kernel, given.data());
  const int64_t rows = given[0]->sizes[0];
  const Kind kind = kind_of(kernel, given[1]->element);
  void* to = output_of(kernel, context, {rows, kernel.cols});
  const int64_t size = kind == kInt8 ? 1 : kind == kFloat32 ? 4 : 2;
  in_threads(kernel, context, [&](const Threads& threads) {
    return unpack(m, size, 0, rows, kernel.cols, to, threads);
  });
}

template <class Run>
ort::Status* guarded(const ort::Api* api, const Run& run) {
  try {
    run();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::create_status(api, ort::kFailed, error.what());
  }
}

using Compute = void (*)(const Kernel&, ort::KernelContext*);

// What all operators have in common.
template <Compute kCompute>
ort::Operator made_of() {
  ort::Operator op{};
  op.version = ort::kVersion;
  op.provider = [](const ort::Operator*) -> const char* { return nullptr; };
  op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.output_count = [](const ort::Operator*) { return size_t(1); };
  op.output_presence = [](const ort::Operator*, size_t) -> int { return ort::kRequired; };
  op.variadic_inputs = op.variadic_outputs = [](const ort::Operator*) { return 1; };
  op.variadic_inputs_alike = op.variadic_outputs_alike = [](const ort::Operator*) { return 1; };
  op.create_or_fail = [](const ort::Operator*, const ort::Api* api, const ort::KernelInfo* info,
                         void** kernel) {
    return guarded(api, [&] {
      int64_t cols = 0;
      check(ort::attribute(api, info, "cols", &cols));
      require(api, cols >= 0, "torchprune: a matrix cannot have a negative number of columns");
      *kernel = new Kernel{api, cols};
    });
  };
  op.compute_or_fail = [](void* kernel, ort::KernelContext* context) {
    const auto& known = *static_cast<const Kernel*>(kernel);
    return guarded(known.api, [&] { kCompute(known, context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

// Products of inputs of one type.
template <int Element>
const ort::Operator* linear() {
  static const ort::Operator made = [] {
    ort::Operator op = made_of<compute_linear>();
    op.name = [](const ort::Operator*) { return "BitmaskLinear"; };
    op.input_count = [](const ort::Operator*) { return kInputs; };
    op.input_type = [](const ort::Operator*, size_t index) -> int {
      const int types[kInputs] = {Element, ort::kInt64, ort::kAny, ort::kInt32, ort::kFloat, Element};
      return types[index];
    };
    op.input_presence = [](const ort::Operator*, size_t index) -> int {
      return index < 4 ? ort::kRequired : ort::kOptional;
    };
    op.output_type = [](const ort::Operator*, size_t) -> int { return Element; };
    return op;
  }();
  return &made;
}

// Matrices of values of one type.
template <int Element>
const ort::Operator* unpacking() {
  static const ort::Operator made = [] {
    ort::Operator op = made_of<compute_unpack>();
    op.name = [](const ort::Operator*) { return "BitmaskUnpack"; };
    op.input_count = [](const ort::Operator*) { return kParts; };
    op.input_type = [](const ort::Operator*, size_t index) -> int {
      const int types[kParts] = {ort::kInt64, Element, ort::kInt32};
      return types[index];
    };
    op.input_presence = [](const ort::Operator*, size_t) -> int { return ort::kRequired; };
    op.output_type = [](const ort::Operator*, size_t) -> int { return Element; };
    return op;
  }();
  return &made;
}

// The domain, made once; sessions hold on to it for as long as this library is loaded.
ort::Domain* domain(const ort::Api* api) {
  static ort::Domain* const made = [&] {
    ort::Domain* found = nullptr;
    check(ort::create_domain(api, "torchprune", &found));
    const ort::Operator* all[] = {linear<ort::kFloat>(),        linear<ort::kHalf>(),
                                  unpacking<ort::kFloat>(),     unpacking<ort::kHalf>(),
                                  unpacking<ort::kBFloat16>(), unpacking<ort::kInt8>()};
    for (const ort::Operator* one : all) check(ort::add_operator(api, found, one));
    return found;
  }();
  return made;
}

}  // namespace
}  // namespace torchprune

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What ONNX Runtime calls as it registers the library.
EXPORTED onnxruntime_abi::Status* RegisterCustomOps(onnxruntime_abi::SessionOptions* options,
                                                    const onnxruntime_abi::ApiBase* base) {
  using namespace torchprune;
  const ort::Api* api = base->get(ort::kVersion);
  if (!api) return nullptr;  // older than 1.17, which has then no operator of this name, and says so
  return guarded(api, [&] { check(ort::add_domain(api, options, domain(api))); });
}

// As in ops.cpp.
EXPORTED const char* torchprune_form() { return torchprune::form().name; }
EXPORTED int torchprune_use_form(const char* name) { return torchprune::use_form(name); }
