"""Does an answer answer? The reward, on the real SmolLM2, and the judge, on the real MiniLM."""

import re

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.evaluation import Comparison, judge_answers, make_cases
from modeling_pcm_ensemble.evaluation.answering_judge import AnsweringJudge, without_copies
from modeling_pcm_ensemble.evaluation.embeddings import SentenceEmbedder
from modeling_pcm_ensemble.rewards.answering import AnsweringReward, answering_constant, copied_and_new
from modeling_pcm_ensemble.rewards.quality import TextQuality

# prompt: an answer that uses few of its words
ANSWERS = {
    "Why is the sky blue?": "Air scatters short waves of sunlight more than long ones, as Rayleigh discovered.",
    "How do I bake bread?": "Mix flour, water, yeast and salt, knead the dough, let it rise, and heat the oven.",
    "What do cats eat?": "They are carnivores and need meat, such as chicken, fish or mice, with taurine and protein.",
    "How can I save money?": "Set a monthly budget, spend less on restaurants, and put each bonus in a bank.",
    "Who was Napoleon?": "A French general who became emperor in 1804, conquered much of Europe and lost at Waterloo.",
}
PROMPTS = list(ANSWERS)
TEXTS = list(ANSWERS.values())
SHUFFLED = [*TEXTS[1:], TEXTS[0]]
CHAT = ["Sure, I'd love to help! What a fun thing to ask, my friend. I'm so happy that you came to me with it!"] * 5
KEYWORDS = [f"{chat} {prompt} I love it!" for chat, prompt in zip(CHAT, PROMPTS)]
WRONG = {"shuffled": SHUFFLED, "chat": CHAT, "chat that repeats the prompt": KEYWORDS, "the prompt": PROMPTS}


def chats(prompts: list[str]) -> list[list[dict]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


@pytest.fixture(scope="module")
def smollm2() -> TextQuality:
    model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=torch.float32)
    return TextQuality(model, AutoTokenizer.from_pretrained(demo.fetch_smollm2()))


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def tiny_quality() -> TextQuality:
    return TextQuality(tiny_llama(3, max_position_embeddings=512), tiny_tokenizer(), batch_size=3)


@pytest.fixture
def tiny() -> TextQuality:
    return tiny_quality()


@pytest.mark.real_model
def test_the_reward_is_higher_for_an_answer_than_for_what_only_looks_like_one(smollm2):
    reward = AnsweringReward(smollm2, PROMPTS, others=2)
    rewards = torch.tensor(reward(PROMPTS * 5, sum(WRONG.values(), TEXTS))).view(5, 5)  # (kinds, prompts)
    for kind, of_kind in zip(WRONG, rewards[1:]):
        assert (rewards[0] > of_kind).all(), kind


def test_what_is_saved_is_the_difference_to_other_prompts_on_words_that_the_prompt_has_not(tiny):
    reward = AnsweringReward(tiny, ["why?", "a cat", "go on"], others=2)
    own, first, second = (tiny.token_nll([prompt], ["oh why so"])[0] for prompt in ("why?", "a cat", "go on"))
    of_tokens = (first + second) / 2 - own  # (9,)
    of_tokens[[2, 3, 4, 5, 6]] = 0  # " why "; this tokenizer has a token for each letter
    saved, of_copy, of_nothing = reward.saved(["why?"] * 3, ["oh why so", "Why? Why!", ""])
    assert saved == pytest.approx(of_tokens.mean().item(), abs=1e-5)
    assert of_copy == of_nothing == 0


def test_the_reward_of_a_completion_depends_on_nothing_but_it_and_its_prompt():
    def reward(prompts: list, texts: list, pool: list = PROMPTS) -> list[float]:
        """Of one that holds nothing that was read before."""
        return AnsweringReward(tiny_quality(), pool, others=3, constant=(0.0, 1.0))(prompts, texts)

    together = reward(PROMPTS, TEXTS)
    alone = [reward([prompt], [text])[0] for prompt, text in reversed(ANSWERS.items())]
    as_chats = reward(chats(PROMPTS), [[{"role": "assistant", "content": text}] for text in TEXTS])
    other_pool = reward(PROMPTS, TEXTS, chats(PROMPTS) + PROMPTS)
    for values in (alone[::-1], as_chats, other_pool):
        assert values == pytest.approx(together, abs=1e-4)


