// SPDX-License-Identifier: Apache-2.0
// The code of the CUDA kernels, compiled for the host: a test runs it against the reference where no GPU is.
// Only what the hardware does differs: intrinsics, 16-byte accesses, and which thread has which unit.
#include "cuda/rules.cuh"

namespace zo::cuda {
namespace {

template <class Rule, class D, Kind kKind, bool kGrid, bool kRounds>
void run(const Launch& c) {
  const Rule rule(c);
  for (int64_t number = 0; number < c.count; ++number) {
    const Chunk<D, kKind> chunk(c, number);
    for (int64_t i = chunk.first; i < chunk.end; ++i) unit<Rule, D, kKind, kGrid, kRounds>(chunk.row, i, c, rule);
  }
}

template <class Rule, Kind kKind>
void dispatch_dtype(const Launch& c) {
  switch (c.dtype) {
    case Dtype::f32: return c.grid ? run<Rule, F32, kKind, true, false>(c) : run<Rule, F32, kKind, false, false>(c);
    case Dtype::bf16: return c.rounds ? run<Rule, Bf16, kKind, false, true>(c) : run<Rule, Bf16, kKind, false, false>(c);
    case Dtype::f16: return c.rounds ? run<Rule, F16, kKind, false, true>(c) : run<Rule, F16, kKind, false, false>(c);
  }
}

template <class Rule>
void dispatch(const Launch& c) {
  c.kind == Kind::normal ? dispatch_dtype<Rule, Kind::normal>(c) : dispatch_dtype<Rule, Kind::rademacher>(c);
}

}  // namespace
}  // namespace zo::cuda

// op: 0 add_noise_, 1 zo_sgd_, 2 zo_adam_; numbers: count, tile, tiles, terms, seed, kind, dtype, grid, rounds, aligned,
// sign, buffer.
extern "C" void zo_update(int op, const void* rows, const int64_t* chunks, const int64_t* base, const int64_t* draws,
                          const float* factors, const float* hyper, const int64_t* numbers) {
  using namespace zo::cuda;
  Launch c{};
  c.rows = static_cast<const Row*>(rows);
  c.chunks = chunks, c.base = base, c.draws = draws, c.factors = factors, c.hyper = hyper;
  c.count = numbers[0], c.tile = numbers[1], c.tiles = numbers[2], c.terms = numbers[3];
  c.seed = static_cast<uint64_t>(numbers[4]);
  c.kind = numbers[5] == 0 ? zo::Kind::normal : zo::Kind::rademacher;
  c.dtype = static_cast<Dtype>(numbers[6]);
  c.grid = numbers[7], c.rounds = numbers[8], c.aligned = numbers[9], c.sign = numbers[10], c.buffer = numbers[11];
  if (op == 0) return dispatch<AddNoise>(c);
  if (op == 1) return dispatch<ZoSgd>(c);
  dispatch<ZoAdam>(c);
}
