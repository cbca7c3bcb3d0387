"""Tilts that add up: the product by the formula, by property, and in a model; strengths; what is refused."""

import copy

import pytest
import torch
from conftest import VOCAB, left_pad, make_ensemble, tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import CompileConfig

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.merging import MIXTURES, ExpertLogits
from modeling_pcm_ensemble.tilts import product_log_probs, token_tilts
from modeling_pcm_ensemble.weighting import expert_strengths

BATCH, SEQ = 3, 2
CONTEXT = [21, 22, 23, 24, 25, 26]
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
WEIGHTS = [[0, 1.0, 0.5, 0, -0.7, 2.0], [0, 0, 0, 1, 0, 0], [0, 0.3, 0.3, 0.3, 0.3, -1]]


# The mathematics


def random_case(seed: int, num_experts: int, vocab_size: int):
    """Logits of the reference and of each expert, and strengths of both signs, of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_experts + 1, BATCH, SEQ, vocab_size, generator=generator, dtype=torch.float64)
    strengths = 2 * torch.randn(BATCH, 1, num_experts, generator=generator, dtype=torch.float64).repeat(1, SEQ, 1)
    return logits, strengths * (torch.rand(strengths[:, :1].shape, generator=generator) < 0.7)


def entries(logits: torch.Tensor, strengths: torch.Tensor) -> list[ExpertLogits]:
    """What a model would hand over: the reference, a bare backbone, and each expert on the rows that want it."""
    found = []
    for i in range(strengths.shape[-1]):
        active = (strengths[:, :, i] != 0).any(dim=1)
        if active.any():
            rows = None if active.all() else active.nonzero()[:, 0]
            found.append(ExpertLogits(i, rows, logits[i + 1] if rows is None else logits[i + 1][rows]))
    return [*found, ExpertLogits(None, None, logits[0])]


def slow_product(logits: torch.Tensor, strengths: torch.Tensor, expert_top_k: int | None = None) -> torch.Tensor:
    """By the formula, position by position and token by token; -inf for what is no candidate."""
    log_probs = logits.log_softmax(-1)  # (models, batch, seq, vocab)
    result = torch.full(log_probs.shape[1:], -torch.inf, dtype=logits.dtype)
    for row in range(BATCH):
        for place in range(SEQ):
            s = strengths[row, place]
            shares = [1 - s.sum(), *s]
            known, kept = [], set()
            for model, share in enumerate(shares):
                values = log_probs[model, row, place]
                k = len(values) if expert_top_k is None else min(expert_top_k, len(values))
                best = values.topk(k)
                known.append(values.clamp(min=best.values[-1]))
                kept |= set(best.indices.tolist()) if share != 0 else set()
            for token in kept:
                tilts = sum(s[i] * (known[i + 1][token] - known[0][token]) for i in range(len(s)))
                result[row, place, token] = known[0][token] + tilts
    return result.log_softmax(-1)


cases = given(
    seed=st.integers(0, 2**31 - 1),
    num_experts=st.integers(1, 5),
    vocab_size=st.integers(2, 17),
    expert_top_k=st.sampled_from([None, 1, 3, 30]),
)


def test_strengths_are_the_users_weights_until_the_pcm_has_an_opinion_and_never_turn_around():
    weights = torch.tensor([[1.0, 0.5, -2.0, 0.0]])
    assert torch.equal(expert_strengths(torch.zeros(1, 2, 4), weights), weights.expand(1, 2, 4))
    strong = expert_strengths(torch.full((1, 2, 4), 1e4), weights)
    assert torch.equal(strong, 2 * weights.expand(1, 2, 4))
    assert torch.equal(expert_strengths(torch.full((1, 2, 4), -1e4), weights).abs(), torch.zeros(1, 2, 4))


@cases
def test_a_product_is_the_formula(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    expected = slow_product(logits, strengths, expert_top_k)
    found = product_log_probs(entries(logits, strengths), strengths, expert_top_k=expert_top_k)
    is_candidate = expected > -torch.inf
    assert_close(found[is_candidate], expected[is_candidate], atol=1e-9, rtol=0)
    assert_close(found.exp().sum(-1), torch.ones(BATCH, SEQ, dtype=torch.float64))

    # What is no candidate comes below all that are, in the order of the whole product
    whole = slow_product(logits, strengths)
    for row in range(BATCH):
        for place in range(SEQ):
            outside = ~is_candidate[row, place]
            if outside.any():
                assert found[row, place][outside].max() < found[row, place][~outside].min() - 90
                order = whole[row, place][outside].argsort()
                assert torch.equal(found[row, place][outside].argsort(), order)


@cases
def test_permuting_experts_changes_nothing(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    permuted = entries(logits[torch.cat([torch.zeros(1).long(), order + 1])], strengths[..., order])
    found = product_log_probs(permuted, strengths[..., order], expert_top_k=expert_top_k)
    assert_close(found, product_log_probs(entries(logits, strengths), strengths, expert_top_k=expert_top_k))


@cases
def test_one_expert_at_strength_1_is_that_expert_and_at_0_the_reference(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    alone = torch.zeros_like(strengths)
    alone[..., -1] = 1
    k = min(expert_top_k or vocab_size, vocab_size)
    for asked, model in ((alone, -1), (torch.zeros_like(strengths), 0)):
        found = product_log_probs(entries(logits, asked), asked, expert_top_k=expert_top_k)
        kept = torch.zeros_like(found, dtype=torch.bool).scatter(-1, logits[model].topk(k).indices, True)
        expected = logits[model].masked_fill(~kept, -torch.inf).log_softmax(-1)
        assert_close(found[kept], expected[kept], atol=1e-12, rtol=0)
        if k == vocab_size:  # to the last bit, where no normaliser comes in
            assert torch.equal(product_log_probs(entries(logits, asked), asked, normalize=False), logits[model])


@cases
def test_a_weight_below_0_takes_away_what_the_same_above_0_adds(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    reference = logits[0].log_softmax(-1)
    towards, away = (product_log_probs(entries(logits, s), s) for s in (strengths, -strengths))
    added, taken = towards - reference, away - reference
    assert_close(added - added[..., :1], taken[..., :1] - taken, atol=1e-9, rtol=0)


@cases
def test_gradients_are_those_of_the_formula(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    weights = torch.randn(BATCH, SEQ, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, expected = strengths.clone().requires_grad_(), strengths.clone().requires_grad_()
    product = product_log_probs(entries(logits, strengths), found, expert_top_k=expert_top_k)
    reference = slow_product(logits, expected, expert_top_k)
    is_candidate = reference > -torch.inf
    (product * weights)[is_candidate].sum().backward()
    (reference * weights)[is_candidate].sum().backward()
    active = (strengths != 0).any(dim=1, keepdim=True).expand_as(strengths)  # what did not run has none
    assert_close(found.grad[active], expected.grad[active], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("expert_top_k", [None, 2])
def test_what_a_model_gives_no_probability_is_impossible_unless_it_has_no_part(expert_top_k):
    never = float("-inf")
    reference, expert = torch.tensor([[[1.0, 0.5, 0.0, never]]]), torch.tensor([[[0.0, never, 1.0, 2.0]]])
    models = [ExpertLogits(0, None, expert), ExpertLogits(None, None, reference)]
    strengths = torch.tensor([[[1.0]]], requires_grad=True)
    alone = product_log_probs(models, strengths, expert_top_k=expert_top_k)
    assert (alone[0, 0] == never).tolist() == [False, True, False, False]

    for strength in (0.5, -1.0, 3.0):
        strengths = torch.tensor([[[strength]]], requires_grad=True)
        product = product_log_probs(models, strengths)
        assert (product[0, 0] == never).tolist() == [False, True, False, True]
        product[0, 0, 2].backward()
        assert strengths.grad.isfinite().all()


def test_averages_keep_the_same_candidates_whatever_their_rounding():
    logits, _ = random_case(0, 2, 50)
    models = [*entries(logits[:, :1, :1].float(), torch.ones(1, 1, 2))]
    for share in torch.linspace(0.01, 0.99, 99):
        strengths = torch.stack([share, 1 - share])[None, None]
        product = product_log_probs(models, strengths, expert_top_k=5)
        kept = logits[1:, 0, 0].topk(5).indices.unique()
        assert torch.equal((product[0, 0] > -90).nonzero()[:, 0], kept)


def test_models_that_keep_nothing_in_common_leave_numbers():
    never = float("-inf")
    models = [
        ExpertLogits(0, None, torch.tensor([[[never, 1.0, never]]])),
        ExpertLogits(None, None, torch.tensor([[[1.0, never, never]]])),
    ]
    product = product_log_probs(models, torch.tensor([[[0.5]]]), expert_top_k=1)
    assert product[0, 0, :2].isfinite().all()


@cases
def test_token_tilts_are_what_each_expert_adds(seed, num_experts, vocab_size, expert_top_k):
    logits, strengths = random_case(seed, num_experts, vocab_size)
    tokens = torch.randint(vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))
    models = entries(logits, strengths)
    base, tilts = token_tilts(models, tokens[..., None], num_experts, expert_top_k=expert_top_k)
    log_probs = logits.log_softmax(-1)
    k = min(expert_top_k or vocab_size, vocab_size)
    known = log_probs.maximum(log_probs.topk(k).values[..., -1:])
    of_tokens = known.gather(-1, tokens.expand(num_experts + 1, -1, -1)[..., None])[..., 0]  # (models, batch, seq)
    assert_close(base[..., 0], of_tokens[0])
    expected = strengths * (of_tokens[1:] - of_tokens[:1]).permute(1, 2, 0)
    assert_close(strengths * tilts[:, :, 0], expected, atol=1e-9, rtol=0)


# In a model


@pytest.fixture
def product(mixed) -> PCMEnsembleForCausalLM:
    """Four architectures, six experts, the first of which is the reference; the PCM has opinions."""
    mixed.config.merge, mixed.config.reference = "product", "e0"
    return mixed


@torch.no_grad()
def by_formula(model, context: list[int], weights: list[float], expert_top_k: int | None = None):
    """One row's log π, `(seq, vocab)`, and strengths, `(seq, experts)`, each model run alone; reference e0."""
    experts = model.config.experts
    active = [e for e, weight in zip(experts, weights) if weight != 0]
    alike = len(set(weights[1:])) == 1
    description = [] if alike else [t for ids in sorted(e["description_ids"] for e in active) for t in ids]
    hidden = model.pcm.body(torch.tensor([description + context])).last_hidden_state[0, -len(context) :]
    strengths = torch.tensor(weights) * 2 * model.pcm.head(hidden).float().sigmoid()  # (seq, experts)

    log_probs = []
    for expert in experts:
        backbone = model.backbones[expert["backbone"]]
        logits = backbone(torch.tensor([expert["prompt_ids"] + context])).logits[0, -len(context) :]
        log_probs.append(logits.float().log_softmax(-1))
    log_probs = torch.stack(log_probs)
    known = log_probs.maximum(log_probs.topk(expert_top_k or VOCAB).values[..., -1:])
    total = known[0] + torch.einsum("te,etv->tv", strengths[:, 1:], known[1:] - known[0])

    ran = [True] + [weight != 0 for weight in weights[1:]]
    is_candidate = (log_probs[ran] >= log_probs[ran].topk(expert_top_k or VOCAB).values[..., -1:]).any(0)
    return total.masked_fill(~is_candidate, -torch.inf).log_softmax(-1), strengths


