// SPDX-License-Identifier: Apache-2.0
// The loop nest of `multiply` for one instruction set. Include it behind a `V` (see noise.inl) and a struct `D`:
//   kRows x kVectors: the register tile, in rows and vectors of W columns;
//   Wide, Narrow: W columns of four 8-bit lanes (which hold q + 128) or 4-bit lanes (q + 8), with
//     static L load(const uint8_t*), static U dot(U acc, L weights, U activations), and kOffset: what dot
//     leaves in the sum for every unit of the activations;
//   fma(a, b, c): a b + c, rounded once; broadcast(const int8_t*): four bytes in every lane;
//   keep(U&): nothing, but to the compiler a new value.
//
// A block of columns is multiplied chunk by chunk along K. The weights of a chunk stay in L1, where they may be
// a transformed copy (unpacked, perturbed, or as floats); partial sums of its rows stay in L2.

#include <algorithm>
#include <cstring>
#include <vector>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "cpu/noise.inl"
#pragma GCC diagnostic pop
#include "cpu/product.h"
#include "cpu/signs.inl"
#include "cpu/tile.inl"

namespace zo::cpu {
namespace {

constexpr int kTileSize = kTile * kColumns;
// Tiles that visit a chunk's weights in turn: few, whose partial sums stay near, unless the weights are a copy that
// must be worth its making.
inline int block_tiles(const Product& p) {
  if (p.row_scale == nullptr || p.perturb != Perturb::none) return kBlockTiles;
  return p.bits == 8 ? kBlockTiles / 4 : kBlockTiles / 2;
}
constexpr int64_t kFewTiles = 8;           // not worth an unpacked copy of weights of 4 bits
constexpr int64_t kRowsInL2 = 600 << 10;  // bytes

// What a thread works in: well under a megabyte.
struct Scratch {
  alignas(64) int32_t total[kBlockTiles][kTileSize];         // integers, or floats by their bits
  alignas(64) int32_t signed_total[kBlockTiles][kTileSize];  // of the signs, where they are a second product
  alignas(64) float sum[kBlockTiles][kTileSize];             // over groups, where there are several
  std::vector<uint8_t> staged, staged_signs;
  Signs signs[kBlockPanels];
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/stage.inl"
#include "cpu/epilogue.inl"

namespace zo::cpu {
namespace {

// Asks for weights that the block will want next, a share of them at each tile.
struct Ahead {
  const uint8_t* data;
  int64_t panel_stride, bytes;  // of a panel
  int64_t share;                // bytes of a panel for a tile
  int panels;

