"""Forward: equal to the formula worked out by hand, whatever the batch, the cache and the route."""

import pytest
import torch
from conftest import VOCAB, left_pad, make_ensemble, reference, tiny_gpt2, tiny_llama, tiny_mistral
from torch.testing import assert_close

from modeling_pcm_ensemble import submodel
from modeling_pcm_ensemble.merging import MIXTURES

CONTEXT = [21, 22, 23, 24, 25, 26, 27]
WEIGHTS = [1.0, 0.5, 2.0, 0.0, 0.25, 1.0]


def test_logits_equal_the_formula_worked_out_by_hand(mixed):
    output = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS))
    expected = reference(mixed, CONTEXT, WEIGHTS)
    assert (output.logits[0] - expected["log_probs"]).abs().max() < 1e-4
    assert_close(output.expert_weights[0], expected["expert_weights"], atol=1e-5, rtol=0)


def test_decoding_path_equals_the_exact_path(mixed):
    with torch.no_grad():
        summed = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS)).logits
    exact = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS)).logits
    assert_close(summed, exact.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("expert", range(6))
def test_one_active_expert_gives_its_own_log_probs_at_any_weight(mixed, expert):
    expected = reference(mixed, CONTEXT, [1.0] * 6)["expert_log_probs"][expert]
    for weight in (0.01, 3.0):
        output = mixed(torch.tensor([CONTEXT]), preference={f"e{expert}": weight})
        assert (output.logits[0] - expected).abs().max() < 1e-4
        assert output.expert_weights[0, :, expert].eq(1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_in_a_mixed_padded_batch_equals_the_row_alone(mixed, side):
    rows = [CONTEXT, [31, 32, 33], [41, 42, 43, 44, 45]]
    preferences = [{"e0": 1.0, "e4": 0.5}, {"e5": 1.0}, {f"e{i}": 1.0 for i in range(6)}]
    inputs = left_pad(rows)
    if side == "right":
        inputs = {name: torch.stack([x.roll(-(7 - len(row))) for x, row in zip(value, rows)])
                  for name, value in inputs.items()}  # fmt: skip
    output = mixed(**inputs, preference=preferences)
    for i, (row, preference) in enumerate(zip(rows, preferences)):
        weights = [preference.get(f"e{j}", 0.0) for j in range(6)]
        real = inputs["attention_mask"][i].bool()
        assert (output.logits[i][real] - reference(mixed, row, weights)["log_probs"]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("chunks", "rows"),
    [
        pytest.param((1,) * 7, [CONTEXT, [31, 32, 33, 34, 35, 36, 37]], id="token-by-token"),
        pytest.param((3, 1, 3), [CONTEXT, [31, 32, 33, 34, 35]], id="chunks-of-padded-rows"),
        pytest.param((6, 1), [CONTEXT, [31, 32]], id="prompt-then-token"),
    ],
)
def test_cached_steps_equal_one_pass(mixed, chunks, rows):
    preferences = [WEIGHTS, [0.0, 1.0, 0.0, 0.0, 3.0, 0.0]]
    inputs = left_pad(rows)
    with torch.no_grad():
        whole = mixed(**inputs, preference=torch.tensor(preferences), use_cache=False)
        cache, logits, weights = None, [], []
        for end in torch.tensor(chunks).cumsum(0).tolist():
            start = 0 if cache is None else cache.get_seq_length()
            output = mixed(
                inputs["input_ids"][:, start:end],
                attention_mask=inputs["attention_mask"][:, :end],
                past_key_values=cache,
                preference=torch.tensor(preferences) if cache is None else None,
            )
            cache = output.past_key_values
            logits.append(output.logits)
            weights.append(output.expert_weights)
    assert whole.past_key_values is None
    real = inputs["attention_mask"].bool()
    assert_close(torch.cat(logits, 1)[real], whole.logits[real], atol=1e-4, rtol=0)
    assert_close(torch.cat(weights, 1)[real], whole.expert_weights[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2, 5])], ids=str)
