// Loads, stores, asynchronous copies, and the matrix loads and stores of shared memory.
#include <algorithm>
#include <cstring>
#include "machine.h"

namespace {
void needs_defined_address(const Step& s, u32 undefined) {
  if (undefined & s.lanes) s.machine.find(undefined_address, s.pc, -1, first_lane(undefined & s.lanes));
}

// A register with one element of a load; with WIDE it has 64 bits.
void put(const Step& s, int i, int lane, u64 value, bool undefined) {
  if (!s.has(i)) return;
  u32 bit = 1u << lane, mark = undefined ? bit : 0;
  if (s.flag(WIDE)) {
    s.d(i)[lane] = value;
    u32& known = s.warp.undefined64[s.operands[i]];
    known = (known & ~bit) | mark;
  } else {
    s.r(i)[lane] = u32(value);
    u32& known = s.warp.undefined32[s.operands[i]];
    known = (known & ~bit) | mark;
  }
}

// Operands: `width` results, the address.
template <class Address, class Read>
void load(const Step& s, Address address_of, Read read) {
  const int size = s.instruction.size, width = s.instruction.width;
  for (int lane = 0; lane < 32; lane++) {
    if (!(s.lanes >> lane & 1)) continue;
    u8 buffer[32];
    bool undefined = false;
    if (!read(lane, address_of(lane), u32(size * width), buffer, undefined)) {
      std::memset(buffer, 0xff, sizeof buffer);
      undefined = true;
    }
    for (int i = 0; i < width; i++) {
      u64 value = 0;
      std::memcpy(&value, buffer + i * size, size);
      int drop = 64 - 8 * size;
      if (s.flag(SIGNED)) value = u64(s64(value << drop) >> drop);
      put(s, i, lane, value, undefined);
    }
  }
}

// Operands: the address, `width` values.
template <class Address, class Write>
void store(const Step& s, Address address_of, Write write) {
  const int size = s.instruction.size, width = s.instruction.width;
  for (int lane = 0; lane < 32; lane++) {
    if (!(s.lanes >> lane & 1)) continue;
    u8 buffer[32];
    bool undefined = false;
    for (int i = 0; i < width; i++) {
      if (s.flag(WIDE))
        std::memcpy(buffer + i * size, &s.d(1 + i)[lane], size);
      else
        std::memcpy(buffer + i * size, &s.r(1 + i)[lane], size);
      undefined |= (s.flag(WIDE) ? s.undefined_d(1 + i) : s.undefined_r(1 + i)) >> lane & 1;
    }
    write(lane, address_of(lane), u32(size * width), buffer, undefined);
  }
}

bool aligned(const Step& s, int lane, u32 address, u32 size) {
  if (address % size == 0) return true;
  s.machine.find(misaligned, s.pc, -1, lane, address);
  return false;
}
}  // namespace

// Operand: the result; immediate: the place among the parameters.
void op::ld_param(const Step& s) {
  u64 value = 0;
  const int size = s.instruction.size, drop = 64 - 8 * size;
  std::memcpy(&value, s.machine.job.parameters + s.instruction.immediate, size);
  if (s.flag(SIGNED)) value = u64(s64(value << drop) >> drop);
  for (int lane = 0; lane < 32; lane++)
    if (s.lanes >> lane & 1) put(s, 0, lane, value, false);
}

void op::ld_global(const Step& s) {
  const int last = s.instruction.width;
  needs_defined_address(s, s.undefined_d(last));
  const u64* base = s.d(last);
  u64 addresses[32];
  for (int l = 0; l < 32; l++) addresses[l] = base[l] + u64(s.instruction.immediate);  // a result may be the address
  load(s, [&](int lane) { return addresses[lane]; }, [&](int lane, u64 address, u32 size, u8* buffer, bool& undefined) {
    if (!s.machine.read_global(s.pc, lane, address, size, undefined)) return false;
    std::memcpy(buffer, reinterpret_cast<const u8*>(address), size);
    return true;
  });
}

void op::ld_shared(const Step& s) {
  const int last = s.instruction.width;
  needs_defined_address(s, s.undefined_r(last));
  u32 addresses[32];
  for (int l = 0; l < 32; l++) addresses[l] = s.r(last)[l] + u32(s.instruction.immediate);
  load(s, [&](int lane) { return addresses[lane]; }, [&](int lane, u32 address, u32 size, u8* buffer, bool& undefined) {
    if (!aligned(s, lane, address, size) || !s.machine.read_shared(s.pc, lane, address, size, undefined)) return false;
    std::memcpy(buffer, &s.machine.shared[address], size);
    return true;
  });
}

void op::st_global(const Step& s) {
  needs_defined_address(s, s.undefined_d(0));
  store(s, [&](int lane) { return s.d(0)[lane] + u64(s.instruction.immediate); },
        [&](int lane, u64 address, u32 size, const u8* data, bool undefined) {
          s.machine.write_global(s.pc, lane, address, size, data, undefined);
        });
}

