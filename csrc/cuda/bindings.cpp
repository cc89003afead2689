// The module adamal_kernels._cuda: the CUDA kernels, for the plans of adamal_kernels._C.
#include <pybind11/pybind11.h>

#include "cuda/api.h"

namespace py = pybind11;

namespace {
adamal::CudaApi api{
    &adamal::step_cuda,         &adamal::watched_step_cuda, &adamal::step_and_project_cuda,
    &adamal::device_rows_bytes, &adamal::squared_norm_cuda, &adamal::is_capturing_cuda};
}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of adamal_kernels.";
  m.def("launch_error", &adamal::launch_error_cuda,
        "Why the current device can launch no kernel of this module; None if it can.");
  m.def("driver_version", &adamal::driver_version_cuda,
        "The newest CUDA that the driver runs, 1000 * major + 10 * minor; 0 without a driver.");
  m.attr("api") = py::capsule(&api, adamal::kCudaApiCapsule);
}