def test_logits_to_keep_selects_positions_of_logits_and_weights(mixed, keep):
    inputs = left_pad([CONTEXT, [31, 32, 33, 34, 35, 36]])
    whole = mixed(**inputs, preference=["e0", "e4"])
    kept = mixed(**inputs, preference=["e0", "e4"], logits_to_keep=keep)
    positions = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(kept.logits[0], whole.logits[0, positions], atol=1e-5, rtol=0)
    assert_close(kept.logits[1, 1:], whole.logits[1, positions][1:], atol=1e-5, rtol=0)
    assert kept.expert_weights.shape[1] == kept.logits.shape[1]


def test_a_prefix_with_bos_takes_the_place_of_the_contexts_bos():
    model = make_ensemble([tiny_llama(1)], [(0, [1, 6, 7], [11]), (0, [], [12])], prefix_bos_token_id=1)
    context = [1, 21, 22, 23]
    output = model(**left_pad([context, [1, 31]]), preference=[["e0"], ["e1"]])
    backbone = model.backbones[0]
    without_bos = backbone(torch.tensor([[1, 6, 7, 21, 22, 23]])).logits[0, -4:].log_softmax(-1)
    assert_close(output.logits[0], without_bos, atol=1e-4, rtol=0)
    assert_close(output.logits[1, -2:], backbone(torch.tensor([[1, 31]])).logits[0].log_softmax(-1), atol=1e-4, rtol=0)


def test_preference_ids_replace_the_description(mixed):
    context = torch.tensor([CONTEXT])
    expected = reference(mixed, CONTEXT, [1.0] * 6, description=[33, 34])
    for ids in (torch.tensor([33, 34]), torch.tensor([[0, 33, 34]]), torch.tensor([[-1, 33, 34]])):
        output = mixed(context, preference_ids=ids)
        assert_close(output.expert_weights[0], expected["expert_weights"], atol=1e-5, rtol=0)


def test_context_alone_is_read_when_all_experts_are_active_at_equal_weight(mixed):
    expected = reference(mixed, CONTEXT, [1.0] * 6, description=[])
    output = mixed(torch.tensor([CONTEXT]), preference=torch.full((6,), 0.7))
    assert_close(output.expert_weights[0], expected["expert_weights"], atol=1e-5, rtol=0)


def test_default_preference_holds_when_none_is_given(mixed):
    mixed.config.default_preference = {"e2": 1.0, "e5": 0.5}
    given = mixed(torch.tensor([CONTEXT]), preference={"e2": 1.0, "e5": 0.5})
    assert_close(mixed(torch.tensor([CONTEXT])).logits, given.logits, atol=0, rtol=0)


def test_each_needed_backbone_runs_once_with_as_many_rows_as_active_pairs(mixed):
    calls = []

    def count_rows(name):
        return lambda module, args, kwargs, output: calls.append((name, len(kwargs["input_ids"])))

    for name, backbone in enumerate(mixed.backbones):
        backbone.register_forward_hook(count_rows(name), with_kwargs=True)
    preferences = [["e0", "e1"], ["e1"], ["e5"]]
    with torch.no_grad():
        cache = mixed(torch.tensor([CONTEXT] * 3), preference=preferences).past_key_values
        mixed(torch.tensor([[1], [2], [3]]), past_key_values=cache)
    assert calls == [(0, 3), (3, 1)] * 2
    assert set(cache.backbones) == {0, 3}


def test_only_the_pcm_learns_and_experts_stay_in_evaluation_mode(mixed):
    mixed.train()
    assert not any(module.training for module in mixed.backbones.modules())
    before = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    optimizer = torch.optim.SGD(mixed.parameters(), lr=1.0)
    mixed(torch.tensor([CONTEXT]), labels=torch.tensor([CONTEXT]), preference=["e0", "e2"]).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in mixed.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "pcm.head.weight" in changed
    assert all(name.startswith("pcm.") for name in changed)


