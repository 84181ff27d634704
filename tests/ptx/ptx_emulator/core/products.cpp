// Matrix products on tensor cores: mma m16n8k16 of registers, and the asynchronous wgmma m64nNk16 of shared memory.
#include <algorithm>
#include <cmath>
#include "machine.h"
#include "numbers.h"

namespace {
constexpr int K = 16;

// acc + a . b over K. Exact in double; or as tensor cores do it: by eights, products and sum are cut off, not rounded,
// 25 bits below the largest of them.
double dot(double acc, const float* a, const float* b, int stride, bool truncate) {
  if (!truncate) {
    for (int k = 0; k < K; k++) acc += double(a[k]) * b[k * stride];
    return acc;
  }
  for (int start = 0; start < K; start += 8) {
    double products[8], largest = std::fabs(acc);
    bool finite = std::isfinite(acc);
    for (int k = 0; k < 8; k++) {
      products[k] = double(a[start + k]) * b[(start + k) * stride];
      largest = std::max(largest, std::fabs(products[k]));
      finite &= bool(std::isfinite(products[k]));
    }
    if (!finite) {
      for (double product : products) acc += product;
      continue;
    }
    if (largest == 0) continue;
    int exponent;
    std::frexp(largest, &exponent);
    double unit = std::ldexp(1.0, 25 - exponent);
    s64 sum = s64(std::trunc(acc * unit));
    for (double product : products) sum += s64(std::trunc(product * unit));
    double exact = double(sum) / unit;
    float cut = float(exact);
    if (std::fabs(double(cut)) > std::fabs(exact)) cut = std::nextafterf(cut, 0.0f);
    acc = cut;
  }
  return acc;
}

// The 16 x 16 fragment of A in four registers: lane 4 * g + t has rows g and g + 8, columns 2 t, 2 t + 1, and 8 on.
// Returns the rows in which something is undefined.
u32 fragment_of_a(const Step& s, int first, float a[16][K]) {
  u32 bad_rows = 0;
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4 + 8 * (i & 1), column = 2 * (lane % 4) + 8 * (i >> 1);
      u32 pair = s.r(first + i)[lane];
      a[row][column] = from_half(pair, s.flag(BFLOAT16));
      a[row][column + 1] = from_half(pair >> 16, s.flag(BFLOAT16));
      if (s.undefined_r(first + i) >> lane & 1) bad_rows |= 1u << row;
    }
  return bad_rows;
}

// Where an accumulator register of a lane lies in its 16 x N tile.
struct Place {
  int row, column;
  Place(int index, int lane)
      : row(lane / 4 + 8 * (index >> 1 & 1)), column(8 * (index >> 2) + 2 * (lane % 4) + (index & 1)) {}
};

// The matrix descriptor of wgmma: how an operand of 2-byte elements lies in shared memory (PTX, "matrix descriptor").
struct Layout {
  u32 start, leading, stride;
  int swizzle;  // 0 none, 1 rows of 128 bytes, 2 of 64, 3 of 32
  bool k_major;

  Layout(u64 descriptor, bool along_k)
      : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4), swizzle(int(descriptor >> 62)), k_major(along_k) {}

  // The byte address of the element in row or column `mn` and at `k`.
  u32 at(u32 mn, u32 k) const {
    u32 row = swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32, address;
    if (k_major)
      address = swizzle ? mn % 8 * row + mn / 8 * stride + 2 * k
                        : mn % 8 * 16 + mn / 8 * stride + k / 8 * leading + k % 8 * 2;
    else
      address = swizzle ? mn % (row / 2) * 2 + mn / (row / 2) * leading + k % 8 * row + k / 8 * stride
                        : mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    address += start;
    u32 mask = swizzle == 1 ? 7 : swizzle == 2 ? 3 : swizzle == 3 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
  }
};

// Reads an element for a wgmma, and notes the 16 bytes around it. Returns whether it is undefined.
bool read_element(const Step& s, u32 address, float& value, Product& product) {
  bool undefined = false;
  u16 bits = 0;
  if (s.machine.read_shared(s.pc, 0, address, 2, undefined, true)) {
    bits = u16(s.machine.shared[address] | s.machine.shared[address + 1] << 8);
    if (product.chunks.empty() || product.chunks.back() != address / 16) product.chunks.push_back(address / 16);
  }
  value = from_half(bits, s.flag(BFLOAT16));
  return undefined;
}

void needs_fence(const Step& s, int i) {
  const Warp& warp = s.warp;
  if (warp.write_clock[s.operands[i]] <= warp.wgmma_fence_clock) return;
  // After a fence of this group the compiler of PTX orders a late write; without one nobody does.
  bool in_group = warp.wgmma_fence_clock > warp.wgmma_commit_clock;
  s.machine.find(in_group ? wgmma_register_written_in_group : wgmma_register_without_fence, s.pc);
}

// Only the first lane's descriptor counts, and all must agree.
u64 descriptor(const Step& s, int i) {
  const u64* lanes = s.d(i);
  if (std::any_of(lanes, lanes + 32, [=](u64 x) { return x != lanes[0]; })) s.machine.find(bad_descriptor, s.pc);
  if (s.undefined_d(i)) s.machine.find(undefined_address, s.pc);
  return lanes[0];
}
}  // namespace

