// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#include "cpu/update.h"

namespace zo::cpu {
namespace {

// What `isa` needs and is not there, each after a space; nothing where it can run.
std::string lacking(Isa isa) {
  std::string out;
#if defined(ZO_X86)
  const auto need = [&out](bool has, const char* feature) {
    if (!has) out += std::string(" ") + feature;
  };
  if (isa != Isa::scalar) {
    need(__builtin_cpu_supports("avx2"), "avx2");
    need(__builtin_cpu_supports("f16c"), "f16c");
    need(__builtin_cpu_supports("fma"), "fma");
  }
  if (isa == Isa::avx512) {
    need(__builtin_cpu_supports("avx512f"), "avx512f");
    need(__builtin_cpu_supports("avx512bw"), "avx512bw");
    need(__builtin_cpu_supports("avx512dq"), "avx512dq");
    need(__builtin_cpu_supports("avx512vl"), "avx512vl");
  }
#else
  if (isa != Isa::scalar) out = " x86-64";
#endif
  return out;
}

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};
constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

Isa parse(const std::string& name) {
  if (name.empty() || name == "auto") return available_isas().back();
  std::string runnable;
  for (Isa isa : available_isas()) runnable += std::string(" ") + name_of(isa);
  for (Isa isa : kAll) {
    if (name != name_of(isa)) continue;
    const std::string lack = lacking(isa);
    if (lack.empty()) return isa;
    throw std::invalid_argument("set_isa: name must be one that this machine can run (auto" + runnable +
                                "), got " + name + ", for which it lacks" + lack + "; choose another");
  }
  throw std::invalid_argument("set_isa: name must be one of auto" + runnable + ", got '" + name +
                              "'; choose one of them");
}

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (Isa isa : kAll) {
    if (lacking(isa).empty()) out.push_back(isa);
  }
  return out;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

Isa isa() {
  int now = chosen.load(std::memory_order_relaxed);
  if (now == kUnset) {
    now = static_cast<int>(available_isas().back());
    chosen.store(now, std::memory_order_relaxed);
  }
  return static_cast<Isa>(now);
}

void set_isa(const std::string& name) { chosen.store(static_cast<int>(parse(name))); }

void update(const Piece& piece, const Call& call) {
  switch (isa()) {
#if defined(ZO_X86)
    case Isa::avx512: return update_avx512(piece, call);
    case Isa::avx2: return update_avx2(piece, call);
#endif
    default: return update_scalar(piece, call);
  }
}

}  // namespace zo::cpu
