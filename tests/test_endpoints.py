"""Experts behind an endpoint: as good as here, refused where they could not be, and asked where that is allowed."""

import ast
import asyncio
import contextlib
import copy
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hpack
import hypercorn.asyncio
import pytest
import torch
import trustme
from conftest import VOCAB, tiny_llama, tiny_tokenizer
from endpoint_server import EndpointServer
from test_training import make_trainer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, TextIteratorStreamer, pipeline

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.endpoints import EndpointError, EndpointForCausalLM, requests
from modeling_pcm_ensemble.endpoints.apis import APIS, top_tokens
from modeling_pcm_ensemble.evaluation import TrainedEnsemble
from modeling_pcm_ensemble.failures import truncation_bound

NAMES = ("here", "there", "elsewhere")
PREFERENCES = [
    {"here": 1.0, "there": 1.0},
    {"there": 1.0},
    {"there": 2.0, "elsewhere": 1.0},
    {"elsewhere": 1.0},
    {"here": 1.0},
    dict.fromkeys(NAMES, 0.5),
]
OTHER_KIND = {"there": {"served_model": "there"}, "elsewhere": {"served_model": "elsewhere", "prompt": "be brief"}}


@pytest.fixture(scope="module")
def backbones():
    return {name: tiny_llama(seed, max_position_embeddings=128) for seed, name in enumerate(NAMES)}


@pytest.fixture
def server(backbones):
    with EndpointServer(backbones, tiny_tokenizer()) as server:
        yield server


def ensembles(server, backbones, top_k: int | None = 20, **options) -> tuple:
    """The ensemble with two experts behind an endpoint, and the same with all of them here."""
    own = {"timeout": 20.0, "top_logprobs": top_k or VOCAB} | options.pop("own", {})
    common = {"pcm": backbones["here"], "tokenizer": tiny_tokenizer(), "expert_top_k": top_k} | options
    served = {"here": {"model": backbones["here"]}}
    local = dict(served)
    for name, fields in OTHER_KIND.items():
        served[name] = fields | {"endpoint": server.endpoint} | own
        local[name] = {"model": backbones[name]} | {key: fields[key] for key in fields if key == "prompt"}

    models = []
    for experts in (served, local):
        model = PCMEnsembleForCausalLM.from_experts(experts, **common)
        torch.nn.init.normal_(model.pcm.head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        model.generation_config.eos_token_id = None
        models.append(model)
    server.asked.clear()
    return tuple(models)


def batch(rows: int = 6) -> dict:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, VOCAB, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_with_the_whole_vocabulary_told_the_mixture_is_that_of_local_experts(server, backbones):
    served, local = ensembles(server, backbones, top_k=None)
    inputs = batch() | {"preference": PREFERENCES}
    with torch.no_grad():
        found, wanted = (model(**inputs, logits_to_keep=1).logits for model in (served, local))
    assert_close(found, wanted, atol=1e-4, rtol=0)
    assert torch.equal(*(model.generate(**inputs, do_sample=False, max_new_tokens=12) for model in (served, local)))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {"cache_implementation": "static"}],
    ids=str,
)
@pytest.mark.parametrize("merge", ["probabilities", "product"])
def test_with_a_top_k_every_mode_of_generate_gives_what_local_experts_give(server, backbones, merge, options):
    reference = {"reference": "here"} if merge == "product" else {}
    preferences = [{"there": 1.0}, {"there": 2.0, "elsewhere": 1.0}, {"elsewhere": -0.5}] if reference else PREFERENCES
    inputs = batch(len(preferences)) | {"preference": preferences}
    answers = []
    for model in ensembles(server, backbones, merge=merge, **reference):
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8} | options))
    assert torch.equal(*answers)


def test_whole_texts_are_scored_and_attributed_as_by_local_experts(server, backbones):
    served, local = ensembles(server, backbones, top_k=None)
    inputs = batch() | {"preference": PREFERENCES}
    assert_close(served.attribute(**inputs), local.attribute(**inputs), atol=1e-4, rtol=0)


