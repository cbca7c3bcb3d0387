"""What cannot be served is refused by name before anything is loaded."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REFERENCES, engine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"enable_lora": True}, "is not served with `--enable-lora`", id="lora"),
        pytest.param(
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "is not served with pipeline parallelism",
            id="pipeline",
        ),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "is not served with speculative decoding",
            id="drafts",
        ),
        pytest.param(
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "is not served with KV connectors",
            id="connector",
        ),
        pytest.param({"kv_offloading_size": 1}, "is not served with `--kv-offloading-size`", id="offloading"),
        pytest.param({"additional_config": {"expert_slots": 9}}, "must be a whole number from 1 to 4", id="slots"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message), engine("probabilities", **options):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c["backbones"].append(c["backbones"][0]), "2 backbones", id="backbones"),
    ],
)
def test_an_ensemble_that_cannot_be_served_is_refused_by_name(change, message, tmp_path):
    folder = REFERENCES / "probabilities"
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message), engine(str(tmp_path.resolve())):
        pass


OTHER_VERSION = """
import vllm
vllm.__version__ = "0.33.0"
from modeling_pcm_ensemble.vllm import register
register()
from vllm import ModelRegistry
print("PCMEnsembleForCausalLM" in ModelRegistry.get_supported_archs())
"""


def test_another_version_of_vllm_is_named_and_left_as_it_is():
    environment = os.environ | {"VLLM_PLUGINS": ""}  # which would register it under the version that is installed
    found = subprocess.run([sys.executable, "-c", OTHER_VERSION], env=environment, capture_output=True, text=True)
    assert found.stdout.rstrip().endswith("False"), found.stderr
    assert "PCM ensembles are served by vLLM 0.32, and 0.33.0 is installed" in found.stdout + found.stderr
