// SPDX-License-Identifier: Apache-2.0
// Attention of one head for one instruction set. Blocks of keys pass by a group of queries (as in FlashAttention,
// Dao et al. 2022, arXiv 2205.14135): scores, weights and the block's keys and values stay in L1. All products are
// of 16-bit integers, two to a lane, summed in 32 bits. `D` gives, beside what product.inl asks for,
//   Pairs: W columns of two 16-bit lanes;
//   larger(U, U), largest(U): of each lane, and of all of them, unsigned; above(a, b): the larger, b where a is NaN.

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/attention.h"

namespace zo::cpu {
namespace {

constexpr uint32_t kNoScore = 1u << 30;  // scores are kept this much higher: never negative

inline int64_t padded_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline void store_i16(int16_t* p, U x) {
  V::store_u16(reinterpret_cast<uint16_t*>(p), V::bit_and(x, V::set(0xFFFFu)));
}

// one 2^x, for x <= 0, or just above by rounding; what is below 2^-64 is that. Relative error 1e-4.
inline F power_of_two(F x, float one) {
  x = D::above(x, V::set(-64.0f));
  const U n = D::nearest(x);
  const F r = V::sub(x, V::from_i32(n));
  F y = V::set(5.50089313e-2f * one);
  for (float c : {2.42210968e-1f, 6.93282928e-1f, 1.0f}) y = D::fma(y, r, V::set(c * one));
  return V::floats(V::add(V::bits(y), V::template shift_left<23>(n)));
}

// A head's keys and values as integers, and what a thread works in.
struct Head {
  int64_t depth, steps, columns;  // of a head; pairs of channels; channels padded to whole vectors
  int block;                      // keys of a block: less of deep heads, or keys and values would not fit into L1
  int64_t blocks, block_keys;     // of keys; int16 of a block of keys
  std::unique_ptr<int16_t[]> memory;
  // Keys: [blocks][panels of keys][steps][kPanel][2]; values: [blocks][panels of columns][pairs][kPanel][2]; [rows][columns].
  int16_t *keys, *values, *queries;
  std::unique_ptr<float[]> floats;
  float *value_scale, *sums, *total, *factor, *shrink;  // [columns], [rows][columns], then [rows] each
  uint32_t most[kAttentionRows + W];
  float key_unit;
  alignas(64) int32_t scores[kTile * kBlockKeys];
  alignas(64) int16_t weights[kTile * kBlockKeys + 1];

  explicit Head(const Attention& a)
      : depth(a.depth), steps((a.depth + 1) / 2), columns(padded_to(a.depth, kPanel)),
        block(a.depth > kDeep ? kBlockKeys / 2 : kBlockKeys), blocks((a.keys + block - 1) / block),
        block_keys(block * 2 * steps) {
    const int64_t key_count = blocks * block_keys, value_count = blocks * block * columns;
    memory.reset(new int16_t[static_cast<size_t>(key_count + value_count + kAttentionRows * columns + 64)]);
    keys = reinterpret_cast<int16_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    values = keys + key_count;
    queries = values + value_count;
    floats.reset(new float[static_cast<size_t>((kAttentionRows + 1) * columns + 3 * kAttentionRows + W)]);
    value_scale = floats.get();
    sums = value_scale + columns;
    total = sums + kAttentionRows * columns;
    factor = total + kAttentionRows;
    shrink = factor + kAttentionRows;
    pack_keys(a);
    pack_values(a);
  }

  // Calls each(index, vector) for a row of `depth` values; zeros stand behind the last.
  template <class Each>
  void each_vector_of(const Attention& a, const void* rows, int64_t row, const Each& each) const {
    for (int64_t i = 0; i < depth; i += W) {
      each(i, load_some(rows, a.dtype, row * a.stride + i, static_cast<int>(std::min<int64_t>(W, depth - i))));
    }
  }
  uint32_t largest_of_rows(const Attention& a, const void* rows, int64_t begin, int64_t end) const {
    Quantize q{};
    q.x = rows;
    q.dtype = a.dtype;
    q.channels = depth;
    q.stride = a.stride;
    return largest_here(q, begin, end);
  }
  // What makes codes of values whose largest magnitude has these bits, and the value of a code.
  static float to_codes(uint32_t largest, int code) {
    return has_scale(largest) ? static_cast<float>(code) / float_of(largest) : 0.0f;
  }
  static float unit_of(uint32_t largest, int code) {
    if (largest >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
    return has_scale(largest) ? float_of(largest) / static_cast<float>(code) : 0.0f;
  }

  void pack_keys(const Attention& a) {
    const int code = largest_code(depth);
    const uint32_t largest = largest_of_rows(a, a.key, 0, a.keys);
    key_unit = unit_of(largest, code);
    const F by = V::set(to_codes(largest, code));
    std::unique_ptr<int16_t[]> row(new int16_t[static_cast<size_t>(columns)]());
    for (int64_t j = 0; j < blocks * block; ++j) {
      if (j < a.keys) {
        each_vector_of(a, a.key, j, [&](int64_t i, F x) { store_i16(row.get() + i, D::nearest(V::mul(x, by))); });
      } else if (j == a.keys) {
        std::fill_n(row.get(), columns, int16_t{0});
      }
      int16_t* to = keys + j / kPanel * steps * 2 * kPanel + j % kPanel * 2;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * 2 * kPanel, row.get() + 2 * s, 4);
    }
  }

