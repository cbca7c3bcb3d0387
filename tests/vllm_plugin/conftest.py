"""Engines of vLLM in this process, one at a time, and what `references.py` has written."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
REFERENCES = Path(os.environ.get("VLLM_REFERENCES", "build/vllm"))
if "PYTEST_XDIST_WORKER" in os.environ:  # each compiles into a folder of its own
    os.environ["VLLM_CACHE_ROOT"] = str(REFERENCES.absolute() / "cache" / os.environ["PYTEST_XDIST_WORKER"])


@dataclass
class Reference:
    """What `generate` answers to one request."""

    extra_args: dict
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    next: list[float]


def references(name: str) -> list[Reference]:
    return [Reference(**line) for line in json.loads((REFERENCES / f"{name}.json").read_text())]


@contextmanager
def engine(name: str, **options) -> Iterator:
    """An engine of float32 that serves an ensemble, by its name here or elsewhere; eager unless `options` differ."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    folder = REFERENCES / name
    llm = None
    try:
        llm = LLM(str(folder) if folder.exists() else name, **defaults | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # which the traceback of a test that has failed would keep alive
        del llm
        gc.collect()  # an engine that is still there would take the next one's process groups along
        cleanup_dist_env_and_memory()


def ask(llm, asked: list[Reference], **params) -> list:
    """Ask all at once, greedily unless `params` say otherwise."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": reference.prompt} for reference in asked]
    common = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1} | params
    wanted = [SamplingParams(**common, extra_args=reference.extra_args or None) for reference in asked]
    return llm.generate(prompts, wanted, use_tqdm=False)


def check_equal(answers: list, asked: list[Reference], tolerance: float = 1e-4):
    """Tokens are the same, and the log-probability of each is."""
    for answer, reference in zip(answers, asked, strict=True):
        [output] = answer.outputs
        assert output.token_ids == reference.tokens, reference.extra_args
        found = [of_token[token].logprob for of_token, token in zip(output.logprobs, output.token_ids)]
        assert found == pytest.approx(reference.logprobs, abs=tolerance), reference.extra_args


def metric(llm, name: str) -> float:
    values = [entry.value for entry in llm.get_metrics() if entry.name == f"vllm:{name}"]
    assert values, f"There is no metric {name}."
    return sum(values)
