// What the programs of the harness share: what they can be asked, and how they are.
//
// Usage: PROGRAM INPUT OUTPUT. tests/helpers/native_harness.py writes the input and reads the
// output; both are plain concatenations of little-endian 8-byte numbers and raw arrays.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace adamal::harness {

enum class Command : int64_t {
  info,
  decode,
  encode,
  scalars,
  step_cpu,
  step_cuda,
  step_on_device,
  norm_cpu,
  norm_cuda,
  watched_cpu,
  watched_cuda,
  watched_on_device,
  project_serially,
  project_cpu,
  project_cuda
};

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "harness: %s\n", message);
  std::exit(2);
}

class Input {
 public:
  explicit Input(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) fail("the input cannot be opened");
  }
  ~Input() { std::fclose(file_); }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  bool at_end() {
    const int next = std::fgetc(file_);
    std::ungetc(next, file_);
    return next == EOF;
  }
  void read(void* target, size_t bytes) {
    if (bytes != 0 && std::fread(target, 1, bytes, file_) != bytes) fail("the input is too short");
  }
  int64_t integer() {
    int64_t value;
    read(&value, sizeof(value));
    return value;
  }
  template <typename T>
  std::vector<T> array(int64_t count) {
    std::vector<T> values(count);
    read(values.data(), count * sizeof(T));
    return values;
  }

 private:
  std::FILE* file_;
};

class Output {
 public:
  explicit Output(const char* path) : file_(std::fopen(path, "wb")) {
    if (file_ == nullptr) fail("the output cannot be opened");
  }
  ~Output() {
    if (std::fclose(file_) != 0) fail("the output cannot be written");
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  void write(const void* source, size_t bytes) {
    if (bytes != 0 && std::fwrite(source, 1, bytes, file_) != bytes) {
      fail("the output cannot be written");
    }
  }
  void integer(int64_t value) { write(&value, sizeof(value)); }
  template <typename T>
  void array(const std::vector<T>& values) {
    write(values.data(), values.size() * sizeof(T));
  }

 private:
  std::FILE* file_;
};

// Runs the cases of the input with `run`, one after another.
inline int run_cases(int argc, char** argv, void (*run)(Command, Input&, Output&)) {
  if (argc != 3) fail("usage: PROGRAM INPUT OUTPUT");
  Input input(argv[1]);
  Output output(argv[2]);
  while (!input.at_end()) run(static_cast<Command>(input.integer()), input, output);
  return 0;
}

}  // namespace adamal::harness
