"""The program that starts a workspace's command, stays beside it and sees that nothing of it is left.

Run as `python -I -S supervisor.py HANDSHAKE_FD LOCK_FD`, with its orders on standard input: fields that end
with a NUL byte, see `Orders`. Any Python from 3.11 on runs it, without this library or another being
installed there: it imports the standard library alone, and little of that, to start quickly.

Two processes stay, each of which adopts what its descendants orphan (PR_SET_CHILD_SUBREAPER, prctl(2)), so
a process cannot leave the tree by forking twice or by a session of its own:

    guard           waits; if the supervisor is killed it kills all that is left
    └─ supervisor   starts the command, writes down its end, copies its output to the log
       └─ command   is killed by the kernel should the supervisor end (PR_SET_PDEATHSIG)

Signals to the supervisor: SIGTERM asks everything to end, SIGQUIT kills everything. When the command has
ended by itself, what it left is asked to end, and killed after the grace that the orders give it.

The handshake is "ok", or "<errno> <what>" when the command cannot be started. Until it was given the
supervisor holds the descriptor of the workspace's lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
import time

MAX_LOG_BYTES = 1 << 20
"""A log of this size is renamed to "<log>.1", in place of the one before, and a new one begins."""
NOT_EXECUTED = "cannot be executed"
"""In the handshake: it is the command that is at fault."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_READ_BYTES = 1 << 16
_NOT_STARTED = 127
"""Exit code of a command that cannot be started, as in shells."""
_ENDED = frozenset(b"ZXx")


class ProcessStat:
    """The fields of /proc/<pid>/stat that are needed; see proc_pid_stat(5)."""

    __slots__ = ("has_ended", "parent", "start_ticks")

    def __init__(self, data: bytes) -> None:
        # The name stands in parentheses and may hold some.
        fields = data.rpartition(b")")[2].split()
        self.has_ended = fields[0][0] in _ENDED
        self.parent = int(fields[1])
        self.start_ticks = int(fields[19])


def read_stat(pid: int) -> ProcessStat | None:
    """Return the fields of a process, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return ProcessStat(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> dict[int, ProcessStat]:
    """Return all processes below one, without those that ended and wait for their parent."""
    children: dict[int, list[int]] = {}
    stats: dict[int, ProcessStat] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (stat := read_stat(int(name))) is not None:
            stats[int(name)] = stat
            children.setdefault(stat.parent, []).append(int(name))
    found: dict[int, ProcessStat] = {}
    new = [pid]
    while new:
        below = children.get(new.pop(), ())
        new.extend(below)
        found.update((child, stats[child]) for child in below if not stats[child].has_ended)
    return found


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def replace_file(path: str, text: str) -> None:
    """Give a file new content in one step, readable by its owner alone."""
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(temporary, path)


def write_end(path: str, token: str, exit_code: int | None) -> None:
    """Write down that a run ended, and how if that is known."""
    code = "null" if exit_code is None else str(exit_code)
    now_us = time.time_ns() // 1000
    replace_file(path, f'{{"token": "{token}", "exit_code": {code}, "ended_at_us": {now_us}}}\n')


class Orders:
    """What to run, as the fields of standard input say it.

    Number of all that follow, run file, end file, log file, token, id of the boot of the host, grace in
    seconds, number of arguments, arguments, environment ("NAME=value"). ValueError when they are not whole,
    because the starter was killed.
    """

    def __init__(self, data: bytes) -> None:
        total, *fields = data.split(b"\0")[:-1]
        if len(fields) != int(total):
            raise ValueError("the orders are cut short")
        run, end, log, token, boot_id, grace, count, *rest = fields
        self.run, self.end, self.log = os.fsdecode(run), os.fsdecode(end), os.fsdecode(log)
        self.token, self.boot_id = token.decode(), boot_id.decode()
        self.grace_s = float(grace)
        self.arguments = rest[: int(count)]
        self.environment = dict(entry.split(b"=", 1) for entry in rest[int(count) :])


class Log:
    """The bounded log of a command's output."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append. What a full disk does not take is lost: the command is not held up by its log."""
        try:
            if self._size + len(data) > MAX_LOG_BYTES:
                full = self._fd
                try:
                    os.replace(self._path, f"{self._path}.1")
                except FileNotFoundError:
                    pass  # moved by an earlier try, which could not open a new one
                self._open()
                os.close(full)
            self._size += os.write(self._fd, data)
        except OSError:
            pass


