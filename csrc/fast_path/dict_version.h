// Whether a dict is as it was, known without looking through it.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <unordered_map>

namespace adamal {

#if PY_VERSION_HEX < 0x030C0000

// Every change of any dict gives that dict a version that none has had before (PEP 509): one of the
// version that is remembered holds the very objects it held then. (Setting an attribute of whoever
// has the dict for its __dict__ may let go of the old object just before that.)
class DictVersion {
 public:
  void watch(PyObject* /*dict*/) {}
  void note(PyObject* dict) { version_ = of(dict); }
  void forget() { version_ = 0; }
  bool is_of(PyObject* dict) const { return version_ == of(dict); }

 private:
  static uint64_t of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }

  uint64_t version_ = 0;  // which no dict has
};

#else

// Python tells a watcher of every change of a watched dict, just before it (PEP 699). Where the
// process has no watcher left, no dict is as it was.
class DictVersion {
 public:
  // Watches `dict` from now on, in place of another. Needs the GIL, unlike what follows.
  void watch(PyObject* dict) {
    static const int watcher = PyDict_AddWatcher(count_change);
    watched_ = nullptr;
    if (watcher < 0 || PyDict_Watch(watcher, dict) < 0) {
      PyErr_Clear();
      return;
    }
    SharedWatched& watched = all_watched()[dict];
    if (watched == nullptr) watched = std::make_shared<Watched>(Watched{dict, 1});
    watched_ = watched;
  }
  void note(PyObject* dict) { noted_ = is_watched(dict) ? watched_->changes : 0; }
  void forget() { noted_ = 0; }
  bool is_of(PyObject* dict) const { return is_watched(dict) && watched_->changes == noted_; }

 private:
  // A dict, for all who watch it.
  struct Watched {
    PyObject* dict;    // null: it is no more, and its place may be another's
    uint64_t changes;  // so far, from 1
  };

  using SharedWatched = std::shared_ptr<Watched>;

  // Those that are alive. Never destroyed: dicts may outlive all else.
  static std::unordered_map<PyObject*, SharedWatched>& all_watched() {
    static auto* const all = new std::unordered_map<PyObject*, SharedWatched>;
    return *all;
  }

  static int count_change(PyDict_WatchEvent event, PyObject* dict, PyObject* /*key*/,
                          PyObject* /*value*/) {
    const auto found = all_watched().find(dict);
    if (found == all_watched().end()) return 0;
    ++found->second->changes;
    if (event == PyDict_EVENT_DEALLOCATED) {
      found->second->dict = nullptr;
      all_watched().erase(found);
    }
    return 0;
  }

  bool is_watched(PyObject* dict) const { return watched_ && watched_->dict == dict; }

  SharedWatched watched_;
  uint64_t noted_ = 0;
};

#endif

}  // namespace adamal
