// SPDX-License-Identifier: Apache-2.0
// What a product needs to know before it starts: its chunks along K, and where each row's pixels lie.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/product.h"

namespace zo::cpu {

// Chunks along K = taps x channels whose scales come in `groups` runs of consecutive k: whole taps where several
// fit, else an even share of one tap's channels. A share is a multiple of 8 channels, those of a 4-bit step, and
// whole groups unless one group is too long.
inline std::vector<Chunk> chunks_of(int64_t taps, int64_t channels, int64_t groups, bool integers) {
  const int64_t most = integers ? kChunkIntegers : kChunkFloats;
  const bool grouped = groups > 1;
  const int64_t tap_groups = grouped ? groups / taps : 1, run = channels / tap_groups;
  const bool whole = grouped && run <= most && integers;  // floats: a chunk has one group's zero points
  const int64_t span = whole || !grouped ? channels : run;
  const int64_t pieces = (span + most - 1) / most, unit = whole ? run : 8;
  const int64_t piece = ((span + pieces - 1) / pieces + unit - 1) / unit * unit;
  const int64_t step = (whole || !grouped) && piece >= channels ? std::max<int64_t>(1, most / channels) : 1;
  std::vector<Chunk> chunks;
  for (int64_t tap = 0; tap < taps; tap += step) {
    for (int64_t start = 0; start < channels; start += span) {
      for (int64_t c = 0; c < span; c += piece) {
        Chunk chunk{};
        chunk.tap = static_cast<int32_t>(tap);
        chunk.taps = static_cast<int32_t>(std::min(step, taps - tap));
        chunk.channel = static_cast<int32_t>(start + c);
        chunk.channels = static_cast<int32_t>(std::min(piece, span - c));
        chunk.group = static_cast<int32_t>(grouped ? tap * tap_groups + (start + c) / run : 0);
        chunk.groups = static_cast<int32_t>(whole ? chunk.taps * chunk.channels / run : 1);
        chunk.first = whole || (c == 0 && (grouped || tap == 0));
        chunk.last = whole || (c + piece >= span && (grouped || tap + step >= taps));
        chunks.push_back(chunk);
      }
    }
  }
  return chunks;
}

// A convolution; a linear layer is one of 1x1, whose pixels are its rows.
struct Geometry {
  int64_t samples, height, width;  // of the input
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t rows() const { return samples * out_height * out_width; }
};

// Where output pixel `row` lies.
struct Position {
  int64_t sample, row, column;

  Position(const Geometry& g, int64_t pixel)
      : sample(pixel / (g.out_height * g.out_width)),
        row(pixel / g.out_width % g.out_height),
        column(pixel % g.out_width) {}

  void next(const Geometry& g) {
    if (++column < g.out_width) return;
    column = 0;
    if (++row < g.out_height) return;
    row = 0;
    ++sample;
  }

  // Index of the input pixel that it sees through a tap, or -1 in the padding.
  int64_t seen_through(const Geometry& g, int64_t tap) const {
    const int64_t i = row * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
    const int64_t j = column * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
    if (i < 0 || i >= g.height || j < 0 || j >= g.width) return -1;
    return (sample * g.height + i) * g.width + j;
  }
};

}  // namespace zo::cpu
