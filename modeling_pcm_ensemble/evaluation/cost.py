"""What a baseline costs: seconds a token, and memory."""

import contextlib
import ctypes
import gc
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from .answers import Case
from .baselines import Baseline

CLEAR_REFS = Path("/proc/self/clear_refs")


def measure_cost(
    baselines: list[Baseline], cases: list[Case], tokenizer: PreTrainedTokenizerBase, rounds: int = 3, rows: int = 8
) -> dict[str, dict[str, float]]:
    r"""
    Let all baselines answer `rows` cases at once, in turns, so that a slow moment hits all of them.

    Returns:
        For each baseline `seconds_per_token` (median over rounds; tokens of all rows together), `working_mb` (peak
        memory while it answers, above what was taken before; on Linux and CUDA) and `weights_mb`, of its `model`,
        whatever part of it ran.
    """
    seconds: dict[str, list[float]] = {baseline.name: [] for baseline in baselines}
    working = dict.fromkeys(seconds, 0)
    for number in tqdm(range(rounds), desc="cost"):
        for baseline in baselines:
            applicable = [case for case in cases if baseline.applies(case.preference)]
            step = max(len(applicable) // rows, 1)
            set_seed(number)
            per_token, peak = _measure(baseline, applicable[::step][:rows], tokenizer)

            seconds[baseline.name].append(per_token)
            working[baseline.name] = max(working[baseline.name], peak)

    costs = {}
    for baseline in baselines:
        costs[baseline.name] = {
            "seconds_per_token": median(seconds[baseline.name]),
            "working_mb": working[baseline.name] / 2**20,
            "weights_mb": _weights(baseline) / 2**20,
        }
    return costs


def _measure(baseline: Baseline, cases: list[Case], tokenizer: PreTrainedTokenizerBase) -> tuple[float, int]:
    """Seconds a token, and bytes at the peak above those before, of one batch of answers."""
    before = _reset_peak()
    start = time.perf_counter()
    answers = baseline.generate([case.prompt for case in cases], [case.preference for case in cases])
    elapsed = time.perf_counter() - start
    peak = _peak() - before

    tokens = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)
    return elapsed / max(tokens, 1), peak


def _weights(baseline: Baseline) -> int:
    """Bytes of its model's distinct weights, 0 where it has no `model`."""
    model = getattr(baseline, "model", None)
    if model is None:
        return 0
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()
    }
    return sum(storage.nbytes() for storage in storages.values())


def _reset_peak() -> int:
    """Forget the peak so far, and give what is taken now, in bytes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the baseline before has freed
        CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if not CLEAR_REFS.exists():
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


__all__ = ["measure_cost"]