void op::st_shared(const Step& s) {
  needs_defined_address(s, s.undefined_r(0));
  store(s, [&](int lane) { return s.r(0)[lane] + u32(s.instruction.immediate); },
        [&](int lane, u32 address, u32 size, const u8* data, bool undefined) {
          if (aligned(s, lane, address, size)) s.machine.write_shared(s.pc, lane, address, size, data, undefined);
        });
}

// Operands: shared address, global address, bytes to read (the rest is zero) or -1; size: bytes written; kind: offset
// of the shared address; immediate: that of the global one.
void op::cp_async(const Step& s) {
  needs_defined_address(s, s.undefined_r(0) | s.undefined_d(1));
  u32 undefined_size = s.has(2) ? s.undefined_r(2) & s.lanes : 0;
  if (undefined_size) s.machine.find(undefined_guard, s.pc, -1, first_lane(undefined_size));
  const u32 size = s.instruction.size;
  for (int lane = 0; lane < 32; lane++) {
    if (!(s.lanes >> lane & 1)) continue;
    AsyncCopy copy{s.r(0)[lane] + s.instruction.kind, s.pc, u16(size), u8(lane), 0, {}};
    u64 source = s.d(1)[lane] + u64(s.instruction.immediate);
    u32 bytes = s.has(2) ? std::min(s.r(2)[lane], size) : size;
    if (!aligned(s, lane, copy.target, size)) continue;
    if (bytes) {
      bool undefined = false;
      if (s.machine.read_global(s.pc, lane, source, bytes, undefined))
        std::memcpy(copy.data, reinterpret_cast<const u8*>(source), bytes);
      else
        undefined = true;
      copy.undefined = undefined;
    }
    s.machine.begin_copy(s.warp, copy);
  }
}

void op::cp_async_commit_group(const Step& s) {
  s.warp.copy_groups.push_back(std::move(s.warp.open_copies));
  s.warp.open_copies.clear();
}

// immediate: how many of the newest groups may still be under way.
void op::cp_async_wait_group(const Step& s) {
  auto& groups = s.warp.copy_groups;
  while (s64(groups.size()) > s.instruction.immediate) {
    s.machine.land(groups.front());
    groups.erase(groups.begin());
  }
}

void op::cp_async_wait_all(const Step& s) {
  for (auto& group : s.warp.copy_groups) s.machine.land(group);
  s.warp.copy_groups.clear();
  s.machine.land(s.warp.open_copies);
}

// `width` matrices of 8 rows of 16 bytes; lane 8 * i + row has the address of a row of matrix i. Operands: results,
// address.
void op::ldmatrix(const Step& s) {
  s.needs_all_lanes();
  const int width = s.instruction.width;
  const bool transposed = s.flag(TRANSPOSE);
  u32 rows = width == 4 ? ALL : (1u << (8 * width)) - 1;
  if (s.undefined_r(width) & rows) s.machine.find(undefined_address, s.pc, -1, first_lane(s.undefined_r(width) & rows));
  u16 matrix[4][8][8] = {};
  u32 bad[4] = {};  // rows that are undefined
  for (int lane = 0; lane < 8 * width; lane++) {
    u32 address = s.r(width)[lane] + u32(s.instruction.immediate);
    bool undefined = false;
    if (aligned(s, lane, address, 16) && s.machine.read_shared(s.pc, lane, address, 16, undefined))
      std::memcpy(matrix[lane / 8][lane % 8], &s.machine.shared[address], 16);
    else
      undefined = true;
    if (undefined) bad[lane / 8] |= 1u << lane % 8;
  }
  for (int i = 0; i < width; i++) {
    u32 undefined = 0;
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4, pair = 2 * (lane % 4);
      auto& m = matrix[i];
      u16 low = transposed ? m[pair][row] : m[row][pair], high = transposed ? m[pair + 1][row] : m[row][pair + 1];
      s.r(i)[lane] = low | u32(high) << 16;
      if (transposed ? bad[i] >> pair & 3 : bad[i] >> row & 1) undefined |= 1u << lane;
    }
    s.define_r(i, undefined);
  }
}

// The reverse. Operands: address, `width` values.
void op::stmatrix(const Step& s) {
  s.needs_all_lanes();
  for (int lane = 0; lane < 8 * s.instruction.width; lane++) {
    int i = lane / 8, row = lane % 8;
    const u32* values = s.r(1 + i);
    u16 data[8];
    bool undefined = false;
    for (int column = 0; column < 8; column++) {
      int from = s.flag(TRANSPOSE) ? column * 4 + row / 2 : row * 4 + column / 2;
      int upper = s.flag(TRANSPOSE) ? row & 1 : column & 1;
      data[column] = u16(values[from] >> (16 * upper));
      undefined |= s.undefined_r(1 + i) >> from & 1;
    }
    u32 address = s.r(0)[lane] + u32(s.instruction.immediate);
    if (s.undefined_r(0) >> lane & 1) s.machine.find(undefined_address, s.pc, -1, lane);
    if (aligned(s, lane, address, 16))
      s.machine.write_shared(s.pc, lane, address, 16, reinterpret_cast<const u8*>(data), undefined);
  }
}
