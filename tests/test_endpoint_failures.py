"""What fails behind an endpoint: an error or a drop, within its time, and never a wrong answer."""

# ruff: noqa: F811  # fixtures are imported by the names that tests take them by

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_tokenizer
from endpoint_server import FAULTS, REFUSALS, RETRY_AFTER
from test_endpoints import NAMES, backbones, ensembles, server, spec  # noqa: F401
from test_training import make_trainer
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.endpoints import EndpointError, EndpointForCausalLM, requests


@pytest.mark.parametrize("fault", FAULTS)
def test_what_another_try_mends_is_asked_again(server, backbones, fault):
    served, local = ensembles(server, backbones, own={"timeout": 0.5})
    server.fault = lambda number: fault if number == 0 else None
    inputs = {"input_ids": torch.tensor([[20, 21, 22]]), "preference": "there", "logits_to_keep": 1}
    start = time.perf_counter()
    with torch.no_grad():
        assert_close(served(**inputs).logits.exp(), local(**inputs).logits.exp(), atol=1e-5, rtol=0)
    usage = served.endpoint_usage[f"{server.endpoint} there"]
    assert (usage.failed_tries, usage.prompts) == (1, 3)  # one to try it, and two tries
    assert fault != "429" or time.perf_counter() - start > RETRY_AFTER
    assert not server.cookies


def test_a_server_that_wants_to_rest_for_long_is_not_asked_for_so_long(server, backbones):
    served, _ = ensembles(server, backbones, own={"on_failure": "drop"})
    server.fault, server.retry_after = lambda number: "429", 300
    start = time.perf_counter()
    served(torch.tensor([[20, 21, 22]]), preference=["here", "there"], logits_to_keep=1)
    assert time.perf_counter() - start < 5
    assert served.backbones[1]._rests_until - time.monotonic() > 250


def test_an_answer_without_end_is_an_error(server, backbones, monkeypatch):
    served, _ = ensembles(server, backbones)
    monkeypatch.setattr(requests, "MOST_BYTES", 100)
    with pytest.raises(EndpointError, match="more than 100 bytes"):
        served(torch.tensor([[20, 21, 22]]), preference="there")


def test_a_failure_does_not_wait_for_another_endpoint(server, backbones):
    served, _ = ensembles(server, backbones, own={"timeout": 10.0})
    server.delay = 5.0  # but for who is refused at once
    server.fault = lambda number: "refused at once" if number == 1 else None
    start = time.perf_counter()
    with pytest.raises(EndpointError, match="status 403"):
        served(torch.tensor([[20, 21, 22]]), preference=["there", "elsewhere"], logits_to_keep=1)
    assert time.perf_counter() - start < 2


def test_calls_that_meet_one_failure_begin_one_rest(server, backbones):
    served, _ = ensembles(server, backbones, own={"attempts": 1, "on_failure": "drop"})
    server.fault, server.delay = lambda number: "500", 0.3
    with ThreadPoolExecutor(4) as threads:
        ids = [torch.tensor([[token]]) for token in range(20, 24)]
        list(threads.map(lambda one: served(one, preference=["here", "there"], logits_to_keep=1), ids))
    assert served.backbones[1]._rest == 30
    assert served.endpoint_usage[f"{server.endpoint} there"].dropped == 4


@pytest.mark.parametrize("fault", [*FAULTS, *REFUSALS])
def test_what_fails_always_is_an_error_within_its_time(server, backbones, fault):
    served, _ = ensembles(server, backbones, own={"timeout": 0.3, "attempts": 2})
    server.fault = lambda number: fault
    start = time.perf_counter()
    with pytest.raises(EndpointError, match=f"{server.endpoint}/v1/completions"):
        served.generate(torch.tensor([[20, 21, 22]]), preference=["here", "there"], max_new_tokens=4)
    assert time.perf_counter() - start < 5
    assert len(server.asked) == (1 if fault in REFUSALS else 2)


@pytest.mark.parametrize("fault", ["500", "dropped", "wrong ids"])
def test_rows_may_go_on_without_an_expert_that_fails(server, backbones, fault, caplog):
    served, local = ensembles(server, backbones, own={"attempts": 1, "on_failure": "drop"})
    server.fault = lambda number: fault
    ids = torch.tensor([[20, 21, 22]] * 2)
    with torch.no_grad():
        output = served(ids, preference=[["here", "there"], ["here"]], logits_to_keep=1)
        alone = local(ids, preference="here", logits_to_keep=1)
    assert_close(output.logits, alone.logits, atol=1e-5, rtol=0)
    assert output.dropped_experts.tolist() == [[False, True, False], [False, False, False]]
    assert output.expert_weights[0, 0].tolist() == [1.0, 0.0, 0.0]
    asked = len(server.asked)
    served(ids, preference=["here", "there"], logits_to_keep=1)
    assert len(server.asked) == asked  # it rests
    assert served.endpoint_usage[f"{server.endpoint} there"].dropped == 2
    assert [record.message for record in caplog.records if "go on without the expert for 30 s" in record.message]
    cache = PCMEnsembleCache(served.config)
    with pytest.raises(RuntimeError, match="all experts of a row"):
        served(ids, preference="there", logits_to_keep=1, past_key_values=cache)
    assert cache.get_seq_length() == 0

    for endpoint in served.backbones.endpoints.values():
        endpoint._rests_until = 0.0
    server.fault = lambda number: None
    with torch.no_grad():
        again = served(ids, preference="there", logits_to_keep=1)
    assert again.dropped_experts is None


