// What every form of the kernels provides, one form for each instruction set.
//
// This header is compiled with the flags of several instruction sets, so it declares and never
// defines: a function shared by two of them could be linked from the wrong one.
#pragma once

#include <cstdint>

namespace torchprune {

// The dtype of the values. Inputs are float32, but bfloat16 for the two of pairs, where instructions
// that multiply pairs of them are there: with bfloat16 values, and with int8 ones. kInt8Fixed is
// int8 with one finite row of input in fixed point, where instructions that multiply bytes are.
enum Kind : int { kFloat32, kFloat16, kBFloat16, kInt8, kPairs, kInt8Pairs, kInt8Fixed, kKinds };

// The most words in a row for kInt8Fixed, whose sums are whole numbers of 32 bits.
constexpr int64_t kFixedWords = 1 << 14;

// The most rows of input that one pass over the weights serves without unpacking them to a buffer.
constexpr int kFew = 8;

// Columns that one word of the bitmask covers. Rows of the bitmask begin on a word.
constexpr int64_t kWord = 64;

// Values that may be read beyond the last one: as many as a word can ask for.
constexpr int64_t kSlack = kWord;

// A (rows, cols) matrix as a bitmask and its packed nonzeros, row after row.
//
// What bits and starts say of each other is nobody's word until it is looked at, which every kernel
// does as it goes: it counts a row's bits from the row's start, takes each word's values from no
// further than `total`, whatever it has counted, and tells whether each row ended where the next
// one starts. So nothing beyond the slack is ever read, and parts that contradict each other show.
struct Packed {
  const uint64_t* bits;   // rows x words, bit c % 64 of word c / 64 is column c; 0 past the end
  const char* values;     // total nonzeros, then at least kSlack more
  const int32_t* starts;  // rows + 1: the index of a row's first nonzero
  int64_t words;
  uint64_t past;          // the bits of a row's last word that no column belongs to
  uint64_t total;
};

// out[b * out_stride + r] = sum over c of matrix[r, c] * x[b, c] for the rows r of [begin, end).
// Rows of `x` are arranged, and words * kWord elements apart. Whether their bits and starts agree.
using Product = bool (*)(const Packed& matrix, const void* x, int64_t batch, int64_t begin,
                         int64_t end, float* out, int64_t out_stride);

struct Form {
  const char* name;

  // Lay one row of float32 input out as the products with a kind of values want it, zeros up to
  // words * kWord. kInt8Fixed takes no more room than the others.
  void (*arrange)(Kind kind, const float* from, int64_t cols, float* to, int64_t words);

  // The same for bfloat16 and the kinds of pairs. Null where there are none.
  void (*arrange_pairs)(Kind kind, const uint16_t* from, int64_t cols, uint16_t* to, int64_t words);

  // By kind and rows of input less 1; for more of them than kFew. Null where not provided.
  Product few[kKinds][kFew];
  Product many[kKinds];

  // The rows [begin, end) with their zeros; rows of `to` are cols apart. For 1, 2 and 4 bytes.
  // Whether their bits and starts agree.
  bool (*expand[3])(const Packed& matrix, int64_t begin, int64_t end, int64_t cols, char* to);
};

const Form* portable_form();
const Form* avx2_form();         // AVX2, FMA, F16C, BMI2; null where not compiled for x86-64
const Form* avx512_form();       // AVX-512 F, BW, VL and VBMI2; null where not compiled for x86-64
const Form* avx512_bf16_form();  // and AVX-512 BF16, which multiplies pairs of bfloat16

}  // namespace torchprune