class Supervisor:
    """Runs one command to its end. For the main thread of a process of its own."""

    def __init__(self, orders: Orders, guard: int) -> None:
        self._orders = orders
        self._guard = guard
        self._wake, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD):
            # Its number is written to the wake-up descriptor. Unlike SIG_IGN, doing nothing is not inherited.
            signal.signal(number, lambda *_: None)  # noqa: TID251  (this is a program)
        self._output, self._output_writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        self._log = Log(orders.log)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._output, select.POLLIN)
        self._command = 0
        self._exit_code: int | None = None
        self._is_asked = self._is_killing = False
        self._asked: set[tuple[int, int]] = set()
        self._kill_at: float | None = None

    def start(self) -> OSError | None:
        """Start the command, which is written down before it begins; returns why it could not be started."""
        go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
        failure_reader, failure_writer = os.pipe2(os.O_CLOEXEC)
        supervisor = os.getpid()
        self._command = os.fork()
        if not self._command:
            os.close(go_writer)
            self._become_command(supervisor, go_reader, failure_writer)
        for fd in (go_reader, failure_writer, self._output_writer):
            os.close(fd)
        self._write_run(supervisor)
        try:
            os.write(go_writer, b"1")
        except BrokenPipeError:
            pass  # it was killed already
        os.close(go_writer)
        failure = os.read(failure_reader, 16)
        os.close(failure_reader)
        return OSError(int(failure), os.strerror(int(failure))) if failure else None

    def run_to_end(self) -> int:
        """Stay until nothing is left of the command; returns its exit code, negative for a signal."""
        while self._reap():
            if self._is_killing:
                for pid in descendants(os.getpid()):
                    send(pid, signal.SIGKILL)
            elif self._is_asked:
                self._ask_orphans()
            elif self._exit_code is not None:
                self._ask(self._orders.grace_s)
            self._wait()
        while self._copy_output():
            pass
        assert self._exit_code is not None
        return self._exit_code

    def _become_command(self, supervisor: int, go: int, failure: int) -> None:
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor or not os.read(go, 1):
                os._exit(_NOT_STARTED)
            # Of its own, so that a signal to its process group does not reach the supervisor.
            os.setsid()
            _reset_signals()
            os.umask(0o022)
            os.dup2(self._output_writer, 1)
            os.dup2(self._output_writer, 2)
            arguments = self._orders.arguments
            os.execvpe(arguments[0], arguments, self._orders.environment)  # noqa: S606
        except OSError as error:
            os.write(failure, str(error.errno or errno.EINVAL).encode())
        finally:
            os._exit(_NOT_STARTED)

    def _write_run(self, supervisor: int) -> None:
        pids = {"guard": self._guard, "supervisor": supervisor, "command": self._command}
        processes = ""
        for name, pid in pids.items():
            stat = read_stat(pid)
            processes += f', "{name}": [{pid}, {0 if stat is None else stat.start_ticks}]'
        replace_file(
            self._orders.run,
            f'{{"token": "{self._orders.token}", "boot_id": "{self._orders.boot_id}", '
            f'"started_at_us": {time.time_ns() // 1000}{processes}}}\n',
        )

    def _reap(self) -> bool:
        """Take in what has ended; returns whether anything is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if not pid:
                return True
            if pid == self._command:
                self._exit_code = os.waitstatus_to_exitcode(status)

    def _wait(self) -> None:
        timeout_ms = None
        if self._kill_at is not None and not self._is_killing:
            timeout_ms = max(0.0, self._kill_at - time.monotonic()) * 1000
        ready = {fd for fd, _ in self._poll.poll(timeout_ms)}
        if not ready and timeout_ms is not None:
            self._is_killing = True
        if self._output in ready and not self._copy_output():
            self._poll.unregister(self._output)
        if self._wake not in ready:
            return
        for number in os.read(self._wake, 4096):
            if number == signal.SIGQUIT:
                self._is_killing = True
            elif number == signal.SIGTERM:
                self._ask(None)

    def _ask(self, grace_s: float | None) -> None:
        """Ask everything to end; kill what has not within `grace_s`, unless who asked sees to that."""
        self._is_asked = True
        self._kill_at = None if grace_s is None else time.monotonic() + grace_s
        for pid, stat in descendants(os.getpid()).items():
            self._ask_one(pid, stat)

    def _ask_orphans(self) -> None:
        """Ask those too whose parents ended while they were being started.

        What a process starts to end in order, while that process lives, is left to it.
        """
        for pid, stat in descendants(os.getpid()).items():
            if stat.parent == os.getpid() and (pid, stat.start_ticks) not in self._asked:
                self._ask_one(pid, stat)

    def _ask_one(self, pid: int, stat: ProcessStat) -> None:
        self._asked.add((pid, stat.start_ticks))
        send(pid, signal.SIGTERM)
        send(pid, signal.SIGCONT)  # one that is stopped takes no other signal

    def _copy_output(self) -> bool:
        """Move some output to the log; returns whether there may be more, now or later."""
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return False
        self._log.write(data)
        return bool(data)


def guard(supervisor: int, orders: Orders) -> None:
    """Wait for the supervisor; if it did not end well, kill all that it left and write that down."""
    is_killing = False
    while True:
        if is_killing:
            for pid in descendants(os.getpid()):
                send(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        is_killing = is_killing or (pid == supervisor and status != 0)
    if is_killing:
        write_end(orders.end, orders.token, None)


def supervise(orders: Orders, guard_pid: int, handshake: int, lock: int) -> None:
    """Run the command to its end, and write that down."""
    # The guard's end means that nobody would see ours.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        supervisor = Supervisor(orders, guard_pid)
        if os.getppid() != guard_pid:
            os._exit(1)
        failure = supervisor.start()
    except OSError as error:
        _answer(handshake, error, "cannot be written down")
        raise
    if failure is not None:
        write_end(orders.end, orders.token, _NOT_STARTED)
        _answer(handshake, failure, NOT_EXECUTED)
        return
    _answer(handshake, None, "")
    os.close(lock)
    write_end(orders.end, orders.token, supervisor.run_to_end())


def main() -> None:
    handshake, lock = (int(number) for number in sys.argv[1:3])
    for fd in (handshake, lock):
        os.set_inheritable(fd, False)
    orders = Orders(sys.stdin.buffer.read())
    os.dup2(1, 0)  # which is /dev/null
    if os.fork():
        os._exit(0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard_pid = os.getpid()
    supervisor = os.fork()
    if not supervisor:
        supervise(orders, guard_pid, handshake, lock)
        os._exit(0)
    os.close(handshake)
    os.close(lock)
    guard(supervisor, orders)


def _answer(handshake: int, failure: OSError | None, what: str) -> None:
    answer = "ok" if failure is None else f"{failure.errno or errno.EIO} {what}"
    try:
        os.write(handshake, answer.encode())
    except BrokenPipeError:
        pass  # whoever asked is gone; the command runs all the same
    os.close(handshake)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _reset_signals() -> None:
    """What the starter or Python ignores is not for the command to ignore."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_DFL)  # noqa: TID251
        except OSError:
            pass  # the C library keeps it for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


if __name__ == "__main__":
    main()