@pytest.mark.parametrize("expert_top_k", [None, 5])
@torch.no_grad()
def test_a_batch_of_unlike_wishes_follows_the_formula(product, expert_top_k):
    product.config.expert_top_k = expert_top_k
    output = product(**left_pad(ROWS), preference=torch.tensor(WEIGHTS))
    for row, weights, logits, found in zip(ROWS, WEIGHTS, output.logits, output.expert_weights):
        expected, strengths = by_formula(product, row, weights, expert_top_k)
        is_candidate = expected > -torch.inf
        assert_close(logits[-len(row) :][is_candidate], expected[is_candidate], atol=1e-4, rtol=0)
        assert_close(found[-len(row) :], strengths, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_default_reference_is_the_bare_backbone(prompted):
    prompted.config.merge = "product"
    torch.nn.init.zeros_(prompted.pcm.head.weight)
    context = torch.tensor([CONTEXT])
    bare = prompted.backbones[0](context).logits.log_softmax(-1)
    e0, e1 = (prompted(context, preference=name).logits for name in ("e0", "e1"))
    found = prompted(context, preference={"e0": 1.5, "e1": -0.5}).logits
    assert_close(found, (bare + 1.5 * (e0 - bare) - 0.5 * (e1 - bare)).log_softmax(-1), atol=1e-4, rtol=0)
    assert_close(prompted(context, preference=[0, 0, 0]).logits, bare, atol=1e-5, rtol=0)
    assert_close(prompted(context, preference="e2").logits, bare, atol=1e-5, rtol=0)  # it reads nothing first


COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, COMPILED],
    ids=["greedy", "beam", "sample", "compiled"],
)
@pytest.mark.parametrize("expert_top_k", [None, 5])
def test_generation_is_the_same_cached_and_uncached_and_alone(product, options, expert_top_k):
    product.config.expert_top_k = expert_top_k
    settings = {"max_new_tokens": 6, "do_sample": False} | options

    def generate(rows, weights, **more):
        torch.manual_seed(0)
        inputs = left_pad(rows)
        answers = product.generate(**inputs, preference=torch.tensor(weights), **settings, **more)
        return answers[:, inputs["input_ids"].shape[1] :].tolist()

    batch = generate(ROWS, WEIGHTS)
    if options is COMPILED:
        assert any(submodel.compiled_step is not None for submodel in product.backbones.submodels)
        settings = {"max_new_tokens": 6, "do_sample": False}
    assert batch == generate(ROWS, WEIGHTS, use_cache=False)
    if not options.get("do_sample"):
        assert batch == [generate([row], [weights])[0] for row, weights in zip(ROWS, WEIGHTS)]


