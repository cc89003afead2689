// csrc/fast_path/dict_version.h for Python to call, by ctypes and with the GIL.
#include "fast_path/dict_version.h"

using adamal::DictVersion;

extern "C" {

DictVersion* version_new() { return new DictVersion; }
void version_delete(DictVersion* version) { delete version; }
void version_watch(DictVersion* version, PyObject* dict) { version->watch(dict); }
void version_note(DictVersion* version, PyObject* dict) { version->note(dict); }
void version_forget(DictVersion* version) { version->forget(); }
int version_is_of(const DictVersion* version, PyObject* dict) { return version->is_of(dict); }

}  // extern "C"
