// SPDX-License-Identifier: Apache-2.0
// Which instruction set the micro-kernels use: the best that cpuid reports, or what set_isa says.
#pragma once

#include <string>
#include <vector>

namespace zo::cpu {

enum class Isa { scalar, avx2, avx512 };

// The one in use.
Isa isa();
// All that this build has and this machine can run, slowest first.
std::vector<Isa> available_isas();
const char* name_of(Isa isa);
// "auto", "scalar", "avx2" or "avx512". Throws std::invalid_argument with the reason.
void set_isa(const std::string& name);

}  // namespace zo::cpu
