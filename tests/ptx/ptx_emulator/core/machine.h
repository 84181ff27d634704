// The state of one program (CTA) and what the instructions do with it. Warps run in turn, each until it has to wait;
// the 32 lanes of a warp run in lockstep.
//
// Races in shared memory are found by vector clocks. Agents are the warps and, behind them, the mbarriers, in whose
// name bulk copies write. The time of a warp goes on when it tells others what it has done (a barrier, an arrival);
// that of an mbarrier is the number of its phase, from 1. An access is ordered after another one if the warp that
// makes it knows of the agent's time at which the other one was made.
#pragma once
#include <map>
#include <utility>
#include <vector>
#include "interface.h"

constexpr u32 ALL = 0xffffffffu;  // lanes
constexpr u32 POISON = 0x7fff7fffu;  // what registers hold that nothing has written: NaN in every format

using Clock = std::vector<u32>;  // of each agent the last time that is known of

constexpr s32 MBARRIERS = 64;  // the most that one program may have

enum ByteState : u8 { PLAIN, COPYING, OF_MBARRIER };

// What is known of a byte of shared memory; when each warp read it last is in Machine::read_times.
struct SharedByte {
  u32 write_time, write_pc, read_pc;  // write_time 0: never written
  u32 write_sync, write_fences;       // how often the writing warp had met bar.warp.sync and fence.proxy.async
  u8 write_agent, write_lane, defined, state;
};

// Of two bytes of global memory. Programs are counted from 1; an epoch is the time between two barriers of all warps.
struct GlobalPair {
  u32 write_program, write_epoch, write_pc, read_program, read_epoch, read_warps, read_pc;
  u8 write_warp;
};

// A copy of one lane that is under way.
struct AsyncCopy {
  u32 target;
  s32 pc;
  u16 size;
  u8 lane, undefined;
  u8 data[16];
};

// A wgmma that is in flight: what it reads and writes until it is waited for.
struct Product {
  s32 pc;
  std::vector<u32> chunks;  // of 16 bytes of shared memory
  std::vector<s32> accumulators, operands;
};

// A barrier of bar.sync.
struct Barrier {
  u32 threads, arrived;  // expected, and how many are there
  Clock known;           // to those that have arrived
  std::vector<s32> waiting;
};

struct Mbarrier {
  s32 agent;
  u32 count, missing;  // arrivals that a phase takes, and those that this one still needs
  s64 bytes;           // that are still to be copied in this phase
  u32 phase;           // from 1
  u32 copied, seen;    // the last phases in which a copy came, and that a warp waited for
  s32 pc, warp;        // of its mbarrier.init
  u32 time, fences;    // of that warp then
  Clock arriving, complete;  // known to those that have arrived so far, and when the last phase ended
};

// A copy by the tensor memory accelerator that is under way.
struct BulkCopy {
  u32 target, mbarrier;
  s32 pc;
  std::vector<u8> data, defined;  // in the order of addresses, swizzled
};

// Lanes of a warp that stand at the same instruction.
struct Path {
  s32 pc;
  u32 lanes;
};

struct Warp {
  std::vector<u32> r32;  // [register][lane]
  std::vector<u64> r64;
  std::vector<u32> pred;  // [register], a bit for each lane
  std::vector<u32> undefined32, undefined64, undefined_pred;  // likewise
  std::vector<Path> paths;  // sorted; the one that is furthest behind runs
  bool ended, waiting;
  u64 executed;  // instructions
  s32 wait_pc;   // of the instruction at which it last waited
  s32 registers;
  Clock known, known_at_fence;  // its own entry is its time
  u32 syncs, fences;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
  u32 products_in_flight;
  u32 clock, wgmma_fence_clock, wgmma_commit_clock;
  std::vector<u32> write_clock;  // of 32-bit registers
  std::vector<u8> accumulating, multiplying;  // in how many products in flight a register is
};

struct Step;

struct Machine {
  explicit Machine(Job& job);
  void run_program(u32 program, const u32 place[3]);

  void find(Kind kind, s32 pc, s32 other_pc = -1, s32 lane = 0, u64 address = 0, s32 region = -1);

  // Checks of an access, memory.cpp. False: it must not be carried out. `undefined` is set where no one has written.
  bool read_global(s32 pc, s32 lane, u64 address, u32 size, bool& undefined);
  bool write_global(s32 pc, s32 lane, u64 address, u32 size, const u8* data, bool undefined);
  bool read_shared(s32 pc, s32 lane, u32 address, u32 size, bool& undefined, bool by_wgmma = false);
  bool write_shared(s32 pc, s32 lane, u32 address, u32 size, const u8* data, bool undefined);
  void begin_copy(Warp& warp, const AsyncCopy& copy);
  void land(std::vector<AsyncCopy>& copies);
  void end_product(const Product& product);
  void begin_bulk_copy(BulkCopy copy, Mbarrier& barrier, s32 lane);