def test_what_was_read_is_not_read_again(tiny):
    read = []
    tiny.model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    tiny.features(PROMPTS, TEXTS)
    assert sum(read) == 2 * len(TEXTS)  # with the prompt, and without
    AnsweringReward(tiny, PROMPTS, constant=(0.0, 1.0))(PROMPTS, TEXTS)
    assert sum(read) == 3 * len(TEXTS)  # after another prompt


def test_the_constant_standardises_the_base_models_answers(tiny):
    reward = AnsweringReward(tiny, PROMPTS, constant=(0.0, 1.0))
    reward.constant = answering_constant(reward, PROMPTS, TEXTS)
    rewards = torch.tensor(reward(PROMPTS, TEXTS))
    assert_close(rewards.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(rewards.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", "...", "你好", "a" * 300, "!!!! 😀😀", "Why? Why, why!"])
def test_no_text_gets_more_than_three_deviations(tiny, text):
    (value,) = AnsweringReward(tiny, PROMPTS, constant=(0.0, 0.01))(["why?"], [text])
    assert -3 <= value <= 3


@pytest.mark.parametrize(("pool", "others"), [(PROMPTS, 5), (PROMPTS, 0), (["why?"] * 9, 1)])
def test_a_pool_without_enough_different_prompts_is_refused(tiny, pool, others):
    with pytest.raises(
        ValueError, match=f"compared with {others} others, out of a pool of {len(set(pool))} different"
    ):
        AnsweringReward(tiny, pool, others)


def test_words_of_the_prompt_are_found_in_an_answer_whatever_their_case():
    text = "THE sky isn't green; don’t look"
    copied, new = copied_and_new("Why is the sky blue? Don’t ask!", text)
    assert [text[word] for word in copied] == ["THE", "sky", "don’t"]
    assert [text[word] for word in new] == ["isn't", "green", "look"]
    assert without_copies("Why is the sky blue? Don’t ask!", text) == "isn't green; look"


@pytest.mark.real_model
def test_embeddings_are_the_mean_of_hidden_states_at_length_one(embedder):
    """A text is embedded alike whatever it is batched with, and what means alike lies near."""
    for text, found in zip(TEXTS, embedder(TEXTS)):
        with torch.no_grad():
            hidden = embedder.model(**embedder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert_close(found, torch.nn.functional.normalize(hidden.mean(dim=0), dim=0), atol=1e-5, rtol=0)

    cat, kitten, rates = embedder(["A cat sits on a mat.", "A kitten lies on a rug.", "Interest rates rose."])
    assert cat @ kitten > 0.4 > 0.2 > cat @ rates
    assert embedder(["word " * 2000]).norm().item() == pytest.approx(1.0)


@pytest.mark.real_model
def test_the_judge_finds_the_prompt_of_an_answer_and_none_of_chat_or_copies(embedder):
    judge = AnsweringJudge(chats(PROMPTS), embedder)
    assert judge.ranks(chats(PROMPTS), TEXTS) == [1.0] * 5
    assert judge.ranks(chats(PROMPTS), PROMPTS) == [0.0] * 5
    for kind, texts in WRONG.items():
        assert sum(judge.ranks(chats(PROMPTS), texts)) / 5 <= 0.6, kind


@pytest.mark.real_model
def test_the_judge_compares_answers_whatever_the_preference(embedder):
    cases = make_cases(chats(PROMPTS), [Preference({"concise": 1.0})])
    judge = AnsweringJudge(chats(PROMPTS), embedder)
    assert (judge_answers(judge, cases, TEXTS, PROMPTS).wins == 1).all()
    (tie,) = judge.judge([Comparison(chats(PROMPTS)[0], Preference({"a": 1.0}), TEXTS[0], TEXTS[0])])
    assert tie.winner == 0.5
    assert judge.judge([]) == []


@pytest.mark.real_model
def test_a_judge_of_one_prompt_is_refused(embedder):
    with pytest.raises(ValueError, match=re.escape("among two or more, got 1")):
        AnsweringJudge(chats(PROMPTS[:1]) * 2, embedder)
