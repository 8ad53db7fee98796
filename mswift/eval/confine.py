"""Runs inside the sandbox: gives up files, network, processes and time, then runs the program. Standard library only.

`python -P -S -B confine.py RESULT_FD`, started by `mswift.eval.sandbox` in an empty directory. It never runs a program
that it could not confine. System call numbers: the kernel's tables for x86-64 and for arm64 (asm-generic).
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NONE = -1
# name: (x86-64, arm64)
_REFUSED = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269), "io_uring_setup": (425, 425),
    # processes: others, and leaving the group that is killed
    "fork": (57, _NONE), "vfork": (58, _NONE), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "setrlimit": (160, 164), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "kcmp": (312, 272),
    # what Landlock leaves open: owner, mode, times and attributes of files
    "chmod": (90, _NONE), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, _NONE),
    "fchown": (93, 55), "lchown": (94, _NONE), "fchownat": (260, 54), "utime": (132, _NONE), "utimes": (235, _NONE),
    "futimesat": (261, _NONE), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "truncate": (76, 45), "file_setattr": (469, 469),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "acct": (163, 89), "syslog": (103, 116), "quotactl": (179, 60),
    "personality": (135, 92), "ioperm": (173, _NONE), "iopl": (172, _NONE), "modify_ldt": (154, _NONE),
    # memory and queues that outlive the process
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_CLONE, _CLONE3, _PRLIMIT64 = (56, 220), (435, 435), (302, 261)
_CLONE_THREAD = 0x10000
_CAPSET = (126, 91)
_EPERM, _ENOSYS = 1, 38

# linux/filter.h, linux/seccomp.h
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _MACHINE_AT = 0, 4
_X32 = 0x40000000

# linux/landlock.h
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 1 << 2 | 1 << 3  # read_file, read_dir
_RIGHTS_BY_VERSION = (0, 13, 14, 15, 15, 16)  # number of the file rights that a version knows
_WRITE = (1 << 1) | sum(1 << bit for bit in (4, 5, 7, 8, 14))  # write, remove, make directory and file, truncate

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38


class CannotConfine(Exception):
    """What this machine lacks."""


def _argument_at(index: int, high: bool = False) -> int:
    """Where seccomp_data holds the low (or high) half of an argument, on a little-endian machine."""
    return 16 + 8 * index + (4 if high else 0)


def _filter(column: int, machine: int) -> bytes:
    """A classic BPF program: the system calls of `_REFUSED` and new processes fail, threads and the rest pass."""
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_JUMP_EQUAL, 1, 0, machine),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32),  # x32's own numbers
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in _REFUSED.values():
        if numbers[column] != _NONE:
            steps += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    steps += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]  # the C library then uses clone
    steps += [
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _argument_at(0)),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    steps += [  # prlimit64 that only asks passes
        (_JUMP_EQUAL, 0, 5, _PRLIMIT64[column]),
        (_LOAD, 0, 0, _argument_at(2)),
        (_JUMP_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _argument_at(2, high=True)),
        (_JUMP_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise CannotConfine(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Landlock: only these directories and files, only to read, or also to write. Others cannot be opened."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise CannotConfine(f"Landlock (Linux 5.13 or newer, switched on): {os.strerror(ctypes.get_errno())}")
    known = (1 << _RIGHTS_BY_VERSION[min(version, len(_RIGHTS_BY_VERSION) - 1)]) - 1
    handled = struct.pack("Q", known)
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), 0), "Landlock")
    for paths, rights in ((readable, _READ), (writable, _READ | _WRITE)):
        for path in paths:
            directory = os.path.isdir(path)
            allowed = rights & known if directory else _READ & known & ~(1 << 3)
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, descriptor)
            _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), f"Landlock for {path}")
            os.close(descriptor)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def _restrict_calls() -> None:
    """Seccomp: no network, no new process, no signal to others, no change of the machine; and no capability."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES or sys.maxsize < 2**32:
        raise CannotConfine(f"seccomp on {sys.platform} {platform.machine()} (known: Linux on x86-64 and arm64)")
    column, machine = _MACHINES[platform.machine()]
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # behind the last one, or not ours to drop
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET[column], header, nothing), "capset")
    code = _filter(column, machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _limit(limits: dict[str, int]) -> None:
    """Resource limits of this process; a hard limit is never raised."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["num_files"],
        resource.RLIMIT_NPROC: limits["num_processes"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Confine, say so, run, say how it ended, in lines on the result descriptor; success is believed with its token."""
    result = int(sys.argv[1])
    job = json.load(sys.stdin)
    token, program = job["token"], job["program"]
    say = lambda line: os.write(result, f"{line}\n".encode(errors="replace"))  # noqa: E731
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    code = None
    try:
        if job["strict"]:
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
            _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            _restrict_files([path for path in job["readable"] if os.path.exists(path)], [os.getcwd()])
        _limit(job["limits"])
        if job["strict"]:
            _restrict_calls()
    except (CannotConfine, OSError, ValueError) as error:
        say(f"cannot {error}")
        return
    say("confined")
    os.environ.clear()
    try:
        code = compile(program, "program.py", "exec")
        exec(code, {"__name__": "__main__"})  # noqa: S102 - what all of the above is for
    except BaseException as error:
        say(f"failed {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        os._exit(1)
    say(f"passed {token}")
    os._exit(0)  # no thread of the program goes on, nothing that it registered runs


if __name__ == "__main__":
    main()