@pytest.mark.parametrize("fault", REFUSALS)
def test_what_no_later_try_would_mend_is_no_reason_to_go_on_without(server, backbones, fault):
    served, _ = ensembles(server, backbones, own={"on_failure": "drop"})
    server.fault = lambda number: fault
    with pytest.raises(EndpointError, match="answered with status"):
        served(torch.tensor([[20, 21, 22]]), preference=["here", "there"])


def test_no_row_goes_on_without_the_reference_of_a_product(server, backbones):
    experts = {name: spec(server, prompt=name, on_failure="drop", attempts=1) for name in ("kind", "brief")}
    model = PCMEnsembleForCausalLM.from_experts(
        experts, pcm=backbones["here"], tokenizer=tiny_tokenizer(), expert_top_k=20, merge="product"
    )
    server.fault = lambda number: "500"
    with pytest.raises(RuntimeError, match="`reference` has failed"):
        model.generate(torch.tensor([[20, 21]]), preference="kind", max_new_tokens=3)


def test_a_cache_that_a_failure_left_half_read_is_not_gone_on_with(server, backbones):
    served, _ = ensembles(server, backbones, own={"attempts": 1})
    ids = torch.tensor([[20, 21, 22]])
    cache = served(ids, preference=["here", "there"], logits_to_keep=1).past_key_values
    server.fault = lambda number: "500"
    with pytest.raises(EndpointError):
        served(torch.tensor([[23]]), past_key_values=cache)
    server.fault = lambda number: None
    with pytest.raises(RuntimeError, match="Start the text anew"):
        served(torch.tensor([[23]]), past_key_values=cache)


def test_an_interruption_waits_for_no_endpoint(server, backbones, monkeypatch):
    served, _ = ensembles(server, backbones)
    server.delay = 5.0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(served.backbones[0], "forward", interrupted)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        served(torch.tensor([[20, 21]]), preference=["here", "there"], logits_to_keep=1)
    assert time.perf_counter() - start < 2


def test_what_fails_in_one_thread_ends_no_other_thread_s_call(server, backbones):
    served, local = ensembles(server, backbones, own={"timeout": 10.0})
    ids, preference = torch.tensor([[20, 21, 22]]), ["there", "elsewhere"]
    with torch.no_grad():
        wanted = local(ids, preference=preference, logits_to_keep=1).logits.exp()

    def ask(_) -> torch.Tensor:
        with torch.no_grad():
            return served(ids, preference=preference, logits_to_keep=1).logits.exp()

    # The first request is refused at once, while the other call waits for its two.
    server.delay = 0.5
    server.fault = lambda number: "refused at once" if number == 0 else None
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(ask, number) for number in range(2)]
        ended = [call.exception() or call.result() for call in calls]
    answers = [result for result in ended if isinstance(result, torch.Tensor)]
    assert len(answers) == 1
    assert_close(answers[0], wanted, atol=1e-5, rtol=0)


def test_a_first_call_of_many_threads_makes_one_connection_pool(server, backbones):
    model = EndpointForCausalLM.of_expert("there", spec(server))
    model.fit(backbones["there"], tiny_tokenizer(), "'there'")
    requests._networks.clear()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: requests._network(), range(8)))
        answers = list(threads.map(lambda token: model(torch.tensor([[token]])).logits, range(20, 28)))
    assert len(set(map(id, found))) == 1
    assert all(answer.isfinite().all() for answer in answers)


def test_a_rollout_from_which_an_expert_was_dropped_teaches_nothing(server, backbones, tmp_path):
    served, _ = ensembles(server, backbones, own={"attempts": 1, "on_failure": "drop"})
    rewards = dict.fromkeys(NAMES, lambda prompts, completions, **columns: [0.0] * len(completions))
    trainer = make_trainer(tmp_path, served, preference_sets=[list(NAMES)], rewards=rewards)
    server.fault = lambda number: "500" if number > 3 else None
    with pytest.raises(RuntimeError, match="teach the PCM to do without"):
        trainer.train()


def test_no_schedule_of_faults_hangs_or_gives_a_wrong_answer(server, backbones, monkeypatch):
    monkeypatch.setattr(requests, "PAUSE", 0.005)
    served, local = ensembles(server, backbones, own={"timeout": 0.2, "attempts": 2})
    ids = torch.tensor([[20, 21, 22]])
    options = {"preference": list(NAMES), "max_new_tokens": 3, "do_sample": False}
    wanted = local.generate(ids, **options)
    ended = {"answered": 0, "failed": 0}
    for schedule in range(200):
        chance = random.Random(schedule)
        faults = [*(set(FAULTS) - {"slow"}), *REFUSALS]
        kinds = [chance.choice(faults) if chance.random() < 0.15 else None for _ in range(40)]
        if schedule % 20 == 0:
            kinds[1] = "slow"
        server.asked.clear()
        server.fault = lambda number, kinds=kinds: kinds[number % len(kinds)]
        start = time.perf_counter()
        try:
            assert torch.equal(served.generate(ids, **options), wanted)
            ended["answered"] += 1
        except EndpointError:
            ended["failed"] += 1
        assert time.perf_counter() - start < 10
    assert min(ended.values()) > 20, ended
