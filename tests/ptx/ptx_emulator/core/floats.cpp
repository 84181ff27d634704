// float32 arithmetic, half precisions and conversions. A NaN result has one bit pattern.
#include <algorithm>
#include <cmath>
#include <limits>
#include "machine.h"
#include "numbers.h"

namespace {
// With FTZ subnormal inputs and results become zeros of their sign.
template <class F>
void unary_f32(const Step& s, F f) {
  if (s.flag(FTZ))
    unary(s, [=](u32 a) { return result(flush(f(flush(as_float(a))))); });
  else
    unary(s, [=](u32 a) { return result(f(as_float(a))); });
}
template <class F>
void binary_f32(const Step& s, F f) {
  if (s.flag(FTZ))
    binary(s, [=](u32 a, u32 b) { return result(flush(f(flush(as_float(a)), flush(as_float(b))))); });
  else
    binary(s, [=](u32 a, u32 b) { return result(f(as_float(a), as_float(b))); });
}

// Of zeros +0 is the larger one; a NaN loses against a number unless KEEP_NAN.
float larger(float a, float b, bool keep_nan) {
  if (a != a || b != b) return keep_nan || (a != a && b != b) ? as_float(NAN32) : a != a ? b : a;
  if (a == b) return as_float(as_bits(a) & as_bits(b));
  return std::max(a, b);
}
float smaller(float a, float b, bool keep_nan) {
  if (a != a || b != b) return keep_nan || (a != a && b != b) ? as_float(NAN32) : a != a ? b : a;
  if (a == b) return as_float(as_bits(a) | as_bits(b));
  return std::min(a, b);
}

enum Rounding { TO_ZERO, TO_NEAREST, DOWN, UP, NONE };
double to_integer(double x, s32 rounding) {
  switch (rounding) {
    case TO_ZERO: return std::trunc(x);
    case TO_NEAREST: return std::nearbyint(x);
    case DOWN: return std::floor(x);
    case UP: return std::ceil(x);
    default: return x;
  }
}

// Out of range is the nearest integer, and NaN is 0, as the hardware has it.
s64 saturated(float f, s32 rounding, int bits, bool with_sign) {
  double x = f != f ? 0 : to_integer(f, rounding);
  double low = with_sign ? -std::ldexp(1.0, bits - 1) : 0, limit = std::ldexp(1.0, with_sign ? bits - 1 : bits);
  if (x >= limit) return with_sign ? s64((u64(1) << (bits - 1)) - 1) : bits == 64 ? -1 : s64((u64(1) << bits) - 1);
  x = std::max(x, low);
  return with_sign ? s64(x) : s64(u64(x));
}

template <class F>
void approximated(const Step& s, int ulps, F f) {
  int mode = s.flag(APPROX) ? s.machine.job.approximation : 0;
  unary_f32(s, [=](float a) { return approximate(f(a), as_bits(a), ulps, mode); });
}
}  // namespace

void op::add_f32(const Step& s) { binary_f32(s, [](float a, float b) { return a + b; }); }
void op::sub_f32(const Step& s) { binary_f32(s, [](float a, float b) { return a - b; }); }
void op::mul_f32(const Step& s) { binary_f32(s, [](float a, float b) { return a * b; }); }
void op::div_f32(const Step& s) {
  int mode = s.machine.job.approximation;
  if (s.flag(APPROX))
    binary_f32(s, [=](float a, float b) { return divide_approximately(a, b, mode); });
  else
    binary_f32(s, [](float a, float b) { return a / b; });
}
void op::fma_f32(const Step& s) {
  auto fma = [](u32 a, u32 b, u32 c) { return std::fmaf(as_float(a), as_float(b), as_float(c)); };
  auto flushed = [](u32 a) { return as_bits(flush(as_float(a))); };
  if (s.flag(FTZ))
    ternary(s, [=](u32 a, u32 b, u32 c) { return result(flush(fma(flushed(a), flushed(b), flushed(c)))); });
  else
    ternary(s, [=](u32 a, u32 b, u32 c) { return result(fma(a, b, c)); });
}
void op::max_f32(const Step& s) {
  bool keep = s.flag(KEEP_NAN);
  binary_f32(s, [=](float a, float b) { return larger(a, b, keep); });
}
void op::min_f32(const Step& s) {
  bool keep = s.flag(KEEP_NAN);
  binary_f32(s, [=](float a, float b) { return smaller(a, b, keep); });
}
void op::neg_f32(const Step& s) {
  if (s.flag(FTZ))
    unary_f32(s, [](float a) { return -a; });
  else
    unary(s, [](u32 a) { return a ^ 0x80000000u; });
}
void op::abs_f32(const Step& s) {
  if (s.flag(FTZ))
    unary_f32(s, [](float a) { return std::fabs(a); });
  else
    unary(s, [](u32 a) { return a & 0x7fffffffu; });
}
// ex2 of 0 is exact: the largest score of a softmax has the weight 1.
void op::ex2_f32(const Step& s) {
  int mode = s.machine.job.approximation;
  unary_f32(s, [=](float a) { return a == 0 ? 1.0f : approximate(std::exp2f(a), as_bits(a), 2, mode); });
}
void op::lg2_f32(const Step& s) {
  // The bound is absolute near 1, relative elsewhere: 2^-22.
  int mode = s.machine.job.approximation;
  unary_f32(s, [=](float a) {
    float exact = std::log2f(a), bound = 0x1p-22f * (a > 0.5f && a < 2 ? 1.0f : std::fabs(exact));
    if (!mode || exact != exact || std::isinf(exact) || exact == 0) return exact;
    return exact + (mode == 2 || (mode == 1 && as_bits(a) % 3 == 2) ? bound : mode == 1 && as_bits(a) % 3 ? 0 : -bound);
  });
}
void op::rcp_f32(const Step& s) { approximated(s, 1, [](float a) { return 1.0f / a; }); }
void op::sqrt_f32(const Step& s) { approximated(s, 1, [](float a) { return std::sqrt(a); }); }
void op::rsqrt_f32(const Step& s) { approximated(s, 2, [](float a) { return float(1.0 / std::sqrt(double(a))); }); }

