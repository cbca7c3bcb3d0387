"""What torch's compiler does once on a machine before its first code: several things at once, and ahead."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context
from functools import cache
from threading import Thread

HEADERS_THREAD = "torch-headers"
# What comes behind the headers that torch puts before all of its code: a function, to have something to compile.
NOTHING = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* numbers) {}\n'


@cache
def prepare_compiler():
    """
    Save the first compiled step on a machine seconds, once in a process.

    torch tries each of the processor's instruction sets by a program that it compiles: one after another, but here
    side by side. And it compiles its headers before the first code: while all else waits, but here in the background.
    What fails here is left to the compiler, which meets it too and says so.
    """
    from torch._inductor import config, cpu_vec_isa  # slow to import; none of this has a public name

    flags = set(cpu_vec_isa.x86_isa_checker())
    sets = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= flags]

    # A thread sees torch's settings as they are here in a copy of this context alone, and each needs one of its own.
    contexts = [copy_context() for _ in sets]
    with suppress(RuntimeError), ThreadPoolExecutor() as pool:
        list(pool.map(Context.run, contexts, [bool] * len(sets), sets))  # torch keeps what it finds

    if config.cpp_cache_precompile_headers and sys.platform != "win32":
        run = copy_context().run
        with suppress(RuntimeError):
            Thread(target=run, args=(_compile_headers,), name=HEADERS_THREAD, daemon=True).start()


def _compile_headers():
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with suppress(Exception):
        CppPythonBindingsCodeCache.load_pybinding(["float*"], NOTHING)


__all__ = ["prepare_compiler"]