@torch.no_grad()
def test_joined_caches_go_on_as_each_would_alone(prompted):
    """With the bare backbone among the rows that are put in order."""
    prompted.config.merge = "product"
    wishes = [{"e0": 1.0}, {"e1": 0.5, "e2": -1.0}]
    caches, alone = [], []
    for row, wish in zip(ROWS, wishes):
        cache = prompted(torch.tensor([row]), preference=wish).past_key_values
        alone.append(prompted(torch.tensor([[9]]), past_key_values=copy.deepcopy(cache)).logits)
        caches.append(cache)

    joined = PCMEnsembleCache.join(caches)
    told = torch.tensor(joined.known_route.descriptions[1])
    assert_close(
        prompted(torch.tensor([[9], [9]]), past_key_values=joined).logits, torch.cat(alone), atol=1e-4, rtol=0
    )
    joined.reweight(torch.tensor([[-1.0, 0, 0], [0, 2.0, 2.0]]))
    assert joined.preferences[1].label == "e1=2 + e2=2"
    joined.batch_select_indices(torch.tensor([1, 0, 1]))
    found = prompted(torch.tensor([[9], [9], [9]]), past_key_values=joined)
    assert_close(found.logits[0], found.logits[2])
    again = prompted(torch.tensor([[*ROWS[1], 9, 9]]), preference=[{"e1": 2.0, "e2": 2.0}], preference_ids=told)
    assert_close(found.logits[0, -1], again.logits[0, -1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="other than 0, and between -100 and 100"):
        joined.reweight(torch.tensor([[0, 200.0, 2.0], [-1.0, 0, 0], [0, 2.0, 2.0]]))

    prompted.config.merge = "probabilities"
    with pytest.raises(ValueError, match="was filled under `merge='product'`"):
        prompted(torch.tensor([[9], [9], [9]]), past_key_values=joined)
    changes = (
        lambda: joined.batch_select_indices(torch.tensor([0])),
        lambda: joined.reweight(torch.tensor([[0, 1.0, 1.0], [-1.0, 0, 0], [0, 1.0, 1.0]])),
        lambda: type(joined).join([joined]),
    )
    for change in changes:
        with pytest.raises(ValueError, match="was filled under `merge='product'`"):
            change()

    prompted.config.merge = "product"
    prompted.config.experts = [entry | {"dimension": "another"} for entry in prompted.config.experts]
    with pytest.raises(ValueError, match="was filled by other experts"):
        prompted(torch.tensor([[9], [9], [9]]), past_key_values=joined)


@torch.no_grad()
def test_attribution_is_in_signed_nats(product):
    ids, wish = torch.tensor([CONTEXT]), torch.tensor(WEIGHTS[:1])
    tilts = product.attribute(ids, preference=wish)[0]  # (seq - 1, experts)
    _, strengths = by_formula(product, CONTEXT, WEIGHTS[0])

    log_probs = []
    for expert in product.config.experts:
        prompt, backbone = expert["prompt_ids"], product.backbones[expert["backbone"]]
        of_expert = backbone(torch.tensor([prompt + CONTEXT])).logits[0, len(prompt) : -1].log_softmax(-1)
        log_probs.append(of_expert.gather(-1, torch.tensor(CONTEXT[1:])[:, None])[:, 0])
    expected = strengths[:-1] * (torch.stack(log_probs, dim=-1) - log_probs[0][:, None])
    assert_close(tilts, expected, atol=1e-4, rtol=0)
    assert (tilts < 0).any()
    assert (tilts > 0).any()


def test_the_pcm_gets_gradients_of_a_product(product):
    product.config.expert_top_k = 40
    ids = torch.tensor([CONTEXT])
    product(ids, preference=torch.tensor(WEIGHTS[:1]), labels=ids).loss.backward()
    gradient = product.pcm.head.weight.grad
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, True, True, False, True, True]


