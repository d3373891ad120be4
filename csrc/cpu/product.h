// SPDX-License-Identifier: Apache-2.0
// Products of activations with packed integer weights (layout: zo_kernels/packing.py), over raw pointers; no
// torch here. A convolution is the same product with several taps: a row is an output pixel, and each of its
// taps points at an input pixel, so that no im2col buffer exists.
#pragma once

#include <cstdint>

#include "cpu/update.h"

namespace zo::cpu {

constexpr int kTile = 6;        // rows that share one visit of the weights in registers
constexpr int kPanel = 16;      // columns of a packed panel
constexpr int kBlockPanels = 4;  // panels of a block of columns
constexpr int kColumns = kPanel * kBlockPanels;
constexpr int kBlockTiles = 64;  // tiles at most that visit the weights in turn, their partial sums in L2
constexpr int32_t kOutside = -1;  // offset of a pixel in the padding

enum class Activation { none, silu, gelu };
enum class Perturb { none, weight, codes };  // of scales: the scales are given perturbed

// K steps of one column block that are multiplied at a time: whole taps, or some channels of one.
struct Chunk {
  int32_t tap, taps, channel, channels;
  int32_t group, groups;  // of the scales: the first one, and how many
  bool first, last;       // of its group; both where it has several
};

struct Product {
  // Activations. Integers: int8, `channels` of a pixel padded to a multiple of 4. Floats: fp32.
  const void* a;
  const void* zeros;      // a pixel of the padding
  const int32_t* offset;  // [tiles][taps][kTile], elements of `a`; kOutside is `zeros`
  const int32_t* sums;    // [tiles][groups][kTile], of the integers of a row; null where a is fp32
  const float* row_scale;  // [tiles][kTile]; null where a is fp32
  bool has_minus_128;      // among the integers
  int64_t taps, channels;
  // Rows: `sets` of `rows` each, one set a perturbation. A tile never straddles two sets.
  int64_t sets, rows, tiles;  // tiles of a set
  // Weights.
  const uint8_t* weight;  // packed
  int bits;
  int64_t n, groups;
  const float* scale;  // [sets or 1][n][groups]
  int64_t scale_stride;  // from set to set; 0 where all share one
  const int8_t* zero_point;  // [n][groups] or null
  const Chunk* chunks;
  int64_t chunk_count;
  // Perturbation of the weights.
  Perturb perturb;
  uint64_t seed;
  uint32_t stream;
  const int64_t* draws;  // [sets]
  const float* coeffs;   // [sets]
  // Epilogue.
  const float* bias;  // [n] or null
  Activation activation;
  const void* residual;  // [sets * rows][n] of residual_dtype, or null
  Dtype residual_dtype;
  void* out;  // [sets * rows][n] of out_dtype
  Dtype out_dtype;
};

// How many channels a chunk has at most, so that its weights stay in L1: bytes, or fp32.
constexpr int64_t kChunkIntegers = 512, kChunkFloats = 128;

// The first row of a tile, and how many it has.
inline int64_t row_of(const Product& p, int64_t tile) { return tile / p.tiles * p.rows + tile % p.tiles * kTile; }
inline int rows_of(const Product& p, int64_t tile) {
  const int64_t left = p.rows - tile % p.tiles * kTile;
  return static_cast<int>(left < kTile ? left : kTile);
}

}  // namespace zo::cpu
