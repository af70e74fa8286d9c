// What a library of operators needs of ONNX Runtime's C interface, as of its version 17 (ONNX Runtime
// 1.17). That interface is one table of functions that only ever grows at its end, so a place in it
// stays what it is, and a library built once serves every later runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxruntime_abi {

constexpr uint32_t kVersion = 17;

struct Api;  // the table
struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct Operator;
struct InferContext;

enum Element : int { kAny = 0, kFloat = 1, kInt8 = 3, kInt32 = 6, kInt64 = 7, kHalf = 10, kBFloat16 = 16 };
enum Presence : int { kRequired = 0, kOptional = 1 };
constexpr int kFailed = 1;           // a status' code
constexpr int kInvalidArgument = 2;

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

// The table's places.
template <int Place, class Signature>
struct Function {
  template <class... Given>
  auto operator()(const Api* api, Given... given) const {
    void* const* table = reinterpret_cast<void* const*>(api);
    return reinterpret_cast<Signature*>(table[Place])(given...);
  }
};

constexpr Function<0, Status*(int code, const char* message)> create_status;
constexpr Function<26, Status*(const char* name, Domain** out)> create_domain;
constexpr Function<27, Status*(Domain*, const Operator*)> add_operator;
constexpr Function<28, Status*(SessionOptions*, Domain*)> add_domain;
constexpr Function<51, Status*(Value*, void** out)> data;
constexpr Function<60, Status*(const TensorInfo*, int* out)> element;
constexpr Function<61, Status*(const TensorInfo*, size_t* out)> dimensions_count;
constexpr Function<62, Status*(const TensorInfo*, int64_t* out, size_t count)> dimensions;
constexpr Function<65, Status*(const Value*, TensorInfo** out)> tensor_info;
constexpr Function<86, Status*(const KernelInfo*, const char* name, int64_t* out)> attribute;
constexpr Function<90, Status*(const KernelContext*, size_t index, const Value** out)> input;
constexpr Function<91, Status*(KernelContext*, size_t index, const int64_t* sizes, size_t count,
                               Value** out)> output;
constexpr Function<99, void(TensorInfo*)> release_tensor_info;
constexpr Function<274, Status*(const KernelContext*, void (*run)(void* given, size_t index),
                                size_t count, size_t batches, void* given)> parallel_for;

// What an operator is, and what makes, runs and ends its kernels.
struct Operator {
  uint32_t version;
  void* (*create)(const Operator*, const Api*, const KernelInfo*);  // before `create_or_fail` was
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t index);
  size_t (*input_count)(const Operator*);
  int (*output_type)(const Operator*, size_t index);
  size_t (*output_count)(const Operator*);
  void (*compute)(void* kernel, KernelContext*);  // before `compute_or_fail` was
  void (*destroy)(void* kernel);
  int (*input_presence)(const Operator*, size_t index);
  int (*output_presence)(const Operator*, size_t index);
  int (*input_memory)(const Operator*, size_t index);
  int (*variadic_inputs)(const Operator*);
  int (*variadic_inputs_alike)(const Operator*);
  int (*variadic_outputs)(const Operator*);
  int (*variadic_outputs_alike)(const Operator*);
  Status* (*create_or_fail)(const Operator*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_or_fail)(void* kernel, KernelContext*);
  Status* (*infer)(const Operator*, InferContext*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace onnxruntime_abi
