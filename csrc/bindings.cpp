// SPDX-License-Identifier: Apache-2.0
// zo_kernels._C: build information, the CPU instruction set, and the noise in numpy arrays. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/update.h"

namespace py = pybind11;

namespace {

zo::Kind kind_of(const std::string& name) {
  if (name == "normal") return zo::Kind::normal;
  if (name == "rademacher") return zo::Kind::rademacher;
  throw py::value_error("noise_into: kind must be normal or rademacher, got " + name +
                        "; choose one of them");
}

// Python ints of 64 bits, signed or not, as the same bits.
uint64_t word64(const py::int_& value) {
  return py::cast<uint64_t>(value.attr("__and__")(py::int_(UINT64_MAX)));
}

// z from any offset on: the kernels start at a multiple of kChunkAlignment, so the head goes by a buffer.
void fill(float* out, int64_t offset, int64_t n, uint32_t stream, const zo::cpu::Call& call) {
  constexpr float kNothing = -0.0f;  // -0 + z has the bits of z, also where z is a zero
  const int64_t skip = offset % zo::cpu::kChunkAlignment;
  if (skip != 0) {
    float head[zo::cpu::kChunkAlignment];
    const int64_t taken = std::min(zo::cpu::kChunkAlignment - skip, n);
    std::fill_n(head, skip + taken, kNothing);
    zo::cpu::update({head, zo::cpu::Dtype::f32, stream, 0.0f, offset - skip, skip + taken, {}}, call);
    std::copy_n(head + skip, taken, out);
    out += taken, offset += taken, n -= taken;
  }
  std::fill_n(out, n, kNothing);
  zo::cpu::update({out, zo::cpu::Dtype::f32, stream, 0.0f, offset, n, {}}, call);
}

void noise_into(py::array_t<float, py::array::c_style>& out, const py::int_& seed, const py::int_& draw,
                int64_t stream, const std::string& kind, int64_t offset) {
  const zo::Kind which = kind_of(kind);
  if (stream < 0 || stream > UINT32_MAX) {
    throw py::value_error("noise_into: stream must be in [0, 2^32), got " + std::to_string(stream) +
                          "; number from 0");
  }
  if (offset < 0 || out.size() > zo::max_elements(which) - offset) {
    throw py::value_error("noise_into: elements must lie in [0, " + std::to_string(zo::max_elements(which)) +
                          ") for kind=" + kind + ", got " + std::to_string(out.size()) + " from " +
                          std::to_string(offset) + "; use several streams");
  }
  const int64_t one_draw = static_cast<int64_t>(word64(draw));
  const float one = 1.0f;
  float* data = out.mutable_data();
  const int64_t size = out.size();
  const uint64_t key = word64(seed);
  const zo::cpu::Call call{zo::cpu::Op::add_noise, key, which, 1, &one_draw, &one, &one, false, false, 0};
  py::gil_scoped_release release;
  fill(data, offset, size, static_cast<uint32_t>(stream), call);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of zo_kernels that need no torch.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = ZO_COMPILER;
    info["flags"] = ZO_FLAGS;
    info["torch"] = ZO_TORCH_VERSION;
    info["torch_target"] = std::to_string(ZO_TORCH_TARGET >> 56) + "." +
                           std::to_string((ZO_TORCH_TARGET >> 48) & 0xFF);
    return info;
  }, "Compiler, its flags, the torch it was built with, and the oldest that its ABI serves.");
  m.def("cpu_isa", [] { return std::string(zo::cpu::name_of(zo::cpu::isa())); },
        "The instruction set in use: scalar, avx2 or avx512.");
  m.def("cpu_isas_available", [] {
    std::vector<std::string> names;
    for (zo::cpu::Isa isa : zo::cpu::available_isas()) names.push_back(zo::cpu::name_of(isa));
    return names;
  }, "The instruction sets that this machine and this build have, slowest first.");
  m.def("set_isa", &zo::cpu::set_isa, py::arg("name"),
        "Use this instruction set from now on; ValueError with the reason if it cannot run.");
  m.def("trim_pool", &zo::cpu::trim_pool,
        "Give what the pool of large outputs holds free back to the system; returns the bytes.");
  m.def("pool_use", [] {
    const zo::cpu::PoolUse use = zo::cpu::pool_use();
    return py::dict(py::arg("mapped") = use.mapped, py::arg("taken") = use.taken);
  }, "Bytes of the pool of large outputs: those that it has of the system, and those that tensors have of it.");
  m.def(
      "philox",
      [](std::array<uint32_t, 4> counter, const py::int_& key) {
        const zo::Words out =
            zo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, word64(key));
        return std::array<uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
      },
      py::arg("counter"), py::arg("key"), "Philox4x32-10 of four words and a 64-bit key.");
  m.def("noise_into", &noise_into, py::arg("out").noconvert(), py::kw_only(), py::arg("seed"),
        py::arg("draw"), py::arg("stream"), py::arg("kind") = "normal", py::arg("offset") = 0,
        "Fill a float32 array with z(seed, draw, stream, offset + i); see zo_kernels.rng.");
}