def test_how_far_a_top_k_may_be_from_the_whole_is_known(server, backbones):
    inputs = batch() | {"preference": PREFERENCES, "logits_to_keep": 1}
    served, local = ensembles(server, backbones, top_k=7)
    _, whole = ensembles(server, backbones, top_k=None)
    with torch.no_grad():
        found, kept, exact = (model(**inputs, output_expert_logits=True) for model in (served, local, whole))
    bound = truncation_bound(found.expert_logits, found.expert_weights, 7, served.served_experts)
    assert_close(bound, truncation_bound(kept.expert_logits, kept.expert_weights, 7), atol=1e-5, rtol=0)
    distance = (found.logits.exp() - exact.logits.exp()).abs().sum(dim=-1) / 2
    assert (distance <= bound + 1e-5).all()
    assert bound.min() > 0.05


def test_it_streams_and_serves_a_pipeline(server, backbones):
    served, local = ensembles(server, backbones)
    texts = []
    for model in (served, local):
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
        options = {"max_new_tokens": 6, "do_sample": False, "preference": "there"}
        model.generate(**batch(1), **options, streamer=streamer)
        generate = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
        texts.append(("".join(streamer), generate("hello", **options)[0]["generated_text"]))
    assert texts[0] == texts[1]


def test_a_step_asks_for_equal_contexts_once_and_counts_what_it_asked(server, backbones):
    served, _ = ensembles(server, backbones)
    server.asked.clear()
    ids = torch.tensor([[20, 21, 22]]).expand(5, -1)
    served.generate(ids, preference=["there"], max_new_tokens=1, do_sample=False)
    assert [len(body["prompt"]) for body in server.asked] == [1]
    usage = served.endpoint_usage[f"{server.endpoint} there"]
    assert (usage.prompts, usage.prompt_tokens, usage.failed_tries) == (
        2,
        3 + len("Hello, world!"),
        0,
    )  # one to try it
    assert usage.seconds > 0


def test_an_endpoint_answers_while_the_pcm_runs(server, backbones, monkeypatch):
    served, _ = ensembles(server, backbones)
    asked = []
    weighted = served.pcm.forward

    def slow(*args, **kwargs):
        time.sleep(0.5)
        asked.append(len(server.asked))
        return weighted(*args, **kwargs)

    monkeypatch.setattr(served.pcm, "forward", slow)
    served(torch.tensor([[20, 21]]), preference=["here", "there"], logits_to_keep=1)
    assert asked == [1]


def test_connections_are_kept(server, backbones):
    served, _ = ensembles(server, backbones)
    served.generate(**batch(), preference=PREFERENCES, max_new_tokens=8, do_sample=False)
    assert len(server.asked) == 16
    assert server.connections <= 2


