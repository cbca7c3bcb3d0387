"""
Lets vLLM's V2 runner, which wants Triton, start on a CPU: Triton gets a backend by that name, and runs its kernels in
its interpreter. Python imports this file when it starts, if its folder is in PYTHONPATH.
"""

import importlib.abc
import importlib.util
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"


class CpuBackend(importlib.abc.MetaPathFinder):
    """Adds a backend to Triton's when they are imported."""

    def find_spec(self, name, path, target=None):
        if name != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            driver = SimpleNamespace(is_active=lambda: False)
            module.backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, CpuBackend())
