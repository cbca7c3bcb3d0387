"""Requests that join and leave a running batch get the answers that they would get alone."""

import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import CompileConfig

from modeling_pcm_ensemble.scheduler import Request, Scheduler


@pytest.mark.parametrize(("joins", "compiled"), [(True, False), (False, False), (True, True)], ids=str)
def test_scheduled_requests_get_the_answers_that_they_would_get_alone(joins, compiled):
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5, 6], [11]), (0, [], [13]), (1, [8], [14, 15])])
    model._tokenizer = tiny_tokenizer()
    preferences = [{"e0": 1.0, "e2": 0.5}, {"e1": 1.0}, {"e0": 1.0, "e1": 2.0}, {"e2": 1.0}, {"e1": 0.5, "e2": 1.0}]
    requests = [
        Request([21 + 3 * i + j for j in range(2 + i)], preference, max_new_tokens=1 + 2 * i)
        for i, preference in enumerate(preferences)
    ]
    scheduler, ended = Scheduler(model, 2, joins, CompileConfig(backend="eager") if compiled else None), []
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        ended += scheduler.step()
        assert len(scheduler.running) <= 2
    assert {id(request) for request in ended} == {id(request) for request in requests}
    assert compiled == (model.backbones.submodels[0].compiled_step is not None)
    for request in requests:
        alone = model.generate(
            torch.tensor([request.input_ids]),
            preference=request.preference,
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
        )
        assert request.tokens == alone[0, len(request.input_ids) :].tolist()


@pytest.fixture(params=["dynamic", "static"])
def scheduler(request):
    """Of three rows, with what an expert without a prompt has more room for than one with."""
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5] * 20, [11]), (0, [], [13]), (1, [8], [14, 15])])
    model._tokenizer = tiny_tokenizer()
    scheduler = Scheduler(model, 3)
    scheduler.compiled = request.param == "static"  # the caches of compiled steps
    return scheduler


def run(scheduler) -> list:
    ended = []
    while scheduler.waiting or scheduler.running:
        ended += scheduler.step()
    return ended


