# SPDX-License-Identifier: Apache-2.0
"""Which system calls an untrusted process may still make: a seccomp filter, by ctypes and the standard library alone.

The filter is a list of what is refused, not of what is allowed: an interpreter's needs differ between versions, and what
must not happen is known. It closes what the other layers leave open or what an old kernel lacks them for: sockets of
every kind (a network namespace holds no vsock and no socket files), new processes and programs (so that the limits of one
process are those of the whole program), signals to and limits of other processes, memory that no limit counts, reading
other processes, and the kernel's less used doors: namespaces, mounts, io_uring, BPF, keys.

See seccomp(2) and linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from typing import NamedTuple


class _Machine(NamedTuple):
    """How one architecture is told (`AUDIT_ARCH_*`), and its column of the table."""

    audit: int
    column: int


_MACHINES = {"x86_64": _Machine(0xC000003E, 0), "aarch64": _Machine(0xC00000B7, 1)}

# Numbers on x86_64 and aarch64; -1: no such call. From asm/unistd_64.h and asm-generic/unistd.h.
_REFUSED = {
    # network
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    # processes and programs; `clone` is looked at below
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    # other processes: signals, priorities, memory, files
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that belongs to no process
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # the kernel's less used doors
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "syslog": (103, 116),
}
_CLONE, _CLONE3, _TGKILL = (56, 220), (435, 435), (234, 131)
_SOCKETPAIR, _SENDTO, _PRLIMIT = (53, 199), (44, 206), (302, 261)

_LOAD, _EQUAL, _ANY_BIT, _GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_SOCK_STREAM, _SOCK_TYPE_MASK = 1, 0xF
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_Step = tuple[int, int, int, int]
"""Code, how many steps to skip if true, if false, and the operand."""


def refuse_calls() -> bool:
    """Installs the filter for this process for good. Needs `no_new_privs`; False where there is no seccomp."""
    machine = _MACHINES.get(platform.machine())
    if not sys.platform.startswith("linux") or machine is None or sys.maxsize < 1 << 32:
        return False
    steps = _steps(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0


def _steps(machine: _Machine, pid: int) -> list[_Step]:
    """The filter. Every block but the last falls through to the next when it is not about the call at hand."""
    column = machine.column
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if platform.machine() == "x86_64":  # numbers from 2^30 are the same calls with 32-bit pointers
        steps += [(_GREATER_EQUAL, 0, 1, 1 << 30), (_RETURN, 0, 0, _KILL_PROCESS)]
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            steps += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # Its flags lie in memory, out of a filter's sight; libc falls back to `clone`.
    steps += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    allow = (_RETURN, 0, 0, _ALLOW)
    conditions: list[tuple[tuple[int, int], list[_Step]]] = [
        (_CLONE, [(_LOAD, 0, 0, _argument(0)), (_ANY_BIT, 1, 0, _CLONE_THREAD)]),
        (_TGKILL, [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 1, 0, pid)]),
        (_PRLIMIT, [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 1, 0, 0)]),
        # A datagram socket could be told another address with every message.
        (_SOCKETPAIR, [(_LOAD, 0, 0, _argument(1)), (_AND, 0, 0, _SOCK_TYPE_MASK), (_EQUAL, 1, 0, _SOCK_STREAM)]),
        (_SENDTO, [(_LOAD, 0, 0, _argument(5)), (_EQUAL, 1, 0, 0)]),
    ]
    for numbers, condition in conditions:
        block = [*condition, refuse, allow]
        steps += [(_EQUAL, 0, len(block), numbers[column]), *block]
    return [*steps, allow]


def _argument(index: int) -> int:
    """Where the low half of a call's argument lies in what a filter sees, on a little-endian machine."""
    return 16 + 8 * index
