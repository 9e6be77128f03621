# SPDX-License-Identifier: Apache-2.0
"""Hostile completions: what each tries, and its code. `test_attacks.py` runs them and looks for what they left behind.

Every program follows `PRELUDE`, under which stand the names of the scene: CANARY (a file to leave alone), SECRET_FILE, LOOT
(paths that must not come to be), TCP, UDP, UNIX and ABSTRACT (listeners), PARENT (the evaluating process) and PROBLEMS (the
published right answers). `leak` tries ways out for what was found. Programs without an `f` of their own get a wrong one.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple


TEST = "assert f(1) == 2\nassert abs(f(-9)) == 8\nassert list(map(f, (0, 1, 2))) == [1, 2, 3]\n"

PRELUDE = r"""
import ctypes, os, re, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    return 0
def must(ok):
    if not ok:
        raise OSError(ctypes.get_errno(), "refused")
def leak(found):
    name = "got_" + re.sub(r"\W", "_", found if isinstance(found, str) else found.decode("latin-1"))[:60]
    for path in LOOT:
        try:
            open(path, "w").write(name)
        except OSError:
            pass
    raise type(name, (Exception,), {})
def hunt(data):
    found = re.search(rb"ATTACK_SECRET=(\w+)", data)
    if found:
        leak(found[1])
