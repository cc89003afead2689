// The module adamal_kernels._C: plans, the CPU step and the steady state.
#include <torch/extension.h>

#include <array>
#include <memory>
#include <string_view>
#include <tuple>
#include <utility>

#include "fast_path/fast_path.h"
#include "fast_path/tensor_fields.h"
#include "plan/cpu_plan.h"
#include "plan/cuda_plan.h"
#include "plan/plan.h"
#include "plan/triton_plan.h"

namespace py = pybind11;

namespace adamal {
namespace {

using Tensors = std::vector<at::Tensor>;

int checked_format(int format) {
  TORCH_CHECK(format >= 0 && format < kFormatCount, "unknown format: ", format);
  return format;
}

const CudaApi& cuda_api(const py::capsule& capsule) {
  TORCH_CHECK(std::string_view(capsule.name()) == kCudaApiCapsule,
              "adamal_kernels._cuda was built from other sources than adamal_kernels._C; build "
              "both anew");
  return *capsule.get_pointer<CudaApi>();
}

void check_same_length(size_t expected, size_t found, const char* what) {
  TORCH_CHECK(found == expected, "a bucket of ", expected, " parameters has ", found, " ", what);
}

// A parameter or a group can refer back to its optimizer: such cycles run through here.
void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  const auto steady_state = [](PyObject* self) -> SteadyState* {
    auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return holder.holder_constructed() ? holder.value_ptr<SteadyState>() : nullptr;
  };
  static const auto of = steady_state;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const SteadyState* state = of(self);
    return state == nullptr ? 0 : state->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (SteadyState* state = of(self)) state->clear();
    return 0;
  };
}

std::vector<const void*> addresses_of(const Tensors& tensors) {
  std::vector<const void*> addresses;
  for (const at::Tensor& tensor : tensors) {
    addresses.push_back(tensor.numel() == 0 ? &kEmptyGradient : tensor.const_data_ptr());
  }
  return addresses;
}

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // sizes and strides

void set_runs(const Runs& runs, const char* name, int64_t* count, int32_t* run_count,
              int64_t* sizes, int64_t* strides) {
  TORCH_CHECK(runs.size() <= CoupledRows::kMostRuns, name, " has ", runs.size(),
              " runs of dimensions; at most ", CoupledRows::kMostRuns, " are supported");
  *count = 1;
  *run_count = static_cast<int32_t>(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    std::tie(sizes[i], strides[i]) = runs[i];
    *count *= sizes[i];
  }
}

CoupledRows coupled_rows(int kind, double size, double tolerance, const Runs& kept,
                         const Runs& reduced) {
  TORCH_CHECK(kind >= 0 && kind <= static_cast<int>(SetKind::simplex), "unknown set: ", kind);
  TORCH_CHECK(!reduced.empty(), "reduced must have a run of dimensions");
  CoupledRows rows{};
  rows.set = {static_cast<SetKind>(kind), size, tolerance};
  set_runs(kept, "kept", &rows.rows, &rows.kept_count, rows.kept_sizes, rows.kept_strides);
  set_runs(reduced, "reduced", &rows.length, &rows.reduced_count, rows.reduced_sizes,
           rows.reduced_strides);
  return rows;
}

void check_rows_of(const at::Tensor& multiplier, const CoupledRows& rows, c10::Device device) {
  TORCH_CHECK(multiplier.scalar_type() == at::kDouble && multiplier.device() == device &&
                  multiplier.numel() == rows.rows && multiplier.is_non_overlapping_and_dense(),
              "a multiplier must be dense, with a float64 for each of ", rows.rows, " rows, on ",
              device);
}

// Binds the tensors of a bucket as adamal_kernels.core.bucket.Bucket holds it.
void bind(Plan& plan, const Tensors& params, const std::vector<Tensors>& buffers,
          const std::vector<CoupledRows>& sets, const Tensors& records) {
  check_same_length(Buffer::count, buffers.size(), "buffers");
  check_same_length(sets.empty() ? 0 : params.size(), sets.size(), "sets");
  std::vector<TensorEntry> entries;
  for (const at::Tensor& param : params) entries.push_back({param.data_ptr(), param.numel(), {}});
  for (int which = 0; which < Buffer::count; ++which) {
    const Buffer& buffer = kBuffers[which];
    const bool exists = buffer.exists(plan.second_moment(), !sets.empty());
    check_same_length(exists ? params.size() : 0, buffers[which].size(), buffer.key);
    for (size_t i = 0; i < buffers[which].size(); ++i) {
      const at::Tensor& tensor = buffers[which][i];
      if (buffer.shape == BufferShape::rows) check_rows_of(tensor, sets[i], plan.device());
      entries[i].buffers[which] = tensor.data_ptr();
    }
  }
  plan.bind(entries, sets, records);
}