// Half precisions, one or two numbers in a register: exact, then rounded once.
void op::half(const Step& s) {
  enum HalfKind { FMA, MUL, ADD, SUB, NEG, ABS };
  const bool bfloat16 = s.flag(BFLOAT16);
  const s32 kind = s.instruction.kind, width = s.instruction.width, count = s.instruction.count;
  u32* out = s.r(0);
  const u32 *a = s.r(1), *b = count > 2 ? s.r(2) : a, *c = count > 3 ? s.r(3) : a;
  auto one = [=](u32 x, u32 y, u32 z) -> u32 {
    if (kind == NEG) return (x ^ 0x8000) & 0xffff;
    if (kind == ABS) return x & 0x7fff;
    double fx = from_half(x, bfloat16), fy = from_half(y, bfloat16), fz = from_half(z, bfloat16);
    double exact = kind == FMA ? fx * fy + fz : kind == MUL ? fx * fy : kind == ADD ? fx + fy : fx - fy;
    return to_half(round_to_odd(exact), bfloat16);
  };
  each_lane(s.lanes, [=](int l) {
    u32 low = one(a[l], b[l], c[l]), high = width == 2 ? one(a[l] >> 16, b[l] >> 16, c[l] >> 16) : 0;
    out[l] = low | high << 16;
  });
  s.define_r(0, s.undefined_r(1) | (count > 2 ? s.undefined_r(2) : 0) | (count > 3 ? s.undefined_r(3) : 0));
}

void op::cvt_f32_bf16(const Step& s) { unary(s, [](u32 a) { return result(from_bfloat16(a & 0xffff)); }); }
void op::cvt_f32_f16(const Step& s) { unary(s, [](u32 a) { return result(from_float16(a & 0xffff)); }); }
void op::cvt_bf16_f32(const Step& s) { unary(s, [](u32 a) -> u32 { return to_bfloat16(as_float(a)); }); }
void op::cvt_f16_f32(const Step& s) { unary(s, [](u32 a) -> u32 { return to_float16(as_float(a)); }); }
// The first operand becomes the upper half.
void op::cvt_bf16x2_f32(const Step& s) {
  binary(s, [](u32 a, u32 b) { return u32(to_bfloat16(as_float(a))) << 16 | to_bfloat16(as_float(b)); });
}
void op::cvt_f16x2_f32(const Step& s) {
  binary(s, [](u32 a, u32 b) { return u32(to_float16(as_float(a))) << 16 | to_float16(as_float(b)); });
}
void op::cvt_f32_f32(const Step& s) {
  s32 rounding = s.instruction.kind;
  unary_f32(s, [=](float a) { return float(to_integer(a, rounding)); });
}

// size: bytes of the integer.
void op::cvt_f32_from_32(const Step& s) {
  bool with_sign = s.flag(SIGNED);
  if (s.instruction.size == 2)
    unary(s, [=](u32 a) { return as_bits(with_sign ? float(s16(a)) : float(u16(a))); });
  else
    unary(s, [=](u32 a) { return as_bits(with_sign ? float(s32(a)) : float(a)); });
}
// An integer of up to 32 bits to a half precision, rounded once.
void op::cvt_half_from_32(const Step& s) {
  const bool with_sign = s.flag(SIGNED), bfloat16 = s.flag(BFLOAT16), is_short = s.instruction.size == 2;
  unary(s, [=](u32 a) -> u32 {
    double exact = with_sign ? (is_short ? s16(a) : s32(a)) : double(is_short ? u16(a) : a);
    return to_half(round_to_odd(exact), bfloat16);
  });
}
void op::cvt_f32_from_64(const Step& s) {
  bool with_sign = s.flag(SIGNED);
  u32* out = s.r(0);
  const u64* a = s.d(1);
  each_lane(s.lanes, [=](int l) { out[l] = as_bits(with_sign ? float(s64(a[l])) : float(a[l])); });
  s.define_r(0, s.undefined_d(1));
}
void op::cvt_32_from_f32(const Step& s) {
  s32 rounding = s.instruction.kind;
  bool with_sign = s.flag(SIGNED);
  unary(s, [=](u32 a) { return u32(saturated(as_float(a), rounding, 32, with_sign)); });
}
void op::cvt_64_from_f32(const Step& s) {
  s32 rounding = s.instruction.kind;
  bool with_sign = s.flag(SIGNED);
  u64* out = s.d(0);
  const u32* a = s.r(1);
  each_lane(s.lanes, [=](int l) { out[l] = u64(saturated(as_float(a[l]), rounding, 64, with_sign)); });
  s.define_d(0, s.undefined_r(1));
}
