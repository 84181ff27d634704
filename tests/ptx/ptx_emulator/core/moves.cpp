// Moves, packing, integer conversions, predicates and comparisons.
#include "machine.h"
#include "numbers.h"

void op::mov_b32(const Step& s) {
  unary(s, [](u32 a) { return a; });
}
void op::mov_b64(const Step& s) {
  u64* out = s.d(0);
  const u64* a = s.d(1);
  each_lane(s.lanes, [=](int l) { out[l] = a[l]; });
  s.define_d(0, s.undefined_d(1));
}
void op::mov_pred(const Step& s) { s.set_p(0, s.p(1), s.undefined_p(1)); }

// Two halves into one register, the first one below.
void op::pack_b32(const Step& s) {
  binary(s, [](u32 a, u32 b) { return (a & 0xffff) | b << 16; });
}
void op::pack_b64(const Step& s) {
  u64* out = s.d(0);
  const u32 *a = s.r(1), *b = s.r(2);
  each_lane(s.lanes, [=](int l) { out[l] = a[l] | u64(b[l]) << 32; });
  s.define_d(0, s.undefined_r(1) | s.undefined_r(2));
}

// The reverse: either result may be left out, and one may be the source itself.
void op::unpack_b32(const Step& s) {
  u32 source[32], undefined = s.undefined_r(2);
  each_lane(ALL, [&](int l) { source[l] = s.r(2)[l]; });
  for (int half = 0; half < 2; half++) {
    if (!s.has(half)) continue;
    u32* out = s.r(half);
    each_lane(s.lanes, [&](int l) { out[l] = source[l] >> (16 * half) & 0xffff; });
    s.define_r(half, undefined);
  }
}
void op::unpack_b64(const Step& s) {
  const u64* source = s.d(2);
  for (int half = 0; half < 2; half++) {
    if (!s.has(half)) continue;
    u32* out = s.r(half);
    each_lane(s.lanes, [=](int l) { out[l] = u32(source[l] >> (32 * half)); });
    s.define_r(half, s.undefined_d(2));
  }
}

// The low `size` bytes of the source, extended to the `width` bits of the result.
void op::cvt_int(const Step& s) {
  const bool wide_source = s.flag(WIDE_SOURCE), wide = s.flag(WIDE), with_sign = s.flag(SIGNED);
  const int drop = 64 - 8 * s.instruction.size;
  u64 value[32];
  for (int l = 0; l < 32; l++) {
    u64 shifted = (wide_source ? s.d(1)[l] : s.r(1)[l]) << drop;
    value[l] = with_sign ? u64(s64(shifted) >> drop) : shifted >> drop;
  }
  u32 undefined = wide_source ? s.undefined_d(1) : s.undefined_r(1);
  if (wide) {
    each_lane(s.lanes, [&](int l) { s.d(0)[l] = value[l]; });
    s.define_d(0, undefined);
  } else {
    u32 mask = s.instruction.width == 32 ? ALL : (1u << s.instruction.width) - 1;
    each_lane(s.lanes, [&](int l) { s.r(0)[l] = u32(value[l]) & mask; });
    s.define_r(0, undefined);
  }
}

void op::selp_b32(const Step& s) {
  u32* out = s.r(0);
  const u32 *a = s.r(1), *b = s.r(2), choice = s.p(3);
  u32 undefined = (choice & s.undefined_r(1)) | (~choice & s.undefined_r(2)) | s.undefined_p(3);
  each_lane(s.lanes, [=](int l) { out[l] = choice >> l & 1 ? a[l] : b[l]; });
  s.define_r(0, undefined);
}
void op::selp_b64(const Step& s) {
  u64* out = s.d(0);
  const u64 *a = s.d(1), *b = s.d(2);
  u32 choice = s.p(3), undefined = (choice & s.undefined_d(1)) | (~choice & s.undefined_d(2)) | s.undefined_p(3);
  each_lane(s.lanes, [=](int l) { out[l] = choice >> l & 1 ? a[l] : b[l]; });
  s.define_d(0, undefined);
}

