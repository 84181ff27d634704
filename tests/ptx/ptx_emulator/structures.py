"""The structures of core/interface.h, field by field."""

import ctypes
from ctypes import c_int32, c_uint8, c_uint32, c_uint64, c_void_p


class Region(ctypes.Structure):
    _fields_ = (("base", c_uint64), ("size", c_uint64), ("allowed", c_void_p), ("defined", c_void_p))


class Finding(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "pc", "other_pc", "program", "warp", "lane", "region")),
        ("address", c_uint64),
        ("count", c_uint64),
    )


class TensorMap(ctypes.Structure):
    _fields_ = (
        ("magic", c_uint32),
        *((name, c_uint8) for name in ("dimensions", "element_size", "swizzle", "unused")),
        ("base", c_uint64),
        ("strides", c_uint64 * 4),
        ("sizes", c_uint32 * 5),
        ("box", c_uint32 * 5),
    )


class Job(ctypes.Structure):
    _fields_ = (
        ("code", c_void_p),
        ("code_length", c_int32),
        ("operands", c_void_p),
        *((name, c_int32) for name in ("registers32", "registers64", "predicates")),
        ("constants32", c_void_p),
        ("constants32_count", c_int32),
        ("constants64", c_void_p),
        ("constants64_count", c_int32),
        ("constants_pred", c_void_p),
        ("constants_pred_count", c_int32),
        ("special", c_int32 * 10),
        ("grid", c_int32 * 3),
        ("warps", c_int32),
        ("parameters", c_void_p),
        ("parameter_bytes", c_int32),
        ("max_registers", c_int32),
        ("shared_bytes", c_int32),
        ("regions", c_void_p),
        ("region_count", c_int32),
        *((name, c_int32) for name in ("capability", "warp_order", "program_order", "approximation", "truncate")),
        ("seed", c_uint64),
        ("limit", c_uint64),
        ("findings", c_void_p),
        ("finding_capacity", c_int32),
        ("finding_count", c_int32),
        ("executed", c_void_p),
    )
