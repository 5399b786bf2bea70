"""What a computation takes besides time: bytes of tensors alive, bytes that leave the cache, resident memory."""

from __future__ import annotations

import re
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul")
# Touch a few elements per row of a large operand; or reserve memory without touching it.
SPARSE_OR_EMPTY = ("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "empty", "empty_like", "new_empty")


class PeakTensors(TorchDispatchMode):
    """The highest sum of bytes of storages that operations create, whatever their allocator does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


class Traffic(TorchDispatchMode):
    """Bytes that operations other than matrix products read from and write to memory, through a cache of one core.

    Each operand counts as read once and each result as written once, which is the least an operation can do; what the
    last operations left in a cache of `CACHE_BYTES` (least recently used goes first) is not read again, and written
    once when it goes. A product empties the cache.
    """

    CACHE_BYTES = 2 * 1024**2
    PAGE = 4096

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._dirty: OrderedDict[int, bool] = OrderedDict()  # by page number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self._evict(0)
        elif name not in SPARSE_OR_EMPTY and not func.is_view:
            overwrites = name in ("copy_", "fill_", "zero_")
            out = {id(tensor) for tensor in _tensors((kwargs or {}).get("out"))}
            for position, operand in enumerate(_tensors((args, kwargs))):
                if id(operand) not in out and not (overwrites and position == 0):
                    self._touch(operand, written=False)
            for tensor in _tensors(result):
                self._touch(tensor, written=True)
        return result

    def total(self) -> int:
        """Bytes so far, with what the cache still has to write."""
        self._evict(0)
        return self.bytes

    def _touch(self, tensor: Tensor, written: bool) -> None:
        if tensor.numel() == 0:
            return
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        for page in range(start // self.PAGE, (start + span * tensor.element_size() - 1) // self.PAGE + 1):
            dirty = self._dirty.pop(page, None)
            if dirty is None and not written:
                self.bytes += self.PAGE
            self._dirty[page] = bool(dirty) or written
        self._evict(self.CACHE_BYTES // self.PAGE)

    def _evict(self, pages: int) -> None:
        while len(self._dirty) > pages:
            self.bytes += self.PAGE * self._dirty.popitem(last=False)[1]


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def resident_bytes() -> int:
    """Of this process now. Linux."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The highest since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024
