// SPDX-License-Identifier: Apache-2.0
// Register tiles: a few rows by a few vectors of columns stay in registers along all of a chunk's channels.
// Behind a `V` and a `D`, see product.inl.

#include <algorithm>
#include <type_traits>

#include "cpu/each.h"
#include "cpu/product.h"

namespace zo::cpu {
namespace {

constexpr int kPanelVectors = kPanel / W;

// One visit of a chunk's weights: `rows` rows of a tile by `panels` panels.
template <class A>
struct Visit {
  const A* a;
  const A* zeros;
  const int32_t* offset;  // [taps][kTile]
  int64_t taps, channel, steps;
  const void* b;              // [panels][taps][tap_stride]
  int64_t panel_stride, tap_stride;  // bytes
  const int32_t* sums;        // [groups][kTile], of the rows of `a`; null where a is fp32
  const int32_t* zero;        // [groups][kColumns], the lanes' zeros; null: all are kOffset
  int rows, panels;
  void* total;  // [kTile][kColumns] int32 or fp32
  bool first;   // it holds nothing yet
  // Several groups: `groups` of `steps` in every tap. Their scaled sums are added up in `total`, which is fp32.
  int64_t groups;
  const float* scale;  // [taps * groups][kColumns]
};

template <class A, int R>
ZO_INLINE inline void aim(const Visit<A>& v, int64_t tap, int first_row, const A* (&a)[R]) {
  each<R>([&](auto i) ZO_INLINE {
    const int32_t offset = v.offset[tap * kTile + first_row + i];
    a[i] = (offset == kOutside ? v.zeros : v.a + offset) + v.channel;
  });
}

inline const uint8_t* vector_at(const void* b, int64_t panel_stride, int vector, int bytes) {
  return static_cast<const uint8_t*>(b) + vector / kPanelVectors * panel_stride + vector % kPanelVectors * bytes;
}

template <class A, int N>
ZO_INLINE inline void aim_weights(const Visit<A>& v, int64_t tap, int vector, const uint8_t* (&b)[N]) {
  each<N>([&](auto j) ZO_INLINE { b[j] = vector_at(v.b, v.panel_stride, vector + j, 4 * W) + tap * v.tap_stride; });
}

// What makes the sums of lanes those of codes: minus the lanes' zeros times the sum of the row.
template <class L, int R, int N>
ZO_INLINE inline void start_at(U (&acc)[R][N], const int32_t* sums, const int32_t* zero) {
  each<R>([&](auto i) ZO_INLINE {
    const U sum = V::set(static_cast<uint32_t>(-sums[i]));
    each<N>([&](auto j) ZO_INLINE {
      acc[i][j] = zero != nullptr ? D::multiply(sum, V::load_words(zero + j * W))
                                  : V::set(static_cast<uint32_t>(-L::kOffset * sums[i]));
    });
  });
}

// Codes of 4 bits as they are packed: 8 channels a step.
struct Nibbles {
  static constexpr int32_t kOffset = D::Narrow::kOffset;
};
template <class L>
constexpr int kStepChannels = std::is_same_v<L, Nibbles> ? 8 : 4;

template <class L, int R, int N>
ZO_INLINE inline void add_step(U (&acc)[R][N], const int8_t* const (&a)[R], const L (&w)[N], int64_t channel) {
  each<R>([&](auto i) ZO_INLINE {
    const U x = D::broadcast(a[i] + channel);
    each<N>([&](auto j) ZO_INLINE { acc[i][j] = L::dot(acc[i][j], w[j], x); });
  });
}

// acc += products of `steps` times kStepChannels<L> channels.
template <class L, int R, int N>
ZO_INLINE inline void add_products(U (&acc)[R][N], const int8_t* const (&a)[R], const uint8_t* const (&b)[N],
                                   int64_t steps) {
  // Equal to gcc, accumulators would share registers and be copied.
  each<R>([&](auto i) ZO_INLINE { each<N>([&](auto j) ZO_INLINE { D::keep(acc[i][j]); }); });
  each_step(steps, [&](int64_t s) ZO_INLINE {
    if constexpr (std::is_same_v<L, Nibbles>) {
      const U low = V::set(0x0F0F0F0Fu);
      const auto codes = [&](int j) ZO_INLINE {
        return V::load_words(reinterpret_cast<const int32_t*>(b[j] + s * 4 * kPanel));
      };
      typename D::Narrow w[N];
      each<N>([&](auto j) ZO_INLINE { w[j].u = V::bit_and(codes(j), low); });
      add_step(acc, a, w, 8 * s);
      asm volatile("" ::: "memory");  // loaded again: there is no register to keep them in
      each<N>([&](auto j) ZO_INLINE { w[j].u = V::bit_and(V::template shift_right<4>(codes(j)), low); });
      add_step(acc, a, w, 8 * s + 4);
    } else {
      L w[N];
      each<N>([&](auto j) ZO_INLINE { w[j] = L::load(b[j] + s * 4 * kPanel); });
      add_step(acc, a, w, 4 * s);
    }
  });
}

// The same of `steps` channels in fp32.
template <int R, int N>
ZO_INLINE inline void add_products(F (&acc)[R][N], const float* const (&a)[R], const uint8_t* const (&b)[N],
                                   int64_t steps) {
  each<R>([&](auto i) ZO_INLINE { each<N>([&](auto j) ZO_INLINE { acc[i][j] = V::keep(acc[i][j]); }); });
  each_step(steps, [&](int64_t s) ZO_INLINE {
    F w[N];
    each<N>([&](auto j) ZO_INLINE { w[j] = V::load(reinterpret_cast<const float*>(b[j] + s * 4 * kPanel)); });
    each<R>([&](auto i) ZO_INLINE {
      const F x = V::set(a[i][s]);
      each<N>([&](auto j) ZO_INLINE { acc[i][j] = D::fma(x, w[j], acc[i][j]); });
    });
  });
}

template <class L>
struct Integers {
  using A = int8_t;
  template <int R, int N>
  [[gnu::noinline]] static void run(const Visit<A>& v, int row, int vector) {
    int32_t* total = static_cast<int32_t*>(v.total) + row * kColumns + vector * W;
    U acc[R][N];
    if (v.first) {
      start_at<L>(acc, v.sums + row, v.zero != nullptr ? v.zero + vector * W : nullptr);
    } else {
      each<R>([&](auto i) ZO_INLINE {
        each<N>([&](auto j) ZO_INLINE { acc[i][j] = V::load_words(total + i * kColumns + j * W); });
      });
    }
    for (int64_t tap = 0; tap < v.taps; ++tap) {
      const A* a[R];
      aim(v, tap, row, a);
      const uint8_t* b[N];
      aim_weights(v, tap, vector, b);
      add_products<L>(acc, a, b, v.steps * 4 / kStepChannels<L>);
    }
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE { V::store_words(total + i * kColumns + j * W, acc[i][j]); });
    });
  }
};

