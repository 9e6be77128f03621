# SPDX-License-Identifier: Apache-2.0
"""The kernel's help in confining an untrusted process, by ctypes and the standard library alone.

Run inside the sandbox's own interpreter (`sandbox_child.py`), never in the evaluating process: every call is final for
the process that makes it. Each function reports whether it succeeded, and a refusal leaves the process as it was, so
that the caller can go on with what the kernel grants and name it in the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Sequence


CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
# These numbers are the same on every architecture; glibc wraps none of the calls.
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446

NOBODY = 65534
UID_BASE = 0x6000_0000
PRIVATE_TMP = "/tmp"
MAX_FILES = 4096
"""Files and folders of a private working folder: empty ones take memory too."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> bool:
    """Calls a libc function that returns 0 on success; False when it fails or does not exist here."""
    function = getattr(_libc(), name, None)
    return function is not None and function(*args) == 0


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> bool:
    kind_bytes = kind.encode() if kind else None
    return _call("mount", source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode())


def die_with_parent() -> None:
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent died, so that none gets away."""
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def forbid_new_privileges() -> bool:
    return _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def forbid_tracing() -> None:
    """Nobody of the same user may read this process's memory or attach to it."""
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def prefer_as_victim() -> None:
    """Where the machine runs out of memory, the kernel ends this process and its children, not somebody else's."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def keep_only(*fds: int) -> None:
    """Closes all file descriptors but these and the standard three."""
    low = 3
    for fd in (*sorted(fds), 256):
        os.closerange(low, fd)
        low = fd + 1


def enter_namespaces() -> list[str]:
    """Gives this process (its children, for process ids) a network, mount table and process table of its own.

    Root does so directly. Anybody else needs a user namespace, which some systems refuse.
    """
    if not sys.platform.startswith("linux"):
        return []
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if user == 0 and _call("unshare", flags):
        return ["network-namespace", "process-namespace"]
    if not _call("unshare", flags | CLONE_NEWUSER):
        return []
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError:
            pass  # the ids then read as "nobody"; the files keep the owner they had
    return ["network-namespace", "process-namespace"]


def private_root(folder: str, tmp_bytes: int) -> bool:
    """Replaces the file system by the interpreter and the system libraries, read-only, and an empty `/tmp`.

    Needs the mount namespace of `enter_namespaces`. `folder` is where the new root is put together.
    """
    if not _mount("none", "/", None, MS_REC | MS_PRIVATE):
        return False
    if not _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755"):
        return False
    tmp = folder + PRIVATE_TMP
    os.mkdir(tmp)
    if not _mount("tmpfs", tmp, "tmpfs", MS_NOSUID | MS_NODEV, f"size={tmp_bytes},nr_inodes={MAX_FILES},mode=1777"):
        return False
    if not all(_bind_readonly(path, folder) for path in needed_paths()):
        return False
    for path in package_paths():
        if not _mount("tmpfs", folder + path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=755"):
            return False
    os.mkdir(folder + "/dev")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        open(folder + device, "w").close()
        if not _mount(device, folder + device, None, MS_BIND):
            return False
    os.mkdir(folder + "/old")
    if not _mount("none", folder, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV):
        return False
    if not _call("pivot_root", folder.encode(), (folder + "/old").encode()):
        return False
    os.chdir("/")
    if not _call("umount2", b"/old", MNT_DETACH):
        os._exit(70)  # the old root is still reachable and the new one is in place: neither forward nor back
    return True


@functools.cache
def needed_paths() -> tuple[str, ...]:
    """What a running interpreter may still open: its standard library and the shared libraries of its extensions."""
    wanted = [os.path.dirname(os.path.realpath(os.__file__)), "/usr/share/zoneinfo", "/nix/store", "/gnu/store"]
    for prefix in (sys.base_prefix, sys.base_exec_prefix, "/usr", "/"):
        wanted += [os.path.join(prefix, name) for name in ("lib", "lib64", "lib32")]
    kept: list[str] = []
    for path in sorted({os.path.normpath(p) for p in wanted if os.path.isdir(p)}, key=len):
        if not any(_inside(path, parent) for parent in kept) and path != "/":
            kept.append(path)
    return tuple(kept)


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


@functools.cache
def package_paths() -> tuple[str, ...]:
    """Installed packages among what is needed: no program's business, and one of them holds the right solutions."""
    standard, needed = os.path.dirname(os.path.realpath(os.__file__)), needed_paths()
    found = {folder for path in needed for folder in glob.glob(f"{glob.escape(path)}/python*/*-packages")}
    found |= set(glob.glob(f"{glob.escape(standard)}/*-packages"))
    return tuple(sorted(path for path in found if os.path.realpath(path) == path and any(_inside(path, p) for p in needed)))


