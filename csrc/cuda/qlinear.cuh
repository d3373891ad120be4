// SPDX-License-Identifier: Apache-2.0
// `qlinear` of 1 to 16 floating rows: y [M, N] = x [M, K] (scale (q - zero))^T + bias, limited by the bytes of q.
//
// The weight is the first operand of mma.m16n8k16, x the second, 8 rows of it at a time: fma cannot keep up with
// memory for 16 rows. A warp has two panels of 16 rows, of which lane (g = lane / 4, t = lane % 4) has rows 4 g to
// 4 g + 3 of the 32 and, in each 32 channels, channels 8 t to 8 t + 7. That is how 16-byte loads of the packed layout
// fall (zo_kernels/packing.py: 4 bytes of each row side by side), whole lines at a time, and 16 bytes of x too. The k
// of an mma is any 16 channels and its rows any 16 rows, as long as the operands agree: no lane needs another's codes.
//
//   mma (h, s) of 32 channels | its row g: 4 g + 2 h | row g + 8: 4 g + 2 h + 1 | its k: of 8 t + 4 s to 8 t + 4 s + 3
//
// Sums of kChunk channels start from 0 and are then scaled into fp32 totals. Warps and blocks of a cluster take turns
// at chunks; their totals are joined in one order, through shared memory: the same bits every time.
//
//   codes of a block on their way | 32 KB; 24 KB with 4 bits from 9 rows on
//   shared memory                 | 8 KB, or 16 KB from 9 rows on
#pragma once

#include "cuda/codes.cuh"
#include "cuda/qlinear.h"
#include "cuda/warp.cuh"

namespace zo::cuda {

// Where a warp stands: its 32 rows, those of its block, and which chunks are its.
struct Place {
  int64_t block_row;
  int row, way, rank, first, stride;
  ZO_HOST_DEVICE Place(const Product& p, int64_t block, int warp) {
    rank = static_cast<int>(block % p.cut.ranks);
    block_row = block / p.cut.ranks * p.cut.rows();
    row = warp % p.cut.row_warps * kWarpRows;
    way = warp / p.cut.row_warps;
    first = rank * p.cut.ways() + way;
    stride = p.cut.ranks * p.cut.ways();
  }
};

// A lane's share of a chunk.
template <int kBits>
struct Slot {
  static constexpr int kWords = Codes<kBits, F16>::kWords;
  Words4 codes[2][kWords];
  float scale[4];
};

template <int kTiles>
struct Totals {
  float of[4][kTiles][2];  // row 4 g + r of the weight, row 8 tile + 2 t + j of x
};

ZO_HOST_DEVICE inline int group_of_chunk(const Product& p, int chunk) { return chunk / (p.k / kChunk / p.groups); }

// A panel that the weight lacks repeats the last one; its results are not written.
template <int kBits>
ZO_HOST_DEVICE inline void load(Slot<kBits>& slot, const Product& p, int64_t first_row, int lane, int chunk) {
  constexpr int kWords = Slot<kBits>::kWords;
  const int g = lane / 4, t = lane % 4;
  const int64_t row = first_row + 4 * g, last = (p.n - 1) / 16;
  const int64_t panel = row / 16 < last ? row / 16 : last;
  const int64_t steps = p.k / 8 * kWords;
  const auto* at = static_cast<const Words4*>(p.weight) + (panel * steps + chunk * (kChunk / 8 * kWords)) * 4 + g % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) slot.codes[i][j] = load_once(at + ((4 * i + t) * kWords + j) * 4);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    slot.scale[r] = row + r < p.n ? p.scale[(row + r) * p.groups + group_of_chunk(p, chunk)] : 0.0f;
  }
}

// Of a lane's rows, in the group of a chunk.
template <int kBits, class D>
ZO_HOST_DEVICE inline void load_zeros(Zero (&zeros)[4], const Product& p, int64_t row, int chunk) {
#pragma unroll
  for (int r = 0; r < 4; ++r) zeros[r] = Codes<kBits, D>::kNone;
  if (p.zero == nullptr) return;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (row + r < p.n) zeros[r] = Codes<kBits, D>::zero(p.zero[(row + r) * p.groups + group_of_chunk(p, chunk)]);
  }
}

// 8 channels of a row of x; 0 where there is no row.
ZO_HOST_DEVICE inline Words4 load_x(const Product& p, int m, int channel) {
  if (m >= p.m) return {};
  return load_again(static_cast<const Words4*>(p.x) + (int64_t{m} * p.k + channel) / 8);
}

