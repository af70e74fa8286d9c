// Products in terms of a vector type V. To be included inside an anonymous namespace: every form
// has functions of its own, since each is compiled for another processor.
//
// V provides
//   Vector, kWidth              floats, or pairs for kPairs, in a vector
//   kTaken                      vectors that one `take` makes of kTaken * V::kColumns columns
//   zero(), fma(w, x, sum), load(x, vector index), store(to, vector index, w), sum(v)
//   take<K>(bits, from, w)      the next columns' weights; returns where the next values begin
//   sum_four(a, b, c, d, to)    four sums at once, if kRows is 4
//   kFewRows                    rows of weights that `few` takes at once
//   kRows, kInputs              rows of weights and of input that `many` multiplies in registers

#define UNROLLED _Pragma("GCC unroll 16")

// Where a word's values are, if its row has counted so many before them.
template <int Bytes>
const char* values_at(const Packed& m, int64_t counted) {
  return m.values + (uint64_t(counted) < m.total ? uint64_t(counted) : m.total) * Bytes;
}

// Whether a row has counted as many values as it should have, and none for what is no column.
bool agrees(const Packed& m, int64_t row, int64_t counted) {
  const uint64_t beyond = m.past ? m.bits[(row + 1) * m.words - 1] & m.past : 0;
  return counted == m.starts[row + 1] && beyond == 0;
}

// R rows of weights times B rows of input, weights expanded in registers.
template <class V, Kind K, int R, int B>
bool direct(const Packed& m, const void* x, int64_t begin, float* out, int64_t out_stride) {
  using Vector = typename V::Vector;
  constexpr int kTakes = int(kWord) / (V::kTaken * V::kColumns);
  constexpr int kPerWord = kTakes * V::kTaken;
  // Enough chains of sums to hide the latency of a product; as many whatever R is, so that a row's
  // sum does not depend on its neighbours.
  constexpr int kFull = B == 1 ? 1 : B * V::kFewRows;
  constexpr int kSums = kFull >= 6 ? 1 : kFull >= 3 ? 2 : 4;
  const int64_t stride = m.words * kPerWord;
  const uint64_t* bits = m.bits + begin * m.words;
  int64_t counted[R];
  Vector sums[R][B][kSums];
  UNROLLED for (int r = 0; r < R; ++r) {
    counted[r] = m.starts[begin + r];
    UNROLLED for (int b = 0; b < B; ++b) {
      UNROLLED for (int i = 0; i < kSums; ++i) sums[r][b][i] = V::zero();
    }
  }
  for (int64_t at = 0; at < m.words; ++at) {
    uint64_t words[R];
    const char* from[R];
    UNROLLED for (int r = 0; r < R; ++r) {
      words[r] = bits[r * m.words + at];
      from[r] = values_at<bytes_of<K>()>(m, counted[r]);
      counted[r] += __builtin_popcountll(words[r]);
      V::ahead(from[r]);
    }
    UNROLLED for (int t = 0; t < kTakes; ++t) {
      Vector w[R][V::kTaken];
      UNROLLED for (int r = 0; r < R; ++r) {
        from[r] = V::template take<K>(words[r] >> (t * V::kTaken * V::kColumns), from[r], w[r]);
      }
      UNROLLED for (int b = 0; b < B; ++b) {
        UNROLLED for (int i = 0; i < V::kTaken; ++i) {
          const int n = t * V::kTaken + i;
          const Vector input = V::load(x, b * stride + at * kPerWord + n);
          UNROLLED for (int r = 0; r < R; ++r) {
            sums[r][b][n % kSums] = V::fma(w[r][i], input, sums[r][b][n % kSums]);
          }
        }
      }
    }
  }
  bool right = true;
  UNROLLED for (int r = 0; r < R; ++r) {
    right &= agrees(m, begin + r, counted[r]);
    UNROLLED for (int b = 0; b < B; ++b) {
      float total = V::sum(sums[r][b][0]);
      UNROLLED for (int i = 1; i < kSums; ++i) total += V::sum(sums[r][b][i]);
      out[b * out_stride + begin + r] = total;
    }
  }
  return right;
}

template <class V, Kind K, int B>
bool few(const Packed& m, const void* x, int64_t, int64_t begin, int64_t end, float* out,
         int64_t out_stride) {
  constexpr int R = B == 1 ? 1 : V::kFewRows;  // several where inputs would not stay in L1
  bool right = true;
  int64_t r = begin;
  for (; r + R <= end; r += R) right &= direct<V, K, R, B>(m, x, r, out, out_stride);
  for (; r < end; ++r) right &= direct<V, K, 1, B>(m, x, r, out, out_stride);
  return right;
}

// R unpacked rows of weights times B rows of input, over some of their columns.
template <class V, int R, int B>
void tile(const void* w, const void* x, int64_t stride, int64_t vectors, bool first, float* out,
          int64_t out_stride) {
  typename V::Vector sums[R][B];
  UNROLLED for (int r = 0; r < R; ++r) {
    UNROLLED for (int b = 0; b < B; ++b) sums[r][b] = V::zero();
  }
  for (int64_t at = 0; at < vectors; ++at) {
    typename V::Vector now[R];
    UNROLLED for (int r = 0; r < R; ++r) now[r] = V::load(w, r * vectors + at);
    UNROLLED for (int b = 0; b < B; ++b) {
      const typename V::Vector input = V::load(x, b * stride + at);
      UNROLLED for (int r = 0; r < R; ++r) sums[r][b] = V::fma(now[r], input, sums[r][b]);
    }
  }
  UNROLLED for (int b = 0; b < B; ++b) {
    float found[R];
    if constexpr (R == 4) {
      V::sum_four(sums[0][b], sums[1][b], sums[2][b], sums[3][b], found);
    } else {
      UNROLLED for (int r = 0; r < R; ++r) found[r] = V::sum(sums[r][b]);
    }
    float* to = out + b * out_stride;
    UNROLLED for (int r = 0; r < R; ++r) to[r] = first ? found[r] : to[r] + found[r];
  }
}