// Of gradients alone: binds no other tensors, so the plan is not one that steps.
at::Tensor squared_norm(Plan& plan, const Tensors& grads) {
  std::vector<TensorEntry> entries;
  for (const at::Tensor& grad : grads) {
    entries.push_back({nullptr, grad.numel(), {}});
  }
  plan.bind(entries);
  return plan.squared_norm(addresses_of(grads));
}

void check_rows(const Plan& plan, const Tensors& grads, const std::vector<uint32_t>& rows,
                int64_t row_count) {
  check_same_length(plan.tensors().size(), grads.size(), "grads");
  check_same_length(plan.tensors().size(), rows.size(), "rows");
  for (const uint32_t row : rows) {
    TORCH_CHECK(row < row_count, "row ", row, " of a table of ", row_count);
  }
}

void step(Plan& plan, const Tensors& grads, const py::buffer& scalars,
          const std::vector<uint32_t>& rows) {
  const py::buffer_info table = scalars.request();
  TORCH_CHECK(table.item_type_is_equivalent_to<double>() && table.ndim == 1 &&
                  table.size % kStepScalarCount == 0,
              "scalars must be an array of float64, ", kStepScalarCount, " a row");
  const int64_t row_count = table.size / kStepScalarCount;
  check_rows(plan, grads, rows, row_count);
  const auto* first_row = static_cast<const StepScalars<double>*>(table.ptr);
  const py::gil_scoped_release no_gil;
  plan.step(addresses_of(grads), rows, first_row, row_count);
}

const void* address_of(const std::optional<at::Tensor>& tensor, at::ScalarType type,
                       c10::Device device) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->numel() == 1 && tensor->scalar_type() == type && tensor->device() == device,
              "expected one ", type, " on ", device, ", got ", tensor->toString(), " on ",
              tensor->device());
  return tensor->const_data_ptr();
}

using ScalarTensors = std::array<std::optional<at::Tensor>, 3>;  // lr, beta1, beta2

DeviceOptions device_options(const BoundOptions& numbers, const ScalarTensors& tensors,
                             c10::Device device) {
  DeviceOptions options = numbers.step;
  DeviceOptions::Address* const targets[] = {&options.lr, &options.beta1, &options.beta2};
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i]) continue;
    *targets[i] = {address_of(tensors[i], tensors[i]->scalar_type(), device),
                   tensors[i]->scalar_type() == at::kDouble};
  }
  return options;
}

// The step of a bucket whose scalars are derived on its device; `counts` are those of its tensors.
void step_on_device(Plan& plan, const Tensors& grads, const std::vector<BoundOptions>& options,
                    const std::vector<ScalarTensors>& scalar_tensors,
                    const std::vector<uint32_t>& rows, const at::Tensor& counts,
                    const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf,
                    const std::optional<at::Tensor>& grad_norm, double max_grad_norm,
                    const std::optional<at::Tensor>& skipped_steps) {
  check_same_length(options.size(), scalar_tensors.size(), "tuples of scalar tensors");
  check_rows(plan, grads, rows, static_cast<int64_t>(options.size()));
  TORCH_CHECK(counts.device() == plan.device() && counts.scalar_type() == at::kFloat &&
                  counts.is_contiguous() && counts.numel() == static_cast<int64_t>(grads.size()),
              "counts must be a float32 for each tensor, on ", plan.device());
  std::vector<DeviceOptions> table;
  for (size_t i = 0; i < options.size(); ++i) {
    table.push_back(device_options(options[i], scalar_tensors[i], plan.device()));
  }
  const auto address = [&](const std::optional<at::Tensor>& tensor, at::ScalarType type) {
    return const_cast<void*>(address_of(tensor, type, plan.device()));
  };
  const StepInputs inputs{static_cast<float*>(address(grad_scale, at::kFloat)),
                          static_cast<float*>(address(found_inf, at::kFloat)),
                          static_cast<double*>(address(grad_norm, at::kDouble)), max_grad_norm};
  plan.step(addresses_of(grads), rows,
            {table.data(), static_cast<int64_t>(table.size()), counts.mutable_data_ptr<float>(),
             inputs, static_cast<int64_t*>(address(skipped_steps, at::kLong))});
}

}  // namespace
}  // namespace adamal

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace adamal;
  m.doc() = "Plans of adamal_kernels and the CPU step.";
  py::list buffers;
