"""Push and pull by standard calls, whole and thin, between clean processes and a real server."""

import json
import textwrap

import pytest
import torch
from conftest import tiny_llama
from hub_clients import PUSH_ENSEMBLE, output, run_client
from local_hub import Fault
from safetensors.torch import load

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo

# Somebody else, who has not got this package.
PULL = """
import sys
sys.modules["modeling_pcm_ensemble"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("owner/ensemble", trust_remote_code=True, **OPTIONS)
with torch.no_grad():
    print(model(torch.tensor([[21, 22, 23, 24, 25]])).logits.double().sum().item())
"""


def pull(hub, home, token=None, environment=None, **options):
    return run_client(PULL, hub, home, token, environment, OPTIONS=options)


@pytest.mark.parametrize("is_thin", [False, True], ids=["whole", "thin"])
def test_what_is_pushed_gives_the_same_logits_where_it_is_pulled(hub, published, tmp_path, is_thin):
    expected = hub.hold(published[is_thin])
    assert output(pull(hub, tmp_path, "hf_owner")) == expected
    downloads = len(hub.requests)
    assert output(pull(hub, tmp_path, environment={"HF_HUB_OFFLINE": "1"})) == expected
    assert len(hub.requests) == downloads
    stored = hub.files("owner/ensemble")
    tensors = set(load(stored["model.safetensors"]))
    assert ("backbones.0.model.norm.weight" in tensors) == (not is_thin)
    assert ("pcm.body.embed_tokens.weight" in tensors) == (not is_thin)
    assert "pcm.head.weight" in tensors
    assert (json.loads(stored["config.json"])["thin"] is not None) == is_thin
    assert {name for name in stored if name.startswith(".")} <= {".gitattributes"}


def test_a_thin_checkpoint_loads_as_a_whole_one_with_every_option(hub, thin, tmp_path):
    script = """
    import torch
    from modeling_pcm_ensemble import PCMEnsembleForCausalLM
    model, loading = PCMEnsembleForCausalLM.from_pretrained(
        "owner/ensemble", merge="logits", dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu",
        output_loading_info=True,
    )
    assert not any(loading[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")), loading
    assert model.config.merge == "logits" and model.config.thin is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.backbones[1].config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in model.backbones.parameters())
    assert model.pcm.head.weight.requires_grad
    assert model.generation_config.eos_token_id == 2 and model.name_or_path == "owner/ensemble"
    assert model.tokenizer.decode([7])
    model.save_pretrained(FOLDER)
    model.save_pretrained(FOLDER + "-thin", thin=True)
    for folder in (FOLDER, FOLDER + "-thin"):
        again = PCMEnsembleForCausalLM.from_pretrained(folder)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

    reference, expert = model.config.expert_names[:2]
    model.config.merge, model.config.reference = "product", reference
    model.save_pretrained(FOLDER + "-product", thin=True)
    product = PCMEnsembleForCausalLM.from_pretrained(
        FOLDER + "-product", dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert (product.config.merge, product.config.reference) == ("product", reference)
    ids, wishes = torch.tensor([[3, 4, 5]]), {expert: -0.5}
    assert torch.equal(product(ids, preference=wishes).logits, model(ids, preference=wishes).logits)
    """
    output(run_client(textwrap.dedent(script) + "\nprint()", hub, tmp_path / "user", None, FOLDER=str(tmp_path / "f")))
    assert (tmp_path / "f-thin/model.safetensors").stat().st_size < (tmp_path / "f/model.safetensors").stat().st_size


def test_a_backbone_that_changed_under_its_name_is_refused(hub, thin, tmp_path):
    """Same commit, other weights: a Hub that rewrote history, or a cache that somebody touched."""
    llama = hub.repositories["someone/llama"]
    tree = llama.commits[llama.resolve("main")]
    tiny_llama(1, intermediate_size=40).save_pretrained(tmp_path / "other")
    tree["model.safetensors"] = ((tmp_path / "other/model.safetensors").read_bytes(), True)
    refused = pull(hub, tmp_path / "user")
    assert "ValueError: The weights of someone/llama at" in refused.stderr
    assert "not those that this ensemble was saved with" in refused.stderr


