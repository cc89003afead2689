// An optimizer as it was last checked: a step that finds it unchanged does no Python work.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "fast_path/dict_version.h"
#include "fast_path/groups.h"
#include "fast_path/sharded_class.h"
#include "fast_path/tensor_fields.h"
#include "fast_path/thread_shares.h"
#include "plan/plan.h"

namespace adamal {

// Where a parameter that has state is stepped: indices into the plans and the options.
struct Membership {
  size_t plan;
  size_t options;
};

// Every step reads the lists of parameters, the parameters, gradients, state tensors and step
// counts anew and compares them with what was checked; so it does with the dicts of groups, options
// and state, but for those whose version tells that they have not changed. A changed learning rate,
// beta, eps or weight decay is taken over; gradients may come, go and move. Whatever else differs
// is the caller's to check and to bind anew, so nothing is ever stale.
class SteadyState {
 public:
  // `members` has an entry for every parameter in the groups' order, nullopt for those without
  // state. `steps` holds, for each plan, the step counts of its parameters in that order, and each
  // one's state[p]["step"] is a view of it, or one of its own in shared memory: on the plan's
  // device where `on_device`, which derives its scalars there, else on the CPU. `sharded` is the
  // class of those parameters that are spread over processes, whose own part is what is stepped;
  // null where there are none. `sets` holds, for each plan, the sets of its parameters in that
  // order, if they couple elements; else nothing.
  SteadyState(const pybind11::list& groups, const pybind11::dict& state,
              const std::vector<std::optional<Membership>>& members,
              std::vector<BoundOptions> options, std::vector<std::shared_ptr<Plan>> plans,
              const std::vector<at::Tensor>& steps, const std::vector<bool>& on_device,
              std::shared_ptr<ShardedClass> sharded, std::vector<std::vector<CoupledRows>> sets);

  // Hands the plans the tensors' addresses; false if some tensor is no ordinary one: then this
  // cannot be used. To be called once, before the first step. `records` are, for each plan, those
  // of its parameters' items; empty where steps are not watched.
  bool bind(const pybind11::handle& state, const std::vector<std::vector<at::Tensor>>& records);

  // What the caller knows of the gradients; the twin of scalars.StepInputs.
  struct Inputs {
    std::optional<at::Tensor> grad_scale;
    std::optional<at::Tensor> found_inf;
    std::optional<at::Tensor> grad_norm;
    double max_grad_norm;
    std::optional<at::Tensor> skipped_steps;
  };
  // The norm, from the sum of squares of each plan, and the gradients' scale.
  using NormOfSums =
      std::function<at::Tensor(const std::vector<at::Tensor>&, const std::optional<at::Tensor>&)>;

  // Steps every parameter that has a gradient, or returns false and has changed nothing. The norm
  // is asked for where `max_grad_norm` is finite.
  bool step(const pybind11::handle& groups, const pybind11::handle& state, Inputs inputs,
            const NormOfSums& norm_of_sums);

  // For Python's garbage collector. A cleared one finds nothing as it was.
  int traverse(visitproc visit, void* arg) const { return groups_.traverse(visit, arg); }
  void clear();

  size_t plan_count() const { return plans_.size(); }
  // Distinct rows of scalars in the last step.
  size_t row_count() const { return scalars_.size(); }

 private:
  // A thread's least share of the members: about 0.06 ms.
  static constexpr size_t kLeastMembers = 512;

  struct Member {
    PyObject* param;
    uint32_t plan;
    uint32_t slot;  // in the plan
    bool is_complex;
    bool is_sharded;
    c10::DispatchKeySet key_set;
  };
  // A parameter's tensors: its buffers, by their index, and others.
  struct Which {
    static constexpr int step = Buffer::count, param = step + 1, grad = param + 1;
    static constexpr int of_state = step + 1, held = grad, count = grad + 1;