  // barriers.cpp. None: it has not been initialised.
  Mbarrier* find_mbarrier(s32 pc, s32 lane, u32 address);
  void make_mbarrier(s32 pc, s32 lane, u32 address, u32 count);
  void end_mbarrier(s32 pc, s32 lane, u32 address);
  void arrive(Mbarrier& barrier, s32 pc, s32 lane, u32 address, u32 count);
  void copied(Mbarrier& barrier, s32 pc, u32 address, s64 bytes);

  Job& job;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<SharedByte> shared_bytes;
  std::vector<std::vector<u32>> read_times;  // [warp][byte]
  std::vector<u16> locks;  // how many wgmma in flight read 16 bytes of shared memory
  std::map<u32, Mbarrier> mbarriers;  // by address
  std::vector<BulkCopy> bulk_copies;
  std::vector<std::vector<GlobalPair>> global_pairs;  // by region
  u32 epoch = 1, program = 0;
  s32 current = 0;  // warp
  u64 events = 0;  // what may let a warp that waits go on
  bool stopped = false;

 private:
  void start(const u32 place[3]);
  void end_program();
  void run_warp(Warp& warp);
  void report_deadlock();
  void land_bulk_copies();
  void at_barrier(Warp& warp, s32 pc, s32 number, u32 threads);
  bool try_wait(const Step& step);
  bool set_registers(Warp& warp, s32 pc, s32 count, bool more);
  void end_phase_if_complete(Mbarrier& barrier, s32 pc, u32 address);
  void check_write(s32 pc, s32 lane, u32 address, u32 size, const u8* data, bool bulk);
  void track_registers(Warp& warp, const Instruction& instruction, s32 pc);
  bool find_region(s32 pc, s32 lane, u64 address, u32 size, u64& offset);
  void mark_shared(s32 pc, s32 lane, u32 address, u32 size);
  u32 random();

  Barrier barriers[16];
  s32 agents = 0;          // mbarriers that have been made
  s32 free_registers = 0;  // by lane of a warp, that setmaxnreg has given back
  u64 random_state;
  s32 region = 0;  // of the last global access
  std::map<std::pair<u64, s32>, s32> seen;
};

// One instruction of one warp, as the functions of the operations get it.
struct Step {
  Machine& machine;
  Warp& warp;
  const Instruction& instruction;
  const s32* operands;
  s32 pc;
  u32 active;  // the lanes that are here
  u32 lanes;   // those of them whose guard holds: they execute

  u32* r(int i) const { return &warp.r32[size_t(operands[i]) * 32]; }
  u64* d(int i) const { return &warp.r64[size_t(operands[i]) * 32]; }
  u32 p(int i) const { return warp.pred[operands[i]]; }
  u32 undefined_r(int i) const { return warp.undefined32[operands[i]]; }
  u32 undefined_d(int i) const { return warp.undefined64[operands[i]]; }
  u32 undefined_p(int i) const { return warp.undefined_pred[operands[i]]; }
  void define_r(int i, u32 undefined) const { merge(warp.undefined32[operands[i]], undefined); }
  void define_d(int i, u32 undefined) const { merge(warp.undefined64[operands[i]], undefined); }
  void set_p(int i, u32 value, u32 undefined) const {
    merge(warp.pred[operands[i]], value);
    merge(warp.undefined_pred[operands[i]], undefined);
  }
  bool flag(Flags flag) const { return instruction.flags & flag; }
  bool has(int i) const { return operands[i] >= 0; }
  void needs_all_lanes() const {
    if (lanes != ALL) machine.find(divergent_sync, pc);
  }

 private:
  void merge(u32& old, u32 value) const { old = (old & ~lanes) | (value & lanes); }
};

template <class F>
inline void each_lane(u32 lanes, F f) {
  if (lanes == ALL) {
#pragma GCC ivdep
    for (int lane = 0; lane < 32; lane++) f(lane);
  } else {
    for (int lane = 0; lane < 32; lane++)
      if (lanes >> lane & 1) f(lane);
  }
}

inline void learn(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < other.size(); i++)
    if (other[i] > clock[i]) clock[i] = other[i];
}

inline int first_lane(u32 lanes) { return __builtin_ctz(lanes); }

// Lane by lane, a result of one register from one, two or three; undefined where any of these is.
template <class F>
inline void unary(const Step& s, F f) {
  u32* out = s.r(0);
  const u32* a = s.r(1);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l]); });
  s.define_r(0, s.undefined_r(1));
}
template <class F>
inline void binary(const Step& s, F f) {
  u32* out = s.r(0);
  const u32 *a = s.r(1), *b = s.r(2);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l]); });
  s.define_r(0, s.undefined_r(1) | s.undefined_r(2));
}
template <class F>
inline void ternary(const Step& s, F f) {
  u32* out = s.r(0);
  const u32 *a = s.r(1), *b = s.r(2), *c = s.r(3);
  each_lane(s.lanes, [=](int l) { out[l] = f(a[l], b[l], c[l]); });
  s.define_r(0, s.undefined_r(1) | s.undefined_r(2) | s.undefined_r(3));
}

// The operations, by the names of opcodes.def.
namespace op {
#define OP(name, operands) void name(const Step& step);
#include "opcodes.def"
#undef OP
}  // namespace op