def test_gradient_flows_through_the_weights_as_through_the_formula(mixed):
    labels = torch.tensor([CONTEXT])
    mixed(labels, labels=labels, preference=torch.tensor(WEIGHTS)).loss.backward()
    head = mixed.pcm.head.weight
    from_forward, head.grad = head.grad, None
    hidden = mixed.pcm.body(torch.tensor([[11, 12, 13, 14, 15, 16, 18, 19, 20, *CONTEXT]])).last_hidden_state[0, -7:]
    unnormalised = mixed.pcm.head(hidden).exp() * torch.tensor(WEIGHTS)
    weights = unnormalised / unnormalised.sum(-1, keepdim=True)
    expert_log_probs = reference(mixed, CONTEXT, WEIGHTS)["expert_log_probs"]
    mixture = torch.einsum("te,etv->tv", weights, expert_log_probs.exp())
    (-mixture[:-1].log().gather(1, labels[0, 1:, None]).mean()).backward()
    assert_close(from_forward, head.grad, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mixtures_next_token_cross_entropy(mixed):
    labels = torch.tensor([[-100, *CONTEXT[1:]]])
    output = mixed(torch.tensor([CONTEXT]), labels=labels, preference="e1")
    expected = torch.nn.functional.nll_loss(output.logits[0, :-1], labels[0, 1:])
    assert_close(output.loss, expected)


def test_hidden_states_and_attentions_are_the_pcms(mixed):
    mixed.set_attn_implementation("eager")
    output = mixed(torch.tensor([CONTEXT]), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == mixed.config.pcm.num_hidden_layers + 1
    assert output.hidden_states[-1].shape == (1, 7, mixed.config.pcm.hidden_size)
    assert output.attentions[0].shape == (1, 2, 7, 7)


def test_merging_logits_is_the_weighted_sum_of_logits(mixed):
    mixed.config.merge = "logits"
    output = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS))
    expected = reference(mixed, CONTEXT, WEIGHTS)
    summed = torch.einsum("te,etv->tv", expected["expert_weights"], expected["expert_log_probs"])
    assert_close(output.logits[0], summed.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_expert_top_k_keeps_and_renormalises_each_experts_best_tokens(mixed, grad):
    mixed.config.expert_top_k = 3
    with torch.set_grad_enabled(grad):
        output = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS))
    expected = reference(mixed, CONTEXT, WEIGHTS)
    probs = expected["expert_log_probs"].exp()
    kept = probs * (probs >= probs.topk(3, dim=-1).values[..., -1:])
    mixture = torch.einsum("te,etv->tv", expected["expert_weights"], kept / kept.sum(-1, keepdim=True))
    assert_close(output.logits[0].exp(), mixture, atol=1e-5, rtol=0)
    dropped = mixture == 0
    assert output.logits[0][dropped].exp().sum() < 1e-40
    assert_close(output.logits[0][dropped], expected["log_probs"][dropped] - 100, atol=1e-3, rtol=0)


def test_padded_vocabularies_are_cut_to_the_tokens_all_parts_know():
    model = make_ensemble([tiny_llama(1, vocab_size=112), tiny_gpt2(2)], [(0, [], []), (1, [], [])])
    output = model(torch.tensor([CONTEXT]))
    assert output.logits.shape[-1] == model.config.vocab_size == VOCAB
    assert_close(output.logits.exp().sum(-1), torch.ones(1, 7))


def test_half_precision_experts_are_merged_in_float32(mixed):
    output = mixed.to(torch.bfloat16)(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS))
    assert output.logits.dtype == output.expert_weights.dtype == torch.float32
    assert_close(output.logits.exp().sum(-1), torch.ones(1, 7), atol=1e-5, rtol=0)


def test_weights_and_shares_of_a_whole_text_equal_the_formula(mixed):
    rows = [CONTEXT, [31, 32, 33, 34]]
    inputs = left_pad(rows)
    weights = mixed.compute_expert_weights(**inputs, preference=torch.tensor(WEIGHTS))
    shares = mixed.attribute(**inputs, preference=torch.tensor(WEIGHTS))
    assert weights.shape == (2, 7, 6)
    assert shares.shape == (2, 6, 6)
    for i, row in enumerate(rows):
        expected = reference(mixed, row, WEIGHTS)
        assert_close(weights[i, -len(row) :], expected["expert_weights"], atol=1e-5, rtol=0)
        tokens = torch.tensor(row[1:])
        probs = expected["expert_log_probs"][:, :-1].exp().gather(2, tokens.expand(6, -1)[..., None])[..., 0]
        parts = expected["expert_weights"][:-1] * probs.T
        assert_close(shares[i, 1 - len(row) :], parts / parts.sum(-1, keepdim=True), atol=1e-4, rtol=0)
    assert shares[1, :3].eq(0).all()  # padding
    assert shares[..., 3].eq(0).all()  # an expert of weight 0


