// Integer arithmetic, by the rules of PTX: shifts by more than the width saturate, and division by 0 is defined here.
#include <algorithm>
#include <limits>
#include "machine.h"

namespace {
u32 byte_permute(u32 a, u32 b, u32 selector) {
  u64 bytes = u64(b) << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 choice = selector >> (4 * i) & 15, byte = u32(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign of the byte instead
    out |= byte << (8 * i);
  }
  return out;
}

u32 extract_signed(u32 a, u32 position, u32 length) {
  u32 sign = length == 0 ? 0 : a >> std::min(position + length - 1, 31u) & 1, out = 0;
  for (u32 i = 0; i < 32; i++) out |= (i < length && position + i < 32 ? a >> (position + i) & 1 : sign) << i;
  return out;
}

u64 low_bits(u64 value, u32 length) { return length > 63 ? value : value & ((u64(1) << length) - 1); }

u32 reversed(u32 a) {
  u32 out = 0;
  for (int i = 0; i < 32; i++) out |= (a >> i & 1) << (31 - i);
  return out;
}

template <class T>
u64 quotient(u64 a, u64 b) {
  T x = T(a), y = T(b);
  if (y == 0) return ~u64(0);
  if (std::numeric_limits<T>::is_signed && y == T(-1)) return 0 - a;
  return u64(x / y);
}

template <class T>
u64 remainder(u64 a, u64 b) {
  T x = T(a), y = T(b);
  if (y == 0) return a;
  if (std::numeric_limits<T>::is_signed && y == T(-1)) return 0;
  return u64(x % y);
}

template <class F>
void unary64(const Step& s, F f) {
  u64* out = s.d(0);
  const u64* a = s.d(1);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l]); });
  s.define_d(0, s.undefined_d(1));
}
template <class F>
void binary64(const Step& s, F f) {
  u64* out = s.d(0);
  const u64 *a = s.d(1), *b = s.d(2);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l]); });
  s.define_d(0, s.undefined_d(1) | s.undefined_d(2));
}
template <class F>
void shift64(const Step& s, F f) {
  u64* out = s.d(0);
  const u64* a = s.d(1);
  const u32* b = s.r(2);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l]); });
  s.define_d(0, s.undefined_d(1) | s.undefined_r(2));
}
template <class F>
void wide(const Step& s, F f) {
  u64* out = s.d(0);
  const u32 *a = s.r(1), *b = s.r(2);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l]); });
  s.define_d(0, s.undefined_r(1) | s.undefined_r(2));
}
template <class F>
void wide_add(const Step& s, F f) {
  u64* out = s.d(0);
  const u32 *a = s.r(1), *b = s.r(2);
  const u64* c = s.d(3);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l]) + c[l]; });
  s.define_d(0, s.undefined_r(1) | s.undefined_r(2) | s.undefined_d(3));
}

u64 product_s32(u32 a, u32 b) { return u64(s64(s32(a)) * s64(s32(b))); }
u64 product_u32(u32 a, u32 b) { return u64(a) * b; }
}  // namespace

#define UNARY(name, expression) \
  void op::name(const Step& s) { unary(s, [](u32 a) -> u32 { return u32(expression); }); }
#define BINARY(name, expression) \
  void op::name(const Step& s) { binary(s, [](u32 a, u32 b) -> u32 { return u32(expression); }); }
#define TERNARY(name, expression) \
  void op::name(const Step& s) { ternary(s, [](u32 a, u32 b, u32 c) -> u32 { return u32(expression); }); }
#define UNARY64(name, expression) \
  void op::name(const Step& s) { unary64(s, [](u64 a) -> u64 { return u64(expression); }); }
#define BINARY64(name, expression) \
  void op::name(const Step& s) { binary64(s, [](u64 a, u64 b) -> u64 { return u64(expression); }); }
#define SHIFT64(name, expression) \
  void op::name(const Step& s) { shift64(s, [](u64 a, u32 b) -> u64 { return u64(expression); }); }

BINARY(add_b16, u16(a + b))
BINARY(sub_b16, u16(a - b))
BINARY(mul_b16, u16(a * b))
TERNARY(mad_b16, u16(a * b + c))
BINARY(mul_hi_u16, (a & 0xffff) * (b & 0xffff) >> 16)
BINARY(mul_hi_s16, u16(s32(s16(a)) * s32(s16(b)) >> 16))
BINARY(mul_wide_u16, (a & 0xffff) * (b & 0xffff))
BINARY(mul_wide_s16, s32(s16(a)) * s32(s16(b)))
UNARY(neg_b16, u16(0 - a))
UNARY(not_b16, u16(~a))
BINARY(shl_b16, b > 15 ? 0 : u16(a << b))
BINARY(shr_u16, b > 15 ? 0 : (a & 0xffff) >> b)
BINARY(shr_s16, u16(s16(a) >> std::min(b, 15u)))
BINARY(min_u16, std::min(a & 0xffff, b & 0xffff))
BINARY(min_s16, u16(std::min(s16(a), s16(b))))
BINARY(max_u16, std::max(a & 0xffff, b & 0xffff))
BINARY(max_s16, u16(std::max(s16(a), s16(b))))

