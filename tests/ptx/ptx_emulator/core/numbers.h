// Number formats and the rounding of instructions that are not correctly rounded.
#pragma once
#include <cmath>
#include <cstring>
#include "interface.h"

inline float as_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline u32 as_bits(float f) { u32 bits; std::memcpy(&bits, &f, 4); return bits; }

// Results that are NaN have one bit pattern, as on the hardware.
constexpr u32 NAN32 = 0x7fffffff;
constexpr u16 NAN16 = 0x7fff;
inline u32 result(float f) { return f != f ? NAN32 : as_bits(f); }

inline float flush(float f) { return as_bits(f) & 0x7f800000u ? f : as_float(as_bits(f) & 0x80000000u); }

inline float from_bfloat16(u32 half) { return as_float(half << 16); }
inline u16 to_bfloat16(float f) {
  u32 bits = as_bits(f);
  return f != f ? NAN16 : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(u32 half) {
  u32 sign = (half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  if (exponent == 0) return as_float(sign | as_bits(float(fraction) * 0x1p-24f));
  if (exponent == 31) return as_float(sign | 0x7f800000u | (fraction << 13));
  return as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}
inline u16 to_float16(float f) {
  u32 sign = (as_bits(f) >> 16) & 0x8000, size = as_bits(f) & 0x7fffffff;
  if (f != f) return NAN16;
  if (size >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and more round to infinity
  if (size < 0x38800000) return u16(sign | u32(std::nearbyintf(std::fabs(f) * 0x1p24f)));  // units of 2^-24
  return u16(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

inline float from_half(u32 half, bool bfloat16) {
  return bfloat16 ? from_bfloat16(half & 0xffff) : from_float16(half & 0xffff);
}
inline u16 to_half(float f, bool bfloat16) { return bfloat16 ? to_bfloat16(f) : to_float16(f); }

// A float from which rounding on to half precision gives what rounding the double to it once would.
inline float round_to_odd(double exact) {
  float f = float(exact);
  if (double(f) == exact || exact != exact || std::isinf(f)) return f;
  if (std::fabs(double(f)) > std::fabs(exact)) f = std::nextafterf(f, 0.0f);
  return as_float(as_bits(f) | 1);
}

// Another value within `ulps` units in the last place of a correctly rounded one, always the same for the same input.
inline float approximate(float rounded, u32 input, int ulps, int mode) {
  if (!mode || rounded != rounded || rounded == 0 || std::isinf(rounded)) return rounded;
  u32 h = input;
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h ^= h >> 16;
  int step = mode == 1 ? int(h % (2 * ulps + 1)) - ulps : mode == 2 ? ulps : -ulps;
  u32 bits = as_bits(rounded), moved = bits + step;
  bool leaves_range = ((moved ^ bits) & 0x80000000u) || (moved & 0x7f800000u) == 0x7f800000u || !(moved & 0x7f800000u);
  return leaves_range ? rounded : as_float(moved);
}

// div.full and div.approx: the dividend times the reciprocal of the divisor, which is exact for powers of two.
inline float divide_approximately(float a, float b, int mode) {
  if (a != a || b != b || b == 0 || std::isinf(b) || std::isinf(a) || a == 0) return a / b;
  float scale = std::fabs(b) > 8.5e37f ? 0.25f : std::fabs(b) < 1.2e-38f ? 16777216.0f : 1.0f;
  float reciprocal = 1.0f / (b * scale);
  if (as_bits(b * scale) & 0x7fffff) reciprocal = approximate(reciprocal, as_bits(b * scale), 1, mode);
  return (a * scale) * reciprocal;
}
