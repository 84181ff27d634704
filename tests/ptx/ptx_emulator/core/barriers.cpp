// Barriers of a number of threads (bar.sync), mbarriers and their phases, and the registers that setmaxnreg moves.
#include <algorithm>
#include "machine.h"

namespace {
// The shared address of an mbarrier, of operand i.
u32 address_of(const Step& s, int i, int lane) {
  if (s.undefined_r(i) >> lane & 1) s.machine.find(undefined_address, s.pc, -1, lane);
  return s.r(i)[lane] + u32(s.instruction.kind);
}

template <class F>
void each_active(const Step& s, F f) {
  for (int lane = 0; lane < 32; lane++)
    if (s.lanes >> lane & 1) f(lane);
}
}  // namespace

// The warp comes to a barrier and waits there. The last one lets all go on.
void Machine::at_barrier(Warp& warp, s32 pc, s32 number, u32 threads) {
  Barrier& barrier = barriers[number];
  if (!barrier.arrived) {
    barrier.threads = threads;
    barrier.known.assign(warp.known.size(), 0);
  } else if (barrier.threads != threads) {
    find(barrier_counts_differ, pc);
  }
  events++;
  learn(barrier.known, warp.known);
  barrier.arrived += 32;
  barrier.waiting.push_back(current);
  warp.waiting = true;
  warp.wait_pc = pc;
  if (barrier.arrived < barrier.threads) return;
  for (s32 w : barrier.waiting) {
    learn(warps[w].known, barrier.known);
    warps[w].known[w]++;
    warps[w].waiting = false;
    warps[w].syncs++;
  }
  if (s32(barrier.waiting.size()) == job.warps) epoch++;
  barrier.waiting.clear();
  barrier.arrived = 0;
}

// Registers of a warp, by lane. False: too few have been given back so far.
bool Machine::set_registers(Warp& warp, s32 pc, s32 count, bool more) {
  const bool wrong_way = more ? count < warp.registers : count > warp.registers;
  if (!job.max_registers || count % 8 || count < 24 || count > 256 || wrong_way) {
    find(bad_register_count, pc);
    return true;
  }
  if (count - warp.registers > free_registers) return false;
  free_registers -= count - warp.registers;
  warp.registers = count;
  events++;
  return true;
}

Mbarrier* Machine::find_mbarrier(s32 pc, s32 lane, u32 address) {
  auto found = mbarriers.find(address);
  if (found == mbarriers.end()) {
    find(mbarrier_missing, pc, -1, lane, address);
    return nullptr;
  }
  Mbarrier& barrier = found->second;
  if (barrier.warp != current && barrier.time > warps[current].known[barrier.warp])
    find(mbarrier_init_not_seen, pc, barrier.pc, lane, address);
  return &barrier;
}

void Machine::make_mbarrier(s32 pc, s32 lane, u32 address, u32 count) {
  const u8 bytes[8] = {};
  if (address % 8) {
    find(misaligned, pc, -1, lane, address);
    return;
  }
  if (!write_shared(pc, lane, address, 8, bytes, true)) return;
  if (agents == MBARRIERS) {
    find(mbarrier_missing, pc, -1, lane, address);
    stopped = true;
    return;
  }
  for (u32 i = address; i < address + 8; i++) shared_bytes[i].state = OF_MBARRIER;
  const Warp& warp = warps[current];
  Clock none(warp.known.size(), 0);
  mbarriers[address] = {job.warps + agents++, count, count, 0, 1, 0, 0, pc, current, warp.known[current], warp.fences,
                        none, none};
}

void Machine::end_mbarrier(s32 pc, s32 lane, u32 address) {
  Mbarrier* barrier = find_mbarrier(pc, lane, address);
  if (!barrier) return;
  if (barrier->copied > barrier->seen || barrier->bytes) find(bulk_copy_not_waited_for, pc, barrier->pc, lane, address);
  mbarriers.erase(address);
  for (u32 i = address; i < address + 8; i++) shared_bytes[i].state = PLAIN;
  const u8 bytes[8] = {};
  write_shared(pc, lane, address, 8, bytes, true);
}