@contextlib.contextmanager
def over_tls(server: EndpointServer, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The same answers by HTTP/2, which hypercorn speaks: its address, and the version of each request."""
    authority, versions = trustme.CA(), []
    authority.cert_pem.write_to_path(folder / "authority.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        content = b""
        while (message := await receive())["type"] == "http.request":
            content += message["body"]
            if not message["more_body"]:
                break
        versions.append(scope["http_version"])
        answer = json.dumps(server.told(scope["path"], json.loads(content or b"{}"))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = hypercorn.Config()
    config.bind, config.errorlog = [address], None
    config.certfile = config.keyfile = str(folder / "server.pem")

    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    serving = hypercorn.asyncio.serve(app, config, shutdown_trigger=ended.wait)
    thread = threading.Thread(target=loop.run_until_complete, args=[serving])
    thread.start()
    try:
        yield f"https://{address}", versions
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()


def test_http_2_is_spoken_where_the_server_does_and_logs_no_key(server, backbones, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    caplog.set_level(logging.DEBUG)
    with over_tls(server, tmp_path) as (endpoint, versions):
        requests._networks.clear()
        model = EndpointForCausalLM.of_expert("there", spec(server, endpoint=endpoint, key=lambda: "sk-secret"))
        model.fit(backbones["there"], tiny_tokenizer(), "'there'")
        assert model(torch.tensor([[20, 21]])).logits.isfinite().all()
        network = requests._networks.pop()  # whose connection the server would wait for
        asyncio.run_coroutine_threadsafe(network.client.aclose(), network.loop).result()
    assert len(versions) > 3
    assert set(versions) == {"2"}
    assert "sk-secret" not in caplog.text
    for block in re.findall(r"Encoded header block to (b'.*')", caplog.text):
        assert b"sk-secret" not in str(hpack.Decoder().decode(ast.literal_eval(block))).encode()


def test_endpoints_are_asked_at_the_same_time(server, backbones):
    served, _ = ensembles(server, backbones)
    server.delay = 0.4
    served(torch.tensor([[20, 21]]), preference=["there", "elsewhere"], logits_to_keep=1)
    assert server.most_at_once == 2


@pytest.mark.parametrize("merge", ["probabilities", "product"])
def test_a_rollout_with_experts_elsewhere_makes_the_same_update(server, backbones, tmp_path, merge):
    reference = {"reference": "here"} if merge == "product" else {}
    names = NAMES[1:] if reference else NAMES
    rewards = dict.fromkeys(NAMES, lambda prompts, completions, **columns: [float(len(text)) for text in completions])
    learnt = []
    for number, model in enumerate(ensembles(server, backbones, merge=merge, **reference)):
        settings = {"preference_sets": [list(names)], "rewards": rewards, "max_completion_length": 4, "max_steps": 1}
        settings |= {"optim": "sgd", "learning_rate": 1.0}  # an update as large as the gradient
        trainer = make_trainer(tmp_path / str(number), model, **settings)
        asked = len(server.asked)
        trainer.train()
        learnt.append(trainer.model.state_dict())
    assert len(server.asked) == asked  # which experts here have not asked

    assert learnt[1]["head.weight"].abs().max() > 0.01
    for name, weight in learnt[1].items():
        assert_close(learnt[0][name], weight, atol=1e-3, rtol=0)


# What is refused, and what a checkpoint says


def spec(server, **fields) -> dict:
    return {"endpoint": f"{server.endpoint}/v1", "served_model": "there"} | fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": "gpu-7:8000"}, "must be an address"),
        ({"endpoint": "http://me:secret@gpu-7"}, "without a user, a key or a query"),
        ({"endpoint": "me:secret@gpu-7:99999"}, "without a user, a key or a query"),
        ({"api": "chat"}, "a chat's template is applied at the server"),
        ({"api": "openai"}, "tells tokens as texts"),
        ({"api": "tgi"}, "`api` must be one of 'vllm'"),
        ({"served_model": ""}, "needs `served_model`"),
        ({"timeout": 0}, "`timeout` must be above 0"),
        ({"attempts": 10**9}, "`attempts` at most 10"),
        ({"endpoint": "http://gpu-7:99999/v1"}, "must be an address"),
        ({"on_failure": "retry"}, "must be 'error' or 'drop'"),
        ({"model": "gpt2"}, "Leave `model` and `adapter` out"),
        ({"on_fail": "drop"}, r"unknown fields \['on_fail'\]. Accepted are endpoint, .*on_failure, key, prompt"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_description_is_refused_by_name(server, backbones, fields, message):
    experts = {"here": backbones["here"], "there": spec(server, **fields)}
    with pytest.raises(ValueError, match=message) as error:
        PCMEnsembleForCausalLM.from_experts(
            experts, pcm=backbones["here"], tokenizer=tiny_tokenizer(), expert_top_k=20
        )
    assert "secret" not in str(error.value)
    assert not server.requests


def test_what_the_endpoint_does_not_tell_is_not_guessed(server, backbones):
    experts = {"here": backbones["here"], "there": spec(server)}
    options = {"pcm": backbones["here"], "tokenizer": tiny_tokenizer()}
    with pytest.raises(ValueError, match="Set `expert_top_k` to at most 20"):
        PCMEnsembleForCausalLM.from_experts(experts, **options)
    model = PCMEnsembleForCausalLM.from_experts(experts, expert_top_k=20, **options)
    model.config.merge, model.config.expert_top_k = "logits", None
    with pytest.raises(ValueError, match="Set `expert_top_k` to at most 20"):
        model(torch.tensor([[20]]), preference="here")


def test_a_server_that_reads_texts_otherwise_is_refused(server, backbones):
    server.tokenizer = tiny_tokenizer(letters="ol")
    with pytest.raises(ValueError, match="All parts must share one vocabulary: 'Hello, world!' is"):
        ensembles(server, backbones)


def test_a_checkpoint_names_its_endpoints_and_connects_when_it_is_allowed_to(server, backbones, tmp_path):
    served, _ = ensembles(server, backbones)
    served.save_pretrained(tmp_path)
    inputs = batch() | {"preference": PREFERENCES}
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = served.generate(**inputs, **options)

    server.requests.clear()
    for loads in (PCMEnsembleForCausalLM, AutoModelForCausalLM):
        with pytest.raises(PermissionError, match=rf"allow_endpoints=\['{server.endpoint}'\]"):
            loads.from_pretrained(tmp_path)
    built = PCMEnsembleForCausalLM(copy.deepcopy(served.config))
    with pytest.raises(PermissionError, match="names the endpoint"):
        built(**inputs)
    assert not server.requests

    with pytest.raises(TypeError, match="`allow_endpoints` must hold addresses"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path, allow_endpoints=server.endpoint)
    with pytest.raises(PermissionError, match="names the endpoint"):
        AutoModelForCausalLM.from_config(served.config.backbones[1])(torch.tensor([[20]]))
    for wrong in ("sk-secret", ["sk-secret"], {7: "sk-secret"}):
        with pytest.raises(TypeError, match="`endpoint_keys` must hold addresses") as error:
            PCMEnsembleForCausalLM.from_pretrained(tmp_path, trust_endpoints=True, endpoint_keys=wrong)
        assert "sk-secret" not in str(error.value)
    assert not server.requests

    for allowed in ({"allow_endpoints": [server.endpoint + "/v1/"]}, {"trust_endpoints": True}):
        loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path, **allowed)
        assert torch.equal(loaded.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("kind", ["variable", "function"])
def test_a_key_stands_in_no_checkpoint_log_or_error(backbones, tmp_path, monkeypatch, caplog, kind):
    secret = "".join(map(chr, range(65, 85)))  # which this file does not show
    monkeypatch.setenv("PCM_TEST_KEY", secret)
    given = "PCM_TEST_KEY" if kind == "variable" else lambda: secret
    caplog.set_level(logging.DEBUG)
    with EndpointServer(backbones, tiny_tokenizer(), key=secret) as server:
        model, _ = ensembles(server, backbones, own={"key": given, "attempts": 1})
        model.generate(torch.tensor([[20, 21]]), preference="there", max_new_tokens=2)
        model.save_pretrained(tmp_path)
        for fault in ("500", "401", "redirect"):  # of which two repeat it
            server.fault = lambda number, fault=fault: fault
            with pytest.raises(EndpointError) as error:
                model(torch.tensor([[20, 21]]), preference="there")
            assert ("[key]" in str(error.value)) == (fault != "500")
            assert secret[:9] not in f"{error.value!r} {error.getrepr(style='long')}"
            if fault != "redirect":  # httpcore logs the headers that a server answers with
                assert secret not in caplog.text

        server.fault = lambda number: None
        loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path, trust_endpoints=True)
        with pytest.raises(EndpointError, match="status 401"):
            loaded(torch.tensor([[20, 21]]), preference="there")
        keys = {server.endpoint + "/v1/": given}
        loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path, trust_endpoints=True, endpoint_keys=keys)
        loaded(torch.tensor([[20, 21]]), preference="there", logits_to_keep=1)
    written = (tmp_path / "config.json").read_text()
    assert secret not in written
    assert "PCM_TEST_KEY" not in written
    assert json.loads(written)["backbones"][1]["endpoint"] == server.endpoint


@pytest.mark.parametrize(
    "given", ["sk-wrong", lambda: "two\nlines", lambda: "", 7], ids=["literal", "lines", "empty", "number"]
)
def test_a_wrong_key_is_refused_without_being_shown(server, backbones, given):
    with pytest.raises((TypeError, ValueError), match="key") as error:
        ensembles(server, backbones, own={"key": given})
    assert "sk-wrong" not in str(error.value)
    assert "two" not in str(error.value)
    assert not server.requests


def test_an_expert_that_is_added_shares_the_endpoint_and_asks_no_other(server, backbones):
    served, _ = ensembles(server, backbones)
    served.add_expert("brief", spec(server, prompt="be brief", timeout=20.0))
    assert len(served.backbones) == 3
    built = PCMEnsembleForCausalLM(copy.deepcopy(served.config))
    built._tokenizer = tiny_tokenizer()
    server.requests.clear()
    built.add_expert("more", backbones["elsewhere"])
    assert not server.requests
    built.add_expert("kind", spec(server, prompt="be kind", timeout=20.0))  # which the user names, and may ask
    assert built.config.experts[-1]["backbone"] != 1
    built(torch.tensor([[20]]), preference="kind", logits_to_keep=1)


def test_who_is_asked_is_part_of_what_answers_are_kept_under(server, backbones):
    served, local = ensembles(server, backbones)
    before = TrainedEnsemble("it", served, 4).settings()
    served.backbones[1].config.served_model = "elsewhere"
    assert TrainedEnsemble("it", served, 4).settings() != before
    assert "endpoints" not in TrainedEnsemble("it", local, 4).settings()


def test_what_servers_tell_is_checked():
    told = {1: -0.1, 2: -3.0, 130: -9.0}
    assert top_tokens(told, 3, 99) == {1: -0.1, 2: -3.0}  # a padded model's
    assert top_tokens(told, 1, 999) == {1: -0.1}
    with pytest.raises(ValueError, match=r"it gives 0\.018 of the probability to tokens beyond the 99"):
        top_tokens({1: -0.1, 2: -3.0, 130: -4.0}, 3, 99)
    for wrong in ({-1: -0.1}, {"1": -0.1}, {1: 0.5}, {1: float("nan")}, {1: -0.1, 2: -0.1}, {130: -0.0001}, {1: -2.0}):
        with pytest.raises(ValueError, match=r"it told|it gives|the probabilities"):
            top_tokens(wrong, 3, 99)
    with pytest.raises(ValueError, match="does not know `return_tokens_as_token_ids`"):
        APIS["vllm"].read_next_tokens({"choices": [{"index": 0, "logprobs": {"top_logprobs": [{" 3": -0.1}]}}]})


def test_sglang_is_asked_and_read_as_its_source_has_it():
    path, body = APIS["sglang"].next_tokens([[5, 6], [7]], "friendly", 2)
    assert (path, body["input_ids"], body["lora_path"]) == ("/generate", [[5, 6], [7]], "friendly")
    assert "lora_path" not in APIS["sglang"].next_tokens([[5]], "", 2)[1]
    top = [[[-0.1, 3, None], [-2.5, 4, None]]]  # of each token of the answer: log-probability, number, text
    assert APIS["sglang"].read_next_tokens([{"meta_info": {"output_top_logprobs": top}}]) == [{3: -0.1, 4: -2.5}]


@pytest.mark.parametrize("api", ["sglang", "llamacpp"])
def test_a_server_of_one_model_needs_no_name_of_it(server, api):
    model = EndpointForCausalLM.of_expert("there", {"endpoint": server.endpoint, "api": api})
    assert model.config.served_model == ""


def test_two_ways_to_ask_one_model_are_counted_together(server, backbones):
    experts = {"here": backbones["here"], "a": spec(server), "b": spec(server, timeout=9.0, prompt="be brief")}
    model = PCMEnsembleForCausalLM.from_experts(
        experts, pcm=backbones["here"], tokenizer=tiny_tokenizer(), expert_top_k=20
    )
    assert len(model.backbones) == 3
    assert {name: usage.prompts for name, usage in model.endpoint_usage.items()} == {f"{server.endpoint} there": 2}


def test_it_is_a_causal_lm_by_itself(server, backbones):
    model = EndpointForCausalLM.of_expert("there", spec(server, top_logprobs=VOCAB))
    model.fit(backbones["there"], tiny_tokenizer(), "'there'")
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        wanted = backbones["there"](ids).logits.log_softmax(dim=-1)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :2], past_key_values=cache).logits
    second = model(ids[:, 2:], past_key_values=cache).logits
    assert_close(torch.cat([first, second], dim=1), wanted, atol=1e-4, rtol=0)
