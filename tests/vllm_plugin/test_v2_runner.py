"""vLLM's V2 runner, the default on GPUs, by Triton's interpreter: the same answers, and the same refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import ask, check_equal, engine, references
from vllm import SamplingParams

asked = references(sys.argv[2])[:12]
with engine(sys.argv[2], max_num_batched_tokens=100, block_size=32) as llm:
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    check_equal(ask(llm, asked), asked)
    try:
        llm.generate(["Hello"], SamplingParams(extra_args={"preference": "nobody"}), use_tqdm=False)
    except Exception as error:
        print("refused:", error)
    check_equal(ask(llm, asked), asked)  # from cached prefixes, and in places that others have left
"""


@pytest.mark.parametrize(
    "name",
    [
        "probabilities",
        "adapters",
        pytest.param("product", marks=pytest.mark.slow),
        pytest.param("prompted", marks=pytest.mark.slow),
    ],
)
def test_the_v2_runner_answers_as_generate_does(name):
    environment = os.environ | {"PYTHONPATH": str(FOLDER / "interpreter"), "VLLM_USE_V2_MODEL_RUNNER": "1"}
    client = [sys.executable, "-c", CLIENT, str(FOLDER), name]
    found = subprocess.run(client, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "refused: `preference` names the unknown expert 'nobody'" in found.stdout