def test_a_saved_product_comes_back_with_its_reference(product, tmp_path):
    ids = torch.tensor([CONTEXT])
    expected = product(ids, preference=torch.tensor(WEIGHTS[:1])).logits
    product.config.pcm_trained_for = "adapters"
    product.save_pretrained(tmp_path)
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.merge, loaded.config.reference) == ("product", "e0")
    assert loaded.config.pcm_trained_for == "adapters"
    assert torch.equal(loaded(ids, preference=torch.tensor(WEIGHTS[:1])).logits, expected)


# What is refused


def test_weights_below_0_are_refused_by_mixtures_which_say_where_they_go(mixed):
    with pytest.raises(ValueError, match=r'weight -1\.0 in row 0.*`merge="product"` and `"adapters"`'):
        mixed(torch.tensor([CONTEXT]), preference={"e1": 1.0, "e2": -1.0})


@pytest.mark.parametrize(
    ("settings", "preference", "words"),
    [
        ({}, "e0", "'e0' a weight, which is the `reference`.*Weights go to e1, e2, e3, e4, e5"),
        ({}, {"e1": 101}, "weight 101.0 in row 0. Weights must be between -100 and 100"),
        ({}, {"e1": float("nan")}, "weight nan"),
        ({}, {"e1": 1e300}, "weight inf"),
        ({"reference": None}, "e1", "needs a `reference`, since the experts are on 4 backbones"),
        ({"reference": "e9"}, "e1", "`reference` is 'e9', but the experts are e0, "),
        ({"pcm_trained_for": "probabilities"}, "e1", "was trained for `merge='probabilities'`"),
        ({"pcm_trained_for": "sums"}, "e1", "`pcm_trained_for` must be one of"),
        ({"merge": "adapters", "expert_top_k": 5}, "e1", "`expert_top_k` cannot be used with `merge='adapters'`"),
        ({"default_preference": "e0"}, None, "which is the `reference`"),
    ],
    ids=str,
)
def test_what_a_product_cannot_do_is_refused_before_any_model_runs(product, settings, preference, words):
    vars(product.config).update(settings)
    product.backbones.forward = None
    with pytest.raises(ValueError, match=words):
        product.generate(torch.tensor([CONTEXT]), preference=preference, max_new_tokens=1)