  void pack_values(const Attention& a) {
    for (int64_t i = 0; i < columns; i += W) {
      const int count = static_cast<int>(std::clamp<int64_t>(depth - i, 0, W));
      U most_bits = V::set(0u);
      for (int64_t j = 0; j < a.keys && count > 0; ++j) {
        const U bits = V::bit_and(V::bits(load_some(a.value, a.dtype, j * a.stride + i, count)), V::set(0x7FFFFFFFu));
        most_bits = V::if_greater(bits, most_bits, bits, most_bits);
      }
      alignas(64) int32_t largest[W];
      alignas(64) float codes[W];
      V::store_words(largest, most_bits);
      for (int l = 0; l < W; ++l) {
        codes[l] = to_codes(static_cast<uint32_t>(largest[l]), kValueCode);
        value_scale[i + l] = unit_of(static_cast<uint32_t>(largest[l]), kValueCode);
      }
      const F by = V::load(codes);
      const auto row_codes = [&](int64_t j) {
        if (j >= a.keys || count == 0) return V::set(0u);
        const U code = D::nearest(V::mul(load_some(a.value, a.dtype, j * a.stride + i, count), by));
        return V::bit_and(code, V::set(0xFFFFu));
      };
      for (int64_t j = 0; j < blocks * block; j += 2) {
        const U both = V::bit_or(row_codes(j), V::template shift_left<16>(row_codes(j + 1)));
        const int64_t panel = j / block * (columns / kPanel) + i / kPanel;
        const int64_t at = panel * block * kPanel + j % block * kPanel + i % kPanel * 2;
        V::store_words(reinterpret_cast<int32_t*>(values + at), both);
      }
    }
  }

  // `count` queries from `first` on, padded with zeros to whole tiles.
  void take_queries(const Attention& a, int64_t first, int64_t count) {
    const int code = largest_code(depth);
    const int64_t rows = padded_to(count, kTile);
    for (int64_t i = 0; i < rows; ++i) {
      int16_t* to = queries + i * columns;
      factor[i] = total[i] = 0.0f;
      most[i] = 0;
      if (i >= count) {
        std::fill_n(to, columns, int16_t{0});
        continue;
      }
      const uint32_t largest = largest_of_rows(a, a.query, first + i, first + i + 1);
      factor[i] = unit_of(largest, code) * key_unit * a.scale * 1.44269504f;  // e^x = 2^(x / ln 2)
      const F by = V::set(to_codes(largest, code));
      each_vector_of(a, a.query, first + i, [&](int64_t c, F x) { store_i16(to + c, D::nearest(V::mul(x, by))); });
    }
    std::fill_n(sums, rows * columns, 0.0f);
  }

  // acc += rows of pairs at `a` times panels of pairs at `b`, from vector `vector` on.
  template <int R, int N>
  ZO_INLINE static void add_pairs(U (&acc)[R][N], const int16_t* a, int64_t stride, const int16_t* b,
                                  int64_t panel_stride, int vector, int64_t steps) {
    const int8_t* rows[R];
    each<R>([&](auto i) ZO_INLINE { rows[i] = reinterpret_cast<const int8_t*>(a + i * stride); });
    const uint8_t* vectors[N];
    each<N>([&](auto j) ZO_INLINE { vectors[j] = vector_at(b, panel_stride * 2, vector + j, 4 * W); });
    add_products<D::Pairs>(acc, rows, vectors, steps);
  }