def _readable(path: str, hidden: Sequence[str]) -> Iterator[str]:
    """Splits `path` into parts that hold none of `hidden`."""
    if path in hidden:
        return
    if not any(_inside(other, path) for other in hidden):
        yield path
        return
    for entry in os.scandir(path):
        yield from _readable(entry.path, hidden)


def _bind_readonly(source: str, folder: str) -> bool:
    target = folder + source
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return True
    os.mkdir(target)
    if not _mount(source, target, None, MS_BIND | MS_REC):
        return False
    # struct mount_attr {attr_set, attr_clr, propagation, userns_fd}: read-only, no setuid, no devices, submounts too.
    attributes = struct.pack("=4Q", 1 | 2 | 4, 0, 0, 0)
    result = _libc().syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))
    return result == 0


def drop_root(folder: str, number: int) -> str | None:
    """Turns root into a user that nobody else is, so that RLIMIT_NPROC counts and signals reach no one else.

    The user may write to `folder`. `number` is this sandbox's own: the kernel counts processes by user over all process
    namespaces, so that two sandboxes with one user would share one limit.

    Returns ``own-user``; ``own-user-for-limits`` where the interpreter's files are root's alone: then only the real id
    changes, which makes the limit on processes count but protects no file; or None when this process is not root or may
    not change.
    """
    if os.getuid() != 0:
        return None
    for user in (UID_BASE + number, NOBODY):
        try:
            os.setresuid(-1, user, -1)
            readable = os.access(os.__file__, os.R_OK, effective_ids=True)
            os.setresuid(-1, 0, -1)
            if not readable:
                os.setresuid(user, 0, 0)
                return "own-user-for-limits"
            os.chown(folder, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return "own-user"
        except OSError:
            continue  # a container may map few ids: try the next
    return None


def drop_capabilities() -> bool:
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    return _call("capset", header, bytes(24))


def landlock(writable: str, private: bool) -> list[str]:
    """Forbids writing outside `writable`, TCP, and signals to outside, as far as the kernel's version goes.

    Forbids reading too, except `writable` and what the interpreter needs, unless the file system is a `private` one.
    """
    libc = _libc()
    version = libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return []
    # Rights by version: 13 at first, +1 "refer" (2), +1 "truncate" (3), +1 "device ioctl" (5); TCP (4); scopes (6).
    files = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    network, scopes = 3 * (version >= 4), 3 * (version >= 6)
    rules = struct.pack("=3Q", files, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE, rules, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return []
    execute, write, read, listing = 1 << 0, 1 << 1, 1 << 2, 1 << 3
    allowed = [(writable, files), ("/dev/null", read | write)]
    if private:
        allowed.append(("/", execute | read | listing))
    else:
        needed, hidden = needed_paths(), package_paths()
        parts = {part for path in needed for part in _readable(os.path.realpath(path), hidden)}
        allowed += [(part, execute | read) for part in parts] + [(path, listing) for path in needed]
        allowed += [(device, read) for device in ("/dev/zero", "/dev/urandom")]
    ok = all(_allow(libc, ruleset, path, rights) for path, rights in allowed)
    ok = ok and libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return ["landlock-files", *["landlock-tcp"] * bool(network), *["landlock-signals"] * bool(scopes)] if ok else []


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:  # a link to nowhere: nothing to allow
        return True
    try:
        return bool(libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, fd), 0) == 0)
    finally:
        os.close(fd)


def limit_resources(limits: dict[str, int], kinds: Sequence[str]) -> list[str]:
    """Sets soft and hard limits alike. `kinds` names those to set; an existing lower hard limit is kept.

    Returns the names of those the kernel accepted.
    """
    table = {
        "cpu_seconds": resource.RLIMIT_CPU,
        "memory_bytes": resource.RLIMIT_AS,
        "processes": resource.RLIMIT_NPROC,
        "file_bytes": resource.RLIMIT_FSIZE,
        "open_files": resource.RLIMIT_NOFILE,
    }
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    accepted = []
    for kind in kinds:
        hard = resource.getrlimit(table[kind])[1]
        # One second between the soft limit, which the program may catch, and the hard one, which kills it.
        soft, end = limits[kind], limits[kind] + (kind == "cpu_seconds")
        if hard != resource.RLIM_INFINITY:
            soft, end = min(soft, hard), min(end, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and refuses it
            resource.setrlimit(table[kind], (soft, end))
            accepted.append(kind)
    return accepted


def kill_descendants() -> None:
    """Kills every child, and every grandchild it adopts, until none is left (see `adopt_orphans`)."""
    while True:
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
