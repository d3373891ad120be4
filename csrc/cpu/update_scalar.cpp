// SPDX-License-Identifier: Apache-2.0
#include "cpu/v_scalar.h"

#include "cpu/update.inl"

namespace zo::cpu {
void update_scalar(const Piece& piece, const Call& call) { dispatch(piece, call); }
}  // namespace zo::cpu
