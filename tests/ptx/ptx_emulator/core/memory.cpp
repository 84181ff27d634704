// Checks of accesses to global and shared memory: bounds, definedness, races, copies and products under way.
#include <algorithm>
#include <cstring>
#include "machine.h"

// The region that holds all of the access, and where in it; false, with a finding, if the access is not allowed.
bool Machine::find_region(s32 pc, s32 lane, u64 address, u32 size, u64& offset) {
  auto inside = [&](s32 i) {
    const Region& r = job.regions[i];
    return address >= r.base && address + size <= r.base + r.size;
  };
  if (address % size) {
    find(misaligned, pc, -1, lane, address);
    return false;
  }
  if (!job.region_count || !inside(region)) {
    s32 i = 0;
    while (i < job.region_count && !inside(i)) i++;
    if (i == job.region_count) {
      find(out_of_bounds, pc, -1, lane, address);
      return false;
    }
    region = i;
  }
  offset = address - job.regions[region].base;
  const u8* allowed = job.regions[region].allowed + offset;
  if (std::find(allowed, allowed + size, 0) != allowed + size) {
    find(between_elements, pc, -1, lane, address, region);
    return false;
  }
  return true;
}

bool Machine::read_global(s32 pc, s32 lane, u64 address, u32 size, bool& undefined) {
  u64 offset;
  if (!find_region(pc, lane, address, size, offset)) return false;
  const u8* defined = job.regions[region].defined + offset;
  undefined = std::find(defined, defined + size, 0) != defined + size;
  if (undefined) find(undefined_global_read, pc, -1, lane, address, region);
  const u32 reader = program + 1;
  for (u64 i = offset / 2; i <= (offset + size - 1) / 2; i++) {
    GlobalPair& pair = global_pairs[region][i];
    if (pair.write_program && pair.write_program != reader)
      find(programs_read_after_write, pc, pair.write_pc, lane, address, region);
    else if (pair.write_program == reader && pair.write_epoch == epoch && pair.write_warp != current)
      find(global_read_after_write, pc, pair.write_pc, lane, address, region);
    if (pair.read_program && pair.read_program != reader) {
      pair.read_program = ALL;  // by several
    } else {
      if (pair.read_epoch != epoch || !pair.read_program) pair.read_warps = 0;
      pair.read_program = reader;
      pair.read_epoch = epoch;
      pair.read_warps |= 1u << current;
    }
    pair.read_pc = pc;
  }
  return true;
}

bool Machine::write_global(s32 pc, s32 lane, u64 address, u32 size, const u8* data, bool undefined) {
  u64 offset;
  if (!find_region(pc, lane, address, size, offset)) return false;
  const u32 writer = program + 1;
  for (u64 i = offset / 2; i <= (offset + size - 1) / 2; i++) {
    GlobalPair& pair = global_pairs[region][i];
    u32 at = u32(std::max(2 * i, offset) - offset), bytes = std::min(2u, size - at);
    bool same = !std::memcmp(reinterpret_cast<const u8*>(address) + at, data + at, bytes);
    if (pair.write_program && pair.write_program != writer)
      find(same ? global_same_value_twice : programs_write_after_write, pc, pair.write_pc, lane, address, region);
    else if (pair.write_program == writer && pair.write_epoch == epoch && pair.write_warp != current)
      find(same ? global_same_value_twice : global_write_after_write, pc, pair.write_pc, lane, address, region);
    if (!same && pair.read_program && pair.read_program != writer)
      find(programs_write_after_read, pc, pair.read_pc, lane, address, region);
    else if (!same && pair.read_program == writer && pair.read_epoch == epoch && (pair.read_warps & ~(1u << current)))
      find(global_write_after_read, pc, pair.read_pc, lane, address, region);
    pair.write_program = writer;
    pair.write_epoch = epoch;
    pair.write_pc = pc;
    pair.write_warp = u8(current);
  }
  if (undefined) find(store_of_undefined, pc, -1, lane, address, region);
  std::memcpy(reinterpret_cast<u8*>(address), data, size);
  std::memset(job.regions[region].defined + offset, !undefined, size);
  return true;
}