void Machine::arrive(Mbarrier& barrier, s32 pc, s32 lane, u32 address, u32 count) {
  Warp& warp = warps[current];
  learn(barrier.arriving, warp.known);
  warp.known[current]++;
  if (count > barrier.missing) {
    find(mbarrier_arrivals, pc, barrier.pc, lane, address);
    count = barrier.missing;
  }
  barrier.missing -= count;
  end_phase_if_complete(barrier, pc, address);
}

void Machine::copied(Mbarrier& barrier, s32 pc, u32 address, s64 bytes) {
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier, pc, address);
}

void Machine::end_phase_if_complete(Mbarrier& barrier, s32 pc, u32 address) {
  events++;
  if (barrier.missing || barrier.bytes) return;
  for (const BulkCopy& copy : bulk_copies)
    if (copy.mbarrier == address) find(bulk_copy_not_expected, pc, copy.pc, 0, address);
  barrier.complete = barrier.arriving;
  barrier.complete[barrier.agent] = barrier.phase++;
  barrier.missing = barrier.count;
}

// Operands: the result, the mbarrier, the parity of the phase that is waited for. False: some lane must wait.
bool Machine::try_wait(const Step& s) {
  u32 complete = 0;
  bool undefined = false;
  each_active(s, [&](int lane) {
    undefined |= s.undefined_r(2) >> lane & 1;
    Mbarrier* barrier = find_mbarrier(s.pc, lane, address_of(s, 1, lane));
    // Of an even phase the parity is 1, because phases are counted from 1. The one before it is complete.
    if (!barrier || (barrier->phase & 1) != (s.r(2)[lane] & 1)) return;
    complete |= 1u << lane;
  });
  if (undefined) find(undefined_guard, s.pc);
  if (complete == s.lanes) {
    each_active(s, [&](int lane) {
      Mbarrier& barrier = *find_mbarrier(s.pc, lane, address_of(s, 1, lane));
      learn(s.warp.known, barrier.complete);
      barrier.seen = std::max(barrier.seen, barrier.complete[barrier.agent]);
    });
    events++;
  }
  s.set_p(0, complete, 0);
  s.warp.wait_pc = s.pc;
  return complete == s.lanes;
}

// Operands: the mbarrier; size: arrivals of a phase.
void op::mbarrier_init(const Step& s) {
  const u32 count = u32(s.instruction.size);
  each_active(s, [&](int lane) { s.machine.make_mbarrier(s.pc, lane, address_of(s, 0, lane), count); });
}

void op::mbarrier_inval(const Step& s) {
  each_active(s, [&](int lane) { s.machine.end_mbarrier(s.pc, lane, address_of(s, 0, lane)); });
}

// Operands: the mbarrier; size: how many arrivals of each lane.
void op::mbarrier_arrive(const Step& s) {
  each_active(s, [&](int lane) {
    u32 address = address_of(s, 0, lane);
    if (Mbarrier* barrier = s.machine.find_mbarrier(s.pc, lane, address))
      s.machine.arrive(*barrier, s.pc, lane, address, u32(s.instruction.size));
  });
}

// Operands: the mbarrier, bytes that will be copied.
void op::mbarrier_arrive_expect_tx(const Step& s) {
  each_active(s, [&](int lane) {
    u32 address = address_of(s, 0, lane);
    if (s.undefined_r(1) >> lane & 1) s.machine.find(undefined_guard, s.pc, -1, lane);
    if (Mbarrier* barrier = s.machine.find_mbarrier(s.pc, lane, address)) {
      barrier->bytes += s.r(1)[lane];
      s.machine.arrive(*barrier, s.pc, lane, address, 1);
    }
  });
}
