"""A thin checkpoint, by its name on the Hub: the backbone comes from where it stands."""

import pickle
import subprocess
import sys
from pathlib import Path

from conftest import REFERENCES

sys.path.append(str(Path(__file__).parents[1]))
from hub_clients import client_environment
from local_hub import LocalHub

CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import ask, check_equal, engine, references

asked = references("thin")
with engine("owner/ensemble") as llm:
    check_equal(ask(llm, asked), asked)
print("equal")
"""


def test_a_thin_checkpoint_is_served_from_the_hub(tmp_path):
    repositories = pickle.loads((REFERENCES / "hub.pickle").read_bytes())
    with LocalHub() as hub:
        hub.repositories = repositories
        own = {"VLLM_REFERENCES": str(REFERENCES.resolve()), "HF_HUB_OFFLINE": "0"}
        environment = client_environment(hub, tmp_path, "hf_owner") | own
        client = [sys.executable, "-c", CLIENT, str(Path(__file__).parent)]
        found = subprocess.run(client, env=environment, capture_output=True, text=True)
    assert found.stdout.endswith("equal\n"), found.stderr
