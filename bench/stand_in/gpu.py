"""A stand-in for a CUDA device: torch code for a GPU runs where there is none, and computes shapes instead of values.

A tensor on the stand-in is one of torch's meta tensors. It says that it is on CUDA, has a dtype, a shape, strides and
an address that is as aligned as CUDA's would be, and takes no memory, so that the benchmarks run at full size.
What is copied from it to the host stays without values. What the host reads is 0, or True.

Without values no assertion about them can hold: run it with PYTHONOPTIMIZE=1 (and pytest with `--assert=plain`).

    install(H100)   # from here on, in this process, torch.cuda is the stand-in
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


@dataclass(frozen=True)
class Gpu:
    """What code asks a CUDA device for."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    L2_cache_size: int
    """Bytes."""
    total_memory: int
    """Bytes."""

    @property
    def capability(self) -> int:
        return 10 * self.major + self.minor


H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 0, 132, 50 << 20, 80 << 30)
GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 8, 0, 108, 40 << 20, 80 << 30),
    "H100": H100,
    "H200": Gpu("NVIDIA H200", 9, 0, 132, 50 << 20, 141 << 30),
}


def gpu_of(words: str) -> Gpu:
    """The GPU of a name, or of JSON with the entries of `Gpu`."""
    return GPUS[words] if words in GPUS else Gpu(**json.loads(words))


ADDRESS = 1 << 20
"""Of the first byte of every allocation; CUDA's allocations are aligned to 512 bytes or more."""

# Storages of tensors that were copied to the host and have no values there. They are kept, because a storage is known
# by its address, which another one may get.
_on_host: dict[int, torch.UntypedStorage] = {}


def has_no_values(x: torch.Tensor) -> bool:
    return x.is_meta


def is_on_host(x: torch.Tensor) -> bool:
    """Whether a tensor without values is a copy on the host."""
    return x.untyped_storage()._cdata in _on_host


def to_host(x: torch.Tensor) -> torch.Tensor:
    """The same tensor without values, as a copy on the host."""
    if x.is_meta:
        storage = x.untyped_storage()
        _on_host[storage._cdata] = storage
    return x


def is_on_gpu(x: torch.Tensor) -> bool:
    """Whether a tensor is on the stand-in."""
    with torch._C.DisableTorchFunction():
        return x.is_meta and not is_on_host(x)


# ----------------------------------------------------------------------------- the language of Python: names of devices


class CudaByName(TorchFunctionMode):
    """Where torch is called with the name of a CUDA device, the meta device is meant, and tensors there say CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (special := _SPECIAL.get(function)) is not None:
            return special(*args, **kwargs)
        args, kwargs = tree_map_only((str, torch.device), _by_name, (args, kwargs))
        kwargs.pop("pin_memory", None)
        kwargs.pop("non_blocking", None)
        if kwargs.get("device") == _META and "generator" in kwargs:
            kwargs["generator"] = None  # A generator of CUDA cannot be had, and there are no values to generate.
        if function is torch.Tensor.to and (target := _host_in(args[1:], kwargs)) and args[0].is_meta:
            return to_host(args[0].to(target) if isinstance(target, torch.dtype) else args[0].clone())
        return function(*args, **kwargs)


_META = torch.device("meta")


def _by_name(x: str | torch.device) -> str | torch.device:
    if isinstance(x, torch.device):
        return _META if x.type == "cuda" else x
    return _META if x == "cuda" or x.startswith("cuda:") else x


def _host_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | bool:
    """Where a tensor is moved to the host: the dtype that it gets there, or True if it keeps its own."""
    values = [*args, *kwargs.values()]
    if not any(x == "cpu" or (isinstance(x, torch.device) and x.type == "cpu") for x in values):
        return False
    return next((x for x in values if isinstance(x, torch.dtype)), True)


def _device_of(x: torch.Tensor) -> torch.device:
    if not x.is_meta:
        return x.device
    return torch.device("cpu") if is_on_host(x) else torch.device("cuda", 0)


def _address(x: torch.Tensor) -> int:
    return ADDRESS + int(x.storage_offset()) * x.element_size() if x.is_meta else x.data_ptr()


def _read(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the host reads of a tensor without values: True, or 0, which is a place in every list.

    In rows, such as the frames that each story has retrieved, the places of a row differ.
    """
    if len(shape) > 1 and dtype != torch.bool:
        return torch.arange(shape[-1], dtype=dtype).expand(shape)
    return torch.full(shape, dtype == torch.bool, dtype=dtype)


def _listed(x: torch.Tensor) -> Any:
    return _read(x.shape, x.dtype).tolist() if x.is_meta else x.tolist()


def _moved(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    if x.is_meta and not is_on_host(x):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META, requires_grad=x.requires_grad)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.device: torch.device,
    torch.Tensor.device.__get__: _device_of,
    torch.Tensor.is_cuda.__get__: lambda x: _device_of(x).type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda x: _device_of(x).type == "cpu",  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: lambda x: False,  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda x: 0 if _device_of(x).type == "cuda" else -1,
    torch.Tensor.data_ptr: _address,
    torch.Tensor.tolist: _listed,
    torch.Tensor.cpu: lambda x: to_host(x.clone()) if x.is_meta else x,
    torch.Tensor.cuda: _moved,
    torch.Tensor.pin_memory: lambda x: x,
    torch.Tensor.is_pinned: lambda x: False,
}


# ------------------------------------------------------------------------------ the language of ATen: operators on them


