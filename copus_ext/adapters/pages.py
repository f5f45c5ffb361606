"""Pages of memory that goes, for memory that comes: what a move fills on a CPU need not be fresh.

Fresh memory is pages that the kernel fills with zeros one by one as they are touched, which takes several times as long
as copying into them; and what is freed the C library either returns or keeps in holes that the next tensor does not
fit. (On a GPU torch's allocator keeps what is freed.) So pages change places (``mremap``): out of a storage about to be
freed, into one that was just taken, and both stay where they are. What a smaller job has no use for is there for the
next move, unless the system needs it before (``MADV_FREE``).
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
from collections.abc import Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, PROT_READ, PROT_WRITE

import torch

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4  # DONTUNMAP: the place that pages leave stays, without pages; Linux 5.7
_MAP_FIXED = 0x10
_MADV_FREE = 8  # Linux 4.5
_NOWHERE = ctypes.c_void_p(-1).value
_LEAST = 2**18  # bytes that are worth a mapping
_MOST_MAPPINGS = 2**14  # a process may have four times as many; pages that change places are mappings of their own


class Pages:
    """Pages that nothing lies in at present; where the system can't move them, none."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int]] = []  # (bytes, address), ascending
        self._seams: list[int] = []
        self._most_seams = _MOST_MAPPINGS
        self._most = 0  # bytes that a job had so far
        self._wanted = 0  # bytes that this move will take, beyond what it has kept for that
        self._keeps = False  # during a move, unless the system can't do it, or memory is short
        try:
            libc = ctypes.CDLL(None)
            calls = libc.mremap, libc.mmap, libc.munmap, libc.madvise
        except (OSError, TypeError, AttributeError):  # not Linux
            self._can = False
            return
        self._can = True
        self._mremap, self._mmap, self._munmap, self._madvise = calls
        address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mremap.argtypes, self._mremap.restype = [address, size, size, number, address], address
        self._mmap.argtypes, self._mmap.restype = [address, size, number, number, number, ctypes.c_long], address
        self._munmap.argtypes = [address, size]
        self._madvise.argtypes = [address, size, number]

    def __del__(self) -> None:
        self.free()

    @contextlib.contextmanager
    def between(self, before: int, after: int, device: torch.device) -> Iterator[None]:
        """During a move from a job of ``before`` bytes to one of ``after``, both on ``device``.

        The system may have what the new job has no use for as soon as it is let go. Of what it leaves, as much stays as
        the largest job so far had more than the new one.
        """
        self._most, self._wanted = max(self._most, before, after), after
        if self._can and device.type == "cpu":
            with contextlib.suppress(OSError):  # no /proc
                self._seams = _mappings()
                self._most_seams = _MOST_MAPPINGS + len(self._kept)  # which are among them
                self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
            self._trim(self._most - after)

    def free(self) -> None:
        """Give back what is kept, and keep nothing more in this move."""
        self._keeps = False
        for size, place in self._kept:
            self._munmap(place, size)
        self._kept.clear()

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Take the pages of a storage whose content is not needed any more, before it is freed."""
        if not self._keeps or storage.is_shared() or not storage.resizable():
            return  # others may see it, or torch can't free it
        address, size = _whole_pages(storage)
        end, first = address + size, bisect.bisect_right(self._seams, address)
        inside = self._seams[first : bisect.bisect_left(self._seams, end)]
        for start, stop in zip([address, *inside], [*inside, end], strict=True):  # no call takes two mappings
            self._keep(start, stop - start)

    def give(self, storage: torch.UntypedStorage) -> None:
        """Put pages, with any content, into a storage that was just taken, as far as there are any.

        Raises:
            MemoryError: the storage may have lost its memory.
        """
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
        if not self._keeps or size < _LEAST or len(self._seams) + len(self._kept) > self._most_seams:
            return
        place = self._mremap(address, size, size, _MAYMOVE | _DONTUNMAP, None)
        if place == _NOWHERE:
            self._keeps = False
            return
        bisect.insort(self._kept, (size, place))
        if size > self._wanted and not self._offer(place, size):
            self.free()
        self._wanted -= min(size, self._wanted)

    def _keep_rest(self, size: int, place: int) -> None:
        if size >= _LEAST:
            bisect.insort(self._kept, (size, place))
        elif size:
            self._munmap(place, size)

    def _trim(self, most: int) -> None:
        """Give back what is kept beyond ``most`` bytes, small ones first, and offer the rest to the system."""
        beyond = sum(size for size, _ in self._kept) - most
        while beyond > 0:
            size, place = self._kept.pop(0)
            cut = min(size, -(-beyond // PAGESIZE) * PAGESIZE)
            self._munmap(place, cut)
            self._keep_rest(size - cut, place + cut)
            beyond -= cut
        if not all(self._offer(place, size) for size, place in self._kept):
            self.free()

    def _offer(self, place: int, size: int) -> bool:
        """Let the system have pages when it needs them, until they are written to; whether it can."""
        return not self._madvise(place, size, _MADV_FREE)

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