  // Not inlined into `visit`, nor is `gather`: together they would be short of registers.
  template <int R, int N>
  [[gnu::noinline]] void score(int64_t row, const int16_t* keys_of, int vector, int32_t* to) const {
    U acc[R][N];
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE { acc[i][j] = V::set(kNoScore); });
    });
    add_pairs(acc, queries + row * columns, columns, keys_of, steps * 2 * kPanel, vector, steps);
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE { V::store_words(to + i * kBlockKeys + (vector + j) * W, acc[i][j]); });
    });
  }

  // The largest of `count` scores of a row. `valid` masks the last vector.
  static uint32_t highest(int count, U valid, const int32_t* score) {
    const int last = (count - 1) / W * W;
    U high = V::bit_and(V::load_words(score + last), valid);
    for (int j = 0; j < last; j += W) high = D::larger(high, V::load_words(score + j));
    return D::largest(high);
  }

  // Take in the largest scores of a tile's rows: sums of before shrink to those.
  void raise(int64_t row, const uint32_t* high) {
    for (int i = 0; i < kTile; i += W) {  // lanes past the tile are those of rows whose turn comes
      const U before = V::load_words(reinterpret_cast<const int32_t*>(most + row + i));
      const U now = V::load_words(reinterpret_cast<const int32_t*>(high + i));
      const F x = V::mul(V::from_i32(V::sub(before, now)), V::load(factor + row + i));
      V::store(shrink + row + i, power_of_two(x, 1.0f));
    }
    std::copy_n(high, kTile, most + row);
  }

  // Weights of `count` scores of a row beside the row's largest so far, and their sum.
  U weigh(int64_t row, int count, U valid, const int32_t* score, int16_t* weight) const {
    const int last = (count - 1) / W * W;
    const F by = V::set(factor[row]), from = V::mul(V::from_i32(V::set(most[row])), V::set(-factor[row]));
    const auto codes = [&](int j) {
      const F x = D::fma(V::from_i32(V::load_words(score + j)), by, from);
      return D::nearest(power_of_two(x, kWeightCode));
    };
    U sum = V::set(0u);
    for (int j = 0; j < last; j += W) {
      const U code = codes(j);
      sum = V::add(sum, code);
      V::store_u16(reinterpret_cast<uint16_t*>(weight + j), code);
    }
    const U code = V::bit_and(codes(last), valid);
    V::store_u16(reinterpret_cast<uint16_t*>(weight + last), code);
    if (W == 1) weight[count] = 0;  // the other half of a pair
    return V::add(sum, code);
  }

  template <int R, int N>
  [[gnu::noinline]] void gather(const int16_t* weight, const int16_t* values_of, int64_t pairs, int64_t row,
                                int vector) {
    U acc[R][N];
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE { acc[i][j] = V::set(0u); });
    });
    add_pairs(acc, weight, kBlockKeys, values_of, block * kPanel, vector, pairs);
    each<R>([&](auto i) ZO_INLINE {
      const F by = V::set(shrink[row + i]);
      each<N>([&](auto j) ZO_INLINE {
        float* at = sums + (row + i) * columns + (vector + j) * W;
        V::store(at, V::add(V::mul(V::load(at), by), V::from_i32(acc[i][j])));
      });
    });
  }

  // run(N, first) over all vectors, as many at a time as registers allow and about as many each time: one alone would
  // wait for its own sums.
  template <class Run>
  static void by_vectors(int vectors, const Run& run) {
    for (int first = 0; first < vectors;) {
      const int left = vectors - first, times = (left + D::kVectors - 1) / D::kVectors, count = (left + times - 1) / times;
      run_some<D::kVectors>(first, count, run);
      first += count;
    }
  }
  template <int N, class Run>
  static void run_some(int first, int count, const Run& run) {
    if constexpr (N > 1) {
      if (count < N) return run_some<N - 1>(first, count, run);
    }
    run(std::integral_constant<int, N>(), first);
  }

  void visit(int64_t row, int64_t number, int count) {
    constexpr int R = D::kRows;
    const int16_t* key = keys + number * block_keys;
    const int16_t* value = values + number * block * columns;
    for (int i = 0; i < kTile; i += R) {
      by_vectors((count + W - 1) / W, [&](auto n, int vector) {
        score<R, n>(row + i, key, vector, scores + i * kBlockKeys);
      });
    }
    alignas(64) int32_t lanes[W] = {};
    std::fill_n(lanes, (count - 1) % W + 1, -1);
    const U valid = V::load_words(lanes);
    // Step by step for the tile and not for a row: a row's sums over lanes would wait for each other.
    uint32_t high[kTile + W] = {};
    for (int i = 0; i < kTile; ++i) high[i] = std::max(most[row + i], highest(count, valid, scores + i * kBlockKeys));
    raise(row, high);
    U sum[kTile];
    for (int i = 0; i < kTile; ++i) {
      sum[i] = weigh(row + i, count, valid, scores + i * kBlockKeys, weights + i * kBlockKeys);
    }
    for (int i = 0; i < kTile; ++i) {
      total[row + i] = total[row + i] * shrink[row + i] + static_cast<float>(D::total(sum[i]));
    }
    for (int i = 0; i < kTile; i += R) {
      by_vectors(static_cast<int>(columns / W), [&](auto n, int vector) {
        gather<R, n>(weights + i * kBlockKeys, value, (count + 1) / 2, row + i, vector);
      });
    }
  }

  void finish(const Attention& a, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      // 0 times the factor: scores that are NaN have no weights.
      const F by = V::set(total[i] + 0.0f * factor[i]);
      for (int64_t c = 0; c < depth; c += W) {
        const F y = V::div(V::mul(V::load(sums + i * columns + c), V::load(value_scale + c)), by);
        store_some(a.out, a.dtype, (first + i) * a.stride + c, static_cast<int>(std::min<int64_t>(W, depth - c)), y);
      }
    }
  }
};

void attend_here(const Attention& a, int64_t begin, int64_t end) {
  const auto head = std::make_unique<Head>(a);
  for (int64_t first = begin; first < end; first += kAttentionRows) {
    const int64_t count = std::min(kAttentionRows, end - first);
    head->take_queries(a, first, count);
    for (int64_t number = 0; number < head->blocks; ++number) {
      const int keys = static_cast<int>(std::min<int64_t>(head->block, a.keys - number * head->block));
      for (int64_t row = 0; row < count; row += kTile) head->visit(row, number, keys);
    }
    head->finish(a, first, count);
  }
}

}  // namespace
}  // namespace zo::cpu