// The same for several groups, with what `fold` does after each.
template <class L>
struct Groups {
  using A = int8_t;
  template <int R, int N>
  [[gnu::noinline]] static void run(const Visit<A>& v, int row, int vector) {
    float* total = static_cast<float*>(v.total) + row * kColumns + vector * W;
    const int32_t* sums = v.sums + row;
    const float* scale = v.scale + vector * W;
    const int32_t* zero = v.zero != nullptr ? v.zero + vector * W : nullptr;
    bool begin = v.first;
    for (int64_t tap = 0; tap < v.taps; ++tap) {
      const A* a[R];
      aim(v, tap, row, a);
      const uint8_t* b[N];
      aim_weights(v, tap, vector, b);
      for (int64_t g = 0; g < v.groups; ++g) {
        U acc[R][N];
        start_at<L>(acc, sums, zero);
        add_products<L>(acc, a, b, v.steps * 4 / kStepChannels<L>);
        each<N>([&](auto j) ZO_INLINE {
          const F by = V::load(scale + j * W);
          each<R>([&](auto i) ZO_INLINE {
            float* at = total + i * kColumns + j * W;
            const F y = V::mul(V::from_i32(acc[i][j]), by);
            V::store(at, begin ? y : V::add(V::load(at), y));
          });
        });
        each<R>([&](auto i) ZO_INLINE { a[i] += 4 * v.steps; });
        each<N>([&](auto j) ZO_INLINE { b[j] += v.steps * 4 / kStepChannels<L> * 4 * kPanel; });
        sums += kTile;
        scale += kColumns;
        if (zero != nullptr) zero += kColumns;
        begin = false;
      }
    }
  }
};

// Every chunk is summed up on its own, which keeps rounding errors of long sums small.
struct Floats {
  using A = float;
  template <int R, int N>
  [[gnu::noinline]] static void run(const Visit<A>& v, int row, int vector) {
    float* total = static_cast<float*>(v.total) + row * kColumns + vector * W;
    F acc[R][N];
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE { acc[i][j] = V::set(0.0f); });
    });
    for (int64_t tap = 0; tap < v.taps; ++tap) {
      const A* a[R];
      aim(v, tap, row, a);
      const uint8_t* b[N];
      aim_weights(v, tap, vector, b);
      add_products(acc, a, b, v.steps);
    }
    each<R>([&](auto i) ZO_INLINE {
      each<N>([&](auto j) ZO_INLINE {
        float* at = total + i * kColumns + j * W;
        V::store(at, v.first ? acc[i][j] : V::add(V::load(at), acc[i][j]));
      });
    });
  }
};

template <class K, int R, int N>
void visit_vectors(const Visit<typename K::A>& v, int row, int vector, int vectors) {
  if constexpr (N > 1) {
    if (vectors < N) return visit_vectors<K, R, N - 1>(v, row, vector, vectors);
  }
  K::template run<R, N>(v, row, vector);
}

template <class K, int R>
void visit_rows(const Visit<typename K::A>& v, int row, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return visit_rows<K, R - 1>(v, row, rows);
  }
  const int vectors = v.panels * kPanelVectors;
  for (int j = 0; j < vectors; j += D::kVectors) {
    visit_vectors<K, R, D::kVectors>(v, row, j, std::min(D::kVectors, vectors - j));
  }
}

template <class K>
void visit(const Visit<typename K::A>& v) {
  for (int i = 0; i < v.rows; i += D::kRows) visit_rows<K, D::kRows>(v, i, std::min(D::kRows, v.rows - i));
}

}  // namespace
}  // namespace zo::cpu
