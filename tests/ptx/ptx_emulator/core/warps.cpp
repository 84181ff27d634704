// How programs and warps run: order, divergence, barriers, guards, and what is left at the end.
#include <algorithm>
#include "machine.h"

namespace {
using Operation = void (*)(const Step&);
const Operation OPERATIONS[OPCODES] = {
#define OP(name, operands) op::name,
#include "opcodes.def"
#undef OP
};

// Puts the paths that are furthest behind first, so that lanes meet again, and joins those that have met.
void choose_path(std::vector<Path>& paths) {
  std::sort(paths.begin(), paths.end(), [](const Path& a, const Path& b) { return a.pc < b.pc; });
  for (size_t i = 0; i + 1 < paths.size();) {
    if (paths[i].pc == paths[i + 1].pc) {
      paths[i].lanes |= paths[i + 1].lanes;
      paths.erase(paths.begin() + i + 1);
    } else {
      i++;
    }
  }
}

bool accesses_memory(s32 opcode) {
  return opcode == OP_ld_global || opcode == OP_st_global || opcode == OP_ld_shared || opcode == OP_st_shared ||
         opcode == OP_cp_async || opcode == OP_cp_async_bulk_tensor || opcode == OP_mbarrier_init ||
         opcode == OP_mbarrier_arrive || opcode == OP_mbarrier_arrive_expect_tx;
}
}  // namespace

Machine::Machine(Job& given)
    : job(given), warps(given.warps), shared(given.shared_bytes), shared_bytes(given.shared_bytes) {
  locks.resize(job.shared_bytes / 16 + 1);
  read_times.resize(job.warps);
  for (s32 i = 0; i < job.region_count; i++) global_pairs.emplace_back(job.regions[i].size / 2 + 1);
  random_state = job.seed * 0x9E3779B97F4A7C15ull + 1;
}

u32 Machine::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32(random_state >> 11);
}

// One finding for each kind and pair of instructions; others of it are counted.
void Machine::find(Kind kind, s32 pc, s32 other_pc, s32 lane, u64 address, s32 in_region) {
  auto key = std::make_pair(u64(kind) << 32 | u32(pc), other_pc);
  auto known = seen.find(key);
  if (known != seen.end()) {
    job.findings[known->second].count++;
  } else if (job.finding_count < job.finding_capacity) {
    job.findings[job.finding_count] = {kind, pc, other_pc, s32(program), current, lane, in_region, address, 1};
    seen[key] = job.finding_count++;
  }
}

void Machine::start(const u32 place[3]) {
  epoch = 1;
  std::fill(shared.begin(), shared.end(), 0x7f);
  std::fill(shared_bytes.begin(), shared_bytes.end(), SharedByte{});
  std::fill(locks.begin(), locks.end(), 0);
  for (auto& times : read_times) times.assign(job.shared_bytes, 0);
  for (Barrier& barrier : barriers) barrier = Barrier{};
  mbarriers.clear();
  bulk_copies.clear();
  agents = free_registers = 0;
  for (s32 w = 0; w < job.warps; w++) {
    Warp& warp = warps[w];
    warp = Warp{};
    s32 count32 = job.registers32 + job.constants32_count, count64 = job.registers64 + job.constants64_count;
    s32 count_pred = job.predicates + job.constants_pred_count;
    warp.r32.assign(size_t(count32) * 32, POISON);
    warp.r64.assign(size_t(count64) * 32, u64(POISON) << 32 | POISON);
    warp.pred.assign(count_pred, 0xaaaaaaaau);
    warp.undefined32.assign(count32, ALL);
    warp.undefined64.assign(count64, ALL);
    warp.undefined_pred.assign(count_pred, ALL);
    warp.write_clock.assign(count32, 0);
    warp.accumulating.assign(count32, 0);
    warp.multiplying.assign(count32, 0);
    for (s32 i = 0; i < job.constants32_count; i++) {
      std::fill_n(&warp.r32[size_t(job.registers32 + i) * 32], 32, job.constants32[i]);
      warp.undefined32[job.registers32 + i] = 0;
    }
    for (s32 i = 0; i < job.constants64_count; i++) {
      std::fill_n(&warp.r64[size_t(job.registers64 + i) * 32], 32, job.constants64[i]);
      warp.undefined64[job.registers64 + i] = 0;
    }
    for (s32 i = 0; i < job.constants_pred_count; i++) {
      warp.pred[job.predicates + i] = job.constants_pred[i] ? ALL : 0;
      warp.undefined_pred[job.predicates + i] = 0;
    }
    const u32 special[10] = {u32(w) * 32, place[0], place[1], place[2], u32(job.grid[0]), u32(job.grid[1]),
                             u32(job.grid[2]), 0, u32(w), u32(job.warps) * 32};
    for (int i = 0; i < 10; i++) {
      if (job.special[i] < 0) continue;
      bool by_lane = i == 0 || i == 7;  // %tid.x and %laneid
      u32* out = &warp.r32[size_t(job.special[i]) * 32];
      for (u32 lane = 0; lane < 32; lane++) out[lane] = special[i] + (by_lane ? lane : 0);
      warp.undefined32[job.special[i]] = 0;
    }
    warp.paths = {{0, ALL}};
    warp.clock = 1;
    warp.registers = job.max_registers;
    warp.known.assign(job.warps + MBARRIERS, 0);
    warp.known_at_fence = warp.known;
    warp.known[w] = 1;
  }
}