BINARY(add_b32, a + b)
BINARY(sub_b32, a - b)
BINARY(mul_b32, a * b)
TERNARY(mad_b32, a * b + c)
BINARY(mul_hi_u32, product_u32(a, b) >> 32)
BINARY(mul_hi_s32, product_s32(a, b) >> 32)
UNARY(neg_b32, 0 - a)
UNARY(not_b32, ~a)
UNARY(abs_s32, s32(a) < 0 ? 0 - a : a)
BINARY(and_b32, a & b)
BINARY(or_b32, a | b)
BINARY(xor_b32, a ^ b)
BINARY(shl_b32, b > 31 ? 0 : a << b)
BINARY(shr_u32, b > 31 ? 0 : a >> b)
BINARY(shr_s32, s32(a) >> std::min(b, 31u))
BINARY(min_u32, std::min(a, b))
BINARY(min_s32, std::min(s32(a), s32(b)))
BINARY(max_u32, std::max(a, b))
BINARY(max_s32, std::max(s32(a), s32(b)))
BINARY(min_relu_s32, std::max(std::min(s32(a), s32(b)), 0))
BINARY(max_relu_s32, std::max(std::max(s32(a), s32(b)), 0))
BINARY(div_u32, quotient<u32>(a, b))
BINARY(div_s32, quotient<s32>(a, b))
BINARY(rem_u32, remainder<u32>(a, b))
BINARY(rem_s32, remainder<s32>(a, b))
UNARY(popc_b32, __builtin_popcount(a))
UNARY(clz_b32, a ? __builtin_clz(a) : 32)
UNARY(brev_b32, reversed(a))
TERNARY(bfe_u32, low_bits((b & 255) > 31 ? 0 : a >> (b & 255), c & 255))
TERNARY(bfe_s32, extract_signed(a, b & 255, c & 255))
TERNARY(prmt_b32, byte_permute(a, b, c))

// The funnel shifts take b:a as one number of 64 bits.
void op::shf_l_b32(const Step& s) {
  bool clamp = s.flag(CLAMP);
  ternary(s, [=](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << (clamp ? std::min(c, 32u) : c & 31) >> 32); });
}
void op::shf_r_b32(const Step& s) {
  bool clamp = s.flag(CLAMP);
  ternary(s, [=](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (clamp ? std::min(c, 32u) : c & 31)); });
}

// Any function of three bits; kind is its truth table.
void op::lop3_b32(const Step& s) {
  u32 truth = s.instruction.kind;
  ternary(s, [=](u32 a, u32 b, u32 c) {
    u32 out = 0;
    for (u32 row = 0; row < 8; row++)
      if (truth >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return out;
  });
}

void op::mul_wide_u32(const Step& s) { wide(s, product_u32); }
void op::mul_wide_s32(const Step& s) { wide(s, product_s32); }
void op::mad_wide_u32(const Step& s) { wide_add(s, product_u32); }
void op::mad_wide_s32(const Step& s) { wide_add(s, product_s32); }

BINARY64(add_b64, a + b)
BINARY64(sub_b64, a - b)
BINARY64(mul_b64, a * b)
void op::mad_b64(const Step& s) {
  u64* out = s.d(0);
  const u64 *a = s.d(1), *b = s.d(2), *c = s.d(3);
  each_lane(s.lanes, [=](int l) { out[l] = a[l] * b[l] + c[l]; });
  s.define_d(0, s.undefined_d(1) | s.undefined_d(2) | s.undefined_d(3));
}
BINARY64(mul_hi_u64, (unsigned __int128)(a)*b >> 64)
BINARY64(mul_hi_s64, __int128(s64(a)) * s64(b) >> 64)
UNARY64(neg_b64, 0 - a)
UNARY64(not_b64, ~a)
BINARY64(and_b64, a & b)
BINARY64(or_b64, a | b)
BINARY64(xor_b64, a ^ b)
SHIFT64(shl_b64, b > 63 ? 0 : a << b)
SHIFT64(shr_u64, b > 63 ? 0 : a >> b)
SHIFT64(shr_s64, s64(a) >> std::min(b, 63u))
BINARY64(min_u64, std::min(a, b))
BINARY64(min_s64, std::min(s64(a), s64(b)))
BINARY64(max_u64, std::max(a, b))
BINARY64(max_s64, std::max(s64(a), s64(b)))
BINARY64(div_u64, quotient<u64>(a, b))
BINARY64(div_s64, quotient<s64>(a, b))
BINARY64(rem_u64, remainder<u64>(a, b))
BINARY64(rem_s64, remainder<s64>(a, b))
void op::bfe_u64(const Step& s) {
  u64* out = s.d(0);
  const u64* a = s.d(1);
  const u32 *b = s.r(2), *c = s.r(3);
  each_lane(s.lanes, [=](int l) { out[l] = low_bits((b[l] & 255) > 63 ? 0 : a[l] >> (b[l] & 255), c[l] & 255); });
  s.define_d(0, s.undefined_d(1) | s.undefined_r(2) | s.undefined_r(3));
}