bool Machine::read_shared(s32 pc, s32 lane, u32 address, u32 size, bool& undefined, bool by_wgmma) {
  undefined = false;
  if (u64(address) + size > shared.size()) {
    find(shared_out_of_bounds, pc, -1, lane, address);
    return false;
  }
  const Warp& reader = warps[current];
  for (u32 i = address; i < address + size; i++) {
    SharedByte& byte = shared_bytes[i];
    const bool by_warp = byte.write_agent < job.warps;
    if (byte.state == OF_MBARRIER)
      find(mbarrier_accessed, pc, byte.write_pc, lane, address);
    else if (byte.state == COPYING)
      find(by_warp ? read_before_cp_async_landed : read_before_bulk_copy, pc, byte.write_pc, lane, address);
    else
      undefined |= !byte.defined;
    if (byte.write_agent != current) {
      if (byte.write_time > reader.known[byte.write_agent])
        find(by_warp ? shared_read_after_write : read_before_bulk_copy, pc, byte.write_pc, lane, address);
    } else if (byte.write_time && byte.write_lane != lane && byte.write_sync == reader.syncs && !by_wgmma) {
      find(warp_exchange_without_sync, pc, byte.write_pc, lane, address);
    }
    if (by_wgmma && byte.defined && byte.write_time && by_warp) {
      // Either the writer has fenced since, or the reader after it learned of the write.
      bool fenced = warps[byte.write_agent].fences != byte.write_fences;
      fenced |= byte.write_agent != current && reader.known_at_fence[byte.write_agent] >= byte.write_time;
      bool copied = job.code[byte.write_pc].opcode == OP_cp_async;
      Kind kind = copied ? wgmma_of_cp_async_without_proxy_fence : wgmma_without_proxy_fence;
      if (!fenced) find(kind, pc, byte.write_pc, lane, address);
    }
    byte.read_pc = pc;
  }
  std::fill_n(&read_times[current][address], size, reader.known[current]);
  if (undefined) find(undefined_shared_read, pc, -1, lane, address);
  return true;
}

// What stands against a write of the current warp, or of a bulk copy that it begins.
void Machine::check_write(s32 pc, s32 lane, u32 address, u32 size, const u8* data, bool bulk) {
  const Clock& known = warps[current].known;
  for (u32 i = 0; i < size; i++) {
    SharedByte& byte = shared_bytes[address + i];
    const bool by_warp = byte.write_agent < job.warps;
    bool same = data && byte.defined && shared[address + i] == data[i];
    if (byte.state == OF_MBARRIER) find(mbarrier_accessed, pc, byte.write_pc, lane, address);
    if (byte.state == COPYING)
      find(by_warp ? write_before_cp_async_landed : write_before_bulk_copy, pc, byte.write_pc, lane, address);
    if (byte.write_agent != current && byte.write_time > known[byte.write_agent])
      find(!by_warp ? write_before_bulk_copy : same ? shared_same_value_twice : shared_write_after_write, pc,
           byte.write_pc, lane, address);
  }
  for (s32 w = 0; w < job.warps; w++) {
    const u32* times = &read_times[w][address];
    if (w != current && std::any_of(times, times + size, [&](u32 time) { return time > known[w]; }))
      find(bulk ? bulk_copy_over_reads : shared_write_after_read, pc, shared_bytes[address].read_pc, lane, address);
  }
}

// Marks a write of the current warp; locks of products in flight are looked at here.
void Machine::mark_shared(s32 pc, s32 lane, u32 address, u32 size) {
  const Warp& writer = warps[current];
  for (u32 i = address; i < address + size; i++) {
    SharedByte& byte = shared_bytes[i];
    if (locks[i / 16]) find(write_while_wgmma_reads, pc, -1, lane, address);
    byte.write_time = writer.known[current];
    byte.write_pc = pc;
    byte.write_agent = u8(current);
    byte.write_lane = u8(lane);
    byte.write_sync = writer.syncs;
    byte.write_fences = writer.fences;
  }
}