// An operand that is defined and decides alone makes the result defined.
void op::and_pred(const Step& s) {
  u32 a = s.p(1), b = s.p(2), unknown_a = s.undefined_p(1), unknown_b = s.undefined_p(2);
  u32 decided = (~unknown_a & ~a) | (~unknown_b & ~b);
  s.set_p(0, a & b, (unknown_a | unknown_b) & ~decided);
}
void op::or_pred(const Step& s) {
  u32 a = s.p(1), b = s.p(2), unknown_a = s.undefined_p(1), unknown_b = s.undefined_p(2);
  u32 decided = (~unknown_a & a) | (~unknown_b & b);
  s.set_p(0, a | b, (unknown_a | unknown_b) & ~decided);
}
void op::xor_pred(const Step& s) { s.set_p(0, s.p(1) ^ s.p(2), s.undefined_p(1) | s.undefined_p(2)); }
void op::not_pred(const Step& s) { s.set_p(0, ~s.p(1), s.undefined_p(1)); }

namespace {
enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, IS_NAN };
enum Combination { ALONE, AND, OR, XOR };

// For floats, NE and the others are false if any is NaN; those with U, true.
template <class T>
bool compare(T a, T b, s32 comparison) {
  bool unordered = a != a || b != b;
  switch (comparison) {
    case EQ: return a == b;
    case NE: return !unordered && a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return unordered || a == b;
    case NEU: return a != b;
    case LTU: return !(a >= b);
    case LEU: return !(a > b);
    case GTU: return !(a <= b);
    case GEU: return !(a < b);
    case NUM: return !unordered;
    default: return unordered;
  }
}

// Operands: result, a, b, a predicate to combine with or -1, the result of the opposite comparison or -1.
// kind: Comparison; width: Combination.
template <class F>
void set_predicate(const Step& s, u32 undefined, F holds) {
  u32 yes = 0;
  for (int l = 0; l < 32; l++) yes |= u32(holds(l)) << l;
  u32 no = ~yes, combined = 0;
  if (s.instruction.width != ALONE) {
    combined = s.flag(NEGATED) ? ~s.p(3) : s.p(3);
    undefined |= s.undefined_p(3);
  }
  auto combine = [&](u32 x) {
    switch (s.instruction.width) {
      case AND: return x & combined;
      case OR: return x | combined;
      case XOR: return x ^ combined;
      default: return x;
    }
  };
  s.set_p(0, combine(yes), undefined);
  if (s.has(4)) s.set_p(4, combine(no), undefined);
}

template <class T>
void compare32(const Step& s) {
  const u32 *a = s.r(1), *b = s.r(2);
  s32 kind = s.instruction.kind;
  set_predicate(s, s.undefined_r(1) | s.undefined_r(2), [=](int l) { return compare(T(a[l]), T(b[l]), kind); });
}
template <class T>
void compare64(const Step& s) {
  const u64 *a = s.d(1), *b = s.d(2);
  s32 kind = s.instruction.kind;
  set_predicate(s, s.undefined_d(1) | s.undefined_d(2), [=](int l) { return compare(T(a[l]), T(b[l]), kind); });
}
}  // namespace

void op::setp_s16(const Step& s) { compare32<s16>(s); }
void op::setp_u16(const Step& s) { compare32<u16>(s); }
void op::setp_s32(const Step& s) { compare32<s32>(s); }
void op::setp_u32(const Step& s) { compare32<u32>(s); }
void op::setp_s64(const Step& s) { compare64<s64>(s); }
void op::setp_u64(const Step& s) { compare64<u64>(s); }
void op::setp_f32(const Step& s) {
  const u32 *a = s.r(1), *b = s.r(2);
  const s32 kind = s.instruction.kind;
  const bool ftz = s.flag(FTZ);
  set_predicate(s, s.undefined_r(1) | s.undefined_r(2), [=](int l) {
    float x = as_float(a[l]), y = as_float(b[l]);
    return ftz ? compare(flush(x), flush(y), kind) : compare(x, y, kind);
  });
}
