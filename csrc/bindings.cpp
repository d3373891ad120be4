// SPDX-License-Identifier: Apache-2.0
// zo_kernels._C: build information, the CPU instruction set, and the noise in numpy arrays. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/add_noise.h"
#include "cpu/isa.h"

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

void noise_into(py::array_t<float, py::array::c_style>& out, const py::int_& seed, const py::int_& draw,
                uint32_t stream, const std::string& kind, int64_t offset) {
  const zo::Kind which = kind_of(kind);
  if (offset < 0 || offset % zo::cpu::kChunkAlignment != 0) {
    throw py::value_error("noise_into: offset must be a multiple of " +
                          std::to_string(zo::cpu::kChunkAlignment) + ", got " + std::to_string(offset) +
                          "; start earlier and drop the first values");
  }
  if (out.size() > zo::max_elements(which) - offset) {
    throw py::value_error("noise_into: offset + size must be within the stream, got " +
                          std::to_string(offset) + " + " + std::to_string(out.size()) +
                          "; use another stream");
  }
  const int64_t one_draw = static_cast<int64_t>(word64(draw));
  const float one = 1.0f;
  float* data = out.mutable_data();
  const uint64_t key = word64(seed);
  py::gil_scoped_release release;
  std::fill(data, data + out.size(), -0.0f);  // -0 + z has the bits of z, also where z is a zero
  const zo::cpu::NoiseTerms terms{key, stream, which, 1.0f, 1, &one_draw, &one};
  zo::cpu::add_noise(data, zo::cpu::Dtype::f32, offset, out.size(), terms);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of zo_kernels that need no torch.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = ZO_COMPILER;
    info["torch"] = ZO_TORCH_VERSION;
    return info;
  });
  m.def("cpu_isa", [] { return std::string(zo::cpu::name_of(zo::cpu::isa())); },
        "The instruction set in use: scalar, avx2 or avx512.");
  m.def("cpu_isas_available", [] {
    std::vector<std::string> names;
    for (zo::cpu::Isa isa : zo::cpu::available_isas()) names.push_back(zo::cpu::name_of(isa));
    return names;
  });
  m.def("set_isa", &zo::cpu::set_isa, py::arg("name"),
        "Use this instruction set from now on; ValueError with the reason if it cannot run.");
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