// Operands: D (4), A (4), B (2), C (4).
void op::mma(const Step& s) {
  s.needs_all_lanes();
  float a[16][K], b[K][8];
  u32 bad_rows = fragment_of_a(s, 4, a), bad_columns = 0;
  for (int i = 0; i < 2; i++)
    for (int lane = 0; lane < 32; lane++) {
      int column = lane / 4, k = 2 * (lane % 4) + 8 * i;
      u32 pair = s.r(8 + i)[lane];
      b[k][column] = from_half(pair, s.flag(BFLOAT16));
      b[k + 1][column] = from_half(pair >> 16, s.flag(BFLOAT16));
      if (s.undefined_r(8 + i) >> lane & 1) bad_columns |= 1u << column;
    }
  u32 results[4][32], undefined[4];
  for (int i = 0; i < 4; i++) {
    undefined[i] = s.undefined_r(10 + i);
    for (int lane = 0; lane < 32; lane++) {
      Place at(i, lane);
      double before = as_float(s.r(10 + i)[lane]);
      results[i][lane] = result(float(dot(before, a[at.row], &b[0][at.column], 8, s.machine.job.truncate)));
      if ((bad_rows >> at.row & 1) || (bad_columns >> at.column & 1)) undefined[i] |= 1u << lane;
    }
  }
  for (int i = 0; i < 4; i++) {
    std::copy_n(results[i], 32, s.r(i));
    s.define_r(i, undefined[i]);
  }
}

// This warp's 16 of the 64 rows. Operands: D (size / 2), A (4 registers or a descriptor), the descriptor of B, whether
// D is added to. The result is there at once, but neither it nor the operands may be touched before the wait.
void op::wgmma(const Step& s) {
  s.needs_all_lanes();
  const int columns = s.instruction.size, registers = columns / 2;
  Warp& warp = s.warp;
  Product product{s.pc, {}, {}, {}};
  float a[16][K];
  static thread_local std::vector<float> b;
  std::vector<u8> bad_columns(columns);
  b.resize(size_t(K) * columns);
  u32 bad_rows = 0;
  int next = registers;
  if (s.flag(A_REGISTERS)) {
    bad_rows = fragment_of_a(s, next, a);
    for (int i = 0; i < 4; i++) {
      product.operands.push_back(s.operands[next + i]);
      needs_fence(s, next + i);
    }
    next += 4;
  } else {
    Layout layout(descriptor(s, next++), !s.flag(TRANSPOSE));
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < K; k++)
        if (read_element(s, layout.at(row + 16 * (s.machine.current % 4), k), a[row][k], product))
          bad_rows |= 1u << row;
  }
  Layout layout(descriptor(s, next++), !s.flag(TRANSPOSE_B));
  for (int column = 0; column < columns; column++)
    for (int k = 0; k < K; k++)
      if (read_element(s, layout.at(column, k), b[size_t(k) * columns + column], product)) bad_columns[column] = 1;
  const bool add = s.p(next) & 1, truncate = s.machine.job.truncate;

  static thread_local std::vector<double> d;
  d.assign(size_t(16) * columns, 0);
  if (add)
    for (int i = 0; i < registers; i++)
      for (int lane = 0; lane < 32; lane++) {
        Place at(i, lane);
        d[size_t(at.row) * columns + at.column] = as_float(s.r(i)[lane]);
      }
  for (int row = 0; row < 16; row++) {
    double* sums = &d[size_t(row) * columns];
    if (truncate) {
      for (int column = 0; column < columns; column++)
        sums[column] = dot(sums[column], a[row], &b[column], columns, true);
    } else {
      for (int k = 0; k < K; k++) {  // along the columns, which the compiler makes vectors of
        const double x = a[row][k];
        const float* y = &b[size_t(k) * columns];
        for (int column = 0; column < columns; column++) sums[column] += x * double(y[column]);
      }
    }
  }
  for (int i = 0; i < registers; i++) {
    needs_fence(s, i);
    u32 undefined = add ? s.undefined_r(i) : 0, *out = s.r(i);
    for (int lane = 0; lane < 32; lane++) {
      Place at(i, lane);
      out[lane] = result(float(d[size_t(at.row) * columns + at.column]));
      if ((bad_rows >> at.row & 1) || bad_columns[at.column]) undefined |= 1u << lane;
    }
    s.define_r(i, undefined);
    product.accumulators.push_back(s.operands[i]);
    warp.accumulating[s.operands[i]]++;
  }
  for (s32 i : product.operands) warp.multiplying[i]++;
  std::sort(product.chunks.begin(), product.chunks.end());
  product.chunks.erase(std::unique(product.chunks.begin(), product.chunks.end()), product.chunks.end());
  for (u32 chunk : product.chunks) s.machine.locks[chunk]++;
  warp.open_products.push_back(std::move(product));
  warp.products_in_flight++;
}

void op::wgmma_fence(const Step& s) { s.warp.wgmma_fence_clock = s.warp.clock; }

void op::wgmma_commit_group(const Step& s) {
  s.warp.wgmma_commit_clock = s.warp.clock;
  s.warp.product_groups.push_back(std::move(s.warp.open_products));
  s.warp.open_products.clear();
}

// immediate: how many of the newest groups may still be in flight.
void op::wgmma_wait_group(const Step& s) {
  auto& groups = s.warp.product_groups;
  while (s64(groups.size()) > s.instruction.immediate) {
    for (const Product& product : groups.front()) {
      s.machine.end_product(product);
      for (s32 i : product.accumulators) s.warp.accumulating[i]--;
      for (s32 i : product.operands) s.warp.multiplying[i]--;
      s.warp.products_in_flight--;
    }
    groups.erase(groups.begin());
  }
}