def test_expert_weights_of_a_whole_text_run_no_expert(mixed):
    for backbone in mixed.backbones:
        backbone.register_forward_hook(lambda *_: pytest.fail("an expert ran"))
    mixed.compute_expert_weights(torch.tensor([CONTEXT]))


def test_parts_are_held_once():
    backbone = tiny_llama(1)
    model = make_ensemble([backbone], [(0, [i], []) for i in range(6)])
    pcm = sum(p.numel() for p in model.pcm.parameters())
    assert sum(p.numel() for p in model.parameters()) == backbone.num_parameters() + pcm
    assert model.backbones[0].lm_head.weight.data_ptr() == backbone.lm_head.weight.data_ptr()
    assert model.config.backbones[0] is backbone.config


def test_experts_that_drop_tokens_leave_a_gradient_that_is_a_number(mixed):
    mixed.config.expert_top_k = 40
    output = mixed(torch.tensor([CONTEXT]), preference=torch.tensor(WEIGHTS))
    assert (output.logits < -90).any()
    output.logits.sum().backward()
    assert mixed.pcm.head.weight.grad.isfinite().all()
    assert mixed.pcm.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("merge", MIXTURES)
@pytest.mark.parametrize("which", ["every expert", "one expert"])
def test_tokens_that_experts_make_impossible_leave_a_gradient_that_is_a_number(mixed, merge, which):
    mixed.config.merge = merge
    backbones = list(mixed.backbones)[: None if which == "every expert" else 1]
    for backbone in backbones:
        backbone.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output: output.index_fill(-1, torch.tensor([98]), float("-inf"))
        )
    context = torch.tensor([CONTEXT])
    output = mixed(context, preference=torch.tensor(WEIGHTS), labels=context)
    possible = which == "one expert" and merge == "probabilities"
    assert output.logits[..., 98].isfinite().all() == possible
    output.loss.backward()
    assert mixed.pcm.head.weight.grad.isfinite().all()
    assert mixed.pcm.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("merge", "expert_top_k"), [("probabilities", None), ("probabilities", 5), ("logits", None)])
@pytest.mark.parametrize("grad", [True, False])
def test_logits_that_are_not_normalised_are_those_of_the_one_active_expert(mixed, merge, expert_top_k, grad):
    mixed.config.merge, mixed.config.expert_top_k = merge, expert_top_k
    context = torch.tensor([CONTEXT])
    with torch.set_grad_enabled(grad):
        output = mixed(context, preference="e1", normalize_logits=False, output_expert_logits=True)
        mixture = mixed(context, preference={"e1": 1.0, "e3": 2.0}, normalize_logits=False)
    alone = mixed.backbones[0](context).logits
    kept = alone >= alone.topk(expert_top_k or VOCAB, dim=-1).values[..., -1:]
    assert_close(output.logits[kept], alone[kept], atol=1e-4, rtol=0)
    normalised = mixed(context, preference={"e1": 1.0, "e3": 2.0}).logits
    assert_close(mixture.logits.log_softmax(-1), normalised.log_softmax(-1), atol=1e-4, rtol=0)


def test_the_order_of_experts_does_not_matter():
    experts = [(0, [5, 6], [13, 12]), (1, [], [11]), (0, [8], [12, 14, 15])]
    order = [2, 0, 1]
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts)
    permuted = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [experts[i] for i in order])
    permuted.pcm.head.weight.data = model.pcm.head.weight.data[order]
    weights = torch.tensor([1.0, 0.5, 2.0])
    output, other = model(torch.tensor([CONTEXT]), preference=weights), permuted(torch.tensor([CONTEXT]), preference=weights[order])  # fmt: skip  # noqa: E501
    assert_close(other.logits, output.logits, atol=1e-5, rtol=0)
    assert_close(other.expert_weights, output.expert_weights[..., order], atol=1e-5, rtol=0)