def change(hub, name: str, **files: bytes | None):
    """Rewrite what a repository holds, at the same commit."""
    repository = hub.repositories[name]
    tree = repository.commits[repository.resolve("main")]
    for path, content in files.items():
        tree[path.replace("__", ".")] = (content, False)


def test_weights_are_those_of_the_digest_whatever_else_lies_there(hub, thin, tmp_path):
    """A second set of weights is not loaded in place of the one that was named."""
    tiny_llama(9).save_pretrained(tmp_path / "other")
    foreign = (tmp_path / "other/model.safetensors").read_bytes()
    config = json.loads(hub.files("someone/llama")["config.json"])
    named = json.dumps(config | {"transformers_weights": "model-x.safetensors"}).encode()
    change(hub, "someone/llama", **{"config__json": named, "model-x.safetensors": foreign})
    refused = pull(hub, tmp_path / "user")
    assert "names its weights itself, by `transformers_weights` 'model-x.safetensors'" in refused.stderr


@pytest.mark.parametrize("name", ["owner/ensemble", "someone/gpt2"], ids=["ensemble", "expert"])
def test_pickles_of_the_hub_are_never_loaded(hub, whole, tmp_path, name):
    weights = hub.files(name)["model.safetensors"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(load(weights), "evil.bin")}
    repository = hub.repositories[name]
    del repository.commits[repository.resolve("main")]["model.safetensors"]
    torch.save(load(weights), tmp_path / "evil.bin")
    change(hub, name, **{"model.safetensors.index__json": json.dumps(index).encode()})
    change(hub, name, **{"evil.bin": (tmp_path / "evil.bin").read_bytes()})
    script = """
    from modeling_pcm_ensemble import PCMEnsembleForCausalLM
    PCMEnsembleForCausalLM.from_pretrained(NAME) if "ensemble" in NAME else PCMEnsembleForCausalLM.from_experts(
        {"a": NAME}, pcm=NAME
    )
    """
    refused = run_client(textwrap.dedent(script), hub, tmp_path / "user", NAME=name)
    assert "names the weights 'evil.bin'. They must be safetensors beside it" in refused.stderr
    assert not any("evil.bin" in request for request in hub.requests)


def test_an_adapter_beside_the_weights_leads_nowhere(hub, whole, tmp_path):
    """With PEFT installed, transformers would load the model that the adapter names, from any folder."""
    elsewhere = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"}).encode()
    change(hub, "owner/ensemble", adapter_config__json=elsewhere, adapter_model__bin=b"pickle")
    script = "from modeling_pcm_ensemble import PCMEnsembleForCausalLM as C; C.from_pretrained('owner/ensemble')"
    refused = run_client(script, hub, tmp_path / "user")
    assert "'owner/ensemble' holds a PEFT adapter" in refused.stderr
    assert not any("adapter_model" in request for request in hub.requests)


def test_weights_that_are_no_safetensors_are_named(hub, thin, tmp_path):
    change(hub, "someone/llama", **{"model.safetensors": b"\xff" * 2000})
    for _ in range(2):  # the second time from the cache
        assert "model.safetensors is no safetensors file. Fetch it again" in pull(hub, tmp_path / "user").stderr


def test_the_token_that_is_given_reaches_private_backbones_and_a_failed_push_leaves_no_repository(hub, thin, tmp_path):
    for name in ("llama", "gpt2"):
        hub.repositories[f"owner/{name}"] = hub.repositories.pop(f"someone/{name}")
        hub.repositories[f"owner/{name}"].owner, hub.repositories[f"owner/{name}"].private = "owner", True
    del hub.repositories["owner/ensemble"]
    build = PUSH_ENSEMBLE.replace("someone/", "owner/").replace("pcm_layers=1,", "pcm_layers=1, token=TOKEN,")
    clear = "import os, shutil\nshutil.rmtree(os.environ['HF_HOME'] + '/hub')\nmodel.push"
    script = build.replace("model.push", clear)
    refused = run_client(script, hub, tmp_path / "a", None, TOKEN="hf_owner", OPTIONS={"thin": True})
    assert "401" in refused.stderr
    assert "owner/ensemble" not in hub.repositories
    options = {"thin": True, "token": "hf_owner"}
    output(run_client(script, hub, tmp_path / "a", None, TOKEN="hf_owner", OPTIONS=options))
    assert "model.safetensors" in hub.files("owner/ensemble")