bool Machine::write_shared(s32 pc, s32 lane, u32 address, u32 size, const u8* data, bool undefined) {
  if (u64(address) + size > shared.size()) {
    find(shared_out_of_bounds, pc, -1, lane, address);
    return false;
  }
  check_write(pc, lane, address, size, data, false);
  for (u32 i = address; i < address + size; i++) {
    shared_bytes[i].defined = !undefined;
    shared_bytes[i].state = data ? PLAIN : COPYING;
  }
  mark_shared(pc, lane, address, size);
  if (data)
    std::memcpy(&shared[address], data, size);
  else
    std::memset(&shared[address], 0x7f, size);
  return true;
}

// From its issue on a copy may change its target at any time; it is there for the issuing warp after a wait.
void Machine::begin_copy(Warp& warp, const AsyncCopy& copy) {
  if (write_shared(copy.pc, copy.lane, copy.target, copy.size, nullptr, true)) warp.open_copies.push_back(copy);
}

void Machine::land(std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& copy : copies) {
    mark_shared(copy.pc, copy.lane, copy.target, copy.size);
    for (u32 i = copy.target; i < copy.target + copy.size; i++) {
      shared_bytes[i].state = PLAIN;
      shared_bytes[i].defined = !copy.undefined;
    }
    std::memcpy(&shared[copy.target], copy.data, copy.size);
  }
  copies.clear();
}

// A product reads its operands until it has been waited for.
void Machine::end_product(const Product& product) {
  for (u32 chunk : product.chunks) {
    locks[chunk]--;
    u32 first = 16 * chunk, size = std::min(16u, u32(shared.size()) - first);
    std::fill_n(&read_times[current][first], size, warps[current].known[current]);
    for (u32 i = first; i < first + size; i++) shared_bytes[i].read_pc = u32(product.pc);
  }
}

// A bulk copy writes from its issue on, in the name of the mbarrier that it reports to.
void Machine::begin_bulk_copy(BulkCopy copy, Mbarrier& barrier, s32 lane) {
  const u32 size = u32(copy.data.size());
  if (u64(copy.target) + size > shared.size()) {
    find(shared_out_of_bounds, copy.pc, -1, lane, copy.target);
    return;
  }
  if (warps[barrier.warp].fences == barrier.fences) find(mbarrier_without_proxy_fence, copy.pc, barrier.pc, lane);
  check_write(copy.pc, lane, copy.target, size, nullptr, true);
  for (u32 i = copy.target; i < copy.target + size; i++) {
    SharedByte& byte = shared_bytes[i];
    if (locks[i / 16]) find(write_while_wgmma_reads, copy.pc, byte.read_pc, lane, i);
    byte.write_time = barrier.phase;
    byte.write_pc = u32(copy.pc);
    byte.write_agent = u8(barrier.agent);
    byte.defined = 0;
    byte.state = COPYING;
  }
  std::memset(&shared[copy.target], 0x7f, size);
  barrier.copied = barrier.phase;
  bulk_copies.push_back(std::move(copy));
}

// What bulk copies write is there, and their mbarriers are told: in any order.
void Machine::land_bulk_copies() {
  while (!bulk_copies.empty()) {
    size_t next = job.warp_order == 2 ? random() % bulk_copies.size() : 0;
    BulkCopy copy = std::move(bulk_copies[next]);
    bulk_copies.erase(bulk_copies.begin() + s64(next));
    for (u32 i = 0; i < copy.data.size(); i++) {
      shared[copy.target + i] = copy.data[i];
      shared_bytes[copy.target + i].defined = copy.defined[i];
      shared_bytes[copy.target + i].state = PLAIN;
    }
    auto barrier = mbarriers.find(copy.mbarrier);
    if (barrier == mbarriers.end())
      find(mbarrier_missing, copy.pc, -1, 0, copy.mbarrier);
    else
      copied(barrier->second, copy.pc, copy.mbarrier, s64(copy.data.size()));
  }
}
