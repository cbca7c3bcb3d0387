"""
A Python that starts fast, for clients of the local Hub, which are many: its processes are forked from one that has
imported torch and other libraries that are slow to import. That one knows neither this package nor transformers nor
huggingface_hub, which read the Hub's settings as they are imported.

A forked program is not in every respect a Python that was started: it has one thread and the hash seed of all others,
it ends without finalization, and what is imported already cannot be missing. So what trains, compiles, launches ranks,
is killed, or stands for a newcomer's first run is started as users start it.
"""

import atexit
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from contextlib import suppress

SLOW = (
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "scipy.optimize",
    "sklearn.metrics",
    "hqq.core.quantize",
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # no test's own
DIED = 70


@functools.cache
def warm_python() -> str:
    """Return the path of an executable that is called as Python is: with -c, -m, or a file."""
    if sys.platform != "linux":
        return sys.executable

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    executable = f"{folder}/python"
    with open(executable, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" ask "{executable}" "$@"\n')
    os.chmod(executable, 0o755)

    # Who asks before the slow imports are done waits for them.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = [sys.executable, __file__, "serve", str(listener.fileno()), str(os.getpid())]
        server = subprocess.Popen(command, env=ENVIRONMENT, pass_fds=[listener.fileno()])
    atexit.register(server.kill)
    return executable


def ask(executable: str, arguments: list[str]) -> int:
    """Have a program run with this process's folder, environment and files, and return its exit status."""
    told = {"executable": executable, "arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, suppress(OSError):
        connection.connect(f"{os.path.dirname(executable)}/socket")
        socket.send_fds(connection, [json.dumps(told).encode()], [0, 1, 2])
        answer = connection.recv(16)
    if not answer:
        print("The process that tests fork others from has died.", file=sys.stderr)
        return DIED
    return int(answer)


def serve(listener: socket.socket, parent: int):
    """Fork a process for each that asks, until the one that started this one is gone."""
    for name in SLOW:
        with suppress(ImportError):  # some come with libraries that a test may do without
            importlib.import_module(name)
    gc.freeze()  # or each process would copy what the collector looks at
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for programs

    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                become(connection)
            finally:
                os._exit(0)
        connection.close()


def become(connection: socket.socket):
    """Run what was asked for in a process of its own, and report its end."""
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
    program = multiprocessing.get_context("fork").Process(target=run, args=(descriptors,), kwargs=json.loads(message))
    program.start()
    ended, _, _ = select.select([connection, program.sentinel], [], [])
    if program.sentinel not in ended:  # the one who asked is gone
        program.kill()
        return
    program.join()
    connection.send(str(program.exitcode % 256).encode())


def run(descriptors: list[int], executable: str, arguments: list[str], cwd: str, environment: dict[str, str]):
    """Take over files, folder and environment, and be the program."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable  # what the program starts is warm, too

    first, *rest = arguments
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(first))
        main.__file__ = os.path.abspath(first)
        with open(first, "rb") as file:
            exec(compile(file.read(), main.__file__, "exec"), vars(main))


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    serve(socket.socket(fileno=int(sys.argv[2])), parent=int(sys.argv[3]))