def test_backbones_that_moved_on_are_loaded_as_they_were(hub, thin, tmp_path):
    tiny_llama(9).save_pretrained(tmp_path / "llama")
    hub.add("someone/llama", tmp_path / "llama")
    assert output(pull(hub, tmp_path / "user")) == thin


def test_another_revision_of_a_backbone_that_is_there_is_refused(hub, thin, tmp_path):
    first = hub.repositories["someone/llama"].resolve("main")
    tiny_llama(9).save_pretrained(tmp_path / "llama")
    hub.add("someone/llama", tmp_path / "llama")
    script = """
    from modeling_pcm_ensemble import PCMEnsembleForCausalLM
    model = PCMEnsembleForCausalLM.from_pretrained("owner/ensemble")
    backbones = len(model.backbones)
    model.add_expert("same", "someone/llama", revision=FIRST)
    assert len(model.backbones) == backbones
    try:
        model.add_expert("new", "someone/llama", revision="main")
    except ValueError as error:
        print(error)
    """
    said = output(run_client(textwrap.dedent(script), hub, tmp_path / "user", None, FIRST=first))
    assert said.startswith(f"The model of expert 'new', 'someone/llama', is there already at the revision {first}")


def test_what_a_thin_checkpoint_cannot_name_is_refused(hub, thin, tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2))
    with pytest.raises(ValueError, match=r"Backbone 0 \(LlamaForCausalLM\) is not from a Hub repository"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    assert not (tmp_path / "thin").exists()
    before = hub.files("owner/ensemble")
    changed = PUSH_ENSEMBLE.replace(
        "model.push", "torch.nn.init.zeros_(model.backbones[1].lm_head.weight)\nmodel.push"
    )
    refused = run_client(changed, hub, tmp_path / "author", OPTIONS={"thin": True})
    assert "Backbone 1 is not what someone/gpt2 holds at" in refused.stderr
    assert hub.files("owner/ensemble") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repository": "../../somewhere"}, "Repo id must"),
        ({"repository": "/etc"}, "Repo id must"),
        ({"repository": "https://example.org/model"}, "Repo id must"),
        ({"revision": "main"}, "names its backbones by commit"),
        ({"revision": "../../../etc"}, "names its backbones by commit"),
        ({"digest": None}, "`thin` must give repository, revision, digest"),
    ],
    ids=["parent", "absolute", "other-host", "branch", "path", "no-digest"],
)
def test_a_thin_checkpoint_cannot_point_outside_the_hub(hub, thin, tmp_path, change, message):
    repository = hub.repositories["owner/ensemble"]
    tree = repository.commits[repository.resolve("main")]
    config = json.loads(tree["config.json"][0])
    config["thin"]["backbones"][0] |= change
    tree["config.json"] = (json.dumps(config).encode(), False)
    for path, (content, _) in tree.items():
        (tmp_path / path).write_bytes(content)
    with pytest.raises(Exception, match=message):  # transformers' own, of configurations, is no ValueError
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


def test_a_thin_checkpoint_that_shares_a_tensor_of_no_backbone_is_refused(hub, thin, tmp_path):
    config = json.loads(hub.files("owner/ensemble")["config.json"])
    config["thin"]["shared"] = dict.fromkeys(config["thin"]["shared"], "nope")
    change(hub, "owner/ensemble", config__json=json.dumps(config).encode())
    assert "`thin.shared` names the tensor 'nope', which no backbone has" in pull(hub, tmp_path).stderr


def test_a_local_folder_does_not_stand_in_for_a_backbones_repository(hub, thin, tmp_path, monkeypatch):
    tiny_llama(9).save_pretrained(tmp_path / "work/someone/llama")
    monkeypatch.chdir(tmp_path / "work")
    assert output(pull(hub, tmp_path / "user")) == thin