"""


class Attack(NamedTuple):
    """One hostile program.

    Attributes:
        kind: Class of attack.
        tries: What it is after.
        code: Its source, after `PRELUDE`.
        reason: Regular expression of how it must end, unless its time is up before.
        needs: Protections of which one must be active for it to be stopped; empty: always.
        burns: It uses a second of processor time.
        works_outside: Unconfined, it reaches its aim: shown by running it so.
    """

    kind: str
    tries: str
    code: str
    reason: str = ""
    needs: tuple[str, ...] = ()
    burns: bool = False
    works_outside: bool = False


def _table(kind: str, **attacks: Attack) -> dict[str, Attack]:
    return {f"{kind}-{name}".replace("_", "-"): attack._replace(kind=kind) for name, attack in attacks.items()}


def _a(
    tries: str,
    code: str,
    reason: str = "",
    *,
    needs: tuple[str, ...] = (),
    burns: bool = False,
    works_outside: bool = False,
) -> Attack:
    return Attack("", tries, textwrap.dedent(code).strip() + "\n", reason, needs, burns, works_outside)


_TIMEOUT = "timeout"
_MEMORY = "killed: memory|timeout"  # pages are slow to come by on a busy machine
_WRONG = "failed: AssertionError"
_ENDED = "exited before the end of the test"
_REFUSED = "failed: (PermissionError|FileNotFoundError|OSError|NotADirectoryError|BlockingIOError)"
_FILES = ("private-files", "landlock-files")
_NETWORK = ("network-namespace", "seccomp")
_SECCOMP = ("seccomp",)

EXHAUSTION = _table(
    "exhaustion",
    loop=_a("the processor", "while True: pass", _TIMEOUT, burns=True),
    regex=_a("the processor, inside one C call", "re.match('(a+)+$', 'a' * 64 + 'b')", _TIMEOUT, burns=True),
    power=_a("the processor, in a number", "x = 7 ** 7 ** 12", f"{_TIMEOUT}|{_MEMORY}", burns=True),
    swallow=_a(
        "the processor, holding on to every exception",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        f"{_TIMEOUT}|killed: SIGKILL",
        burns=True,
    ),
    in_call=_a("the processor, in the call", "def f(x):\n    while True: pass", _TIMEOUT, burns=True),
    sleep=_a("the wall clock", "time.sleep(10**6)", _TIMEOUT),
    sleep_in_call=_a("the wall clock, in the call", "def f(x): time.sleep(10**6)", _TIMEOUT),
    lock=_a("the wall clock, by a deadlock", "lock = threading.Lock(); lock.acquire(); lock.acquire()", _TIMEOUT),
    closed_channel=_a("the wall clock, with the channel closed", "os.closerange(3, 64); time.sleep(10**6)", _TIMEOUT),
    memory=_a("memory at once", "x = bytearray(8 << 30)", _MEMORY),
    memory_doubling=_a("memory by doubling", "x = b'x'\nwhile True: x += x", _MEMORY),
    memory_mapped=_a(
        "memory by mappings",
        "import mmap\nheld = []\nwhile True: held.append(mmap.mmap(-1, 64 << 20))",
        f"failed: OSError|{_MEMORY}",
    ),
    memory_bomb=_a(
        "memory by unpacking",
        "import zlib\nbomb = zlib.compress(bytes(64 << 20))\nheld = []\nwhile True: held.append(zlib.decompress(bomb))",
        _MEMORY,
    ),
    memory_files=_a(
        "memory in files without a name",
        "for _ in range(32):\n    os.write(os.memfd_create('x'), bytes(8 << 20))\nleak('memfd')",
        _REFUSED,
        needs=_SECCOMP,
    ),
    memory_shared=_a(
        "memory in System V segments, which outlive processes",
        "must(libc.shmget(0, ctypes.c_size_t(1 << 30), 0o1600) >= 0)\nleak('segment')",
        _REFUSED,
        needs=_SECCOMP,
    ),
    recursion=_a("the stack", "def f(x): return f(x + 1)", "failed: RecursionError"),
    recursion_unbounded=_a(
        "the C stack", "sys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)", "killed|failed|timeout"
    ),
    compiler=_a("the compiler's stack", "eval('(' * 10**5 + ')' * 10**5)", "failed|killed"),
    descriptors=_a(
        "file descriptors",
        "held = []\nwhile True: held.append(os.open('/dev/null', os.O_RDONLY))",
        "failed: OSError",
    ),
    descriptors_swallowed=_a(
        "file descriptors, and to go on",
        "try:\n    while True: os.pipe()\nexcept OSError: pass",
        _WRONG,
    ),
    fork=_a(
        "processes, without end",
        "while True:\n    try: os.fork()\n    except BlockingIOError: time.sleep(0.01)",
        f"failed: PermissionError|{_TIMEOUT}",
        needs=("seccomp", "processes"),
        burns=True,
    ),
    threads=_a(
        "threads, without end",
        "while True: threading.Thread(target=time.sleep, args=(10**6,)).start()",
        "failed: RuntimeError",
        needs=("processes",),
    ),
    threads_left=_a(
        "threads that never end",
        "for _ in range(4): threading.Thread(target=time.sleep, args=(10**6,)).start()",
        _WRONG,
    ),
    subprocesses=_a(
        "processes, by the interpreter",
        "import subprocess\nwhile True: subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)",
        "failed",
    ),
    multiprocessing=_a(
        "processes, by a pool",
        "import multiprocessing\nmultiprocessing.Pool(64).map(abs, range(64))\nleak('pool')",
        f"failed|{_TIMEOUT}",
        needs=_SECCOMP,
    ),
    big_file=_a(
        "the disk, by one file",
        "with open('x', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        "failed|killed",
    ),
    sparse_file=_a("the disk, by a promise", "open('x', 'wb').truncate(1 << 40)", "failed|killed"),
    many_files=_a(
        "the disk, by many files",
        "for n in range(10**6):\n    with open(f'x{n}', 'wb') as file: file.write(bytes(4 << 20))",
        "failed: OSError",
        needs=("private-files",),
    ),
    empty_files=_a(
        "the kernel's memory, by empty files",
        "for n in range(10**6): os.close(os.open(f'x{n}', os.O_CREAT))",
        "failed: OSError",
        needs=("private-files",),
    ),
    deep_folders=_a(
        "whoever removes the folder, by depth", "for _ in range(1500):\n    os.mkdir('d'); os.chdir('d')", _WRONG
    ),
    locked_folders=_a("whoever removes the folder, by permissions", "os.makedirs('a/b'); os.chmod('a', 0)", _WRONG),
    flood_stdout=_a("the output", "while True: os.write(1, bytes(1 << 20))", _TIMEOUT, burns=True),
    flood_stderr=_a("the error output", "for _ in range(10**4): sys.stderr.write('x' * 10**4)", _WRONG),
    flood_channel=_a(
        "the result channel",
        "for fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 4096)\n    except OSError: pass",
        f"failed: (MalformedAnswer|AnswerTooLong)|{_ENDED}",
    ),
    long_answer=_a(
        "the tester's memory, by length", "def f(x): return 'x' * (64 << 20)", f"failed: AnswerTooLong|{_TIMEOUT}"
    ),
    deep_answer=_a(
        "the tester's stack, by depth",
        "def f(x):\n    deep = []\n    for _ in range(900): deep = [deep]\n    return deep",
        "failed: (MalformedAnswer|AssertionError|RecursionError|TypeError)",
    ),
    deep_frame=_a(
        "the tester's stack, by depth it did not encode",
        "text = b'{\"value\": ' + b'[' * 10**5 + b']' * 10**5 + b'}'\n"
        "for fd in range(3, 64):\n    try: os.write(fd, len(text).to_bytes(8, 'big') + text)\n    except OSError: pass",
        "failed: MalformedAnswer",
    ),
    endless_answer=_a(
        "the tester's patience",
        "import itertools\ndef f(x): return itertools.count()",
        f"{_MEMORY}|{_TIMEOUT}",
        burns=True,
    ),
    many_digits=_a("the tester's processor", "def f(x): return 1 << 10**7", _WRONG),
    wide_fraction=_a(
        "the tester's memory, by a number",
        "from decimal import Decimal\ndef f(x): return Decimal('1e999999999999999999')",
        "failed",
    ),
)

_KILL = "try:\n    {}\nexcept (OSError, AttributeError): pass"

SIGNALS = _table(
    "signals",
    parent=_a("to end the evaluation", _KILL.format("os.kill(PARENT, signal.SIGKILL)"), _WRONG),
    checker=_a("to end its checker", _KILL.format("os.kill(os.getppid(), signal.SIGKILL)"), _WRONG),
    group=_a("to end its group", _KILL.format("os.killpg(os.getpgrp(), signal.SIGKILL)"), f"{_WRONG}|killed: SIGKILL"),
    session=_a("to end the evaluation's group", _KILL.format("os.killpg(os.getpgid(PARENT), signal.SIGKILL)"), _WRONG),
    everybody=_a(
        "to end everybody",
        _KILL.format("os.kill(-1, signal.SIGKILL)"),
        _WRONG,
        needs=("process-namespace",),
    ),
    stop_checker=_a("to stop its checker", _KILL.format("os.kill(os.getppid(), signal.SIGSTOP)"), _WRONG),
    stop_parent=_a("to stop the evaluation", _KILL.format("os.kill(PARENT, signal.SIGSTOP)"), _WRONG),
    by_descriptor=_a(
        "to end the evaluation, by a process descriptor",
        _KILL.format("signal.pidfd_send_signal(os.pidfd_open(PARENT), signal.SIGKILL)"),
        _WRONG,
    ),
    by_limit=_a(
        "to end the evaluation, by its limits",
        "import resource\n" + _KILL.format("resource.prlimit(PARENT, resource.RLIMIT_CPU, (0, 0))"),
        _WRONG,
    ),
    ignored=_a(
        "to outlive its time",
        "for number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        f"{_TIMEOUT}|killed: SIGKILL",
        burns=True,
    ),
    stop_self=_a("to stop the clock with itself", "signal.raise_signal(signal.SIGSTOP)", _TIMEOUT),
    real_time=_a("to end by a signal without a name", "signal.raise_signal(40)", "killed: signal 40"),
    crash=_a("to crash", "ctypes.string_at(0)", "killed: SIGSEGV"),
    abort=_a("to abort", "os.abort()", "killed: SIGABRT"),
    alarm=_a("to end by an alarm", "signal.alarm(1); time.sleep(10**6)", "killed: SIGALRM"),
    hang_up=_a("to end as if hung up", "signal.raise_signal(signal.SIGHUP)", "killed: SIGHUP"),
)

ESCAPE = _table(
    "escape",
    absolute=_a("the canary", "open(CANARY, 'w').write('x')", _REFUSED, needs=_FILES, works_outside=True),
    upwards=_a("the canary", "open('../' * 40 + CANARY, 'w').write('x')", _REFUSED, needs=_FILES, works_outside=True),
    symlink=_a(
        "the canary",
        "os.symlink(CANARY, 'link')\nopen('link', 'w').write('x')",
        _REFUSED,
        needs=_FILES,
        works_outside=True,
    ),
    hard_link=_a("the canary", "os.link(CANARY, 'link')\nopen('link', 'w').write('x')", "failed", needs=_FILES),
    process_root=_a(
        "the canary", "open('/proc/self/root' + CANARY, 'w').write('x')", _REFUSED, needs=_FILES, works_outside=True
    ),
    parents_root=_a("the canary", "open(f'/proc/{os.getppid()}/root' + CANARY, 'w').write('x')", _REFUSED, needs=_FILES),
    init_root=_a("the canary", "open('/proc/1/root' + CANARY, 'w').write('x')", _REFUSED, needs=_FILES),
    folder_descriptors=_a(
        "the canary, from any descriptor left open",
        """
        for fd in range(64):
            try:
                os.fchdir(fd)
            except OSError:
                continue
            leak("folder")
        """,
        _WRONG,
    ),
    change_folder=_a(
        "the canary, step by step",
        "os.chdir('/')\nfor part in CANARY.strip('/').split('/')[:-1]: os.chdir(part)\nopen('canary', 'w').write('x')",
        _REFUSED,
        needs=_FILES,
        works_outside=True,
    ),
    change_root=_a(
        "the canary, by a second root",
        "os.mkdir('r'); os.chroot('r')\nfor _ in range(99): os.chdir('..')\nos.chroot('.')\nopen(CANARY, 'w').write('x')",
        _REFUSED,
        needs=_FILES,
    ),
    replace=_a("the canary", "open('x', 'w').write('x'); os.rename('x', CANARY)", "failed", needs=_FILES),
    remove=_a("the canary", "os.unlink(CANARY)", _REFUSED, needs=_FILES, works_outside=True),
    truncate=_a("the canary", "os.truncate(CANARY, 0)", _REFUSED, needs=_FILES, works_outside=True),
    permissions=_a("the canary", "os.chmod(CANARY, 0)", "failed", needs=("private-files", "own-user")),
    library=_a(
        "the interpreter's own files", "open(os.path.dirname(os.__file__) + '/evil.py', 'w')", _REFUSED, needs=_FILES
    ),
    remount=_a(
        "the interpreter's own files, by a mount",
        "must(libc.mount(b'none', os.path.dirname(os.__file__).encode(), None, 32 | 4096, None) == 0)\nleak('mount')",
        "failed: (PermissionError|OSError)",
    ),
    new_mounts=_a(
        "memory and mounts, as root of a new user namespace",
        "must(libc.unshare(0x10000000 | 0x20000) == 0)\nmust(libc.mount(b't', b'/tmp', b'tmpfs', 0, None) == 0)\n"
        "leak('mount')",
        "failed: (PermissionError|OSError)",
        needs=("seccomp", "landlock-files"),
    ),
    device=_a(
        "the disk",
        "found = [p for p in ('/dev/vda', '/dev/sda', '/dev/nvme0n1', '/dev/mem') if os.path.exists(p)]\n"
        "leak(open(found[0], 'rb').read(4))",
        f"failed: IndexError|{_REFUSED}",
        needs=_FILES,
    ),
    node=_a("a device of its own", "os.mknod('disk', 0o60666, os.makedev(254, 0)); open('disk', 'rb')", "failed"),
    handle=_a(
        "a file by its handle",
        "must(libc.open_by_handle_at(-100, struct.pack('=IiQI', 8, 1, 2, 0), 0) >= 0)\nleak('handle')",
        "failed: (PermissionError|OSError)",
    ),
    read=_a("the secret file", "leak(open(SECRET_FILE).read())", _REFUSED, needs=_FILES, works_outside=True),
    read_solutions=_a(
        "the published right answers",
        "import gzip\nleak(gzip.open(PROBLEMS).read(60))",
        _REFUSED,
        needs=_FILES,
        works_outside=True,
    ),
    read_packages=_a(
        "the published right answers, wherever they lie",
        """
        import glob
        for root in {sys.base_prefix, sys.prefix, "/usr", "/usr/local"}:
            for found in glob.glob(root + "/lib*/python*/*-packages/*"):
                leak(found)
        """,
        f"{_WRONG}|{_REFUSED}",
        needs=_FILES,
    ),
    drop=_a(
        "a place that stays",
        "for path in LOOT:\n    try: open(path, 'w').write('x')\n    except OSError: pass",
        _WRONG,
        needs=_FILES,
        works_outside=True,
    ),
    passwords=_a("the machine's users", "leak(open('/etc/passwd').read())", _REFUSED, needs=_FILES, works_outside=True),
    setuid=_a("root", "os.setuid(0); leak('root')", "failed: PermissionError", needs=("own-user",)),
)

NETWORK = _table(
    "network",
    tcp=_a(
        "a connection",
        "socket.create_connection(('127.0.0.1', TCP), 1).send(b'x')",
        _REFUSED + "|failed: (TimeoutError|ConnectionRefusedError)",
        needs=(*_NETWORK, "landlock-tcp"),
        works_outside=True,
    ),
    udp=_a(
        "a datagram",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))",
        _REFUSED,
        needs=_NETWORK,
        works_outside=True,
    ),
    unix=_a(
        "a service's socket file",
        "socket.socket(socket.AF_UNIX).connect(UNIX)",
        _REFUSED,
        needs=("private-files", "seccomp"),
        works_outside=True,
    ),
    abstract=_a(
        "a service's abstract socket",
        "socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)",
        _REFUSED + "|failed: ConnectionRefusedError",
        needs=_NETWORK,
        works_outside=True,
    ),
    pair=_a(
        "a service, from a socket made as one of a pair",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', UNIX + '.datagram')",
        _REFUSED,
        needs=("private-files", "seccomp"),
        works_outside=True,
    ),
    pair_addressed=_a(
        "a service, with an address on a connected socket",
        "left, right = socket.socketpair()\nleft.sendto(b'x', UNIX)\nleak('sent')",
        "failed: (PermissionError|OSError|IsADirectoryError|FileNotFoundError)",
    ),
    names=_a(
        "a name server",
        "query = b'\\x12\\x34\\x01\\x00\\x00\\x01' + bytes(6) + b'\\x01x\\x00\\x00\\x01\\x00\\x01'\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(query, ('127.0.0.1', UDP))",
        _REFUSED,
        needs=_NETWORK,
        works_outside=True,
    ),
    names_by_libc=_a("the resolver", "leak(str(socket.getaddrinfo('example.com', 80)))", "failed: gaierror|" + _REFUSED),
    http=_a(
        "a download",
        "import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{TCP}/', timeout=1)",
        "failed: URLError",
        needs=(*_NETWORK, "landlock-tcp"),
    ),
    netlink=_a(
        "the kernel's routes",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); leak('netlink')",
        _REFUSED,
        needs=_SECCOMP,
    ),
    raw=_a("packets", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); leak('raw')", _REFUSED),
    packet=_a("the wire", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); leak('packet')", _REFUSED),
    vsock=_a(
        "the hypervisor, past network namespaces",
        "socket.socket(40, socket.SOCK_STREAM); leak('vsock')",
        _REFUSED,
        needs=_SECCOMP,
    ),
    ring=_a(
        "sockets without socket calls",
        "must(libc.syscall(425, 1, ctypes.create_string_buffer(120)) >= 0)\nleak('ring')",
        _REFUSED,
        needs=_SECCOMP,
    ),
    server=_a("to be called", "socket.create_server(('127.0.0.1', 0)); leak('server')", _REFUSED, needs=_SECCOMP),
)

_SCAN = """
import glob
for path in {}:
    try:
        hunt(open(path, 'rb').read())
    except OSError:
        pass
