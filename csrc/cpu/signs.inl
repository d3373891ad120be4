// SPDX-License-Identifier: Apache-2.0
// Rademacher signs of the 16 rows of a panel, as bits: element i = n K + k of the noise contract; a set bit is -1.

namespace zo::cpu {
namespace {

class Signs {
 public:
  void forget() { set_ = -1; }

  // Bits of rows [row, row + kPanel) of a matrix with `k` columns, for perturbation `set`.
  void fill(int64_t set, uint64_t seed, uint32_t stream, uint64_t draw, int64_t row, int64_t k) {
    if (set_ == set) return;
    set_ = set;
    k_ = k;
    const int64_t first = row * k / kGroup, end = ((row + kPanel) * k + kGroup - 1) / kGroup;
    skipped_ = row * k - first * kGroup;
    constexpr int kSets = 2;
    words_.resize(static_cast<size_t>((end - first + kSets * W) * 4 + 2));  // `bits` reads a word too far
    Source source(seed);
    source.aim(stream, draw);
    for (int64_t block = first; block < end; block += kSets * W) {
      U w[kSets][4];
      const uint32_t start = static_cast<uint32_t>(block);
      philox<kSets>(w, {start, start + W}, source);
      uint32_t* at = words_.data() + (block - first) * 4;
      for (int i = 0; i < kSets; ++i) {
        alignas(64) uint32_t columns[4][W];
        for (int j = 0; j < 4; ++j) V::store_words(reinterpret_cast<int32_t*>(columns[j]), w[i][j]);
        for (int l = 0; l < W; ++l) {
          for (int j = 0; j < 4; ++j) at[(i * W + l) * 4 + j] = columns[j][l];
        }
      }
    }
  }

  // 32 bits from column k on, of each row.
  void bits(int64_t k, uint32_t (&out)[kPanel]) const {
    for (int l = 0; l < kPanel; ++l) {
      const int64_t i = skipped_ + l * k_ + k;
      uint64_t two;
      std::memcpy(&two, words_.data() + i / 32, 8);
      out[l] = static_cast<uint32_t>(two >> (i % 32));
    }
  }

 private:
  int64_t set_ = -1, k_ = 0, skipped_ = 0;
  std::vector<uint32_t> words_;
};

// Bit i of a nibble to bit 0 of byte i.
inline U spread(U nibble) {
  const U pair = V::bit_or(nibble, V::template shift_left<7>(nibble));
  return V::bit_and(V::bit_or(pair, V::template shift_left<14>(pair)), V::set(0x01010101u));
}

}  // namespace
}  // namespace zo::cpu