def check_answered(scheduler, *requests):
    for request in requests:
        ids = torch.tensor([request.input_ids])
        options = {"max_new_tokens": max(len(request.tokens), 1), "do_sample": False}
        alone = scheduler.model.generate(ids, preference=request.preference, **options)
        assert request.tokens == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        ({"preference": {"e9": 1.0}}, "unknown expert 'e9'"),
        ({"preference": "e9"}, "unknown expert 'e9'"),
        ({"preference": {"e0": float("nan")}}, "the weight nan"),
        ({"preference": {"e0": 0.0}}, "without an expert"),
        ({"preference": {}}, "without an expert"),
        ({"preference": 3}, "`preference` must be"),
        ({"preference": [{"e0": 1.0}, {"e1": 1.0}]}, "has 2 rows, but the batch has 1"),
        ({"input_ids": [99]}, "`input_ids` holds 99"),
        ({"input_ids": [-1]}, "`input_ids` holds -1"),
        ({"input_ids": []}, "at least one token"),
        ({"input_ids": [1.5]}, "must be a list of token ids"),
        ({"input_ids": "hello"}, "must be a list of token ids"),
        ({"input_ids": [21] * 46, "preference": "e0"}, "context of 49 tokens is too long for expert 'e0'"),
        ({"max_new_tokens": 64}, "context of 64 tokens is too long for the PCM"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a number from 1 on, got 0"),
        ({"max_new_tokens": -3}, "`max_new_tokens` must be a number from 1 on, got -3"),
        ({"max_new_tokens": "4"}, "`max_new_tokens` must be a number from 1 on, got '4'"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_answered_is_refused_alone(scheduler, faulty, words):
    good = [Request([21, 22], {"e0": 1.0}, 4), Request([31], {"e2": 1.0, "e1": 0.5}, 4), Request([41], None, 3)]
    scheduler.add(good[0])
    scheduler.step()
    scheduler.add(good[1])
    with pytest.raises((TypeError, ValueError), match=words):
        scheduler.add(Request(**{"input_ids": [21], "preference": {"e1": 1.0}, "max_new_tokens": 4} | faulty))
    scheduler.add(good[2])
    assert len(run(scheduler)) == 3
    assert [len(one.tokens) for one in good] == [4, 4, 3]
    check_answered(scheduler, *good)


def test_a_request_may_have_its_preference_in_any_form(scheduler):
    forms = [None, "e1", ["e0", "e2"], [1.0, 0.5, 0.0], {"e2": 2.0}]
    requests = [Request([21 + number, 22], form, 3) for number, form in enumerate(forms)]
    for one in requests:
        scheduler.add(one)
    run(scheduler)
    check_answered(scheduler, *requests)


@pytest.mark.parametrize(
    "held", [{"preference": "e0"}, {"preference_text": "be quick"}, {"preference_ids": [33, 34, 35]}]
)
def test_what_the_generation_config_says_holds_where_a_request_says_nothing(scheduler, held):
    scheduler.model.pcm.head.weight.data *= 3  # so that words change answers
    requests = [Request([21, 22, 23, 24], None, 6), Request([31], "e2", 4)]
    default = scheduler.model.generate(torch.tensor([[21, 22, 23, 24]]), max_new_tokens=6, do_sample=False)
    vars(scheduler.model.generation_config).update(held)
    for one in requests:
        scheduler.add(one)
    run(scheduler)
    check_answered(scheduler, *requests)
    assert requests[0].tokens != default[0, 4:].tolist()


def test_cancelled_requests_leave_the_others_alone(scheduler):
    requests = [Request([21 + number, 22], {f"e{number % 3}": 1.0}, 6) for number in range(5)]
    for one in requests:
        scheduler.add(one)
    scheduler.step()
    scheduler.step()
    cancelled, lowered = [requests[0], requests[4]], requests[2]
    lowered.max_new_tokens = 1
    for one in (*cancelled, requests[0], Request([1], None, 2)):  # twice, and one that was never added
        scheduler.cancel(one)
    assert {*run(scheduler)} == {*requests} - {*cancelled}
    assert [len(one.tokens) for one in requests] == [2, 6, 3, 6, 0]
    check_answered(scheduler, *requests[:4])


def test_a_request_may_be_the_last_and_lowered(scheduler):
    first, lowered = Request([21, 22], "e0", 6), Request([31], "e1", 6)
    scheduler.add(first)
    scheduler.add(lowered)
    scheduler.step()
    lowered.max_new_tokens = 1
    scheduler.cancel(first)
    assert run(scheduler) == [lowered]
    check_answered(scheduler, lowered)


def test_all_may_be_cancelled_and_others_come(scheduler):
    first, second = Request([21, 22], "e0", 9), Request([31], "e1", 4)
    scheduler.add(first)
    scheduler.step()
    scheduler.cancel(first)
    assert not scheduler.running
    assert run(scheduler) == []
    scheduler.add(second)
    assert run(scheduler) == [second]
    check_answered(scheduler, second)


def test_a_request_ends_at_an_end_token_0_and_needs_no_tokenizer(scheduler):
    scheduler.model._tokenizer = None
    free = Request([21, 22], "e1", max_new_tokens=8)
    scheduler.add(free)
    run(scheduler)
    end = free.tokens[2]

    ends = Scheduler(scheduler.model, 3)
    assert ends.ends == set()
    scheduler.model.generation_config.eos_token_id = 0
    assert Scheduler(scheduler.model, 3).ends == {0}
    scheduler.model.generation_config.eos_token_id = end
    stopped, other = Request([21, 22], "e1", max_new_tokens=8), Request([23], "e0", max_new_tokens=2)
    ending = Scheduler(scheduler.model, 3)
    for request in (stopped, other):
        ending.add(request)
    run(ending)
    assert stopped.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert ending.cache is None, "nothing is kept of requests that have ended"


def test_requests_near_the_limit_do_not_end_those_beside_them(scheduler):
    """A long context of an expert without a prompt, beside a short one behind a long prompt."""
    long, short = Request([21] * 50, {"e1": 1.0}, 14), Request([31] * 4, {"e0": 1.0}, 41)
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    assert {*run(scheduler)} == {long, short}
    assert (len(long.tokens), len(short.tokens)) == (14, 41)
    check_answered(scheduler, long, short)


def test_a_prefill_that_fails_loses_no_request(scheduler):
    running, ending, waiting = Request([21, 22], "e0", 6), Request([41], "e1", 2), Request([31], "e2", 4)
    scheduler.add(running)
    scheduler.add(ending)
    scheduler.step()
    scheduler.add(waiting)

    def fail(*_):
        raise MemoryError

    hook = scheduler.model.backbones[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        scheduler.step()
    hook.remove()
    assert {*run(scheduler)} == {running, ending, waiting}
    check_answered(scheduler, running, ending, waiting)


def test_requests_go_on_after_a_step_that_failed_on_its_way(scheduler):
    short, long, waiting = (
        Request([21, 22], "e0", 6),
        Request([41, 42, 43], {"e1": 1.0, "e2": 0.5}, 6),
        Request([5], "e1", 2),
    )
    for request in (short, long, waiting):
        scheduler.add(request)
    scheduler.step()

    def fail(*_):
        raise MemoryError

    hook = scheduler.model.backbones[1].register_forward_pre_hook(fail)  # the PCM has read the token by then
    with pytest.raises(MemoryError):
        scheduler.step()
    hook.remove()

    scheduler.cancel(waiting)
    assert {*run(scheduler)} == {short, long}
    check_answered(scheduler, short, long)


def test_a_cancelled_request_may_go_on_and_one_that_has_ended_may_not(scheduler):
    stopped, other = Request([21, 22], {"e0": 1.0, "e2": 0.5}, 6), Request([41], "e1", 3)
    scheduler.add(stopped)
    scheduler.add(other)
    scheduler.step()
    scheduler.step()
    scheduler.cancel(stopped)
    scheduler.step()

    scheduler.add(stopped)
    assert run(scheduler)[-1] is stopped
    assert len(stopped.tokens) == 6
    check_answered(scheduler, stopped, other)
    with pytest.raises(ValueError, match="has ended"):
        scheduler.add(stopped)
