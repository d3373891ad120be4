// SPDX-License-Identifier: Apache-2.0
#include "cpu/v_avx512.h"

#include "cpu/update.inl"

namespace zo::cpu {
void update_avx512(const Piece& piece, const Call& call) { dispatch(piece, call); }
}  // namespace zo::cpu
