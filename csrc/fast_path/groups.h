// The param groups as they were last checked.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "fast_path/dict_version.h"
#include "fast_path/thread_shares.h"
#include "formula/scalars.h"

namespace adamal {

// The options of one param group for parameters of one type, with bounds rounded to that type.
struct BoundOptions {
  size_t group;
  // Where tensors among the options are read by address; nullopt: on the host, which reads numbers.
  std::optional<c10::Device> device;
  DeviceOptions step;
};

// Whether two options give the same scalars at every step.
bool same_options(const DeviceOptions& a, const DeviceOptions& b);

class SteadyGroups {
 public:
  // `has_state` has an entry for every parameter in the groups' order; `options` are sorted by
  // group.
  SteadyGroups(const pybind11::list& groups, const std::vector<bool>& has_state,
               std::vector<BoundOptions> options);

  // Whether the groups, item by item and parameter by parameter, are those that were checked, and
  // no parameter without state is due its first step. A changed learning rate, beta, eps or weight
  // decay is taken over into the options; what can change without being another object, such as a
  // tensor or a list of betas, is read anew every time.
  bool check(PyObject* groups);

  // Whether they are enough for threads to share a check.
  bool are_many() const { return ThreadShares::threads_for(groups_.size(), kLeastGroups) > 1; }

  const std::vector<BoundOptions>& options() const { return options_; }
  // The first of neighbouring options, read on the same side, that all give the same scalars.
  size_t first_like(size_t options) const { return first_like_[options]; }

  // For Python's garbage collector. Cleared, it finds nothing as it was.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // A thread's least share.
  static constexpr size_t kLeastGroups = 512;

  // What a change of a group's item means to the next step.
  enum class Kind : uint8_t { lr, betas, eps, weight_decay, params, fixed, ignored };
  struct Item {
    pybind11::object key;
    pybind11::object value;  // immutable, not compared, or read anew
    Kind kind;
    bool is_read_anew;
  };
  struct Group {
    pybind11::dict dict;
    DictVersion version;         // of the dict, when it was as checked and nothing is read anew
    PyObject* params = nullptr;  // the dict's list then, which it holds
    std::vector<Item> items;     // in the dict's order
    size_t first_param;
    size_t param_count;
    size_t first_options;
    size_t options_count;
  };
  struct Param {
    pybind11::object object;  // held, so that its address cannot become another's
    bool has_state;
  };

  static Kind classify(const pybind11::handle& key);
  static bool is_number(Kind kind) { return kind <= Kind::weight_decay; }
  // Whether nothing of a group has changed; takes nothing over, so that threads may ask, each of
  // groups of its own.
  bool is_unchanged(Group& group) const;
  void prefetch(size_t index, size_t end) const;
  bool check_items(Group& group);
  bool check_params(const Group& group, PyObject* params) const;
  void find_alike();
  bool take_over(const Group& group, Kind kind, PyObject* value);
  bool take_over(BoundOptions& options, Kind kind, PyObject* value);

  std::vector<Group> groups_;
  std::vector<Param> params_;
  std::vector<BoundOptions> options_;
  std::vector<size_t> first_like_;  // by options
  std::vector<uint8_t> unchanged_;  // by group, in this step
  ThreadShares shares_;             // of the groups
};

}  // namespace adamal
