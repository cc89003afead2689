// The module adamal_kernels._C: plans, the CPU step and the steady state.
#include <torch/extension.h>

#include <memory>
#include <string_view>

#include "plan.h"
#include "steady_state.h"

namespace py = pybind11;

namespace adamal {
namespace {

using Tensors = std::vector<at::Tensor>;

int checked_pair(int pair) {
  TORCH_CHECK(pair >= 0 && pair < kDtypePairCount, "unknown pair of types: ", pair);
  return pair;
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

// One step of a bucket as adamal_kernels.bucket.Bucket holds it.
void step(Plan& plan, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
          const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const py::buffer& scalars,
          const std::vector<uint32_t>& rows) {
  const bool amsgrad = plan.second_moment() == SecondMoment::amsgrad;
  check_same_length(params.size(), grads.size(), "grads");
  check_same_length(params.size(), exp_avgs.size(), "exp_avgs");
  check_same_length(params.size(), exp_avg_sqs.size(), "exp_avg_sqs");
  check_same_length(amsgrad ? params.size() : 0, max_exp_avg_sqs.size(), "max_exp_avg_sqs");
  check_same_length(params.size(), rows.size(), "rows");
  const py::buffer_info table = scalars.request();
  TORCH_CHECK(table.item_type_is_equivalent_to<double>() && table.ndim == 1 &&
                  table.size % kStepScalarCount == 0,
              "scalars must be an array of float64, ", kStepScalarCount, " a row");
  const int64_t row_count = table.size / kStepScalarCount;

  std::vector<TensorEntry> entries;
  std::vector<const void*> grad_addresses;
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(rows[i] < row_count, "row ", rows[i], " of a table of ", row_count);
    entries.push_back({params[i].data_ptr(), exp_avgs[i].data_ptr(), exp_avg_sqs[i].data_ptr(),
                       amsgrad ? max_exp_avg_sqs[i].data_ptr() : nullptr, params[i].numel()});
    grad_addresses.push_back(grads[i].const_data_ptr());
  }
  const auto* first_row = static_cast<const StepScalars<double>*>(table.ptr);
  const py::gil_scoped_release no_gil;
  plan.bind(entries);
  plan.step(grad_addresses, rows, first_row, row_count);
}

}  // namespace
}  // namespace adamal

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace adamal;
  m.doc() = "Plans of adamal_kernels and the CPU step.";
  m.attr("dtype_pair_count") = kDtypePairCount;

  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan").def(
      "step", &step, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
      py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("scalars"), py::arg("rows"));

  m.def(
      "cpu_plan",
      [](int pair, int second_moment) -> std::shared_ptr<Plan> {
        return std::make_shared<CpuPlan>(checked_pair(pair),
                                         static_cast<SecondMoment>(second_moment));
      },
      py::arg("pair"), py::arg("second_moment"));
  m.def(
      "cuda_plan",
      [](int pair, int second_moment, int device, const py::capsule& api) -> std::shared_ptr<Plan> {
        return std::make_shared<CudaPlan>(
            checked_pair(pair), static_cast<SecondMoment>(second_moment),
            c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)), cuda_api(api));
      },
      py::arg("pair"), py::arg("second_moment"), py::arg("device"), py::arg("api"));

  py::class_<Membership>(m, "Membership")
      .def(py::init<size_t, size_t>(), py::arg("plan"), py::arg("options"));
  py::class_<BoundOptions>(m, "BoundOptions")
      .def(py::init([](size_t group, double lr, double beta1, double beta2, double eps,
                       double weight_decay, double lower, double upper, bool decoupled_weight_decay,
                       bool maximize, bool bias_correction) {
             return BoundOptions{group,
                                 {lr, beta1, beta2, eps, weight_decay, lower, upper,
                                  decoupled_weight_decay, maximize, bias_correction}};
           }),
           py::kw_only(), py::arg("group"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
           py::arg("eps"), py::arg("weight_decay"), py::arg("lower"), py::arg("upper"),
           py::arg("decoupled_weight_decay"), py::arg("maximize"), py::arg("bias_correction"));
  py::class_<ShardedClass, std::shared_ptr<ShardedClass>>(m, "ShardedClass")
      .def(py::init<const py::type&, const py::object&, const py::object&, std::vector<py::str>,
                    std::vector<py::str>, py::function>(),
           py::kw_only(), py::arg("type"), py::arg("local"), py::arg("spec"), py::arg("mesh"),
           py::arg("placements"), py::arg("redistribute"));
  py::class_<SteadyState>(m, "SteadyState", py::custom_type_setup(collect_garbage))
      .def(py::init<const py::list&, const py::dict&, const std::vector<std::optional<Membership>>&,
                    std::vector<BoundOptions>, std::vector<std::shared_ptr<Plan>>, at::Tensor,
                    std::shared_ptr<ShardedClass>>(),
           py::arg("groups"), py::arg("state"), py::arg("members"), py::arg("options"),
           py::arg("plans"), py::arg("steps"), py::arg("sharded"))
      .def_property_readonly("plan_count", &SteadyState::plan_count)
      .def_property_readonly("row_count", &SteadyState::row_count)
      .def("bind", &SteadyState::bind, py::arg("state"))
      .def("step", &SteadyState::step, py::arg("groups"), py::arg("state"));
}