"""

READING = _table(
    "reading",
    own_environment=_a("the secret", "hunt(repr(os.environ).encode().replace(b\"': '\", b'='))", _WRONG),
    environment=_a(
        "the secret", "hunt(open(f'/proc/{PARENT}/environ', 'rb').read())", _REFUSED, needs=_FILES, works_outside=True
    ),
    checkers_environment=_a("the secret", _SCAN.format("[f'/proc/{os.getppid()}/environ', '/proc/self/environ']"), _WRONG),
    all_environments=_a("the secret", _SCAN.format("glob.glob('/proc/[0-9]*/environ')"), _WRONG, needs=_FILES),
    command_lines=_a("other's processes", "leak(open(f'/proc/{PARENT}/cmdline').read())", _REFUSED, needs=_FILES),
    memory=_a("the secret", "open(f'/proc/{PARENT}/mem', 'rb').read(1); leak('memory')", _REFUSED, needs=_FILES),
    descriptors=_a(
        "the evaluation's files",
        "leak(str(os.listdir(f'/proc/{PARENT}/fd')))",
        _REFUSED,
        needs=_FILES,
        works_outside=True,
    ),
    trace=_a(
        "to hold its checker",
        "libc.ptrace.restype = ctypes.c_long\nmust(libc.ptrace(16, os.getppid(), 0, 0) == 0)\nleak('attached')",
        _REFUSED,
    ),
    trace_parent=_a(
        "to hold the evaluation",
        "libc.ptrace.restype = ctypes.c_long\nmust(libc.ptrace(0x4206, PARENT, 0, 0) == 0)\nleak('seized')",
        "failed: (PermissionError|OSError|ProcessLookupError)",
        needs=("process-namespace", "landlock-files", "seccomp"),
    ),
    remote_memory=_a(
        "its checker's memory",
        """
        class Part(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
        text = ctypes.create_string_buffer(8)
        here, there = Part(ctypes.addressof(text), 8), Part(id(f), 8)
        must(libc.process_vm_readv(os.getppid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0)
        leak("memory")
        """,
        _REFUSED,
    ),
    remote_files=_a(
        "its checker's files",
        "pidfd = libc.syscall(434, os.getppid(), 0)\nmust(libc.syscall(438, pidfd, 3, 0) >= 0)\nleak('files')",
        _REFUSED,
    ),
    keys=_a(
        "the session's keys",
        "must(libc.syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 0) >= 0)\nleak('keys')",
        _REFUSED,
        needs=_SECCOMP,
    ),
)

FORGERY = _table(
    "forgery",
    exit=_a("a pass, by leaving with 0", "os._exit(0)", _ENDED, works_outside=True),
    exit_politely=_a("a pass, by leaving with 0", "sys.exit(0)", "failed: SystemExit", works_outside=True),
    exit_in_call=_a("a pass, by leaving in the call", "def f(x): os._exit(0)", _ENDED, works_outside=True),
    exit_politely_in_call=_a("a pass, by leaving in the call", "def f(x): raise SystemExit(0)", "failed: SystemExit"),
    exit_by_thread=_a(
        "a pass, by leaving later",
        "threading.Thread(target=lambda: os._exit(0)).start()\ntime.sleep(10)",
        _ENDED,
        works_outside=True,
    ),
    exit_at_exit=_a("a pass, at the end", "import atexit\natexit.register(os._exit, 0)", _WRONG, works_outside=True),
    exit_when_freed=_a(
        "a pass, by leaving when freed",
        "class Last:\n    def __del__(self): os._exit(0)\ndef f(x):\n    Last()\n    return 0",
        _ENDED,
        works_outside=True,
    ),
    exit_by_exec=_a(
        "a pass, as another program", "os.execv('/bin/true', ['true'])", f"{_REFUSED}|{_ENDED}", works_outside=True
    ),
    printing=_a("a pass, in words", "print('passed\\n' * 99, flush=True)", _WRONG),
    words=_a(
        "a pass, in words on every descriptor",
        """
        for fd in range(64):
            for text in (b"passed", b"a" * 64, b'{"verdict": "passed"}\\n', b'{"code": 0}\\n'):
                try:
                    os.write(fd, text)
                except OSError:
                    pass
        os._exit(0)
        """,
        f"{_ENDED}|failed: AnswerTooLong",
    ),
    frames=_a(
        "a pass, by answers ahead of the questions",
        """
        for text in (b'{"value": null}', b'{"value": true}', b'{"verdict": "passed"}', b'{"raised": "passed"}'):
            for fd in range(3, 64):
                try:
                    os.write(fd, len(text).to_bytes(8, "big") + text)
                except OSError:
                    pass
        """,
        "failed",
    ),
    codec=_a(
        "a pass, by the codec",
        """
        import gc
        for found in gc.get_objects():
            if isinstance(found, dict) and "encode" in found and "write_frame" in found:
                found["encode"] = lambda value: ["object", "passed"]
        """,
        "failed: (MalformedAnswer|AssertionError)",
    ),
    check=_a("a pass, by another test", "def check(*_): pass\ndef exec(*_): pass", _WRONG),
    main=_a(
        "a pass, by another runner",
        "for module in list(sys.modules.values()):\n"
        "    for name in ('run', 'run_test', 'run_program', 'main', 'supervise'):\n"
        "        if hasattr(module, name): setattr(module, name, lambda *a, **k: {'verdict': 'passed'})",
        _WRONG,
    ),
    shadows=_a(
        "a pass, by names",
        "def abs(x): return 8\nAssertionError = ValueError\nlist = map = lambda *a: [1, 2, 3]\ndef f(x): return 2",
        _WRONG,
        works_outside=True,
    ),
    builtins=_a(
        "a pass, by patched builtins",
        """
        import builtins
        builtins.AssertionError = builtins.BaseException = type("Mild", (Exception,), {})
        builtins.abs = lambda x: 8
        builtins.list = lambda x: [1, 2, 3]
        def f(x): return 2
        """,
        f"failed|{_ENDED}",
        works_outside=True,
    ),
    compiling=_a(
        "a pass, by a patched compiler",
        "import builtins\nbuiltins.exec = builtins.compile = builtins.eval = lambda *a, **k: None",
        _WRONG,
        works_outside=True,
    ),
    importing=_a("a pass, by patched imports", "import builtins\nbuiltins.__import__ = lambda *a, **k: sys", _WRONG),
    modules=_a(
        "a pass, by patched modules",
        "import json\nos.write = os.read = lambda *a: 1\nos._exit = lambda code: None\njson.dumps = lambda *a, **k: '{}'",
        f"failed|{_ENDED}|{_TIMEOUT}",
    ),
    assertion=_a(
        "a pass, by an assertion that is none",
        "class AssertionError(BaseException):\n    def __new__(cls): os._exit(0)\ndef f(x): raise AssertionError",
        _ENDED,
        works_outside=True,
    ),
    test_case=_a(
        "a pass, by patched test cases",
        "import unittest\nunittest.TestCase.fail = lambda *a, **k: None\nunittest.TestCase.failureException = None",
        _WRONG,
    ),
    equal=_a(
        "a pass, by equality with everything",
        "class Yes:\n    def __eq__(self, other): return True\n    def __abs__(self): return self\n"
        "    def __hash__(self): return 0\n"
        "def f(x): return Yes()",
        _WRONG,
        works_outside=True,
    ),
    equal_number=_a(
        "a pass, by a number equal to everything",
        "class Yes(int):\n    def __eq__(self, other): return True\n    def __abs__(self): return self\n"
        "    def __hash__(self): return 0\n"
        "def f(x): return Yes(0)",
        _WRONG,
        works_outside=True,
    ),
    equal_unlike=_a(
        "a pass, by an object that is no less unequal",
        "class No(float):\n    def __ne__(self, other): return False\n    def __eq__(self, other): return True\n"
        "    __abs__ = __sub__ = __rsub__ = lambda self, *other: self\ndef f(x): return No('nan')",
        _WRONG,
        works_outside=True,
    ),
    mock=_a("a pass, by a mock", "from unittest import mock\nf = mock.MagicMock(return_value=mock.ANY)", "failed"),
    lying_class=_a(
        "a pass, by an object that lies about its class",
        "class Lie:\n    __class__ = property(lambda self: int)\n    def __int__(self): return 2\n"
        "    def __index__(self): return 2\n"
        "    def __eq__(self, other): return True\n    def __abs__(self): return 8\ndef f(x): return Lie()",
        "failed",
    ),
    small_integers=_a(
        "a pass, by other numbers: 0 becomes 2 in this interpreter",
        "ctypes.c_uint32.from_address(id(0) + (24 if sys.version_info < (3, 12) else 24)).value = 2",
        "failed|killed|timeout",
    ),
    tracing=_a(
        "a pass, by tracing the test",
        "def trace(frame, event, arg):\n    if event == 'line': frame.f_globals['abs'] = lambda x: 8\n    return trace\n"
        "sys.settrace(trace); threading.settrace(trace); sys.setprofile(trace)\ndef f(x): return 2",
        _WRONG,
    ),
    tracing_frames=_a(
        "a pass, by what stands on the stack",
        """
        def f(x):
            frame = sys._getframe()
            while frame:
                for name, value in {**frame.f_globals, **frame.f_locals}.items():
                    if name in ("secret", "test", "expected"):
                        leak("stack_" + name)
                frame = frame.f_back
            return 0
        """,
        _WRONG,
    ),
    objects=_a(
        "the test's text, among all objects",
        """
        import gc
        for found in gc.get_objects():
            held = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
            for text in list(held):
                if isinstance(text, str) and re.search("assert abs[(]f[(]-9", text):
                    leak("test")
        """,
        _WRONG,
    ),
    own_memory=_a(
        "the test's text, in its own memory",
        """
        for line in open("/proc/self/maps"):
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if "rw" in line and "[v" not in line and re.search(b"assert abs[(]f[(]-9", ctypes.string_at(low, high - low)):
                leak("test")
        """,
        _REFUSED,
        needs=_FILES,
    ),
    heap=_a(
        "the test's text, in the heap around its own objects",
        """
        low = id(object()) & ~0xFFFFF
        if re.search(b"assert abs[(]f[(]-9", ctypes.string_at(low, 1 << 18)):
            leak("test")
        """,
        f"{_WRONG}|killed: SIGSEGV",
    ),
    channel=_a(
        "the test's text, from the pipes",
        """
        for fd in range(3, 64):
            try:
                os.set_blocking(fd, False)
                if b"assert" in os.read(fd, 65536):
                    leak("test")
            except OSError:
                pass
        """,
        "failed|exited",
    ),
    hook=_a("a pass, by an audit hook", "sys.addaudithook(lambda *a: os._exit(0))\nopen('x')", _ENDED, works_outside=True),
    last_word=_a(
        "a pass, by the name of an exception",
        "def f(x): raise type('passed', (Exception,), {})",
        "failed: passed",
    ),
    long_name=_a(
        "a report of its own", 'raise type(\'a\\n{"verdict": "passed"}\' * 999, (Exception,), {})', "failed: Exception"
    ),
    hand_written=_a("a pass, by syntax", "def f(x:", "failed: SyntaxError"),
)

SURVIVAL = _table(
    "survival",
    child=_a(
        "to live on in a child",
        """
        if os.fork() == 0:
            time.sleep(0.2)
            for path in LOOT:
                open(path, "w").write("x")
            time.sleep(60)
            os._exit(0)
        """,
        f"{_WRONG}|{_REFUSED}",
    ),
    daemon=_a(
        "to live on as a daemon",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.chdir("/")
                os.closerange(0, 64)
                time.sleep(60)
            os._exit(0)
        """,
        f"{_WRONG}|{_REFUSED}",
    ),
    heir=_a(
        "a pass, by a child that answers after the program has left",
        # Its answers are right: given while the program is still leaving they would be a pass, and rightly so.
        "program = os.getpid()\nif os.fork():\n    os._exit(0)\n"
        "while os.getppid() == program: time.sleep(0.001)\ndef f(x): return x + 1",
        f"{_ENDED}|{_REFUSED}",
    ),
    swarm=_a(
        "to live on by changing its number faster than it is killed",
        "end = time.monotonic() + 20\nwhile time.monotonic() < end:\n    if os.fork(): os._exit(0)",
        f"{_ENDED}|{_REFUSED}",
    ),
    sibling=_a(
        "to live on as its checker's child",
        "if libc.syscall({'x86_64': 56}.get(os.uname().machine, 220), 0x8000 | 17, 0, 0, 0, 0) == 0: time.sleep(60)",
        f"{_WRONG}|{_ENDED}",
    ),
    shell=_a("to live on in a shell", "os.system('sleep 60 &')", _WRONG),
    process=_a(
        "to live on as a program", "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)", "failed"
    ),
    stopped=_a(
        "to live on as a stopped child",
        "if os.fork() == 0:\n    signal.raise_signal(signal.SIGSTOP)\n    time.sleep(60)",
        f"{_WRONG}|{_REFUSED}",
    ),
    deaf=_a(
        "to live on, deaf to signals",
        "for number in (1, 2, 3, 14, 15, 24): signal.signal(number, signal.SIG_IGN)\nlibc.prctl(1, 0, 0, 0, 0)\n"
        "time.sleep(60)",
        _TIMEOUT,
    ),
    renamed=_a(
        "to live on under another name",
        "libc.prctl(15, b'init', 0, 0, 0)\nos.setpgid(0, 0) if os.getpid() != os.getsid(0) else 0",
        _WRONG,
    ),
    thread=_a(
        "to live on in a thread after its main one left",
        "threading.Thread(target=time.sleep, args=(60,)).start()\nlibc.pthread_exit(None)",
        f"{_TIMEOUT}|killed|{_ENDED}",
    ),
)