template <int kBits, class D, int kTiles>
ZO_HOST_DEVICE inline void multiply_chunk(Totals<kTiles> (&totals)[kLanes], const Slot<kBits> (&slots)[kLanes],
                                          const Product& p, int64_t first_row, int chunk) {
  constexpr int kWords = Slot<kBits>::kWords;
  float part[2][kTiles][kLanes][4] = {};
  Zero zeros[kLanes][4];
#pragma unroll
  for (int l = 0; l < kLanes; ++l) load_zeros<kBits, D>(zeros[l], p, first_row + lane_of(l) / 4 * 4, chunk);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Words4 x[kTiles][kLanes];
    uint32_t q[4][kLanes][4];
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      const int g = lane_of(l) / 4, t = lane_of(l) % 4;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) x[tile][l] = load_x(p, 8 * tile + g, chunk * kChunk + 32 * i + 8 * t);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t words[kWords];
#pragma unroll
        for (int j = 0; j < kWords; ++j) words[j] = slots[l].codes[i][j].w[r];
        Codes<kBits, D>::pairs(q[r][l], words, zeros[l][r]);
      }
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t a[kLanes][4];
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[l][j] = q[2 * h + j % 2][l][2 * s + j / 2];
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t b[kLanes][2];
#pragma unroll
          for (int l = 0; l < kLanes; ++l) b[l][0] = x[tile][l].w[2 * s], b[l][1] = x[tile][l].w[2 * s + 1];
          mma<D>(part[h][tile], a, b);
        }
      }
    }
  }
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& total = totals[l].of[i / 2][tile][i % 2];
        total = fma(slots[l].scale[i / 2], part[i / 4][tile][l][i % 4], total);
      }
    }
  }
}

// The totals of a warp's chunks, of which kSlots are on their way.
template <int kBits, class D, int kTiles>
ZO_HOST_DEVICE inline void multiply(Totals<kTiles> (&totals)[kLanes], const Product& p, const Place& at) {
  constexpr int kSlots = kBits == 8 ? 2 : kTiles == 1 ? 4 : 3;  // what 128 registers hold
  const int chunks = p.k / kChunk;
  const int64_t first_row = at.block_row + at.row;
  Slot<kBits> slots[kSlots][kLanes];
  const auto fetch = [&](int s, int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) load(slots[s][l], p, first_row, lane_of(l), chunk);
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) fetch(s, at.first + s * at.stride);
  for (int first = at.first; first < chunks; first += kSlots * at.stride) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int chunk = first + s * at.stride;
      if (chunk >= chunks) break;
      multiply_chunk<kBits, D>(totals, slots[s], p, first_row, chunk);
      fetch(s, chunk + kSlots * at.stride);
    }
  }
}

// Shared memory of a block: [ways, 8 kTiles, rows].
template <int kTiles>
ZO_HOST_DEVICE inline int shared_at(const Product& p, int way, int m, int row) {
  return (way * 8 * kTiles + m) * p.cut.rows() + row;
}

template <int kTiles>
ZO_HOST_DEVICE inline void share(float* shared, const Totals<kTiles> (&totals)[kLanes], const Product& p,
                                 const Place& at) {
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    const int g = lane_of(l) / 4, t = lane_of(l) % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        shared[shared_at<kTiles>(p, at.way, 8 * tile + 2 * t + i % 2, at.row + 4 * g + i / 2)] =
            totals[l].of[i / 2][tile][i % 2];
      }
    }
  }
}

ZO_HOST_DEVICE inline float load_as(Dtype dtype, const void* p, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  return dtype == Dtype::bf16 ? Bf16::load(half) : F16::load(half);
}
ZO_HOST_DEVICE inline void store_as(Dtype dtype, void* p, int64_t i, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = dtype == Dtype::bf16 ? Bf16::nearest(value) : F16::nearest(value);
  }
}

// A thread's outputs: each block of a cluster writes some of the rows. shared_of(rank): shared memory of a block.
template <int kTiles, class SharedOf>
ZO_HOST_DEVICE inline void finish(const Product& p, const Place& at, int thread, SharedOf shared_of) {
  const int rows = p.cut.rows() / p.cut.ranks;
  for (int i = thread; i < rows * p.m; i += 32 * kWarps) {
    const int row = at.rank * rows + i % rows, m = i / rows;
    const int64_t n = at.block_row + row;
    if (n >= p.n) continue;
    float y = 0.0f;
    for (int rank = 0; rank < p.cut.ranks; ++rank) {
      const float* shared = shared_of(rank);
      for (int way = 0; way < p.cut.ways(); ++way) y = add(y, shared[shared_at<kTiles>(p, way, m, row)]);
    }
    if (p.bias != nullptr) y = add(y, load_as(p.bias_dtype, p.bias, n));
    store_as(p.y_dtype, p.y, m * p.n + n, y);
  }
}

}  // namespace zo::cuda
