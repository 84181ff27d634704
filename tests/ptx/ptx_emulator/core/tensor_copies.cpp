// Copies of tiles of a tensor from global to shared memory by the tensor memory accelerator.
#include <algorithm>
#include <cstring>
#include "machine.h"

namespace {
constexpr u32 UNIT = 16;  // bytes that are copied as one, and that swizzling moves as one

// The tensor map at an address among the parameters, or none, with a finding.
const TensorMap* map_at(const Step& s, int lane, u64 address) {
  const u64 offset = address - PARAMETERS;
  const bool inside = offset + 128 <= u64(s.machine.job.parameter_bytes) && offset % 64 == 0;
  auto* map = inside ? reinterpret_cast<const TensorMap*>(s.machine.job.parameters + offset) : nullptr;
  if (map && map->magic == TENSOR_MAP && map->dimensions == s.instruction.width) return map;
  s.machine.find(bad_tensor_map, s.pc, -1, lane, address);
  return nullptr;
}

// One unit of a row, from the element at `first` on; what is outside of the tensor stays 0.
void copy_unit(const Step& s, int lane, const TensorMap& map, u64 row, s64 first, u8* data, u8* defined) {
  const s64 size = map.element_size, elements = UNIT / size;
  const s64 begin = std::clamp<s64>(-first, 0, elements);
  const s64 end = std::clamp<s64>(s64(map.sizes[0]) - first, begin, elements);
  // The whole unit at once where it is inside, or else element by element.
  const s64 step = begin == 0 && end == elements ? elements : 1;
  for (s64 i = begin; i < end; i += step) {
    u64 address = row + u64((first + i) * size);
    bool undefined = false;
    if (s.machine.read_global(s.pc, lane, address, u32(step * size), undefined))
      std::memcpy(data + i * size, reinterpret_cast<const u8*>(address), size_t(step * size));
    else
      undefined = true;
    std::memset(defined + i * size, !undefined, size_t(step * size));
  }
}
}  // namespace

// Operands: shared address, address of the tensor map, coordinates from dimension 0 on, the mbarrier.
void op::cp_async_bulk_tensor(const Step& s) {
  const int dimensions = s.instruction.width;
  for (int lane = 0; lane < 32; lane++) {
    if (!(s.lanes >> lane & 1)) continue;
    s64 start[5] = {};
    u32 unknown = s.undefined_r(0) | s.undefined_d(1) | s.undefined_r(2 + dimensions);
    for (int i = 0; i < dimensions; i++) {
      start[i] = s32(s.r(2 + i)[lane]);
      unknown |= s.undefined_r(2 + i);
    }
    if (unknown >> lane & 1) s.machine.find(undefined_address, s.pc, -1, lane);
    const TensorMap* map = map_at(s, lane, s.d(1)[lane]);
    const u32 target = s.r(0)[lane], mbarrier = s.r(2 + dimensions)[lane];
    Mbarrier* barrier = s.machine.find_mbarrier(s.pc, lane, mbarrier);
    if (!map || !barrier) continue;
    if (target % 128) {
      s.machine.find(misaligned, s.pc, -1, lane, target);
      continue;
    }
    const u32 row_bytes = map->box[0] * map->element_size;
    u32 rows = 1;
    for (int i = 1; i < dimensions; i++) rows *= map->box[i];
    const u32 mask = map->swizzle / 16 ? map->swizzle / 16 - 1 : 0;
    BulkCopy copy{target, mbarrier, s.pc, std::vector<u8>(rows * row_bytes), std::vector<u8>(rows * row_bytes, 1)};
    for (u32 row = 0; row < rows; row++) {
      u64 address = map->base;
      bool inside = true;
      for (u32 i = 1, rest = row; i < u32(dimensions); rest /= map->box[i], i++) {
        s64 at = start[i] + rest % map->box[i];
        inside &= at >= 0 && at < s64(map->sizes[i]);
        address += u64(at) * map->strides[i - 1];
      }
      for (u32 byte = 0; inside && byte < row_bytes; byte += UNIT) {
        u32 place = target + row * row_bytes + byte;
        place ^= (place >> 7 & mask) << 4;
        copy_unit(s, lane, *map, address, start[0] + byte / map->element_size, &copy.data[place - target],
                  &copy.defined[place - target]);
      }
    }
    s.machine.begin_bulk_copy(std::move(copy), *barrier, lane);
  }
}
