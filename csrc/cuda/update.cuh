// SPDX-License-Identifier: Apache-2.0
// The one skeleton of the update ops on a GPU. A thread has a unit: four vectors of 16 bytes, one for each word
// or output of the Philox blocks that they share.
//
//   kind        | group | blocks of a unit | vector j of the unit at lane l starts at element
//   normal      |    64 | kVector          | 64 g + 16 j + l
//   rademacher  |   128 | 1                | 128 g + 32 j + l
//
// Neighbouring threads have neighbouring lanes: a warp reads and writes whole sectors. A block takes chunk after
// chunk of a persistent grid; the tensors of a call are rows of one table.
//
// A rule has kStates and kSnapsTerms, and
//   float start(float p, snap): what the terms are added to, one after another;
//   float finish(float total, float p, float (&state)[2], snap): the new p; it updates the state.
// They repeat zo_kernels/_arithmetic.py line by line. `unit` is host code too: tests run it against the reference.
#pragma once

#include <type_traits>

#include "cuda/scalar.h"
#include "cuda/update.h"

namespace zo::cuda {

constexpr int kThreads = 128, kBlocks = 4;  // of a multiprocessor: leaves 128 registers a thread, so that none spills

template <class T, int N>
struct alignas(16) Vector {
  T x[N];
};

struct Anywhere {  // no grid
  ZO_HOST_DEVICE float operator()(float x) const { return x; }
};
struct Grid {  // the nearest multiple of a power of two, ties to even
  float middle;
  ZO_HOST_DEVICE float operator()(float x) const { return sub(add(x, middle), middle); }
};

// kVector consecutive elements from `p` on, of which `left` exist.
template <class T, int N>
ZO_HOST_DEVICE inline void load(T (&to)[N], const T* p, int64_t left, bool aligned) {
  constexpr int kAtOnce = 16 / sizeof(T);
  static_assert(N % kAtOnce == 0);
  if (aligned && left >= N) {
#pragma unroll
    for (int i = 0; i < N; i += kAtOnce) {
      const auto v = *reinterpret_cast<const Vector<T, kAtOnce>*>(p + i);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) to[i + k] = v.x[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < left ? p[i] : T{};
  }
}
template <class T, int N>
ZO_HOST_DEVICE inline void store(T* p, const T (&from)[N], int64_t left, bool aligned) {
  constexpr int kAtOnce = 16 / sizeof(T);
  if (aligned && left >= N) {
#pragma unroll
    for (int i = 0; i < N; i += kAtOnce) {
      Vector<T, kAtOnce> v;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) v.x[k] = from[i + k];
      *reinterpret_cast<Vector<T, kAtOnce>*>(p + i) = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < left) p[i] = from[i];
    }
  }
}

// Unit `number` of a tensor: its first element is `at` of vector 0.
template <Kind kKind, int kVector>
struct Unit {
  static constexpr int kGroup = group_of(kKind), kStep = kGroup / 4, kLanes = kStep / kVector;
  uint32_t group, lane;
  ZO_HOST_DEVICE explicit Unit(int64_t number)
      : group(static_cast<uint32_t>(number / kLanes)), lane(static_cast<uint32_t>(number % kLanes) * kVector) {}
  ZO_HOST_DEVICE int64_t at(int j) const { return int64_t{group} * kGroup + j * kStep + lane; }
};

// total[j][v] + factor z, term by term; equal draws next to each other share one z.
template <Kind kKind, int kVector, class Snap>
ZO_HOST_DEVICE inline void accumulate(float (&total)[4][kVector], const Unit<kKind, kVector>& u, uint32_t stream,
                                      const Launch& c, Snap snap) {
  const int64_t base = *c.base;
  for (int64_t first = 0; first < c.terms;) {
    const int64_t draw = c.draws[first];
    int64_t end = first + 1;
    while (end < c.terms && c.draws[end] == draw) ++end;
    const uint64_t number = static_cast<uint64_t>(base + draw);
    if constexpr (kKind == Kind::normal) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Words w = words(c.seed, stream, number, 16 * u.group + u.lane + v);
        float z[4];
        normal_pair(w.w[0], w.w[1], z[0], z[1]);
        normal_pair(w.w[2], w.w[3], z[2], z[3]);
        for (int64_t t = first; t < end; ++t) {
          const float factor = c.factors[t];
#pragma unroll
          for (int j = 0; j < 4; ++j) total[j][v] = add(total[j][v], snap(mul(factor, z[j])));
        }
      }
    } else {
      const Words w = words(c.seed, stream, number, u.group);
      for (int64_t t = first; t < end; ++t) {
        const uint32_t factor = bits(c.factors[t]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t lanes = w.w[j] >> u.lane;
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            total[j][v] = add(total[j][v], snap(floats(factor ^ (lanes >> v << 31))));
          }
        }
      }
    }
    first = end;
  }
}

// 16 random bits of each element, as zo_kernels/rng.py counts them.
template <Kind kKind, int kVector>
ZO_HOST_DEVICE inline void round_bits(uint32_t (&r)[4], int v, const Unit<kKind, kVector>& u, uint32_t stream,
                                      uint64_t seed, uint64_t draw) {
  if constexpr (kKind == Kind::normal) {
    const Words w = words(seed, stream, draw, u.group / 2 * 16 + u.lane + v);
    const uint32_t shift = u.group % 2 * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) r[j] = w.w[j] >> shift & 0xFFFF;
  } else {
    const Words w = words(seed, stream, draw, 16 * u.group + (u.lane + v) % 16);
    const bool second = u.lane >= 16;
    const uint32_t even = second ? w.w[1] : w.w[0], odd = second ? w.w[3] : w.w[2];
    r[0] = even & 0xFFFF, r[1] = odd & 0xFFFF, r[2] = even >> 16, r[3] = odd >> 16;
  }
}

