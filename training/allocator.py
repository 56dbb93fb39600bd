"""How a process on a CPU treats memory that tensors have freed."""

import ctypes
import os


# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 * 2**20


def keep_freed_memory():
    """Keeps what tensors free for those that follow, where the C library is glibc and nobody has said otherwise (`MALLOC_*`).

    By default glibc maps every block above 32 MiB anew, smaller ones until it has learnt better, and gives the end of its heap back to
    the system: each step of training then touches all its activations for the first time, a page fault for every 4 KiB. Where faults are
    dear, as in virtual machines, this is most of the time. In return the process does not shrink below its peak.

    Returns whether it was done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (only glibc has it)
        settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD))
        return all(library.mallopt(key, value) for key, value in settings)
    except (OSError, AttributeError):
        return False
