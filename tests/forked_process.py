"""Real processes of a program that start at once: forked from a server that has imported the program already.

A training run of a test takes a second, the imports of a new interpreter take five. What a test needs an interpreter
of its own for (a launcher, other environment variables at import, limits) it starts with `subprocess`.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
START_METHOD = multiprocessing.get_start_method()  # that of an interpreter, for the workers of a program


class ForkedProcess:
    """`python SCRIPT ARGV` in the project's folder, in a session of its own; the part of `Popen` that tests use.

    Args:
        script: The program; what it shares with train_flow.py is imported by the server at the first call.
        argv: Its arguments.
        environment: Its environment variables; those that are read at import are the ones of the first call.
        max_file_bytes: No file can grow beyond this, as on a full disk; what is printed goes to files, too.
    """

    def __init__(
        self, script: Path, argv: Sequence[str], environment: Mapping[str, str], max_file_bytes: int | None = None
    ):
        self.args = [sys.executable, str(script), *argv]
        self._output = [tempfile.NamedTemporaryFile(mode="w+") for _ in ("stdout", "stderr")]
        _start_server(environment)
        names = [file.name for file in self._output]
        arguments = (script, list(argv), dict(environment), names, START_METHOD, max_file_bytes)
        self._process = CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        while os.path.exists(f"/proc/{self.pid}") and os.getpgid(self.pid) != self.pid:  # else killpg finds no group
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return what was printed to standard output and to standard error."""
        self.wait(timeout)
        return tuple(Path(file.name).read_text() for file in self._output)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_script(
    script: Path,
    argv: Sequence[str],
    environment: Mapping[str, str],
    max_file_bytes: int | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    process = ForkedProcess(script, argv, environment, max_file_bytes)
    printed, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def run_code(code: str, argv: Sequence[object], environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    """Run Python code as a program to its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(code)
        return run_script(script, list(map(str, argv)), environment)


def run_ranks(
    script: Path,
    argv: Sequence[str] | Sequence[Sequence[str]],
    environment: Mapping[str, str],
    num_processes: int,
    timeout: float = 300,
    machines: bool = False,
) -> subprocess.CompletedProcess:
    """Run a program in several processes, as `accelerate launch --multi_gpu` does; tests of the launcher start it.

    When one fails, the others are terminated, unless they are of other machines, of which its launcher knows nothing.
    What they print is joined in the order of their ranks.

    Args:
        script: The program.
        argv: Its arguments; or those of each rank.
        environment: Its environment variables, which win over the launcher's.
        num_processes: How many there are.
        timeout: Seconds until all are terminated.
        machines: Each is the only one of a machine.
    """
    common = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": 1 if machines else num_processes, "ROLE_RANK": 0}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_MIXED_PRECISION": "no"}
    processes = []
    for rank in range(num_processes):
        own = {"RANK": rank, "LOCAL_RANK": 0 if machines else rank, "GROUP_RANK": rank if machines else 0}
        variables = {name: str(value) for name, value in (common | own).items()}
        arguments = argv if not argv or isinstance(argv[0], str) else argv[rank]
        processes.append(ForkedProcess(script, arguments, variables | dict(environment)))
    deadline = time.monotonic() + timeout
    while any(process.returncode is None for process in processes):
        failed_here = not machines and any(process.returncode for process in processes)
        if failed_here or time.monotonic() > deadline:
            for process in processes:
                process.terminate() if process.returncode is None else None
            break
        time.sleep(0.01)
    codes = [process.wait(30) for process in processes]
    printed, errors = ("".join(texts) for texts in zip(*(process.communicate() for process in processes), strict=True))
    failed = [code for code in codes if code > 0] or [code for code in codes if code]  # what was terminated comes last
    return subprocess.CompletedProcess(processes[0].args, failed[0] if failed else 0, printed, errors)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start_server(environment: Mapping[str, str]) -> None:
    """Start the server if it is not running; it imports `preloaded` in the given environment."""
    before = dict(os.environ)
    os.environ.update(environment, PYTHONPATH=os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]))
    try:
        CONTEXT.set_forkserver_preload(["preloaded"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    script: Path,
    argv: list[str],
    environment: dict[str, str],
    output: list[str],
    start_method: str,
    max_file_bytes: int | None,
) -> None:
    assert "preloaded" in sys.modules  # the server says nothing of an import that fails
    os.setsid()
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    multiprocessing.set_start_method(start_method, force=True)
    os.chdir(PROJECT)
    for descriptor, name in enumerate(output, 1):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(PROJECT))
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = None
    except SystemExit as end:
        code = end.code
    sys.exit(code)  # without the traceback of the program, whose variables multiprocessing would keep until the end