void Machine::run_program(u32 number, const u32 place[3]) {
  program = number;
  start(place);
  std::vector<s32> order(job.warps);
  for (s32 i = 0; i < job.warps; i++) order[i] = job.warp_order == 1 ? job.warps - 1 - i : i;
  for (;;) {
    if (job.warp_order == 2)
      for (s32 i = job.warps - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
    const u64 before = events;
    bool ended = true;
    for (s32 w : order) {
      current = w;
      if (warps[w].ended) continue;
      ended = false;
      if (warps[w].waiting) continue;
      run_warp(warps[w]);
      land_bulk_copies();
      if (stopped) return;
    }
    if (ended) break;
    if (events == before) {
      report_deadlock();
      return;
    }
  }
  end_program();
}

// No warp can go on: each of them waits at a barrier, or for an mbarrier or registers.
void Machine::report_deadlock() {
  stopped = true;
  for (current = 0; current < job.warps; current++) {
    const Warp& warp = warps[current];
    if (!warp.ended) find(warp.waiting ? missing_arrivals : endless_wait, warp.wait_pc);
  }
}

void Machine::end_program() {
  for (current = 0; current < job.warps; current++) {
    Warp& warp = warps[current];
    bool copies = !warp.open_copies.empty();
    for (auto& group : warp.copy_groups) copies |= !group.empty();
    if (copies) find(cp_async_not_waited_for, job.code_length - 1);
    if (warp.products_in_flight) find(wgmma_not_waited_for, job.code_length - 1);
  }
  current = 0;
  for (auto& [address, barrier] : mbarriers)
    if (barrier.copied > barrier.seen || barrier.bytes) find(bulk_copy_not_waited_for, barrier.pc, -1, 0, address);
}

// Registers of products in flight must be left alone, and wgmma must be told of ordinary writes to its registers.
void Machine::track_registers(Warp& warp, const Instruction& instruction, s32 pc) {
  warp.clock++;
  const s32* used = job.operands + instruction.used;
  if (instruction.opcode == OP_wgmma) return;
  if (warp.products_in_flight)
    for (s32 i = 0; i < instruction.used_count; i++) {
      if (warp.accumulating[used[i]])
        find(instruction.opcode == OP_mov_b32 ? wgmma_register_copied_in_flight : wgmma_register_in_flight, pc);
      else if (i < instruction.written_count && warp.multiplying[used[i]])
        find(wgmma_register_in_flight, pc);
    }
  for (s32 i = 0; i < instruction.written_count; i++) warp.write_clock[used[i]] = warp.clock;
}

void Machine::run_warp(Warp& warp) {
  s32 pc = warp.paths[0].pc;
  u32 active = warp.paths[0].lanes;
  auto choose = [&] {
    choose_path(warp.paths);
    pc = warp.paths[0].pc;
    active = warp.paths[0].lanes;
  };
  for (; !stopped; warp.executed++) {
    if (warp.executed > job.limit) {
      find(too_many_instructions, pc);
      stopped = true;
      return;
    }
    if (warp.paths.size() > 1 && pc >= warp.paths[1].pc) {
      warp.paths[0].pc = pc;
      choose();
    }
    const Instruction& instruction = job.code[pc];
    job.executed[pc]++;
    u32 lanes = active;
    if (instruction.guard >= 0) {
      u32 guard = warp.pred[instruction.guard], undefined = warp.undefined_pred[instruction.guard] & active;
      lanes &= instruction.guard_negated ? ~guard : guard;
      if (undefined && instruction.opcode == OP_bra) find(undefined_branch, pc, -1, first_lane(undefined));
      if (undefined && accesses_memory(instruction.opcode)) find(undefined_guard, pc, -1, first_lane(undefined));
    }
    if (job.capability >= 90) track_registers(warp, instruction, pc);
    switch (instruction.opcode) {
      case OP_bar_sync:  // size: threads, 0 for all; immediate: which barrier
        if (lanes != ALL) find(divergent_sync, pc);
        warp.paths = {{pc + 1, ALL}};
        at_barrier(warp, pc, s32(instruction.immediate), instruction.size ? instruction.size : 32 * job.warps);
        return;
      case OP_mbarrier_try_wait:
        if (!lanes || try_wait({*this, warp, instruction, job.operands + instruction.first, pc, active, lanes})) break;
        warp.paths[0].pc = pc + 1;
        return;
      case OP_setmaxnreg:  // size: registers; kind: 1 for more of them
        if (lanes != ALL) find(divergent_sync, pc);
        if (set_registers(warp, pc, instruction.size, instruction.kind)) break;
        warp.paths[0].pc = pc;
        warp.wait_pc = pc;
        return;
      case OP_brx_idx: {  // operands: an index that all lanes share, and the targets, which are no registers
        if (lanes == 0) break;
        const s32* operands = job.operands + instruction.first;
        const u32 *index = &warp.r32[size_t(operands[0]) * 32], chosen = index[first_lane(lanes)];
        if (warp.undefined32[operands[0]] & lanes) find(undefined_branch, pc);
        bool shared_by_all = true;
        each_lane(lanes, [&](int l) { shared_by_all &= index[l] == chosen; });
        if (!shared_by_all || lanes != active) find(divergent_sync, pc);
        if (chosen >= u32(instruction.count - 1)) {
          find(branch_out_of_table, pc, -1, first_lane(lanes), chosen);
          stopped = true;
          return;
        }
        pc = operands[1 + chosen];
        if (warp.paths.size() > 1) {
          warp.paths[0].pc = pc;
          choose();
        }
        continue;
      }
      case OP_bra:
        if (lanes == 0) break;
        if (lanes == active) {
          pc = s32(instruction.immediate);
          if (warp.paths.size() > 1) {
            warp.paths[0].pc = pc;
            choose();
          }
        } else {
          warp.paths[0] = {pc + 1, active & ~lanes};
          warp.paths.push_back({s32(instruction.immediate), lanes});
          choose();
        }
        continue;
      case OP_ret:
        if (lanes == 0) break;
        if (lanes == active)
          warp.paths.erase(warp.paths.begin());
        else
          warp.paths[0] = {pc + 1, active & ~lanes};
        if (warp.paths.empty()) {
          warp.ended = true;
          events++;
          return;
        }
        choose();
        continue;
      default:
        OPERATIONS[instruction.opcode]({*this, warp, instruction, job.operands + instruction.first, pc, active, lanes});
    }
    pc++;
  }
}

// Handled above; the table wants a function for each operation.
void op::bra(const Step&) {}
void op::brx_idx(const Step&) {}
void op::mbarrier_try_wait(const Step&) {}
void op::setmaxnreg(const Step&) {}
void op::ret(const Step&) {}
void op::bar_sync(const Step&) {}
void op::removed(const Step&) {}
void op::waited(const Step& s) { s.set_p(0, ALL, 0); }  // an mbarrier_try_wait that does not wait

// Runs all programs of a launch. 1: stopped at the limit of instructions.
extern "C" int run_job(Job* job) {
  Machine machine(*job);
  u64 x = job->grid[0], y = job->grid[1], total = x * y * job->grid[2];
  for (u64 i = 0; i < total && !machine.stopped; i++) {
    u64 number = job->program_order == 1 ? total - 1 - i : i;
    const u32 place[3] = {u32(number % x), u32(number / x % y), u32(number / (x * y))};
    machine.run_program(u32(number), place);
  }
  return machine.stopped;
}

extern "C" int size_of(int structure) {
  const int sizes[] = {sizeof(Instruction), sizeof(Region), sizeof(Finding), sizeof(Job), sizeof(TensorMap)};
  return sizes[structure];
}
