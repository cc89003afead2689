// What needs no bucket: constants, conversions of 16-bit types, and scalars.
#include <cstdint>
#include <vector>

#include "cpu/step.h"
#include "cuda/launches.h"
#include "cuda/step.h"
#include "cuda/walk.h"
#include "formula/bucket.h"
#include "formula/storage.h"
#include "harness.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

template <typename Storage>
void decode_all(const std::vector<uint16_t>& stored, Output& output) {
  std::vector<float> values;
  for (const uint16_t bits : stored) values.push_back(decode(Storage{bits}));
  output.array(values);
}

template <typename Storage>
void encode_all(const std::vector<float>& values, Output& output) {
  std::vector<uint16_t> stored;
  for (const float value : values) stored.push_back(encode<Storage>(value).bits);
  output.array(stored);
}

void derive_scalars(Input& input, Output& output) {
  for (int64_t i = input.integer(); i > 0; --i) {
    const int64_t step = input.integer();
    const auto number = input.array<double>(7);
    const auto flag = input.array<int64_t>(3);
    const StepOptions options{number[0], number[1], number[2],    number[3],    number[4],
                              number[5], number[6], flag[0] != 0, flag[1] != 0, flag[2] != 0};
    const double grad_factor = input.array<double>(1)[0];
    output.array(std::vector<StepScalars<double>>{derive_step_scalars(step, options, grad_factor)});
  }
}

template <typename Params>
void write_capacity(Output& output) {
  output.integer(sizeof(Params));
  output.integer(Params::kTensorCapacity);
  output.integer(Params::kRowCapacity);
}

void write_info(Output& output) {
  output.integer(kCpuChunk);
  for (int i = 0; i < kFormatCount; ++i) {
    const Format format = kFormats[i];
    for (const Dtype type : {format.param, format.grad, format.exp_avg, format.exp_avg_sq}) {
      output.integer(static_cast<int64_t>(type));
    }
    output.integer(cuda_chunk(i));
  }
  write_capacity<SmallLaunchParams<float>>(output);
  write_capacity<SmallLaunchParams<double>>(output);
  write_capacity<LargeLaunchParams<float>>(output);
  write_capacity<LargeLaunchParams<double>>(output);
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::info:
      return write_info(output);
    case Command::decode: {
      const auto dtype = static_cast<Dtype>(input.integer());
      const auto stored = input.array<uint16_t>(input.integer());
      return dtype == Dtype::bfloat16 ? decode_all<bfloat16>(stored, output)
                                      : decode_all<float16>(stored, output);
    }
    case Command::encode: {
      const auto dtype = static_cast<Dtype>(input.integer());
      const auto values = input.array<float>(input.integer());
      return dtype == Dtype::bfloat16 ? encode_all<bfloat16>(values, output)
                                      : encode_all<float16>(values, output);
    }
    case Command::scalars:
      return derive_scalars(input, output);
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
