// Products with packed matrices from one memory to another, whoever's tensors those are of: torch's
// (`ops.cpp`) and ONNX Runtime's (`onnx_ops.cpp`).
#pragma once

#include <cstdint>
#include <functional>

#include "forms.h"

namespace torchprune {

// The dtype of an input, which its output shares, and of a bias.
enum class Number { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t size_of(Number type) { return type == Number::kFloat32 ? 4 : 2; }

// Does something for every index of [begin, end).
using Part = std::function<void(int64_t begin, int64_t end)>;

// Does a part's work for [0, count), cut into pieces of at least `grain` for as many threads as there
// are. Part must not throw.
using Threads = std::function<void(int64_t count, int64_t grain, const Part& part)>;

// The form in use: the best that runs here, until another is asked for.
const Form& form();

// Use a form by name; whether it exists and runs on this processor.
bool use_form(const char* name);

// Whether `starts` begins with 0 and leaves the slack behind the last of `count` values.
bool fits(const int32_t* starts, int64_t rows, int64_t count);

// What kernels read of a matrix of parts that fit.
Packed packed_from(const void* bits, const void* values, const int32_t* starts, int64_t rows,
                   int64_t cols);

// Whether `product` has a way for so many rows of input that is not a few of them at a time.
bool has_many(Kind kind);

// out[b, r] = (sum over c of matrix[r, c] * x[b, c]) * scales[r] + bias[r], summed in float32; scales
// and bias may be null. Whether the matrix's bits and starts agree.
bool product(const Packed& matrix, Kind kind, Number type, const void* x, int64_t batch, int64_t cols,
             int64_t rows, const float* scales, const float* bias, void* out,
             const Threads& threads);

// The rows [begin, end) with their zeros, of values of `size` bytes. Whether bits and starts agree.
bool unpack(const Packed& matrix, int64_t size, int64_t begin, int64_t end, int64_t cols, void* to,
            const Threads& threads);

void to_float(Number type, const void* from, int64_t count, float* to);

// Scale sums, add the bias, round to the dtype. Spoils the sums.
void finish(Number type, float* sums, int64_t count, const float* scales, const float* bias, void* to);

}  // namespace torchprune