    // That of a key of a parameter's state; `of_state` of any other.
    static int find(PyObject* key);
  };
  // The specs of a sharded member's tensors. Those that agreed in an earlier step are known by
  // address; comparing others takes Python, and so the thread that holds the GIL.
  struct Specs {
    pybind11::object agreed[Which::count];
    PyObject* seen[Which::count] = {};  // in this step, borrowed
    bool is_settled = true;
    // Where the last step found the tensors and this process's parts of them, as in Footprint.
    const void* tensors[Which::held] = {};
    const void* parts[Which::held] = {};
    const void* param_impl = nullptr;
  };
  // Bytes [begin, end).
  struct Span {
    const char* begin = nullptr;
    const char* end = nullptr;
  };
  // Where the last step found what the next one will read: thousands of small objects all over
  // memory, which are prefetched some members ahead. Followed in that same step only, whose
  // tensors are held by what it has read, and the state's objects while their dict, which holds
  // them, has not changed.
  struct Footprint {
    struct Place {
      c10::TensorImpl* tensor = nullptr;
      const c10::StorageImpl* storage = nullptr;  // null: not fetched

      // Written only where another is found: what stays clean need not go back to memory. Returns
      // whether the storage is the one it was.
      bool note(const Place& found) {
        const bool is_same = storage == found.storage;
        if (tensor != found.tensor || !is_same) *this = found;
        return is_same;
      }
    };
    const void* grad = nullptr;
    const void* version_counter = nullptr;
    Span gap;  // memory that no step writes, about where the last gradient lay
    Place param;
    DictVersion version;  // of the dict that holds the state's tensors
    PyObject* objects[Which::of_state] = {};
    Place state[Which::of_state];
  };
  struct StateEntry {
    PyObject* key;
    int64_t member;  // -1: no parameter of ours
  };
  // What the steps of a plan need besides the plan.
  struct PlanStep {
    std::shared_ptr<Plan> plan;
    ElementType param_types[2];  // of real parameters and of complex ones
    ElementType grad_types[2];
    ElementType buffer_types[2][Buffer::count];
    c10::DeleterFnPtr deleter;         // of its device's allocator
    std::vector<uint32_t> options_of;  // by slot
    std::vector<const void*> grads;
    std::vector<uint32_t> rows;
    std::vector<DeviceOptions> options;  // that rows index, where on_device
    at::Tensor steps;
    const c10::StorageImpl* steps_storage;
    float* counts;
    // By slot, the counts that are not of `steps`, which other processes share; `steps` has what
    // each was when it was last read. Empty if there are none.
    std::vector<at::Tensor> own_counts;
    // By slot, if the sets couple elements: the sets, and the sizes and strides they are for.
    std::vector<CoupledRows> sets;
    std::vector<std::vector<int64_t>> layouts;
    bool has_sets;
    unsigned state_keys;  // of a parameter's state, as bits
    bool on_device;
    bool host_counts;  // else they are not read: that would be to wait for the device
    bool has_grads;
  };
  struct LastRow {
    int64_t step;
    uint32_t row;
  };

  // Reads the groups and every member, and whether they are as they were checked
  // (fast_path/members.cpp).
  bool check_members(PyObject* groups, PyObject* state);
  // Finds each member's dict; false where the state is of others than it was.
  bool find_values(PyObject* state);
  // Reads a member's tensors; false where one is not as it was checked.
  bool read_member(size_t index, TensorEntry* entry, const void** grad);
  // Finds a member's state in its dict; false where there is less than its plan needs.
  bool find_objects(size_t index, PyObject* values);
  // One of those; null where it is no tensor of this process to be read.
  c10::TensorImpl* state_tensor(size_t index, int which);
  bool is_count(const Member& member, const c10::TensorImpl& tensor);
  // Whether a count is one of its own; reads it.
  bool is_own_count(const Member& member, const c10::TensorImpl& tensor);
  // Of a member that is being bound.
  void find_own_count(size_t index);
  void write_own_counts(bool host_steps);
  // Reads a buffer of numbers for the rows of a member's set.
  bool read_rows(size_t index, int which, TensorEntry* entry);
  bool read_gradient(size_t index, const ParamLayout& layout, const c10::TensorImpl& gradient,
                     const void** grad);
  void list_written();
  // The memory about an address that is not written; empty if it is.
  Span gap_about(const char* address) const;
  void prefetch(size_t index, size_t first, size_t end) const;
  void prefetch_fixed(size_t index) const;
  void prefetch_gradient(size_t index) const;
  void prefetch_gradient_storage(size_t index) const;
  // Whether the counts of skipped steps, and what may scale or skip, lie where they can be used.
  bool can_use(const Inputs& inputs) const;
  // False where the host finds the step to be skipped.
  bool find_rows(const Inputs& inputs);
  uint32_t row_of(size_t options, int64_t step, double grad_factor);
  uint32_t device_row_of(PlanStep* step, size_t options);
  static void step_on_device(const PlanStep& step, const Inputs& inputs, int64_t* skipped_steps);