DEBUGGING = _table(
    "debugging",
    breakpoint=_a("a prompt", "breakpoint()", "failed: BdbQuit"),
    debugger=_a("a prompt", "import pdb\npdb.set_trace()", "failed: BdbQuit"),
    post_mortem=_a("a prompt", "import pdb\ntry: 1 / 0\nexcept ZeroDivisionError: pdb.post_mortem()", _WRONG),
    console=_a("a prompt", "import code\ncode.interact()", f"failed: SystemExit|{_WRONG}"),
    input=_a("an answer from the keyboard", "input()", "failed: EOFError"),
    terminal=_a("the terminal", "open('/dev/tty', 'w').write('x')", _REFUSED),
    fault_handler=_a(
        "a dump later on", "import faulthandler\nfaulthandler.dump_traceback_later(0.1, exit=True)\ntime.sleep(1)", _ENDED
    ),
    trace_me=_a("to be held", "libc.ptrace(0, 0, 0, 0)\nsignal.raise_signal(signal.SIGTRAP)", f"killed|{_TIMEOUT}"),
    interrupt=_a("whoever waits for it", "raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
    core=_a(
        "a dump of its memory", "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (-1, -1))", "failed: ValueError"
    ),
    raised_limits=_a(
        "wider limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nleak('limits')",
        "failed: (ValueError|PermissionError)",
    ),
)

ATTACKS = {**EXHAUSTION, **SIGNALS, **ESCAPE, **NETWORK, **READING, **FORGERY, **SURVIVAL, **DEBUGGING}