#define ADAMAL_ROW(key, shape, needs, type) \
  buffers.append(py::make_tuple(#key, #shape, #needs, #type));
  ADAMAL_BUFFERS(ADAMAL_ROW)
#undef ADAMAL_ROW
  m.attr("buffers") = buffers;

  py::class_<CoupledRows>(m, "CoupledRows")
      .def(py::init(&coupled_rows), py::arg("kind"), py::arg("size"), py::arg("tolerance"),
           py::arg("kept"), py::arg("reduced"));
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def("bind", &bind, py::arg("params"), py::arg("buffers"), py::arg("sets"),
           py::arg("records"))
      .def_property_readonly("chunk", &Plan::chunk)
      .def("step", &step, py::arg("grads"), py::arg("scalars"), py::arg("rows"))
      .def("step_on_device", &step_on_device, py::arg("grads"), py::arg("options"),
           py::arg("scalar_tensors"), py::arg("rows"), py::arg("counts"), py::kw_only(),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("grad_norm"),
           py::arg("max_grad_norm"), py::arg("skipped_steps"))
      .def("squared_norm", &squared_norm, py::arg("grads"));

  m.def(
      "cpu_plan",
      [](int format, int second_moment) -> std::shared_ptr<Plan> {
        return std::make_shared<CpuPlan>(checked_format(format),
                                         static_cast<SecondMoment>(second_moment));
      },
      py::arg("format"), py::arg("second_moment"));
  m.def(
      "cuda_plan",
      [](int format, int second_moment, int device,
         const py::capsule& api) -> std::shared_ptr<Plan> {
        return std::make_shared<CudaPlan>(
            checked_format(format), static_cast<SecondMoment>(second_moment),
            c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)), cuda_api(api));
      },
      py::arg("format"), py::arg("second_moment"), py::arg("device"), py::arg("api"));
  m.def(
      "triton_plan",
      [](int format, int second_moment, const c10::Device& device, int64_t block,
         py::object launcher) -> std::shared_ptr<Plan> {
        TORCH_CHECK(block > 0, "block must be positive, got ", block);
        return std::make_shared<TritonPlan>(checked_format(format),
                                            static_cast<SecondMoment>(second_moment), device, block,
                                            std::move(launcher));
      },
      py::arg("format"), py::arg("second_moment"), py::arg("device"), py::arg("block"),
      py::arg("launcher"));

  py::class_<Membership>(m, "Membership")
      .def(py::init<size_t, size_t>(), py::arg("plan"), py::arg("options"));
  py::class_<BoundOptions>(m, "BoundOptions")
      .def(py::init([](size_t group, std::optional<c10::Device> device, double lr, double beta1,
                       double beta2, double eps, double weight_decay, double lower, double upper,
                       bool decoupled_weight_decay, bool maximize, bool bias_correction) {
             return BoundOptions{group, device,
                                 DeviceOptions{{lr, beta1, beta2, eps, weight_decay, lower, upper,
                                                decoupled_weight_decay, maximize, bias_correction},
                                               {},
                                               {},
                                               {}}};
           }),
           py::kw_only(), py::arg("group"), py::arg("device"), py::arg("lr"), py::arg("beta1"),
           py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("lower"),
           py::arg("upper"), py::arg("decoupled_weight_decay"), py::arg("maximize"),
           py::arg("bias_correction"));
  py::class_<ShardedClass, std::shared_ptr<ShardedClass>>(m, "ShardedClass")
      .def(py::init<const py::type&, const py::object&, const py::object&, std::vector<py::str>,
                    std::vector<py::str>, py::function>(),
           py::kw_only(), py::arg("type"), py::arg("local"), py::arg("spec"), py::arg("mesh"),
           py::arg("placements"), py::arg("redistribute"));
  py::class_<SteadyState>(m, "SteadyState", py::custom_type_setup(collect_garbage))
      .def(py::init<const py::list&, const py::dict&, const std::vector<std::optional<Membership>>&,
                    std::vector<BoundOptions>, std::vector<std::shared_ptr<Plan>>,
                    const std::vector<at::Tensor>&, const std::vector<bool>&,
                    std::shared_ptr<ShardedClass>, std::vector<std::vector<CoupledRows>>>(),
           py::arg("groups"), py::arg("state"), py::arg("members"), py::arg("options"),
           py::arg("plans"), py::arg("steps"), py::arg("on_device"), py::arg("sharded"),
           py::arg("sets"))
      .def_property_readonly("plan_count", &SteadyState::plan_count)
      .def_property_readonly("row_count", &SteadyState::row_count)
      .def("bind", &SteadyState::bind, py::arg("state"), py::arg("records"))
      .def(
          "step",
          [](SteadyState& self, const py::handle& groups, const py::handle& state,
             std::optional<at::Tensor> grad_scale, std::optional<at::Tensor> found_inf,
             std::optional<at::Tensor> grad_norm, double max_grad_norm,
             std::optional<at::Tensor> skipped_steps, const py::object& norm_of_sums) {
            return self.step(
                groups, state,
                {std::move(grad_scale), std::move(found_inf), std::move(grad_norm), max_grad_norm,
                 std::move(skipped_steps)},
                [&](const std::vector<at::Tensor>& sums, const std::optional<at::Tensor>& scale) {
                  return py::cast<at::Tensor>(norm_of_sums(sums, scale));
                });
          },
          py::arg("groups"), py::arg("state"), py::arg("grad_scale"), py::arg("found_inf"),
          py::arg("grad_norm"), py::arg("max_grad_norm"), py::arg("skipped_steps"),
          py::arg("norm_of_sums"));
}
