// The formula: one element of one step, and the scalars it needs, on the host and on the device.
//
// Every operation is rounded to nearest in the compute type, in the order written here; all
// backends do the same and so give the same bits. Compile with -ffp-contract=off (host) and
// -fmad=false (device).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __FAST_MATH__
#error "adamal_kernels gives the same bits on every backend: compile it without -ffast-math"
#endif

#ifdef __CUDACC__
#define ADAMAL_HD __host__ __device__
#else
#define ADAMAL_HD
#endif

namespace adamal {

enum class SecondMoment { monotone = 0, plain = 1, amsgrad = 2 };
inline constexpr int kSecondMomentCount = 3;

// One row of a bucket's scalar table. Fields and their order are those of
// adamal_kernels.core.scalars.StepScalars, which says what each means.
template <typename T>
struct StepScalars {
  T one_minus_beta1;
  T one_minus_beta2;
  T beta2;
  T step_size;
  T bias2_sqrt;
  T eps;
  T coupled_decay;
  T decay_factor;
  T grad_factor;
  T lower;
  T upper;

  StepScalars() = default;

  // Rounds every field once.
  template <typename U>
  ADAMAL_HD explicit StepScalars(const StepScalars<U>& other)
      : one_minus_beta1(static_cast<T>(other.one_minus_beta1)),
        one_minus_beta2(static_cast<T>(other.one_minus_beta2)),
        beta2(static_cast<T>(other.beta2)),
        step_size(static_cast<T>(other.step_size)),
        bias2_sqrt(static_cast<T>(other.bias2_sqrt)),
        eps(static_cast<T>(other.eps)),
        coupled_decay(static_cast<T>(other.coupled_decay)),
        decay_factor(static_cast<T>(other.decay_factor)),
        grad_factor(static_cast<T>(other.grad_factor)),
        lower(static_cast<T>(other.lower)),
        upper(static_cast<T>(other.upper)) {}

  // Whether a step by these may divide 0 by 0 or leave the bounds.
  ADAMAL_HD bool need_guards() const {
    return !(eps > T(0) && lower == -T(INFINITY) && upper == T(INFINITY));
  }
};

inline constexpr int kStepScalarCount = 11;
static_assert(sizeof(StepScalars<double>) == kStepScalarCount * sizeof(double));

// Everything a step changes of one element, in the compute type.
template <typename T>
struct Element {
  T param;
  T exp_avg;
  T exp_avg_sq;
  T max_exp_avg_sq;  // amsgrad only
};

// kGuarded may be false for scalars that need no guards, which then would change nothing.
template <SecondMoment kSecondMoment, bool kGuarded = true, typename T>
ADAMAL_HD inline Element<T> step_element(Element<T> e, T grad, const StepScalars<T>& s) {
  using std::sqrt;
  T g = s.grad_factor * grad;
  // Left out rather than added as 0 * p: that would be NaN where p is infinite.
  if (s.coupled_decay != T(0)) g = g + s.coupled_decay * e.param;
  const T p = e.param * s.decay_factor;

  const T m = e.exp_avg + s.one_minus_beta1 * (g - e.exp_avg);
  const T g2 = g * g;
  T v = e.exp_avg_sq;
  if (kSecondMoment == SecondMoment::monotone) {
    // As a difference: exactly monotone, which the sum of two products is not.
    v = g2 > v ? v + s.one_minus_beta2 * (g2 - v) : v;
  } else {
    // As a sum: accurate where v falls far, which the difference is not if beta2 is small.
    v = s.beta2 * v + s.one_minus_beta2 * g2;
  }
  T denominator_sq = v;
  if (kSecondMoment == SecondMoment::amsgrad) {
    denominator_sq = v > e.max_exp_avg_sq ? v : e.max_exp_avg_sq;
  }

  const T d = sqrt(denominator_sq) / s.bias2_sqrt + s.eps;
  // Where moments and eps are all 0 the parameter stays.
  const T quotient = (kGuarded && d == T(0) && m == T(0)) ? T(0) : m / d;
  const T stepped = p - s.step_size * quotient;
  if (!kGuarded) return {stepped, m, v, denominator_sq};
  // Ternaries, not fmin and fmax: NaN passes.
  const T clamped = stepped < s.lower ? s.lower : (stepped > s.upper ? s.upper : stepped);
  return {clamped, m, v, denominator_sq};
}

// The options of a param group that the scalars come from.
struct StepOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double lower;
  double upper;
  bool decoupled_weight_decay;
  bool maximize;
  bool bias_correction;
};

// beta**exponent in a fixed order of products; the twin of scalars.beta_power.
ADAMAL_HD inline double beta_power(double beta, int64_t exponent) {
  double result = 1.0;
  double square = beta;
  while (exponent > 0) {
    if (exponent & 1) result *= square;
    square *= square;
    exponent >>= 1;
  }
  return result;
}

// The twin of scalars.derive_step_scalars.
ADAMAL_HD inline StepScalars<double> derive_step_scalars(int64_t step, const StepOptions& options,
                                                         double grad_factor) {
  using std::sqrt;
  StepScalars<double> s;
  s.one_minus_beta1 = 1.0 - options.beta1;
  s.one_minus_beta2 = 1.0 - options.beta2;
  s.beta2 = options.beta2;
  s.step_size = options.lr;
  s.bias2_sqrt = 1.0;
  if (options.bias_correction) {
    s.step_size = options.lr / (1.0 - beta_power(options.beta1, step));
    s.bias2_sqrt = sqrt(1.0 - beta_power(options.beta2, step));
  }
  s.eps = options.eps;
  s.coupled_decay = options.decoupled_weight_decay ? 0.0 : options.weight_decay;
  s.decay_factor = options.decoupled_weight_decay ? 1.0 - options.lr * options.weight_decay : 1.0;
  s.grad_factor = options.maximize ? -grad_factor : grad_factor;
  // A step with a learning rate of 0 does not project.
  s.lower = options.lr == 0 ? -double(INFINITY) : options.lower;
  s.upper = options.lr == 0 ? double(INFINITY) : options.upper;
  return s;
}

// What a step learns of its gradients before it takes them; null where there is nothing to learn.
// The twin of scalars.StepInputs.
struct StepInputs {
  const float* grad_scale;
  const float* found_inf;
  const double* grad_norm;  // unscaled
  double max_grad_norm;
};

struct GradientFactor {
  double factor;
  bool skip;
};

// The twin of scalars.gradient_factor.
ADAMAL_HD inline GradientFactor gradient_factor(const StepInputs& inputs) {
  GradientFactor found{1.0, false};
  if (inputs.grad_scale != nullptr) found.factor = 1.0 / double(*inputs.grad_scale);
  if (inputs.found_inf != nullptr) found.skip = *inputs.found_inf != 0;
  if (inputs.grad_norm != nullptr) {
    const double norm = *inputs.grad_norm;
    // False for NaN too.
    found.skip = found.skip || !(norm < double(INFINITY));
    const double clip = inputs.max_grad_norm / (norm + 1e-6);
    if (clip < 1.0) found.factor *= clip;
  }
  return found;
}

}  // namespace adamal