template <class V, int R, int B>
void tiles(const void* w, const void* x, int64_t batch, int64_t stride, int64_t vectors, bool first,
           float* out, int64_t out_stride) {
  const auto* bytes = static_cast<const char*>(x);
  const int64_t step = stride * int64_t(sizeof(typename V::Vector));
  int64_t b = 0;
  for (; b + B <= batch; b += B) {
    tile<V, R, B>(w, bytes + b * step, stride, vectors, first, out + b * out_stride, out_stride);
  }
  if constexpr (B > 1) {
    if (b < batch) {
      tiles<V, R, B - 1>(w, bytes + b * step, batch - b, stride, vectors, first,
                         out + b * out_stride, out_stride);
    }
  }
}

// Words of the bitmask, as many in each row.
struct Block {
  int64_t begin, end;
};

// R rows of weights, unpacked over a block, times all inputs. `counted` has the rows' values so far.
template <class V, Kind K, int R>
void unpacked_rows(const Packed& m, const void* x, int64_t batch, int64_t begin, Block block,
                   int64_t* counted, void* room, float* out, int64_t out_stride) {
  constexpr int kTakes = int(kWord) / (V::kTaken * V::kColumns);
  constexpr int64_t kPerWord = kTakes * V::kTaken;
  const int64_t vectors = (block.end - block.begin) * kPerWord;
  UNROLLED for (int r = 0; r < R; ++r) {
    const uint64_t* bits = m.bits + (begin + r) * m.words;
    int64_t to = r * vectors;
    for (int64_t at = block.begin; at < block.end; ++at) {
      const char* from = values_at<bytes_of<K>()>(m, counted[r]);
      counted[r] += __builtin_popcountll(bits[at]);
      V::ahead(from);
      UNROLLED for (int t = 0; t < kTakes; ++t) {
        typename V::Vector w[V::kTaken];
        from = V::template take<K>(bits[at] >> (t * V::kTaken * V::kColumns), from, w);
        UNROLLED for (int i = 0; i < V::kTaken; ++i) V::store(room, to++, w[i]);
      }
    }
  }
  const auto* input = static_cast<const char*>(x) +
                      block.begin * kPerWord * int64_t(sizeof(typename V::Vector));
  tiles<V, R, V::kInputs>(room, input, batch, m.words * kPerWord, vectors, block.begin == 0,
                          out + begin, out_stride);
}

// Words of a block: of so many columns the inputs stay in L2 while all rows of weights go by, of
// which some at a time are unpacked to a buffer that stays in L1.
template <class V>
int64_t block_words(int64_t batch, int64_t words) {
  constexpr int64_t kHeld = 1 << 19, kLeast = 8, kWhole = 64;  // bytes, words, rows of input
  if (batch <= kWhole || words <= kLeast) return words;
  const int64_t fit = kHeld / (batch * kWord / V::kColumns * int64_t(sizeof(typename V::Vector)));
  const int64_t most = fit < kLeast ? kLeast : fit;
  const int64_t blocks = (words + most - 1) / most;
  return (words + blocks - 1) / blocks;
}

template <class V, Kind K>
bool many(const Packed& m, const void* x, int64_t batch, int64_t begin, int64_t end, float* out,
          int64_t out_stride) {
  const int64_t step = block_words<V>(batch, m.words);
  const int64_t row = step * kWord / V::kColumns * int64_t(sizeof(typename V::Vector));
  void* room = std::aligned_alloc(64, size_t((V::kRows * row + 63) / 64 * 64));
  auto* counted = static_cast<int64_t*>(std::malloc(size_t(end - begin) * sizeof(int64_t)));
  for (int64_t r = begin; r < end; ++r) counted[r - begin] = m.starts[r];
  Block block{0, 0};
  do {
    block = {block.end, block.end + step < m.words ? block.end + step : m.words};
    int64_t r = begin;
    for (; r + V::kRows <= end; r += V::kRows) {
      unpacked_rows<V, K, V::kRows>(m, x, batch, r, block, counted + r - begin, room, out,
                                    out_stride);
    }
    for (; r < end; ++r) {
      unpacked_rows<V, K, 1>(m, x, batch, r, block, counted + r - begin, room, out, out_stride);
    }
  } while (block.end < m.words);
  bool right = true;
  for (int64_t r = begin; r < end; ++r) right &= agrees(m, r, counted[r - begin]);
  std::free(counted);
  std::free(room);
  return right;
}

#define TORCHPRUNE_FEW(V, K)                                                                     \
  {                                                                                              \
    few<V, K, 1>, few<V, K, 2>, few<V, K, 3>, few<V, K, 4>, few<V, K, 5>, few<V, K, 6>,          \
        few<V, K, 7>, few<V, K, 8>                                                               \
  }