template <class Rule, class D, Kind kKind, bool kGrid, bool kRounds>
ZO_HOST_DEVICE inline void unit(const Row& row, int64_t number, const Launch& c, const Rule& rule) {
  using T = typename D::T;
  using Snap = typename std::conditional<kGrid, Grid, Anywhere>::type;
  constexpr int kVector = 16 / sizeof(T);
  const Unit<kKind, kVector> u(number);
  const uint32_t stream = static_cast<uint32_t>(row.stream);
  Snap snap{};
  if constexpr (kGrid) snap.middle = floats(static_cast<uint32_t>(row.middle));

  T* const p = reinterpret_cast<T*>(row.p);
  T old[4][kVector];
  float total[4][kVector];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    load(old[j], p + u.at(j), row.n - u.at(j), c.aligned);
#pragma unroll
    for (int v = 0; v < kVector; ++v) total[j][v] = rule.start(D::load(old[j][v]), snap);
  }
  if constexpr (Rule::kSnapsTerms) {
    accumulate(total, u, stream, c, snap);
  } else {
    accumulate(total, u, stream, c, Anywhere{});
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float state[2][kVector] = {};
    float* const at[2] = {reinterpret_cast<float*>(row.state[0]), reinterpret_cast<float*>(row.state[1])};
    const int64_t left = row.n - u.at(j);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (rule.has(k)) load(state[k], at[k] + u.at(j), left, c.aligned);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      total[j][v] = rule.finish(total[j][v], D::load(old[j][v]), state[0][v], state[1][v], snap);
    }
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (rule.has(k)) store(at[k] + u.at(j), state[k], left, c.aligned);
    }
  }
  if constexpr (kRounds) {
    const uint64_t draw = static_cast<uint64_t>(*c.base + c.draws[c.terms]);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      uint32_t r[4];
      round_bits(r, v, u, stream, c.seed, draw);
#pragma unroll
      for (int j = 0; j < 4; ++j) old[j][v] = round_randomly<D>(total[j][v], r[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) old[j][v] = D::nearest(total[j][v]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) store(p + u.at(j), old[j], row.n - u.at(j), c.aligned);
}

// The units of a chunk.
template <class D, Kind kKind>
struct Chunk {
  static constexpr int64_t kElements = 4 * (16 / sizeof(typename D::T));  // of a unit
  static constexpr int64_t kGroup = group_of(kKind);
  const Row row;
  int64_t first, end;
  ZO_HOST_DEVICE Chunk(const Launch& c, int64_t number) : row(c.rows[c.chunks[number] >> 32]) {
    const int64_t start = (c.chunks[number] & 0xFFFFFFFF) * c.tile, stop = start + c.tiles * c.tile;
    const int64_t groups = ((row.n < stop ? row.n : stop) + kGroup - 1) / kGroup;
    first = start / kElements;
    end = groups * (kGroup / kElements);
  }
};

#ifdef __CUDACC__

template <class Rule, class D, Kind kKind, bool kGrid, bool kRounds>
__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const Launch c) {
  const Rule rule(c);
  for (int64_t number = blockIdx.x; number < c.count; number += gridDim.x) {
    const Chunk<D, kKind> chunk(c, number);
    for (int64_t i = chunk.first + threadIdx.x; i < chunk.end; i += kThreads) {
      unit<Rule, D, kKind, kGrid, kRounds>(chunk.row, i, c, rule);
    }
  }
}

template <class Rule, class D, Kind kKind, bool kGrid, bool kRounds>
cudaError_t launch(const Launch& c, cudaStream_t stream) {
  const auto kernel = update_kernel<Rule, D, kKind, kGrid, kRounds>;
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  if (error != cudaSuccess || c.count == 0) return error;
  const int64_t resident = int64_t{processors} * blocks;
  const auto grid = static_cast<unsigned>(c.count < resident ? c.count : resident);
  kernel<<<grid, kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

template <class Rule, Kind kKind>
cudaError_t dispatch_dtype(const Launch& c, cudaStream_t stream) {
  switch (c.dtype) {
    case Dtype::f32:
      return c.grid ? launch<Rule, F32, kKind, true, false>(c, stream) : launch<Rule, F32, kKind, false, false>(c, stream);
    case Dtype::bf16:
      return c.rounds ? launch<Rule, Bf16, kKind, false, true>(c, stream)
                      : launch<Rule, Bf16, kKind, false, false>(c, stream);
    case Dtype::f16:
      return c.rounds ? launch<Rule, F16, kKind, false, true>(c, stream)
                      : launch<Rule, F16, kKind, false, false>(c, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Rule>
cudaError_t dispatch(const Launch& c, cudaStream_t stream) {
  return c.kind == Kind::normal ? dispatch_dtype<Rule, Kind::normal>(c, stream)
                                : dispatch_dtype<Rule, Kind::rademacher>(c, stream);
}

#endif

}  // namespace zo::cuda
