"""`python -m hub_upload`: what is checked, described, uploaded, and checked again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from endpoint_server import EndpointServer, save_one_here_one_there
from hub_clients import client_environment
from huggingface_hub import ModelCard
from local_hub import Fault
from safetensors.torch import load
from warm_python import warm_python

from hub_upload.card import code_blocks
from hub_upload.clean_process import run
from modeling_pcm_ensemble import PCMEnsembleForCausalLM

ROOT = Path(__file__).parent.parent
CONFIG = b'{"model_type": "pcm_ensemble"}'
RESULTS = {
    "title": "Win rates on ten prompts",
    "command": "python examples/smollm2/evaluate.py --quick",
    "dataset": "koala",
    "ours": "trained PCM",
    "judges": {"rewards": {"vanilla": {"win_rate": [0.75, 0.5, 0.9], "p": 0.01, "position_bias": 0.0}}},
}


@pytest.fixture
def folder(hub, whole, tmp_path) -> Path:
    """The ensemble as its author has it; it is not on the Hub yet."""
    folder = tmp_path / "ensemble"
    folder.mkdir()
    for path, content in hub.files("owner/ensemble").items():
        (folder / path).write_bytes(content)
    (folder / "README.md").unlink()
    del hub.repositories["owner/ensemble"]
    return folder


def upload(
    hub, folder, *options, token="hf_owner", repo_id="owner/ensemble", python: str | None = None, **settings: str
) -> subprocess.CompletedProcess:
    environment = client_environment(hub, folder.parent / "home", token) | settings
    command = [python or warm_python(), "-m", "hub_upload", str(folder), repo_id, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def commits(hub) -> int:
    """Those after the repository was made."""
    return len(hub.repositories["owner/ensemble"].commits) - 1 if "owner/ensemble" in hub.repositories else 0


def test_what_was_checked_and_described_is_uploaded(hub, folder, tmp_path):
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"of training")
    (tmp_path / "report.json").write_text(json.dumps(RESULTS))
    for name, licence in (("llama", "apache-2.0"), ("gpt2", "mit")):
        models = hub.repositories[f"someone/{name}"]
        models.commits[models.resolve("main")]["README.md"] = (f"---\nlicense: {licence}\n---\n".encode(), False)
    options = ["--private", "--results", str(tmp_path / "report.json"), "--datasets", "a/b"]
    result = upload(hub, folder, *options, python=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "gives this model's logits in a clean process" in result.stdout
    assert re.search(r"model.safetensors\s+│\s+0.\d+", result.stdout)
    assert re.search(r"Left out .*checkpoint-5/model.safetensors, training_args.bin", result.stdout)
    assert "Pulled into an empty cache, it gives this model's logits." in result.stdout
    assert "different licences" in result.stderr
    assert hub.requests.index("POST /api/validate-yaml") < hub.requests.index("POST /api/repos/create")
    stored = hub.files("owner/ensemble")
    assert hub.repositories["owner/ensemble"].private
    assert "training_args.bin" not in stored
    (tmp_path / "README.md").write_bytes(stored["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["someone/llama", "someone/gpt2"]
    assert card.data.license == "other"
    assert card.data.datasets == ["a/b"]
    (win_rate,) = card.data.eval_results
    assert (win_rate.metric_value, win_rate.dataset_type) == (0.75, "koala")
    assert win_rate.metric_name == "win rate against vanilla, judge: rewards"
    data = card.data.to_dict()
    assert (data["base_model_relation"], data["library_name"], data["pipeline_tag"]) == (
        "merge",
        "transformers",
        "text-generation",
    )
    text = card.content
    assert "| b |" in text
    assert "someone/llama with a LoRA adapter of rank 2" in text
    assert "someone/llama: apache-2.0, someone/gpt2: mit" in text
    assert "75.0 % [50.0, 90.0]" in text
    assert "It was trained; how is not recorded" in text
    (code,) = code_blocks(text)
    assert 'preference={"a": 1.0, "b": 0.5}' in code
    assert re.search(r"```text\n.+\n```", text)  # what the code printed
    assert "PRINTED" not in text


def test_a_thin_upload_names_its_backbones(hub, folder):
    (folder / "pcm_training.json").write_text(
        json.dumps({"trainer": "RebelTrainer", "steps": 24, "settings": {"eta": 16.0}})
    )
    result = upload(hub, folder, "--thin", "--revision", "small")
    assert result.returncode == 0, result.stderr
    stored = hub.files("owner/ensemble", "small")
    assert json.loads(stored["config.json"])["thin"]["backbones"][1]["repository"] == "someone/gpt2"
    assert "backbones.0.model.norm.weight" not in load(stored["model.safetensors"])
    card = stored["README.md"].decode()
    assert "loading it fetches someone/gpt2, someone/llama too" in card
    assert 'revision="small"' in card
    assert "trained by `RebelTrainer` for 24 updates (eta 16.0)" in card
    assert "model.safetensors" not in hub.files("owner/ensemble")  # the main branch is left alone
    assert not (folder / "README.md").exists()


def test_a_dry_run_uploads_nothing_and_keeps_a_readme_that_a_person_wrote(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    result = upload(hub, folder, "--dry-run", token=None)
    assert result.returncode == 0, result.stderr
    assert "To be uploaded" in result.stdout
    assert "is kept" in result.stdout
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert "owner/ensemble" not in hub.repositories


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("import torch\n", "import torch, no_such_module\n"), "does not run in a clean process: .*no_such_module"),
        (("return PCMEnsembleOutput(\n", "logits = logits * 2\n        return PCMEnsembleOutput(\n"), "other results"),
        (
            ("return PCMEnsembleOutput(\n", "logits[0, 0, 0] = float('nan')\n        return PCMEnsembleOutput(\n"),
            "other results",
        ),
    ],
    ids=["broken", "different", "nan"],
)
def test_code_that_gives_others_something_else_is_not_uploaded(hub, folder, change, message):
    path = folder / "modeling_pcm_ensemble.py"
    text = path.read_text()
    assert text.count(change[0]) == 1
    path.write_text(text.replace(*change))
    result = upload(hub, folder)
    assert result.returncode == 1
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert "owner/ensemble" not in hub.repositories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "hf_wrong"}, "Invalid user token"),
        ({"repo_id": "owner/../x"}, "Repo id must"),
        ({"repo_id": "ensemble"}, "must be given as owner/name, got 'ensemble'"),
        ({"repo_id": "someone/theirs"}, "who may write to owner, but not to someone"),
        ({"repo_id": "owner/llama"}, "holds a model of another kind (llama)"),
    ],
    ids=["token", "name", "no-owner", "owner", "another-model"],
)
def test_what_the_hub_would_refuse_is_said(hub, folder, arguments, message):
    hub.repositories["owner/llama"] = hub.repositories["someone/llama"]
    result = upload(hub, folder, **arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert set(hub.repositories) == {"owner/llama", "someone/llama", "someone/gpt2"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json. Give a folder that `save_pretrained` wrote"),
        ({"config.json": '{"model_type": "llama"}'}, "holds a model of another kind (llama), not an ensemble"),
        ({"config.json": '{"model_type": "pcm_ensemble", "merge": "sums"}'}, "cannot be loaded: "),
    ],
    ids=["empty", "llama", "invalid"],
)
def test_a_folder_that_is_no_ensemble_is_refused(hub, tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    for name, text in files.items():
        (tmp_path / "folder" / name).write_text(text)
    result = upload(hub, tmp_path / "folder")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["adapter_config.json", "model_index.json", "theirs.gguf", "a/theirs.pt"])
@pytest.mark.parametrize("branch", ["main", "small"])
def test_a_branch_that_holds_another_model_is_refused(hub, folder, name, branch):
    hub.add("owner/theirs", folder)
    hub.repositories["owner/theirs"].commit(branch, {name: (b"theirs", True)})
    result = upload(hub, folder, *([] if branch == "main" else ["--revision", branch]), repo_id="owner/theirs")
    assert result.returncode == 1
    assert f"holds a model of another kind ({name}) in its branch {branch}." in result.stderr
    assert "Traceback" not in result.stderr
    assert hub.files("owner/theirs", branch) == {name: b"theirs"}


def test_a_public_repository_does_not_take_what_should_be_private(hub, folder, whole):
    hub.add("owner/ensemble", folder)
    result = upload(hub, folder, "--private")
    assert "owner/ensemble is there already, and public" in result.stderr
    assert commits(hub) == 0


@pytest.mark.parametrize("kind", ["no chat template", "no tokenizer", "product"])
def test_the_cards_code_runs_without_a_chat_template_or_a_tokenizer(hub, kind, tmp_path):
    model = PCMEnsembleForCausalLM.from_experts(
        {"it's": tiny_llama(1), "a|b": tiny_gpt2(2)} | ({"base": tiny_llama(4)} if kind == "product" else {}),
        pcm=tiny_llama(3),
        tokenizer=None if kind == "no tokenizer" else tiny_tokenizer(chat_template=None),
        **({"merge": "product", "reference": "base"} if kind == "product" else {}),
    )
    model.save_pretrained(tmp_path / "ensemble")
    result = upload(hub, tmp_path / "ensemble")
    assert result.returncode == 0, result.stderr
    card = hub.files("owner/ensemble")["README.md"].decode()
    number = 3 if kind == "product" else 2
    assert f"The licence of {number} backbones that are not from the Hub is not known." in card
    assert "| a\\|b |" in card
    assert ("The reference is base." in card) == (kind == "product")
    assert """preference={"it's": 1.0, "a|b": 0.5}""" in card
    assert ("tensor(" in card) == (kind == "no tokenizer")
    assert "It is not trained" in card


def test_an_upload_that_broke_off_can_be_run_again(hub, folder):
    fault = Fault("status", "POST .*/commit/", times=100, status=500)
    hub.faults.append(fault)
    result = upload(hub, folder)
    assert result.returncode == 1
    assert "500" in result.stderr
    assert commits(hub) == 0
    hub.faults.clear()
    sent = sum(request.startswith("PUT") for request in hub.requests)
    result = upload(hub, folder)
    assert result.returncode == 0, result.stderr
    assert sum(request.startswith("PUT") for request in hub.requests) == sent  # what had arrived is not sent again
    assert commits(hub) == 1


def test_what_arrives_damaged_is_not_committed(hub, folder):
    hub.faults.append(Fault("mangle", "PUT /lfs/"))
    result = upload(hub, folder)
    assert result.returncode == 1
    assert "The uploaded bytes are not those of the checksum" in result.stderr
    assert "Traceback" not in result.stderr
    assert commits(hub) == 0
    assert upload(hub, folder).returncode == 0


def test_a_pull_that_brings_other_numbers_is_noticed(hub, folder):
    hub.faults.append(Fault("corrupt", "GET .*ensemble/resolve/.*safetensors", times=100))
    result = upload(hub, folder)
    assert result.returncode == 1
    assert re.search(
        r"What was uploaded \(commit \w+ of owner/ensemble, which stays there\) gives other", result.stderr
    )


def test_weights_of_an_earlier_checkpoint_are_deleted_and_other_files_stay(hub, folder):
    shards = {f"model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)} | {"notes/model.safetensors": b"other"}
    (folder.parent / "old" / "notes").mkdir(parents=True)
    for name, content in (shards | {"README.md": b"# By hand", "config.json": CONFIG}).items():
        (folder.parent / "old" / name).write_bytes(content)
    hub.add("owner/ensemble", folder.parent / "old")
    (folder / "link.txt").symlink_to("/etc/hostname")
    result = upload(hub, folder)
    assert result.returncode == 0, result.stderr
    assert "Deleted there, being of an earlier checkpoint: model-00001-of-00002.safetensors" in result.stdout
    stored = hub.files("owner/ensemble")
    assert "notes/model.safetensors" in stored
    assert not any("of-00002" in name for name in stored)
    assert "link.txt" not in stored
    assert stored["README.md"] == b"# By hand"
    assert "README.md was written by a person, and stays" in result.stdout


def test_a_tokenizers_files_of_an_earlier_checkpoint_and_what_a_link_leads_to_are_not_uploaded_thin(hub, folder):
    (folder.parent / "old").mkdir()
    templates = "additional_chat_templates/rag.jinja"
    (folder.parent / "old" / templates).parent.mkdir()
    old = {"tokenizer.model": b"old", "model.fp16.safetensors": b"old", templates: b"old", "config.json": CONFIG}
    for name, content in old.items():
        (folder.parent / "old" / name).write_bytes(content)
    hub.add("owner/ensemble", folder.parent / "old")
    repository = hub.repositories["owner/ensemble"]
    repository.branches["small"] = repository.branches["main"]
    main = repository.commit("main", {"theirs.gguf": (b"theirs", True)})
    (folder / "link.txt").symlink_to("/etc/hostname")
    (folder / "model.fp16.safetensors").write_bytes(b"whole")
    (folder / "notes.txt").write_text("mine")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"seen")
    result = upload(hub, folder, "--thin", "--revision", "small")
    assert result.returncode == 0, result.stderr
    assert repository.branches["main"] == main  # which holds another model
    stored = hub.files("owner/ensemble", "small")
    assert stored["notes.txt"] == b"mine"
    assert stored["pictures/a.png"] == b"seen"
    assert not {"tokenizer.model", templates, "link.txt", "model.fp16.safetensors"} & set(stored)
    assert re.search(r"Left out \(.*links to elsewhere\): .*link.txt", result.stdout)


def test_experts_behind_an_endpoint_are_uploaded_with_their_address_and_without_their_key(hub, tmp_path, monkeypatch):
    secret = "".join(map(chr, range(97, 117)))
    monkeypatch.setenv("PCM_TEST_KEY", secret)
    backbones = {"here": tiny_llama(1, max_position_embeddings=128), "there": tiny_gpt2(2, n_positions=128)}
    with EndpointServer(backbones, tiny_tokenizer(), key=secret) as server:
        save_one_here_one_there(server, tmp_path / "ensemble")

        result = upload(hub, tmp_path / "ensemble")
        assert f"names the endpoint {server.endpoint!r}" in result.stderr
        assert f"--endpoints {server.endpoint}" in result.stderr
        assert commits(hub) == 0

        result = upload(hub, tmp_path / "ensemble", "--endpoints", f"{server.endpoint}=PCM_TEST_KEY")
        assert result.returncode == 0, result.stderr

    stored = hub.files("owner/ensemble")
    card = stored["README.md"].decode()
    assert f'allow_endpoints=["{server.endpoint}"], endpoint_keys={{"{server.endpoint}": "PCM_TEST_KEY"}}' in card
    assert card.count("allow_endpoints=[") == 1  # a tokenizer would keep it
    assert "pipeline(" not in card
    assert f"| there |  | there | there behind {server.endpoint} |" in card
    assert f"Experts are behind {server.endpoint}: prompts and answers are sent there." in card
    assert not any(secret.encode() in content for content in stored.values())


def test_an_endpoint_that_fails_between_two_checks_is_said_in_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PCM_TEST_KEY", "abc")
    backbones = {name: tiny_llama(seed, max_position_embeddings=128) for seed, name in enumerate(("here", "there"))}
    with EndpointServer(backbones, tiny_tokenizer(), key="abc") as server:
        save_one_here_one_there(server, tmp_path / "ensemble")
        loading = {"allow_endpoints": [server.endpoint], "endpoint_keys": {server.endpoint: "PCM_TEST_KEY"}}
        model = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble", **loading)
        run(model, torch.arange(3, 11)[None], torch)
        once = len(server.asked)
        server.fault = lambda number: "400" if number >= 2 * once else None  # behind the clean process's requests
        result = upload(hub, tmp_path / "ensemble", "--dry-run", "--endpoints", f"{server.endpoint}=PCM_TEST_KEY")
    assert result.returncode == 1
    assert re.search(r"^EndpointError: .*no such model", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub, folder):
    result = upload(hub, folder, "--dry-run", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "ConnectionError: The exchange with the Hub at http://127.0.0.1:9 failed: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "request_", ["GET /api/models/someone/llama$", "POST /api/validate-yaml", "POST .*/create", "POST .*/branch/"]
)
def test_a_connection_that_is_lost_later_is_said_in_one_line(hub, folder, request_):
    hub.faults.append(Fault("drop", request_, times=100))
    result = upload(hub, folder, "--revision", "small")
    assert result.returncode == 1
    assert f"ConnectionError: The exchange with the Hub at {hub.url} failed: peer closed connection" in result.stderr
    assert "Traceback" not in result.stderr
    assert commits(hub) == 0
