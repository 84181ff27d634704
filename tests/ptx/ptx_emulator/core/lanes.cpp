// What the lanes of a warp exchange, and fences. All of it wants every lane of the warp.
#include <algorithm>
#include <cstring>
#include "machine.h"

// Operands: result, predicate or -1, value, lane or distance, clamp and segment mask. kind: up, down, butterfly, index.
void op::shfl_sync(const Step& s) {
  s.needs_all_lanes();
  u32 source[32];
  std::memcpy(source, s.r(2), sizeof source);
  const u32 undefined_source = s.undefined_r(2), undefined_place = s.undefined_r(3) | s.undefined_r(4);
  u32 inside = 0, undefined = 0, results[32];
  for (int l = 0; l < 32; l++) {
    int by = s.r(3)[l] & 31, clamp = s.r(4)[l] & 31, segment = s.r(4)[l] >> 8 & 31;
    int low = l & segment, high = low | (clamp & ~segment), from = l;
    bool ok = false;
    switch (s.instruction.kind) {
      case 0: from = l - by, ok = from >= (low | (clamp & ~segment)); break;
      case 1: from = l + by, ok = from <= high; break;
      case 2: from = l ^ by, ok = from <= high; break;
      default: from = low | (by & ~segment), ok = from <= high;
    }
    if (!ok) from = l;
    results[l] = source[from];
    inside |= u32(ok) << l;
    if ((undefined_source >> from & 1) || (undefined_place >> l & 1) || !(s.lanes >> from & 1)) undefined |= 1u << l;
  }
  u32* out = s.r(0);
  each_lane(s.lanes, [&](int l) { out[l] = results[l]; });
  s.define_r(0, undefined);
  if (s.has(1)) s.set_p(1, inside, undefined_place);
}

// Operands: result, value, mask of lanes. kind: add, min and max with a sign, min and max without, and, or, xor.
void op::redux_sync(const Step& s) {
  s.needs_all_lanes();
  if (s.undefined_r(2) || s.r(2)[0] != ALL) s.machine.find(divergent_sync, s.pc);
  const u32* a = s.r(1);
  int first = first_lane(s.lanes);
  u32 total = a[first];
  for (int l = first + 1; l < 32; l++) {
    if (!(s.lanes >> l & 1)) continue;
    switch (s.instruction.kind) {
      case 0: total += a[l]; break;
      case 1: total = u32(std::min(s32(total), s32(a[l]))); break;
      case 2: total = u32(std::max(s32(total), s32(a[l]))); break;
      case 3: total = std::min(total, a[l]); break;
      case 4: total = std::max(total, a[l]); break;
      case 5: total &= a[l]; break;
      case 6: total |= a[l]; break;
      default: total ^= a[l];
    }
  }
  u32 undefined = s.undefined_r(1) & s.lanes ? ALL : 0, *out = s.r(0);
  each_lane(s.lanes, [=](int l) { out[l] = total; });
  s.define_r(0, undefined);
}

// kind: ballot into a register, any and all into a predicate.
void op::vote_sync(const Step& s) {
  s.needs_all_lanes();
  u32 votes = (s.flag(NEGATED) ? ~s.p(1) : s.p(1)) & s.lanes;
  u32 undefined = s.undefined_p(1) & s.lanes ? ALL : 0;
  if (s.instruction.kind == 0) {
    u32* out = s.r(0);
    each_lane(s.lanes, [=](int l) { out[l] = votes; });
    s.define_r(0, undefined);
  } else {
    s.set_p(0, (s.instruction.kind == 1 ? votes != 0 : votes == s.lanes) ? ALL : 0, undefined);
  }
}

// Operands: the leader or -1, whether a lane is it.
void op::elect_sync(const Step& s) {
  s.needs_all_lanes();
  if (!s.lanes) return;
  u32 leader = u32(first_lane(s.lanes));
  if (s.has(0)) {
    u32* out = s.r(0);
    each_lane(s.lanes, [=](int l) { out[l] = leader; });
    s.define_r(0, 0);
  }
  s.set_p(1, 1u << leader, 0);
}

void op::activemask(const Step& s) {
  u32* out = s.r(0);
  each_lane(s.lanes, [&](int l) { out[l] = s.lanes; });
  s.define_r(0, 0);
}

void op::bar_warp_sync(const Step& s) {
  s.needs_all_lanes();
  s.warp.syncs++;
}

void op::membar(const Step&) {}  // memory is in order here; what orders warps is a barrier

void op::fence_proxy_async(const Step& s) {
  s.warp.fences++;
  s.warp.known_at_fence = s.warp.known;
}
