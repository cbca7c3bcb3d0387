"""What torch's compiler finds out before it compiles for the first time: on all cores, and while a step is traced."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Thread

# The headers that torch puts before all of its code, and a function to have something to compile.
NOTHING = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* numbers) {}\n'


@cache
def vector_width() -> int:
    """
    Return the bits of the processor's vectors that torch compiles for; 0 if it cannot use any.

    The first time on a machine, two things take seconds. torch tries each of the processor's instruction sets by a
    program that it compiles: one after another, but here side by side. And it compiles its headers before the first
    code: while all else waits, but here in the background, as soon as the width is known.

    Raises:
        RuntimeError: if there is no compiler.
    """
    from torch._inductor import cpu_vec_isa  # slow to import; and none of this has a public name

    flags = set(cpu_vec_isa.x86_isa_checker())
    sets = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= flags]
    with ThreadPoolExecutor() as pool:
        list(pool.map(bool, sets))  # torch keeps what it finds

    picked = cpu_vec_isa.pick_vec_isa()
    Thread(target=_compile_headers, daemon=True).start()
    return picked.bit_width()


def _compile_headers():
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with suppress(Exception):  # compiling a step meets the same, and says so
        CppPythonBindingsCodeCache.load_pybinding(["float*"], NOTHING)


__all__ = ["vector_width"]
