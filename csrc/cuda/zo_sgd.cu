// SPDX-License-Identifier: Apache-2.0
// The kernels of `zo_sgd_`: both kinds of noise, every dtype, on a grid or rounded at random.
#include "cuda/rules.cuh"

namespace zo::cuda {

cudaError_t zo_sgd(const Launch& launch, cudaStream_t stream) { return dispatch<ZoSgd>(launch, stream); }

}  // namespace zo::cuda
