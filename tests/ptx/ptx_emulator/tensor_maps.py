"""What the driver makes of a tensor for tiled copies: the 128 bytes of a kernel's parameter, as the core reads them.

A GPU's own encoding is not published. Here it is the structure TensorMap, with the same contents and conditions.
"""

from collections.abc import Sequence

from ptx_emulator.structures import TensorMap

MAGIC = 0x70616D74
BYTES = 128


def tensor_map(
    base: int, element_size: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """A tensor at the address `base`, and the box that one copy moves. The last dimension is contiguous.

    shape, box: elements; strides: in elements; swizzle: the bytes of a row within which shared memory is permuted, 0
    for none. ValueError: what the driver refuses.
    """
    byte_strides = [stride * element_size for stride in strides[:-1]]
    inner = box[-1] * element_size
    conditions = {
        "the rank is 1 to 5": 1 <= len(shape) <= 5 and len(shape) == len(strides) == len(box),
        "the address is a multiple of 16": base % 16 == 0,
        "strides are multiples of 16 bytes below 2^40": all(x % 16 == 0 and 0 <= x < 1 << 40 for x in byte_strides),
        "the last dimension is contiguous": strides[-1] == 1,
        "sizes are 1 to 2^32": all(1 <= x < 1 << 32 for x in shape),
        "a box has 1 to 256 elements in each dimension": all(1 <= x <= 256 for x in box),
        "a row of the box has a multiple of 16 bytes": inner % 16 == 0,
        "a row of the box is as wide as the swizzling": swizzle == 0 or (swizzle in (32, 64, 128) and inner == swizzle),
    }
    broken = [condition for condition, holds in conditions.items() if not holds]
    if broken:
        raise ValueError(f"no tensor map of shape {list(shape)}, strides {list(strides)}, box {list(box)}: {broken[0]}")
    encoded = TensorMap(magic=MAGIC, dimensions=len(shape), element_size=element_size, swizzle=swizzle, base=base)
    encoded.sizes[: len(shape)] = list(reversed(shape))
    encoded.box[: len(shape)] = list(reversed(box))
    encoded.strides[: len(shape) - 1] = list(reversed(byte_strides))
    return bytes(encoded).ljust(BYTES, b"\0")
