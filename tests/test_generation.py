"""generate() unchanged: every mode equals decoding by hand, and a row in a batch equals the row alone."""

import threading

import pytest
import torch
from conftest import left_pad, make_ensemble, reference, tiny_llama, tiny_mistral, tiny_tokenizer
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from modeling_pcm_ensemble import PCMEnsembleCache
from modeling_pcm_ensemble.cache import GrowingLayer

ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
WEIGHTS = [[1.0, 0.5, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 6]
STEPS = 8


def greedy_by_hand(model, row, weights, description=None, steps=STEPS):
    tokens = list(row)
    for _ in range(steps):
        tokens.append(reference(model, tokens, weights, description)["log_probs"][-1].argmax().item())
    return tokens[len(row) :]


def new_tokens(model, inputs, **kwargs):
    output = model.generate(**inputs, max_new_tokens=STEPS, **{"do_sample": False} | kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_rows_of_a_mixed_padded_batch_equal_decoding_by_hand(mixed, use_cache):
    tokens = new_tokens(mixed, left_pad(ROWS), preference=torch.tensor(WEIGHTS), use_cache=use_cache)
    assert tokens.tolist() == [greedy_by_hand(mixed, row, weights) for row, weights in zip(ROWS, WEIGHTS)]


def test_greedy_over_sliding_windows_and_prompts_equals_decoding_by_hand():
    model = make_ensemble([tiny_mistral(1), tiny_mistral(2)], [(0, [5, 6, 7, 8, 9], [3]), (0, [4], [5]), (1, [], [6])])
    weights = [[1.0, 0.0, 1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    tokens = new_tokens(model, left_pad(ROWS), preference=torch.tensor(weights))
    assert tokens.tolist() == [greedy_by_hand(model, row, w) for row, w in zip(ROWS, weights)]


@pytest.mark.parametrize(
    ("preference", "weights"),
    [
        pytest.param("e1", [0, 1, 0, 0, 0, 0], id="name"),
        pytest.param({"e1": 1.0, "e4": 0.5}, [0, 1, 0, 0, 0.5, 0], id="mapping"),
        pytest.param(["e1", "e4"], [0, 1, 0, 0, 1, 0], id="names"),
        pytest.param([{"e1": 2}], [0, 2, 0, 0, 0, 0], id="mapping-per-row"),
        pytest.param([["e1", "e4"]], [0, 1, 0, 0, 1, 0], id="names-per-row"),
        pytest.param([0, 1, 0, 0, 3, 0], [0, 1, 0, 0, 3, 0], id="numbers"),
        pytest.param(torch.tensor([0, 1, 0, 0, 3, 0]), [0, 1, 0, 0, 3, 0], id="tensor"),
        pytest.param(torch.tensor([[0, 1, 0, 0, 3, 0]]), [0, 1, 0, 0, 3, 0], id="tensor-per-row"),
        pytest.param(None, [1] * 6, id="none"),
    ],
)
def test_every_form_of_preference_reaches_generate(mixed, preference, weights):
    tokens = new_tokens(mixed, left_pad(ROWS[:1]), preference=preference)
    assert tokens[0].tolist() == greedy_by_hand(mixed, ROWS[0], [float(w) for w in weights])


def test_preference_ids_and_text_reach_the_pcm(mixed):
    inputs = left_pad(ROWS[:2])
    tokenizer = tiny_tokenizer()
    texts = ["Be brief.", "Make me laugh out loud!"]
    ids = [tokenizer(text + "\n", add_special_tokens=False)["input_ids"] for text in texts]
    expected = [greedy_by_hand(mixed, row, [1.0] * 6, description) for row, description in zip(ROWS, ids)]
    for use_cache in (True, False):
        from_text = new_tokens(mixed, inputs, preference_text=texts, tokenizer=tokenizer, use_cache=use_cache)
        assert from_text.tolist() == expected
    assert new_tokens(mixed, inputs, preference_ids=left_pad(ids)["input_ids"]).tolist() == expected


def test_rows_without_words_of_their_own_keep_their_experts_descriptions(mixed):
    def alphas(texts):
        given = {"preference": torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]] * 2), "tokenizer": tiny_tokenizer()}
        return mixed(**left_pad(ROWS[:2]), preference_text=texts, **given).expert_weights

    own, words, some = alphas([None, None]), alphas(["Be brief."] * 2), alphas([None, "Be brief."])
    torch.testing.assert_close(some, torch.stack([own[0], words[1]]))
    assert (own - words).abs().max() > 0.01


def test_a_row_without_words_has_the_default_preference(mixed):
    mixed.config.default_preference = {"e0": 1.0, "e1": 0.5}
    output = mixed(**left_pad(ROWS[:2]), preference_text=[None, "Be brief."], tokenizer=tiny_tokenizer())
    active = output.expert_weights[:, -1] > 0
    assert active.tolist() == [[True, True, False, False, False, False], [True] * 6]


def test_beam_search_over_routed_rows_equals_each_row_alone(prompted):
    weights = [[1.0, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 2.0, 0.5]]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    batch = new_tokens(prompted, left_pad(ROWS), preference=torch.tensor(weights), **beams)
    for i, (row, row_weights) in enumerate(zip(ROWS, weights)):
        for use_cache in (True, False):
            alone = new_tokens(
                prompted, left_pad([row]), preference=torch.tensor([row_weights]), use_cache=use_cache, **beams
            )
            assert batch[2 * i : 2 * i + 2].tolist() == alone.tolist()


def test_beam_search_with_sampling_is_the_same_cached_and_uncached(mixed):
    def sample(use_cache):
        torch.manual_seed(5)
        options = {"num_beams": 3, "do_sample": True, "use_cache": use_cache}
        return new_tokens(mixed, left_pad(ROWS), preference=torch.tensor(WEIGHTS), **options).tolist()

    assert sample(True) == sample(False)


def test_beam_search_equals_an_exhaustive_search(prompted):
    """Two steps with as many beams as tokens try every continuation."""
    prompted.config.expert_top_k = 4
    weights, row = [1.0, 0.5, 0.25], [21, 22, 23]
    first = reference_top_k(prompted, row, weights)
    best = max(
        (first[a] + reference_top_k(prompted, [*row, a], weights)[b], a, b)
        for a in first.isfinite().nonzero()[:, 0].tolist()
        for b in range(prompted.config.vocab_size)
    )
    output = prompted.generate(**left_pad([row]), preference=weights, num_beams=99, max_new_tokens=2, do_sample=False)
    assert output[0, -2:].tolist() == list(best[1:])


def reference_top_k(model, row, weights):
    expected = reference(model, row, weights)
    probs = expected["expert_log_probs"][:, -1].exp()
    kept = probs * (probs >= probs.topk(4, dim=-1).values[..., -1:])
    return (expected["expert_weights"][-1] @ (kept / kept.sum(-1, keepdim=True))).log()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
        {"bad_words_ids": [[30], [40, 41]], "sequence_bias": {(50,): 5.0}, "suppress_tokens": [60]},
        {
            "min_new_tokens": 5,
            "eos_token_id": 7,
            "forced_eos_token_id": 7,
            "exponential_decay_length_penalty": (3, 1.1),
        },
        {
            "renormalize_logits": True,
            "remove_invalid_values": True,
            "begin_suppress_tokens": [9],
            "guidance_scale": None,
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling_with_every_processor_is_the_same_cached_and_uncached(mixed, options):
    def sample(use_cache):
        torch.manual_seed(5)
        return new_tokens(
            mixed, left_pad(ROWS), preference=torch.tensor(WEIGHTS), do_sample=True, use_cache=use_cache, **options
        )

    assert sample(True).tolist() == sample(False).tolist()


def test_samples_follow_the_mixture(mixed):
    row, weights, draws = ROWS[0], WEIGHTS[0], 4000
    torch.manual_seed(0)
    tokens = mixed.generate(
        **left_pad([row]), preference=torch.tensor(weights), do_sample=True, top_k=0, max_new_tokens=1,
        num_return_sequences=draws,
    )[:, -1]  # fmt: skip
    probs = reference(mixed, row, weights)["log_probs"][-1].exp()
    frequencies = torch.bincount(tokens, minlength=len(probs)) / draws
    assert ((frequencies - probs).abs() < 5 * (probs * (1 - probs) / draws).sqrt() + 1e-3).all()


def test_custom_processors_and_stopping_criteria_see_context_tokens_only(mixed):
    lengths = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return scores

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    processors = [Record(), MinNewTokensLengthLogitsProcessor(5, 2, 7)]
    output = mixed.generate(
        **left_pad(ROWS[:1]), preference="e0", max_new_tokens=STEPS, logits_processor=processors,
        stopping_criteria=[StopAt()], do_sample=False,
    )  # fmt: skip
    assert lengths == [5, 6, 7, 8]
    assert output.shape == (1, 9)


@pytest.mark.parametrize("backbone", [tiny_llama, tiny_mistral], ids=["llama", "sliding-window"])
def test_prompt_lookup_decoding_equals_greedy(backbone):
    model = make_ensemble([backbone(1)], [(0, [5, 6, 7], [3]), (0, [8], [4])])
    inputs = {"input_ids": torch.tensor([[21, 22, 23, 21, 22, 23, 21, 22]])}
    preference = {"e0": 1.0, "e1": 0.3}
    looked_up = new_tokens(model, inputs, preference=preference, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == new_tokens(model, inputs, preference=preference).tolist()
    assert looked_up[0].tolist() == greedy_by_hand(model, inputs["input_ids"][0].tolist(), [1.0, 0.3])


def test_assisted_decoding_with_a_draft_model_equals_greedy(prompted):
    inputs, preference = left_pad(ROWS[:1]), {"e0": 1.0, "e1": 0.3}
    drafted = new_tokens(prompted, inputs, preference=preference, assistant_model=tiny_llama(1))
    assert drafted.tolist() == new_tokens(prompted, inputs, preference=preference).tolist()


def test_chat_turns_that_pass_the_cache_back_equal_starting_over(mixed):
    turns, preference = [[21, 22, 23], [51, 52], [61, 62, 63]], {"e0": 1.0, "e4": 0.5}
    context, cache = [], None
    for turn in turns:
        context += turn
        inputs = {"input_ids": torch.tensor([context])}
        output = mixed.generate(
            **inputs, past_key_values=cache, preference=None if cache else preference, max_new_tokens=3,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        cache = output.past_key_values
        assert isinstance(cache, PCMEnsembleCache)
        assert output.sequences[0, len(context) :].tolist() == greedy_by_hand(
            mixed, context, [1.0, 0, 0, 0, 0.5, 0], steps=3
        )
        context = output.sequences[0].tolist()


def test_the_same_preference_may_be_given_again_with_the_cache_and_another_is_refused(mixed):
    output = mixed.generate(
        torch.tensor([[21, 22]]), preference="e0", max_new_tokens=2, return_dict_in_generate=True, do_sample=False
    )
    again = mixed.generate(output.sequences, past_key_values=output.past_key_values, preference="e0", max_new_tokens=2)
    for other in ({"preference": "e1"}, {"preference": "e0", "preference_ids": torch.tensor([33])}):
        with pytest.raises(ValueError, match="filled under another preference"):
            mixed.generate(again, past_key_values=output.past_key_values, max_new_tokens=2, **other)


def test_scores_logits_and_transition_scores_are_the_mixtures(mixed):
    inputs, weights = left_pad(ROWS), torch.tensor(WEIGHTS)
    output = mixed.generate(
        **inputs, preference=weights, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    transitions = mixed.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    for i, (row, row_weights) in enumerate(zip(ROWS, WEIGHTS)):
        for step in range(3):
            context = row + output.sequences[i, 5 : 5 + step].tolist()
            expected = reference(mixed, context, row_weights)["log_probs"][-1]
            assert_close(output.logits[step][i].log_softmax(-1), expected, atol=1e-4, rtol=0)
            assert_close(transitions[i, step], expected[output.sequences[i, 5 + step]], atol=1e-4, rtol=0)


def test_streamers_receive_the_generated_text(mixed, capsys):
    tokenizer, inputs = tiny_tokenizer(), left_pad(ROWS[:1])
    expected = tokenizer.decode(new_tokens(mixed, inputs, preference="e0")[0])
    mixed.generate(
        **inputs, preference="e0", max_new_tokens=STEPS, do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )  # fmt: skip
    assert capsys.readouterr().out.removesuffix("\n") == expected.removesuffix("\n")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"preference": "e0", "max_new_tokens": STEPS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=mixed.generate, kwargs=inputs | options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_stop_strings_take_the_tokenizer_too(mixed):
    tokenizer, inputs = tiny_tokenizer(), left_pad(ROWS[:1])
    tokens = new_tokens(mixed, inputs, preference="e0")[0]
    stop = tokenizer.decode(tokens[3])
    stopped = new_tokens(mixed, inputs, preference="e0", stop_strings=[stop], tokenizer=tokenizer)[0]
    assert stopped.tolist() == tokens[: tokens.tolist().index(tokens[3]) + 1].tolist()


@pytest.mark.parametrize(
    ("cache_implementation", "layers"),
    [
        ("dynamic", {GrowingLayer, DynamicSlidingWindowLayer}),
        ("static", {StaticLayer, StaticSlidingWindowLayer}),
    ],
)
def test_every_part_gets_the_kind_of_cache_asked_for(mixed, cache_implementation, layers):
    inputs, weights = left_pad(ROWS), torch.tensor(WEIGHTS)
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    output = mixed.generate(**inputs, preference=weights, cache_implementation=cache_implementation, **options)
    assert output.sequences[:, 5:].tolist() == [greedy_by_hand(mixed, row, w) for row, w in zip(ROWS, WEIGHTS)]
    assert {type(layer) for layer in output.past_key_values.layers} == layers


def test_a_batched_chat_goes_on_without_the_padding_of_rows_that_ended_early(mixed):
    weights = torch.tensor(WEIGHTS[:2])
    first = mixed.generate(
        **left_pad(ROWS[:2]), preference=weights, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    ended = first.sequences.clone()
    ended[1, -2:] = 0  # as if row 1 had ended two tokens before row 0
    turn = torch.tensor([[51, 52], [61, 62]])
    ids = torch.cat([ended, turn], dim=1)
    mask = torch.cat([left_pad(ROWS[:2])["attention_mask"], torch.ones(2, 6).long()], dim=1)
    mask[1, 7:9] = 0
    output = mixed.generate(
        ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False
    )
    for i in range(2):
        context = ids[i][mask[i].bool()].tolist()
        if i == 1:  # experts 2 alone, which has no sliding window
            assert output[i, 11:].tolist() == greedy_by_hand(mixed, context, WEIGHTS[i], steps=4)


def test_chunked_prefill_of_padded_rows_equals_one_pass(prompted):
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 2.0, 0.5]])
    whole = new_tokens(prompted, left_pad(ROWS), preference=weights)
    assert new_tokens(prompted, left_pad(ROWS), preference=weights, prefill_chunk_size=2).tolist() == whole.tolist()


def test_chunked_prefill_of_padded_rows_is_refused_where_windows_slide(mixed):
    with pytest.raises(ValueError, match="`prefill_chunk_size` cannot be used with padded rows"):
        new_tokens(mixed, left_pad(ROWS), preference=torch.tensor(WEIGHTS), prefill_chunk_size=2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_runs_its_unconditional_branch_under_the_same_preference(mixed, use_cache):
    weights, negative, scale = [1.0, 0.0, 0.5, 0.0, 0.0, 0.0], [33, 34], 2.5
    tokens = list(ROWS[0])
    for _ in range(4):
        conditional = reference(mixed, tokens, weights)["log_probs"][-1].log_softmax(-1)
        unconditional = reference(mixed, negative + tokens[len(ROWS[0]) :], weights)["log_probs"][-1].log_softmax(-1)
        tokens.append((scale * (conditional - unconditional) + unconditional).argmax().item())
    output = mixed.generate(
        **left_pad(ROWS[:1]), preference=torch.tensor(weights), guidance_scale=scale, use_cache=use_cache,
        negative_prompt_ids=torch.tensor([negative]), max_new_tokens=4, do_sample=False,
    )  # fmt: skip
    assert output[0].tolist() == tokens


def test_a_description_may_hold_the_padding_token(mixed):
    ids = torch.tensor([[33, 0, 34], [0, 35, 36]])
    expected = [greedy_by_hand(mixed, row, [1.0] * 6, d) for row, d in zip(ROWS, ([33, 0, 34], [35, 36]))]
    for use_cache in (True, False):
        assert new_tokens(mixed, left_pad(ROWS[:2]), preference_ids=ids, use_cache=use_cache).tolist() == expected


def test_rows_end_at_their_own_end_of_sequence(mixed):
    inputs, weights = left_pad(ROWS), torch.tensor(WEIGHTS)
    free = new_tokens(mixed, inputs, preference=weights)
    end = free[1, 2].item()
    ended = new_tokens(mixed, inputs, preference=weights, eos_token_id=end, pad_token_id=0)
    for full, cut in zip(free.tolist(), ended.tolist()):
        length = full.index(end) + 1 if end in full else len(full)
        assert cut[:length] == full[:length][: len(cut)]
        assert not any(cut[length:])


def test_generation_starts_without_a_prompt(mixed):
    assert mixed.generate(preference="e0", max_new_tokens=3, do_sample=False)[0, 1:].tolist() == greedy_by_hand(
        mixed, [1], [1.0, 0, 0, 0, 0, 0], steps=3
    )


def test_another_models_cache_is_refused(mixed):
    with pytest.raises(TypeError, match="must be a `PCMEnsembleCache`, got DynamicCache"):
        mixed.generate(torch.tensor([[21]]), past_key_values=DynamicCache(), max_new_tokens=2)


def test_an_empty_ensemble_cache_may_be_passed_in(mixed):
    cache = PCMEnsembleCache(mixed.config)
    tokens = new_tokens(mixed, left_pad(ROWS[:1]), past_key_values=cache, preference="e2")
    assert tokens[0].tolist() == greedy_by_hand(mixed, ROWS[0], [0, 0, 1.0, 0, 0, 0])
    assert cache.get_seq_length() == 5 + STEPS - 1