def _flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    """Out, LSE and the largest scores of FlexAttention, the one operator that takes a function."""
    by_row = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), by_row, by_row.clone()


class ShapesAlone(TorchDispatchMode):
    """Operators whose results depend on values, and those of memflow_ops, which run their Python."""

    supports_higher_order_operators = True

    def __init__(self, by_name: CudaByName):
        super().__init__()
        self._by_name = by_name

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(operator, HigherOrderOperator):
            return _flex_attention(*args)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        without = [x for x in tensors if x.is_meta]
        if not without:
            return operator(*args, **kwargs)
        if operator.namespace == "memflow_ops" and any(x == "triton" for x in args if isinstance(x, str)):
            # For meta tensors torch would run the operator's fake implementation, which launches nothing. For the
            # implementations that launch nothing themselves it may.
            implementation = torch._library.custom_ops.OPDEFS[operator._schema.name]._init_fn
            with self, self._by_name:
                return implementation(*args, **kwargs)
        host = any(is_on_host(x) for x in without)
        if (special := _WITHOUT_VALUES.get(operator)) is not None:
            out = special(*args, **kwargs)
        else:
            if host:  # Beside what has no values, what has them loses them.
                args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
            out = operator(*args, **kwargs)
        if host:
            tree_map_only(torch.Tensor, to_host, out)
        return out


def _without_values(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _copied(x: torch.Tensor, **options: Any) -> torch.Tensor:
    if options.get("device") is None or options["device"].type != "cpu":
        return torch.ops.aten._to_copy.default(x, **options)
    return to_host(torch.ops.aten._to_copy.default(x, **{**options, "device": _META}))


def _written(target: torch.Tensor, source: torch.Tensor, *more: Any) -> torch.Tensor:
    return torch.ops.aten.copy_.default(target, source) if target.is_meta else target


def _picked(x: torch.Tensor, indices: list[torch.Tensor | None], *more: Any) -> torch.Tensor:
    """x[indices], where a mask picks everything."""
    listed: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            listed += [torch.empty(index.numel(), dtype=torch.int64, device=x.device)] * index.dim()
        else:
            listed.append(index)
    return torch.ops.aten.index.Tensor(x, listed)


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=x.device)


def _unique(x: torch.Tensor, *more: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    places = torch.empty(x.numel(), dtype=torch.int64, device=x.device)
    return torch.empty_like(x).flatten(), places, places


_aten = torch.ops.aten
_WITHOUT_VALUES: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: lambda x: _read((), x.dtype).item(),
    _aten.equal.default: lambda a, b: True,
    _aten._to_copy.default: _copied,
    _aten.copy_.default: _written,
    _aten.index.Tensor: _picked,
    _aten.index_put_.default: lambda x, *more: x,
    _aten._index_put_impl_.default: lambda x, *more: x,
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: lambda x, mask: torch.empty_like(x).flatten(),
    _aten._unique2.default: _unique,
}


# ---------------------------------------------------------------------------------------------------- torch.cuda itself


class _Stream:
    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, other: Any) -> None:
        pass


class _Event(_Stream):
    def record(self, *_: Any) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Graph:
    """A recording that has nothing to replay: what it recorded has run."""

    def replay(self) -> None:
        pass


class _Generator(torch.Generator):
    """One for the host, whatever it is asked for: there are no values to generate on the stand-in."""

    def __new__(cls, device: object = None) -> torch.Generator:  # type: ignore[misc]
        return super().__new__(cls)


def install(gpu: Gpu) -> None:
    """Put the stand-in in the place of torch.cuda, for the rest of this process."""
    importlib.import_module("torch._dynamo")  # The first call of many functions imports it, and it wants the real CUDA.

    cuda: Any = torch.cuda
    nothing = lambda *_, **__: None  # noqa: E731
    nowhere = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: gpu.name,
        "get_device_capability": lambda *_: (gpu.major, gpu.minor),
        "get_device_properties": lambda *_: SimpleNamespace(**asdict(gpu)),
        "mem_get_info": lambda *_: (gpu.total_memory, gpu.total_memory),
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "current_stream": _Stream,
        "graph_pool_handle": nothing,
        **dict.fromkeys(("synchronize", "set_sync_debug_mode", "empty_cache", "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), nothing),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0),
        **dict.fromkeys(("stream", "graph", "device", "device_of"), nowhere),
    }.items():
        setattr(cuda, name, value)
    backends: Any = torch.backends
    backends.cuda.can_use_cudnn_attention = backends.cuda.can_use_flash_attention = lambda *_: True
    backends.cuda.SDPAParams = nothing
    backends.cudnn.is_available = lambda: True
    torch.testing.assert_close = nothing
    whole: Any = torch
    whole.compile = lambda function=None, **_: function if function is not None else lambda function: function
    torch.Tensor.record_stream = nothing  # type: ignore[method-assign]
    # What is recomputed for gradients is on CUDA by name, and what was computed first is compared without names.
    torch.utils.checkpoint._allowed_determinism_checks_to_fns["default"] = nothing
    torch.nn.Module.compile = nothing  # type: ignore[method-assign]
    torch.Generator = _Generator  # type: ignore[misc]
    # Gradients are computed where this mode is still on, so that what is recomputed for them is on CUDA too.
    whole.autograd.has_torch_function = lambda tensors: False
    by_name = CudaByName()
    by_name.__enter__()
    ShapesAlone(by_name).__enter__()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of code that finds no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
