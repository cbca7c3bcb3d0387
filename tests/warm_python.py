"""
A Python that starts in a third of the time, for tests that start it often: its processes are forked from one that has
imported what takes long. That one knows neither this package nor transformers nor the Hub, whose settings are read as
they are imported. To the program inside it is Python. When the one who asked for it is killed, so is the program.
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

SLOW = (
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "scipy.optimize",
    "sklearn.metrics",
    "hqq.core.quantize",
)


@functools.cache
def warm_python() -> str:
    """Return the path of an executable that is called as Python is: with -c, -m, or a file."""
    if sys.platform != "linux":
        return sys.executable

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # whole messages
    listener.bind(f"{folder}/socket")
    listener.listen()
    # Who asks before the slow imports are done waits for them.
    command = [sys.executable, __file__, "serve", str(listener.fileno())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torch reads it once
    server = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()])
    atexit.register(server.kill)

    executable = f"{folder}/python"
    with open(executable, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" ask "{executable}" "$@"\n')
    os.chmod(executable, 0o755)
    return executable


def ask(executable: str, arguments: list[str]) -> int:
    """Have a program run with this process's folder, environment and files, and return its exit status."""
    told = {"executable": executable, "arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"{os.path.dirname(executable)}/socket")
        socket.send_fds(connection, [json.dumps(told).encode()], [0, 1, 2])
        return int(connection.recv(16))


def serve(listener: socket.socket):
    """Fork a process for each that asks, until the one that started this one is gone."""
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # or each process would copy what the collector looks at
    listener.settimeout(1)
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for programs

    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            become(connection)
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
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable  # what the program starts is warm, too

    if arguments[0] == "-u":
        del arguments[0]
    first, *rest = arguments
    sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    serve(socket.socket(fileno=int(sys.argv[2])))