  Ahead(const Product& p, int64_t c, int64_t panel, int panels_, int64_t tiles) : panels(panels_) {
    const bool next_block = c + 1 == p.chunk_count;
    const Chunk& next = p.chunks[next_block ? 0 : c + 1];
    const Packed packed(p, next);
    const int64_t block = panel + (next_block ? panels_ : 0);
    const bool none = (block + panels_) * kPanel > p.n + kPanel - 1;
    data = none ? nullptr : packed.at(p, next, block, 0);
    panel_stride = p.taps * packed.tap_steps * 4 * kPanel;
    bytes = none ? 0 : next.taps * packed.steps * 4 * kPanel;
    share = (bytes / tiles + 63) / 64 * 64;
  }
  void fetch(int64_t tile) const {
    for (int64_t at = tile * share; at < std::min(bytes, (tile + 1) * share); at += 64) {
      for (int i = 0; i < panels; ++i) __builtin_prefetch(data + i * panel_stride + at, 0, 2);
    }
  }
};

// A part of a chunk whose sums end up in one group: all of it, or one of its groups in one of its taps.
template <class A>
Visit<A> part_of(const Product& p, const Chunk& c, const Columns& columns, int64_t part, int64_t tile) {
  Visit<A> v{};
  const int64_t tap_parts = c.groups / c.taps, tap = c.groups == 1 ? 0 : part / tap_parts;
  const int64_t channels = c.groups == 1 ? c.channels : c.channels / tap_parts;
  v.a = static_cast<const A*>(p.a);
  v.zeros = static_cast<const A*>(p.zeros);
  v.offset = p.offset + (tile * p.taps + c.tap + tap) * kTile;
  v.taps = c.groups == 1 ? c.taps : 1;
  v.channel = c.channel + (c.groups == 1 ? 0 : part % tap_parts * channels);
  v.steps = sizeof(A) == 1 ? (channels + 3) / 4 : channels;
  v.sums = p.sums != nullptr ? p.sums + (tile * p.groups + c.group + part) * kTile : nullptr;
  v.first = c.first;
  v.zero = columns.zero_of(part);
  v.rows = rows_of(p, tile);
  return v;
}

// Columns [panel, panel + panels), tiles [tile, tile_end) of one set.
template <bool kIntegers>
void multiply_block(const Product& p, int64_t panel, int panels, int64_t tile, int64_t tile_end, Scratch& s) {
  using A = std::conditional_t<kIntegers, int8_t, float>;
  const int64_t set = tile / p.tiles;
  Columns columns(p, panel, panels, set);
  for (int64_t c = 0; c < p.chunk_count; ++c) {
    const Chunk& chunk = p.chunks[c];
    const bool end = c + 1 == p.chunk_count;
    const Staged weights = stage<kIntegers>(p, chunk, panel, panels, set, tile_end - tile, s);
    const bool two = kIntegers && p.perturb == Perturb::weight;
    const Staged signs = two ? stage_signs(p, chunk, panels, s) : Staged{};
    columns.aim(p, chunk, kIntegers);
    const int64_t tap_parts = std::max<int64_t>(1, chunk.groups / chunk.taps);
    const bool at_once = kIntegers && chunk.groups > 1 && !two;
    const Ahead ahead(p, c, panel, panels, tile_end - tile);
    for (int64_t t = tile; t < tile_end; ++t) {
      ahead.fetch(t - tile);
      if (end) columns.fetch(p, t);
      int32_t* total = s.total[chunk.first && chunk.last ? 0 : t - tile];
      int32_t* signed_total = s.signed_total[t - tile];
      float* sum = s.sum[t - tile];
      for (int64_t part = 0; part < (at_once ? 1 : chunk.groups); ++part) {
        Visit<A> v = part_of<A>(p, chunk, columns, part, t);
        v.panels = panels;
        if constexpr (!kIntegers) {
          visit_staged<Floats>(v, weights, total);
        } else if (at_once) {
          v.taps = chunk.taps;
          v.groups = tap_parts;
          v.scale = columns.scale;
          v.first = c == 0;
          visit_staged<Groups>(v, weights, sum);
        } else {
          visit_staged<Integers>(v, weights.of(part, tap_parts, v.steps), total);
          if (two) {
            v.zero = nullptr;
            visit_staged<Integers>(v, signs.of(part, tap_parts, v.steps), signed_total);
          }
        }
        if (at_once || !chunk.last) continue;
        if (end && plain(p)) {
          finish_plain(p, columns, t, total);
        } else {
          fold<kIntegers>(p, columns, chunk.group, part, set, total, two ? signed_total : nullptr, sum);
        }
      }
      if (end && !plain(p)) finish(p, columns, t, sum);
    }
  }
}

// Rows of a block stay in L2 while the weights pass by; but if all rows fit, they stay and each weight is read once.
template <bool kIntegers>
void multiply_range(const Product& p, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end) {
  static thread_local Scratch scratch;
  const int64_t row_bytes = p.channels * (kIntegers ? 1 : 4);
  const int block = block_tiles(p);
  const bool fits = (tile_end - tile) * kTile * row_bytes <= kRowsInL2;
  for (int64_t t = tile; t < tile_end;) {
    const int64_t most = fits ? tile_end : t + kBlockTiles;
    const int64_t end = fits ? tile_end : std::min({tile_end, most, (t / p.tiles + 1) * p.tiles});
    for (int64_t n = panel; n < panel_end; n += kBlockPanels) {
      const int panels = static_cast<int>(std::min<int64_t>(kBlockPanels, panel_end - n));
      for (Signs& signs : scratch.signs) signs.forget();
      for (int64_t first = t; first < end;) {
        const int64_t last = std::min({end, first + block, (first / p.tiles + 1) * p.tiles});
        multiply_block<kIntegers>(p, n, panels, first, last, scratch);
        first = last;
      }
    }
    t = end;
  }
}

void multiply_here(const Product& p, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end) {
  if (p.row_scale != nullptr) {
    multiply_range<true>(p, panel, panel_end, tile, tile_end);
  } else {
    multiply_range<false>(p, panel, panel_end, tile, tile_end);
  }
}

}  // namespace
}  // namespace zo::cpu
