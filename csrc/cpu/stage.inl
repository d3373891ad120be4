// SPDX-License-Identifier: Apache-2.0
// The weights of a chunk as the register tile wants them: where they lie, or a transformed copy that stays in L1.

namespace zo::cpu {
namespace {

struct Staged {
  const uint8_t* data;
  int64_t panel_stride, tap_stride;  // bytes
  enum { wide, narrow, packed } lanes;  // of 8 or 4 bits, or codes of 4 bits as they lie in memory

  // Where part `part` of a chunk begins, if each tap has `tap_parts` of `steps` 4-channel steps.
  Staged of(int64_t part, int64_t tap_parts, int64_t steps) const {
    Staged out = *this;
    const int64_t bytes = lanes == packed ? 2 * kPanel : 4 * kPanel;
    out.data += part / tap_parts * tap_stride + part % tap_parts * steps * bytes;
    return out;
  }
};

template <template <class> class K, class A>
void visit_staged(Visit<A>& v, const Staged& b, void* total) {
  v.b = b.data;
  v.panel_stride = b.panel_stride;
  v.tap_stride = b.tap_stride;
  v.total = total;
  if (b.lanes == Staged::packed) {
    visit<K<Nibbles>>(v);
  } else if (b.lanes == Staged::narrow) {
    visit<K<typename D::Narrow>>(v);
  } else {
    visit<K<typename D::Wide>>(v);
  }
}
template <class K, class A>
void visit_staged(Visit<A>& v, const Staged& b, void* total) {
  v.b = b.data;
  v.panel_stride = b.panel_stride;
  v.tap_stride = b.tap_stride;
  v.total = total;
  visit<K>(v);
}

// Where the packed steps of a chunk lie. A step holds 4 channels of 8 bits, or 8 of 4 bits, of a whole panel.
struct Packed {
  int64_t tap_steps, steps;  // of all channels; of the chunk's channels in one tap
  const uint8_t* at(const Product& p, const Chunk& c, int64_t panel, int64_t tap) const {
    const int64_t step = (panel * p.taps + c.tap + tap) * tap_steps + c.channel / (32 / p.bits);
    return p.weight + step * 4 * kPanel;
  }
  Packed(const Product& p, const Chunk& c) {
    const int64_t channels = 32 / p.bits;
    tap_steps = (p.channels + channels - 1) / channels;
    steps = (c.channels + channels - 1) / channels;
  }
};

inline void fill_signs(const Product& p, int64_t panel, int panels, int64_t set, Scratch& s) {
  for (int i = 0; i < panels; ++i) {
    s.signs[i].fill(set, p.seed, p.stream, static_cast<uint64_t>(p.draws[set]), (panel + i) * kPanel,
                    p.taps * p.channels);
  }
}

// Calls step(word, panel_signs) ... for each 4-channel step of `panels` panels: the signs of its four channels
// for vector `v` of the panel, spread to bytes (1 is -1).
template <class Step>
void each_signed_step(const Product& p, const Chunk& c, int panels, const Scratch& s, const Step& step) {
  const int64_t steps = (c.channels + 3) / 4;
  for (int i = 0; i < panels; ++i) {
    for (int64_t tap = 0; tap < c.taps; ++tap) {
      const int64_t k = (c.tap + tap) * p.channels + c.channel;
      for (int64_t first = 0; first < steps; first += 8) {
        alignas(64) uint32_t words[kPanel];
        s.signs[i].bits(k + first * 4, words);
        const int count = static_cast<int>(std::min<int64_t>(8, steps - first));
        for (int v = 0; v < kPanelVectors; ++v) {
          U rest = V::load_words(reinterpret_cast<const int32_t*>(words) + v * W);
          for (int j = 0; j < count; ++j, rest = V::template shift_right<4>(rest)) {
            step(i, tap, first + j, v, spread(V::bit_and(rest, V::set(0xFu))));
          }
        }
      }
    }
  }
}

inline uint8_t* room(std::vector<uint8_t>& bytes, int64_t size) {
  if (static_cast<int64_t>(bytes.size()) < size + 64) bytes.resize(static_cast<size_t>(size + 64));
  return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
}

inline U load_bytes(const uint8_t* p) { return V::load_words(reinterpret_cast<const int32_t*>(p)); }
inline void store_bytes(uint8_t* p, U x) { V::store_words(reinterpret_cast<int32_t*>(p), x); }

// Lanes of four bits, or times 16 in lanes of eight, which leaves room for steps of 1/16 code.
template <bool kSixteenths>
void unpack(const Product& p, const Chunk& c, int64_t panel, int panels, uint8_t* to, int64_t panel_stride) {
  const Packed packed(p, c);
  const U low = V::set(0x0F0F0F0Fu), high = V::set(0xF0F0F0F0u);
  for (int i = 0; i < panels; ++i) {
    uint8_t* out = to + i * panel_stride;
    for (int64_t tap = 0; tap < c.taps; ++tap) {
      const uint8_t* in = packed.at(p, c, panel + i, tap);
      for (int64_t s = 0; s < packed.steps; ++s, in += 4 * kPanel, out += 8 * kPanel) {
        for (int v = 0; v < kPanelVectors; ++v) {
          const U two = load_bytes(in + v * 4 * W);
          if constexpr (kSixteenths) {
            store_bytes(out + v * 4 * W, V::bit_and(V::template shift_left<4>(two), high));
            store_bytes(out + 4 * kPanel + v * 4 * W, V::bit_and(two, high));
          } else {
            store_bytes(out + v * 4 * W, V::bit_and(two, low));
            store_bytes(out + 4 * kPanel + v * 4 * W, V::bit_and(V::template shift_right<4>(two), low));
          }
        }
      }
    }
  }
}

// Adds `d` times the signs to the bytes, none of which leaves its range.
inline void add_signs_to(const Product& p, const Chunk& c, int panels, const Scratch& s, int d,
                         const Staged& from, uint8_t* to, int64_t panel_stride, int64_t tap_stride) {
  const U up = V::set(0x01010101u * static_cast<uint32_t>(d < 0 ? -d : d));
  const U flip = V::set(d < 0 ? 0x01010101u : 0u);
  each_signed_step(p, c, panels, s, [&](int i, int64_t tap, int64_t step, int v, U negative) {
    const int64_t at = step * 4 * kPanel + v * 4 * W;
    negative = V::bit_xor(negative, flip);
    const U mask = V::sub(V::template shift_left<8>(negative), negative);  // 0xFF where the sign is -1
    const U twice = V::template shift_left<1>(V::bit_and(mask, up));
    const U word = load_bytes(from.data + i * from.panel_stride + tap * from.tap_stride + at);
    store_bytes(to + i * panel_stride + tap * tap_stride + at, V::sub(V::add(word, up), twice));
  });
}

// The signs alone, as lanes 128 + R: the second product of an exact perturbation.
inline Staged stage_signs(const Product& p, const Chunk& c, int panels, Scratch& s) {
  const int64_t tap_stride = (c.channels + 3) / 4 * 4 * kPanel, panel_stride = tap_stride * c.taps;
  uint8_t* to = room(s.staged_signs, panels * panel_stride);
  each_signed_step(p, c, panels, s, [&](int i, int64_t tap, int64_t step, int v, U negative) {
    const U lanes = V::sub(V::set(0x81818181u), V::template shift_left<1>(negative));
    store_bytes(to + i * panel_stride + tap * tap_stride + step * 4 * kPanel + v * 4 * W, lanes);
  });
  return {to, panel_stride, tap_stride, Staged::wide};
}

// fp32 [channels][kPanel]: q - z + c R.
inline Staged stage_floats(const Product& p, const Chunk& c, int64_t panel, int panels, int64_t set, Scratch& s) {
  const Packed packed(p, c);
  const int64_t channels = packed.steps * (32 / p.bits);
  const int64_t tap_stride = channels * kPanel * 4, panel_stride = tap_stride * c.taps;
  uint8_t* to = room(s.staged, panels * panel_stride);
  const uint32_t offset = p.bits == 8 ? 128 : 8;
  for (int i = 0; i < panels; ++i) {
    alignas(64) int32_t zero[kPanel];  // q - z = u - (offset + z)
    for (int l = 0; l < kPanel; ++l) {
      const int64_t n = (panel + i) * kPanel + l;
      const bool has = p.zero_point != nullptr && n < p.n;
      zero[l] = static_cast<int32_t>(offset) + (has ? p.zero_point[n * p.groups + c.group] : 0);
    }
    for (int64_t tap = 0; tap < c.taps; ++tap) {
      const uint8_t* in = packed.at(p, c, panel + i, tap);
      uint8_t* out = to + i * panel_stride + tap * tap_stride;
      const auto put = [&](U words, int v) {  // four channels a word
        const U shift = V::load_words(zero + v * W);
        const auto lane = [&](U u, int channel) {
          const F w = V::from_i32(V::sub(V::bit_and(u, V::set(0xFFu)), shift));
          V::store(reinterpret_cast<float*>(out + channel * kPanel * 4) + v * W, w);
        };
        lane(words, 0);
        lane(V::template shift_right<8>(words), 1);
        lane(V::template shift_right<16>(words), 2);
        lane(V::template shift_right<24>(words), 3);
      };
      for (int64_t step = 0; step < packed.steps; ++step, in += 4 * kPanel) {
        if (p.bits == 8) {
          for (int v = 0; v < kPanelVectors; ++v) put(load_bytes(in + v * 4 * W), v);
          out += 4 * kPanel * 4;
          continue;
        }
        const U low = V::set(0x0F0F0F0Fu);
        for (int v = 0; v < kPanelVectors; ++v) put(V::bit_and(load_bytes(in + v * 4 * W), low), v);
        out += 4 * kPanel * 4;
        for (int v = 0; v < kPanelVectors; ++v) {
          put(V::bit_and(V::template shift_right<4>(load_bytes(in + v * 4 * W)), low), v);
        }
        out += 4 * kPanel * 4;
      }
    }
  }
  if (p.perturb != Perturb::none) {
    const float unit = p.perturb == Perturb::codes && p.bits == 4 ? 0.0625f : 1.0f;
    const F coeff = V::set(p.coeffs[set] * unit);
    each_signed_step(p, c, panels, s, [&](int i, int64_t tap, int64_t step, int v, U negative) {
      float* at = reinterpret_cast<float*>(to + i * panel_stride + tap * tap_stride) + step * 4 * kPanel + v * W;
      const auto lane = [&](U bits, int channel) {  // the lowest bit is the sign
        const F term = V::floats(V::bit_xor(V::bits(coeff), V::template shift_left<31>(bits)));
        V::store(at + channel * kPanel, V::add(V::load(at + channel * kPanel), term));
      };
      lane(negative, 0);
      lane(V::template shift_right<8>(negative), 1);
      lane(V::template shift_right<16>(negative), 2);
      lane(V::template shift_right<24>(negative), 3);
    });
  }
  return {to, panel_stride, tap_stride, Staged::wide};
}

template <bool kIntegers>
Staged stage(const Product& p, const Chunk& c, int64_t panel, int panels, int64_t set, int64_t tiles, Scratch& s) {
  if (p.perturb != Perturb::none) fill_signs(p, panel, panels, set, s);
  if constexpr (!kIntegers) {
    return stage_floats(p, c, panel, panels, set, s);
  } else {
    const Packed packed(p, c);
    const bool codes = p.perturb == Perturb::codes;
    const bool few = tiles <= kFewTiles && c.channels % 8 == 0;
    const int64_t memory_stride = packed.tap_steps * 4 * kPanel;
    Staged lie{packed.at(p, c, panel, 0), memory_stride * p.taps, memory_stride,
               p.bits == 8 ? Staged::wide : Staged::packed};  // as they lie in memory
    if (!codes && (p.bits == 8 || few)) return lie;
    const int64_t tap_stride = packed.steps * (p.bits == 8 ? 4 : 8) * kPanel, panel_stride = tap_stride * c.taps;
    uint8_t* to = room(s.staged, panels * panel_stride);
    const Staged copy{to, panel_stride, tap_stride, p.bits == 4 && !codes ? Staged::narrow : Staged::wide};
    if (p.bits == 4) {
      if (!codes) {
        unpack<false>(p, c, panel, panels, to, panel_stride);
        return copy;
      }
      unpack<true>(p, c, panel, panels, to, panel_stride);
      lie = copy;
    }
    add_signs_to(p, c, panels, s, static_cast<int>(p.coeffs[set]), lie, to, panel_stride, tap_stride);
    return copy;
  }
}

}  // namespace
}  // namespace zo::cpu
