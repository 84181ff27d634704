// What the core and emulator.py share: plain structures with the same fields on both sides.
#pragma once
#include <stddef.h>
#include <stdint.h>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

enum Opcode : s32 {
#define OP(name, operands) OP_##name,
#include "opcodes.def"
#undef OP
  OPCODES
};

enum Kind : s32 {
#define FINDING(name, fault, meaning) name,
#include "findings.def"
#undef FINDING
  KINDS
};

// Bits of Instruction::flags.
enum Flags : s32 {
  FTZ = 1,           // subnormal inputs and results are zero
  APPROX = 2,        // not correctly rounded
  KEEP_NAN = 4,      // min and max: NaN if any input is
  SIGNED = 8,        // sign extension, or integers with a sign
  WIDE = 16,         // the register of the element has 64 bits
  WIDE_SOURCE = 32,  // that of the source too
  BFLOAT16 = 64,     // else float16
  TRANSPOSE = 128,   // ldmatrix, stmatrix; the operand A of wgmma
  TRANSPOSE_B = 256,
  A_REGISTERS = 512,  // wgmma: A is in registers
  NEGATED = 1024,     // the predicate operand
  CLAMP = 2048,       // shf: shifts by more than 31 are by 32
};

struct Instruction {
  s32 opcode;
  s32 guard, guard_negated;  // a predicate register, or -1
  s32 first, count;          // the operands: register numbers in Job::operands
  s32 flags, size, width, kind;
  s32 used, used_count, written_count;  // 32-bit registers in Job::operands: the written ones first, then those read
  s64 immediate;
};

// A stretch of global memory with arguments in it; one byte of `allowed` and of `defined` for each of its bytes.
struct Region {
  u64 base, size;
  u8* allowed;
  u8* defined;
};

struct Finding {
  s32 kind, pc, other_pc, program, warp, lane, region;
  u64 address, count;
};

// What the driver encodes for tiled copies of a tensor, in the 128 bytes of a kernel's parameter. Dimension 0 is
// contiguous; strides[i] is that of dimension i + 1. Elements outside of the tensor are copied as zeros.
struct TensorMap {
  u32 magic;
  u8 dimensions, element_size, swizzle, unused;  // swizzle: 0, 32, 64 or 128 bytes
  u64 base;
  u64 strides[4];  // bytes
  u32 sizes[5];    // elements
  u32 box[5];
};
constexpr u32 TENSOR_MAP = 0x70616d74;

// Where parameters lie for a kernel that takes the address of one.
constexpr u64 PARAMETERS = 0x500000000000;

// The constants of a register file lie behind its registers.
struct Job {
  const Instruction* code;
  s32 code_length;
  const s32* operands;
  s32 registers32, registers64, predicates;  // without the constants
  const u32* constants32;
  s32 constants32_count;
  const u64* constants64;
  s32 constants64_count;
  const s32* constants_pred;
  s32 constants_pred_count;
  s32 special[10];  // registers of %tid.x, %ctaid.xyz, %nctaid.xyz, %laneid, %warpid, %ntid.x, or -1
  s32 grid[3];
  s32 warps;
  const u8* parameters;
  s32 parameter_bytes;
  s32 max_registers;  // of a thread at the start, which setmaxnreg changes; 0: not said
  s32 shared_bytes;
  const Region* regions;
  s32 region_count;
  s32 capability;
  s32 warp_order;     // between barriers: 0 ascending, 1 descending, 2 random
  s32 program_order;  // 0 ascending, 1 descending
  s32 approximation;  // 0 correctly rounded, 1 anywhere within the documented bounds, 2 at their upper end, 3 lower
  s32 truncate;       // tensor cores: 0 an exact sum rounded once, 1 cut off as the hardware does
  u64 seed;
  u64 limit;  // instructions of a warp
  Finding* findings;
  s32 finding_capacity, finding_count;
  u64* executed;  // by instruction, how often a warp executed it
};
