"""Pages of memory that goes, for memory that comes: what a move fills on a CPU need not be fresh.

Fresh memory is pages that the kernel fills with zeros one by one as they are touched, which takes several times as long
as copying into them; and what is freed the C library either returns or keeps in holes that the next tensor does not
fit. (On a GPU torch's allocator keeps what is freed.) So pages change places (``mremap``): out of a storage about to be
freed, into one that was just taken, and both stay where they are.
"""

from __future__ import annotations

import bisect
import ctypes
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, PROT_READ, PROT_WRITE
from types import TracebackType
from typing import Self

import torch

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4  # DONTUNMAP: the place that pages leave stays, without pages; Linux 5.7
_MAP_FIXED = 0x10
_NOWHERE = ctypes.c_void_p(-1).value
_LEAST = 2**18  # bytes that are worth a mapping
_MOST_MAPPINGS = 2**14  # a process may have four times as many; pages that change places are mappings of their own


class Pages:
    """Up to ``wanted`` bytes of pages; where the system can't do it, none. What is left over is freed at the end."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._kept: list[tuple[int, int]] = []  # (bytes, address), ascending
        self._seams: list[int] = []
        if not wanted:
            return
        try:
            libc = ctypes.CDLL(None)
            self._mremap, self._mmap, self._munmap = libc.mremap, libc.mmap, libc.munmap
            self._seams = _mappings()
        except (OSError, TypeError, AttributeError):  # not Linux
            self._wanted = 0
            return
        address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mremap.argtypes, self._mremap.restype = [address, size, size, number, address], address
        self._mmap.argtypes, self._mmap.restype = [address, size, number, number, number, ctypes.c_long], address
        self._munmap.argtypes = [address, size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None) -> None:
        self.free()

    def free(self) -> None:
        """Give back what is kept, and keep nothing more."""
        self._wanted = 0
        for size, place in self._kept:
            self._munmap(place, size)
        self._kept.clear()

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Take the pages of a storage whose content is not needed any more, before it is freed."""
        if storage.device.type != "cpu" or storage.is_shared() or not storage.resizable():
            return  # others may see it, or torch can't free it
        address, size = _whole_pages(storage)
        end, first = address + size, bisect.bisect_right(self._seams, address)
        inside = self._seams[first : bisect.bisect_left(self._seams, end)]
        for start, stop in zip([address, *inside], [*inside, end], strict=True):  # no call takes two mappings
            self._keep(start, min(stop - start, self._wanted // PAGESIZE * PAGESIZE))

    def give(self, storage: torch.UntypedStorage) -> None:
        """Put pages, with any content, into a storage that was just taken, as far as there are any.

        Raises:
            MemoryError: the storage may have lost its memory.
        """
        if storage.device.type != "cpu":
            return
        address, size = _whole_pages(storage)
        while self._kept and size >= _LEAST:
            fitting = bisect.bisect_left(self._kept, (size,))
            room, place = self._kept.pop(min(fitting, len(self._kept) - 1))
            moved = min(size, room)
            if self._mremap(place, moved, moved, _MAYMOVE | _FIXED, address) != address:
                self._kept.append((room, place))
                self.free()
                return self._replace(address, moved)  # it may be gone by now
            bisect.insort(self._seams, address)
            address, size = address + moved, size - moved
            bisect.insort(self._seams, address)
            self._keep_rest(room - moved, place + moved)

    def _keep(self, address: int, size: int) -> None:
        if size < _LEAST or len(self._seams) + len(self._kept) > _MOST_MAPPINGS:
            return
        place = self._mremap(address, size, size, _MAYMOVE | _DONTUNMAP, None)
        if place == _NOWHERE:
            self._wanted = 0
        else:
            bisect.insort(self._kept, (size, place))
            self._wanted -= size

    def _keep_rest(self, size: int, place: int) -> None:
        if size >= _LEAST:
            bisect.insort(self._kept, (size, place))
        elif size:
            self._munmap(place, size)

    def _replace(self, address: int, size: int) -> None:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | _MAP_FIXED
        if self._mmap(address, size, PROT_READ | PROT_WRITE, flags, -1, 0) != address:
            raise MemoryError("pages can't be moved")


def _mappings() -> list[int]:
    """Where the mappings of this process begin, ascending."""
    with open("/proc/self/maps", "rb") as lines:
        return [int(line.partition(b"-")[0], 16) for line in lines]


def _whole_pages(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Address and bytes of the pages that nothing but ``storage`` lies in."""
    first = -(-storage.data_ptr() // PAGESIZE) * PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // PAGESIZE * PAGESIZE
    return first, max(0, end - first)