  // Of sharded members (fast_path/sharded.cpp).
  bool read_sharded_gradient(size_t index, const ParamLayout& layout,
                             const c10::TensorImpl& gradient, const void** grad);
  // This process's part of one of a member's tensors; null if it has none to be read here.
  PyObject* part_of(size_t index, PyObject* tensor, int which);
  PyObject* gradient_object(const Member& member) const;
  // Compares the specs that have changed, and reads the gradients left out for that; once all
  // agree, has those redistributed that are placed otherwise than their parameters, into `held`.
  bool settle_specs(std::vector<pybind11::object>* held);
  // False if a spec is of another mesh, or a state tensor's of other placements.
  bool compare_specs(Specs* specs, bool* grad_is_placed_alike) const;
  void prefetch_sharded(size_t index, size_t end) const;

  SteadyGroups groups_;
  std::vector<Member> members_;
  std::vector<PyObject*> values_;      // by member, the dicts of its state, borrowed from the state
  std::vector<Footprint> footprints_;  // by member
  std::shared_ptr<ShardedClass> sharded_;
  std::vector<Specs> specs_;  // by member, if any is sharded
  std::vector<StateEntry> state_;
  DictVersion state_version_;  // of the dict that values_ are of
  std::vector<PlanStep> plans_;
  // What the steps write: spans apart, in order, and their storages. A storage that an allocator
  // of torch made shares memory with no other; from NumPy or by DLPack it may.
  std::vector<Span> written_;
  AddressSet written_storages_;
  bool are_owned_ = false;

  ThreadShares shares_;                       // of the members
  std::vector<StepScalars<double>> scalars_;  // of this step
  std::vector<LastRow> last_rows_;            // by options
  std::unordered_map<uint64_t, uint32_t> rows_;
};

inline bool SteadyState::read_gradient(size_t index, const ParamLayout& layout,
                                       const c10::TensorImpl& gradient, const void** grad) {
  const Member& member = members_[index];
  const ElementType grad_type = plans_[member.plan].grad_types[member.is_complex];
  if (!layout.holds_for(gradient, grad_type)) return false;
  // One without elements may have no address, and yet counts as a gradient.
  *grad = &kEmptyGradient;
  if (layout.numel() == 0) return true;
  const auto* const begin = static_cast<const char*>(layout.address(gradient, grad_type.bytes));
  *grad = begin;
  const c10::StorageImpl* const storage = storage_of(gradient);
  if (are_owned_ && is_allocated(*storage, plans_[member.plan].deleter) &&
      !written_storages_.contains(storage)) {
    return true;
  }
  const char* const end = begin + layout.numel() * grad_type.bytes;
  // Gradients are made anew and anew in the same parts of memory.
  Span& gap = footprints_[index].gap;
  if (begin < gap.begin || end > gap.end) {
    gap = gap_about(begin);
    // Read while it is written: the check in Python says what to do.
    if (end > gap.end) return false;
  }
  return true;
}

}  // namespace adamal
