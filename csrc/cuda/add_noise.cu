// SPDX-License-Identifier: Apache-2.0
// The kernels of `add_noise_`: both kinds of noise, every dtype, on a grid or rounded at random.
#include "cuda/rules.cuh"

namespace zo::cuda {

cudaError_t add_noise(const Launch& launch, cudaStream_t stream) { return dispatch<AddNoise>(launch, stream); }

}  // namespace zo::cuda