def test_a_zero_weight_equals_an_ensemble_without_the_expert():
    """Under one description; without, the PCM is told of the experts that remain only where there are others."""
    experts = [(0, [5, 6], [11]), (1, [], [12]), (0, [8], [13])]
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts)
    without = make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts[:2])
    without.pcm.head.weight.data = model.pcm.head.weight.data[:2]
    ids, description = torch.tensor([CONTEXT]), torch.tensor([33])
    output = model(ids, preference=[1, 2, 0], preference_ids=description)
    assert_close(output.logits, without(ids, preference=[1, 2], preference_ids=description).logits, atol=1e-5, rtol=0)


def test_an_unknown_argument_is_refused(mixed):
    with pytest.raises(TypeError, match=r"unknown arguments \['preferense'\]"):
        mixed(torch.tensor([CONTEXT]), preferense="e0")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"merge": "average"}, "`merge` must be one of"), ({"expert_top_k": 0}, "`expert_top_k` must be at least 1")],
    ids=str,
)
def test_a_wrong_value_that_is_set_between_calls_is_refused(mixed, change, words):
    vars(mixed.config).update(change)
    with pytest.raises(ValueError, match=words):
        mixed(torch.tensor([CONTEXT]))


def test_logits_to_keep_counts_the_positions_of_right_padded_rows(mixed):
    ids = torch.tensor([CONTEXT, [31, 32, 33, 34, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    whole = mixed(ids, attention_mask=mask, preference=["e0", "e4"])
    kept = mixed(ids, attention_mask=mask, preference=["e0", "e4"], logits_to_keep=torch.tensor([1, 3]))
    assert_close(kept.logits, whole.logits[:, [1, 3]], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`logits_to_keep` must be a number of tokens or a tensor of positions"):
        mixed(ids, logits_to_keep=mask.bool())


def test_shares_of_right_padded_rows_and_truncated_experts_equal_the_formula(mixed):
    mixed.config.expert_top_k = 30
    ids = torch.tensor([CONTEXT, [31, 32, 33, 34, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    shares = mixed.attribute(ids, attention_mask=mask, preference=torch.tensor(WEIGHTS))
    for i, row in enumerate((CONTEXT, [31, 32, 33, 34])):
        expected = reference(mixed, row, WEIGHTS)
        whole = expected["expert_log_probs"].exp()
        probs = whole * (whole >= whole.topk(30, dim=-1).values[..., -1:])
        probs = probs / probs.sum(-1, keepdim=True)
        picks = torch.tensor(row[1:]).expand(6, -1)[..., None]
        kept, all_tokens = (
            expected["expert_weights"][:-1] * of[:, :-1].gather(2, picks)[..., 0].T for of in (probs, whole)
        )
        parts = torch.where(kept.sum(-1, keepdim=True) > 0, kept, all_tokens)  # what no expert kept is shared too
        assert_close(shares[i, : len(row) - 1], parts / parts.sum(-1, keepdim=True), atol=1e-4, rtol=0)
    assert shares[1, 3:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(mixed, dtype):
    preference = {"e0": 0.123456, "e1": 1e-7}
    expected = mixed(torch.tensor([CONTEXT]), preference=preference)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = mixed(torch.tensor([CONTEXT]), preference=preference)
    finally:
        torch.set_default_dtype(before)
    assert found.logits.dtype == expected.logits.dtype == torch.float32
    assert_close(found.expert_weights, expected.expert_weights, atol=0, rtol=0)


@pytest.mark.parametrize("bos", [None, 21], ids=["no-bos", "contexts-begin-with-the-prompts-bos"])
def test_prompts_of_many_rows_are_encoded_once_for_each_expert(monkeypatch, bos):
    monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", 1)
    experts = [(0, [21, 6, 7], [11, 12]), (0, [8], [13]), (0, [], [14]), (1, [9, 9], [15])]
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts, prefix_bos_token_id=bos)
    rows = [CONTEXT, [21, 31, 32], [41, 42, 43], [21, 22]]
    preferences = [["e0", "e1", "e2"], ["e0", "e3"], ["e1", "e3"], ["e0"]]
    shapes = []
    model.backbones[0].register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        shared = model(**left_pad(rows), preference=preferences)
        step = model(torch.tensor([[1]] * 4), past_key_values=shared.past_key_values)
        shared.past_key_values.crop(-1)
        again = model(torch.tensor([[1]] * 4), past_key_values=shared.past_key_values)
    assert shapes == [(3, 2), (6, 8), (6, 1), (6, 1)]
    assert_close(again.logits, step.logits, atol=1e-5, rtol=0)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([[*row, 1]]), preference=preferences[i], use_cache=False).logits[0]
        assert_close(shared.logits[i, -len(row) :], alone[:-1], atol=1e-4, rtol=0)
        assert_close(step.logits[i], alone[-1:], atol=1e-4, rtol=0)


def test_rows_that_read_the_same_are_read_once(monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", 1)
    experts = [(0, [21, 6, 7], [11, 12]), (0, [8], [13]), (1, [], [14])]
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts)
    torch.nn.init.normal_(model.pcm.head.weight)
    rows = [[31, 32], CONTEXT, CONTEXT, [31, 32], CONTEXT]
    preferences = [["e0", "e1"], ["e0", "e2"], ["e0", "e1"], ["e0", "e1"], ["e0", "e2"]]
    read = {"pcm": [], "0": [], "1": []}
    for name, part in (("pcm", model.pcm.body), ("0", model.backbones[0]), ("1", model.backbones[1])):
        part.register_forward_hook(
            lambda module, args, kwargs, output, name=name: read[name].append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
    with torch.no_grad():
        together = model(**left_pad(rows), preference=preferences)
        step = model(torch.tensor([[1]] * 5), past_key_values=together.past_key_values)
    # The PCM reads a row under its preference, after what descriptions begin with. Experts e0 and e1 read both texts,
    # after their prompts; e2 reads one.
    assert read == {"pcm": [1, 3, 5], "0": [2, 4, 8], "1": [1, 2]}
    for i, row in enumerate(rows):
        alone = model(torch.tensor([[*row, 1]]), preference=preferences[i], use_cache=False)
        assert_close(together.logits[i, -len(row) :], alone.logits[0, :-1], atol=1e-4, rtol=0)
        assert_close(step.logits[i], alone.logits[0, -1:], atol=1e-4, rtol=0)
        assert_close(step.expert_weights[i], alone.expert_weights[0, -1:], atol=1e-5, rtol=0)


def test_rows_of_sliding_windows_that_read_the_same_are_read_once(monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", 1)
    model = make_ensemble([tiny_mistral(4)], [(0, [], [11]), (0, [], [12])])
    read = []
    model.backbones[0].register_forward_hook(
        lambda module, args, kwargs, output: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        together = model(torch.tensor([CONTEXT] * 3))
        step = model(torch.tensor([[1]] * 3), past_key_values=together.past_key_values).logits
    assert read == [2, 6]
    alone = model(torch.tensor([[*CONTEXT, 1]]), use_cache=False).logits
    assert_close(step, alone[:, -1:].expand_as(step), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_beams_and_return_sequences_read_a_prompt_once(monkeypatch, mixed, mode):
    def generated(tokens_saved: int):
        monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", tokens_saved)
        torch.manual_seed(0)
        return mixed.generate(torch.tensor([CONTEXT]), preference="e0", max_new_tokens=6, pad_token_id=0, **mode)

    rows = []
    mixed.backbones[0].register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    once = generated(1)
    assert (rows[0], rows[1]) == (1, 3)
    assert torch.equal(once, generated(512))


def test_prompts_of_sliding_windows_are_encoded_with_each_row(monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", 1)
    model = make_ensemble([tiny_mistral(4)], [(0, [5, 6, 7], [11]), (0, [8], [12])])
    rows = [CONTEXT, [31, 32, 33]]
    with torch.no_grad():
        together = model(**left_pad(rows)).logits
        for logits, row in zip(together, rows):
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
            assert_close(logits[-len(row) :], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [1, 2, 0])
def test_the_lm_head_gets_one_block_of_memory(prompted, keep):
    """Torch multiplies a strided slice by a copy of the weight for each row, 10 GB for 192 rows of SmolLM2."""
    blocks = []
    prompted.backbones[0].lm_head.register_forward_pre_hook(
        lambda module, args: blocks.append(args[0].is_contiguous())
    )
    logits = prompted(torch.tensor([CONTEXT] * 3), logits_to_keep=keep).logits
    assert blocks == [True]
    assert_close(logits, prompted(torch.tensor([CONTEXT] * 3)).logits[:, -keep:], atol=1e-5, rtol=0)