def test_a_reference_is_refused_where_an_ensemble_is_built_or_loses_it():
    experts = {"a": tiny_llama(1), "b": tiny_gpt2(2)}
    with pytest.raises(Exception, match="needs a `reference`"):
        PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), merge="product")
    with pytest.raises(Exception, match="`reference` is 'c'"):
        PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), merge="product", reference="c")
    with pytest.raises(Exception, match="the only expert"):
        PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(3), merge="product", reference="a")

    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), merge="product", reference="a")
    assert model(torch.tensor([CONTEXT])).expert_weights[0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="is the `reference` of `config`"):
        model.remove_expert("a")


@pytest.mark.parametrize("merge", MIXTURES)
@torch.no_grad()
def test_a_pcm_of_strengths_serves_mixtures_too(mixed, merge):
    ids, weights = left_pad(ROWS), torch.tensor([[0, 1.0, 0.5, 0, 0.7, 2.0], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 3]])
    mixed.config.merge, mixed.config.reference, mixed.config.pcm_trained_for = "product", "e0", "adapters"
    strengths = mixed.compute_expert_weights(**ids, preference=weights * torch.tensor([0, 1, 1, 1, 1, 1]))
    mixed.config.merge = merge
    found = mixed.compute_expert_weights(**ids, preference=weights)

    others = strengths[:2] / strengths[:2].sum(dim=-1, keepdim=True)  # rows in which e0 has no weight
    assert_close(found[:2], others, atol=1e-5, rtol=0)
    assert_close(found.sum(dim=-1), torch.ones(found.shape[:2]))
    assert (found[2] > 0).all()

    mixed.pcm.head.weight.zero_()
    still = mixed.compute_expert_weights(**ids, preference=weights)
    assert_close(still, (weights / weights.sum(dim=1, keepdim=True))[:, None].expand_as(still), atol=1e-6, rtol=0)


def test_the_reference_runs_as_one_more_row_of_the_same_pass():
    model = make_ensemble([tiny_llama(1)], [(0, [5], [6]), (0, [7, 8], [9])], merge="product")
    calls = []
    model.backbones[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model(torch.tensor([CONTEXT]), preference=["e0", "e1"])
    assert calls == [3]