def test_standard_arguments_reach_the_hub(hub, whole, tmp_path):
    """Private repositories, tokens, revisions, pull requests, pinned code, pipelines."""
    assert "401" in pull(hub, tmp_path / "nobody").stderr
    assert output(run_client(PULL, hub, tmp_path / "user", None, OPTIONS={"token": "hf_owner"})) == whole
    first = hub.repositories["owner/ensemble"].resolve("main")
    changed = PUSH_ENSEMBLE.replace("manual_seed(5)", "manual_seed(6)")
    other = output(run_client(changed, hub, tmp_path / "author", OPTIONS={"create_pr": True}))
    assert other != whole
    pulled = {
        revision: output(pull(hub, tmp_path / "user", "hf_owner", revision=revision, code_revision=first))
        for revision in ("main", first, "refs/pr/1")
    }
    assert pulled == {"main": whole, first: whole, "refs/pr/1": other}
    generate = """
    from transformers import AutoConfig, AutoTokenizer, pipeline
    AutoConfig.from_pretrained("owner/ensemble", trust_remote_code=True).push_to_hub("owner/config")
    tokenizer = AutoTokenizer.from_pretrained("owner/ensemble", trust_remote_code=True)
    tokenizer.push_to_hub("owner/tokenizer")
    pipe = pipeline("text-generation", "owner/ensemble", trust_remote_code=True)
    print(pipe("abc", preference={"b": 1.0}, max_new_tokens=3, do_sample=False)[0]["generated_text"])
    """
    assert output(run_client(textwrap.dedent(generate), hub, tmp_path / "user")).startswith("abc")
    assert "tokenizer.json" in hub.files("owner/tokenizer")
    assert json.loads(hub.files("owner/config")["config.json"])["model_type"] == "pcm_ensemble"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("drop", "GET .*ensemble/resolve/.*safetensors"), None),
        (Fault("drop", "GET .*llama/resolve/.*safetensors"), None),
        (Fault("slow", "GET .*llama/resolve/.*safetensors", seconds=2.0), None),
        (Fault("status", "GET .*llama/resolve/.*safetensors", status=429, retry_after=1), None),
        (Fault("status", "GET .*llama/resolve/.*safetensors", status=500), "500"),
    ],
    ids=["dropped", "backbone-dropped", "slow", "429", "500"],
)
def test_a_faulty_pull_is_retried_or_says_so_and_can_be_run_again(hub, thin, tmp_path, fault, message):
    hub.faults.append(fault)
    first = pull(hub, tmp_path / "user")
    assert fault.times == 0
    if message is None:
        assert output(first) == thin
    else:
        assert first.returncode
        assert message in first.stderr
        assert output(pull(hub, tmp_path / "user")) == thin


SMOLLM2 = """
import torch
from modeling_pcm_ensemble import demo
model = demo.trained_ensemble(dtype=torch.bfloat16)  # on the folder that `snapshot_download` returns
assert model.config.backbones[0].source["repository"] == demo.REPOSITORY
model.push_to_hub("owner/whole")
model.push_to_hub("owner/thin", thin=True)
"""
BOTH = """
import sys
sys.modules["modeling_pcm_ensemble"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = []
for name in ("owner/whole", "owner/thin"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained(name, trust_remote_code=True)(["What is gravity?"], return_tensors="pt")
    with torch.no_grad():
        logits.append(model(**inputs, preference={"elementary": 1.0, "friendly": 0.5}).logits)
assert model.dtype == torch.bfloat16
print(torch.equal(*logits))
"""


@pytest.mark.real_model
def test_six_adapters_and_the_trained_pcm_are_small_when_thin_and_the_same(hub, tmp_path):
    hub.add(demo.REPOSITORY, demo.fetch_smollm2())
    author = run_client(SMOLLM2, hub, tmp_path / "author")
    assert author.returncode == 0, author.stderr
    sizes = {name: sum(map(len, hub.files(f"owner/{name}").values())) / 1e6 for name in ("whole", "thin")}
    assert sizes["thin"] < 64 < 256 < sizes["whole"]
    assert output(run_client(BOTH, hub, tmp_path / "user", None)) == "True"
