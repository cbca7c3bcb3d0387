"""Judges: rewards that nothing was trained on, language models behind a real server, people's votes."""

import csv
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean, pstdev

import pytest
from conftest import HEADS, SIZES, VOCAB, tiny_tokenizer
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.evaluation import (
    ChatEndpoint,
    Comparison,
    HumanVotes,
    LanguageModelJudge,
    RewardJudge,
    Verdict,
    judge_answers,
    make_cases,
    write_ballot,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import (
    PROXIES,
    held_out_constants,
    held_out_features,
    held_out_rewards,
)
from modeling_pcm_ensemble.evaluation.judges import parse_reply
from modeling_pcm_ensemble.rewards import ModelReward

PROMPT = [{"role": "user", "content": "What is rain?"}]
SIMPLE = "Rain is water that falls from the sky. It makes the plants grow."
LEARNED = "Precipitation, which constitutes the condensation of atmospheric humidity, exhibits considerable variance."
SHORT = "Rain is water that falls."
LONG = SIMPLE + " In 1911 Cherrapunji in India had 2647 centimetres; Mount Waialeale in Hawaii gets rain on 335 days."
KIND = "What a lovely question! Don't you love a happy, wonderful walk in warm rain? It's great fun."
RUDE = "No. Rain is terrible, boring and awful. Never ask that stupid thing."


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("elementary", SIMPLE, LEARNED),
        ("knowledgeable", LEARNED, SIMPLE),
        ("concise", SHORT, LONG),
        ("informative", LONG, SHORT),
        ("friendly", KIND, RUDE),
        ("unfriendly", RUDE, KIND),
    ],
)
def test_held_out_proxies_prefer_what_a_person_would(name, better, worse):
    one, other = held_out_rewards()[name]([PROMPT] * 2, [better, worse])
    assert one > other + 1


def test_held_out_proxies_are_standardised_and_take_any_text():
    texts = [SIMPLE, LEARNED, SHORT, LONG, KIND, RUDE]
    constants = held_out_constants(texts)
    for reward in held_out_rewards(constants).values():
        values = reward([PROMPT] * len(texts), texts)
        assert (fmean(values), pstdev(values)) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    for text in ("", "...", "1 2 3", "\n\n", "你好", "a" * 500, "!!!! 😀😀"):
        assert all(value == value for value in held_out_features(text).values())
    assert set(PROXIES) == set(held_out_rewards())


def test_what_suits_one_dimension_more_than_it_hurts_another_wins():
    rewards = {
        "a": lambda prompts, completions, **_: [
            3.0 if answer[-1]["content"] == "x" else 0.0 for answer in completions
        ],
        "b": lambda prompts, completions, **_: [
            0.0 if answer[-1]["content"] == "x" else 0.5 for answer in completions
        ],
    }
    judge = RewardJudge("rewards", rewards)
    equal, other = judge.judge([Comparison(PROMPT, Preference({"a": a, "b": 1.0}), "x", "y") for a in (1.0, 0.1)])
    assert equal.dimensions == {"a": pytest.approx(0.9526, abs=1e-4), "b": pytest.approx(0.3775, abs=1e-4)}
    assert (equal.winner, other.winner) == (1.0, 0.0)


def llama_reward(positions: int):
    return LlamaForSequenceClassification(
        LlamaConfig(**SIZES | HEADS, max_position_embeddings=positions, num_labels=1)
    )


def gpt2_reward(positions: int):
    config = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=4, n_positions=positions, num_labels=1)
    return GPT2ForSequenceClassification(config)


def roberta_reward(positions: int):
    sizes = SIZES | {"num_attention_heads": 4, "pad_token_id": 1, "max_position_embeddings": positions}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=1))


def opt_reward(positions: int):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=positions, num_labels=1)
    return OPTForSequenceClassification(config)


def deberta_reward(positions: int):
    """Positions are relative, and `positions` is no limit."""
    sizes = SIZES | {"num_attention_heads": 4, "max_position_embeddings": positions, "position_biased_input": False}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, relative_attention=True, num_labels=1))


def test_a_reward_model_judges():
    reward = ModelReward(llama_reward(64), tiny_tokenizer())
    (verdict,) = RewardJudge("model", {"a": reward}).judge([Comparison(PROMPT, Preference({"a": 1.0}), "yes", "no")])
    one, other = reward([PROMPT] * 2, [[{"role": "assistant", "content": text}] for text in ("yes", "no")])
    assert verdict.winner == float(one > other)


@pytest.mark.parametrize(
    ("make", "positions", "most"),
    [
        (gpt2_reward, 16, 16),
        (roberta_reward, 16, 14),
        (opt_reward, 16, 16),
        (deberta_reward, 8, None),
        (llama_reward, 8, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_text_that_a_reward_model_cannot_read_is_refused(make, positions, most):
    reward = ModelReward(make(positions), tiny_tokenizer())
    assert len(reward(["a"], ["b" * ((most or 40) - 1)])) == 1
    if most is not None:
        with pytest.raises(ValueError, match=f"are {most + 1} tokens, but the reward model reads at most {most}"):
            reward(["a", "a"], ["b" * most, "b"])


@pytest.mark.parametrize(
    ("reply", "winner"),
    [("A", "A"), (" b.\n", "B"), ("**TIE**", "TIE"), ("Answer: `B`", "B"), ("<think>A?\nNo.</think>tie", "TIE")],
)
def test_replies_that_say_one_thing_are_read(reply, winner):
    assert parse_reply(reply) == winner


@pytest.mark.parametrize("reply", ["", "A or B", "Both", "A is better than B", "C", "Answer"])
def test_replies_that_do_not_are_refused(reply):
    with pytest.raises(ValueError, match="must reply with A, B or TIE"):
        parse_reply(reply)


class Server(ThreadingHTTPServer):
    """Speaks as much of OpenAI's chat completions as a judge needs; replies are (status, text)."""

    def __init__(self, replies: list[tuple[int, str]]):
        self.replies, self.questions = replies, []
        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


LATE = 0  # as a status: no reply within a second


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(body["messages"][-1]["content"])
        status, text = self.server.replies[min(len(self.server.questions), len(self.server.replies)) - 1]
        if status == LATE:
            time.sleep(1)
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        payload = json.dumps(answer if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


DESCRIPTIONS = {"concise": "Be brief.", "friendly": "Be kind."}
PAIR = Comparison(PROMPT, Preference({"concise": 1.0, "friendly": 1.0}), SHORT, KIND)


def test_a_language_model_is_asked_once_about_each_dimension(tmp_path):
    path = tmp_path / "replies.jsonl"
    with Server([(200, "A"), (200, "B")]) as server:
        judge = LanguageModelJudge("lm", ChatEndpoint(server.url, "m"), DESCRIPTIONS, path, workers=1)
        (verdict,) = judge.judge([PAIR])
        assert verdict == Verdict(0.5, {"concise": 1.0, "friendly": 0.0})
        assert SHORT in server.questions[0]
        assert "Be kind." in server.questions[1]
        again = LanguageModelJudge("lm", ChatEndpoint(server.url, "m"), DESCRIPTIONS, path)
        assert again.judge([PAIR]) == [verdict]
        assert len(server.questions) == 2


def test_a_server_that_fails_or_is_late_at_first_is_asked_again(tmp_path):
    with Server([(503, "busy"), (429, "slow down"), (LATE, ""), (200, "TIE")]) as server:
        endpoint = ChatEndpoint(server.url, "m", timeout=0.3)
        judge = LanguageModelJudge("lm", endpoint, DESCRIPTIONS, tmp_path / "replies.jsonl", workers=1)
        assert judge.judge([PAIR]) == [Verdict(0.5, {"concise": 0.5, "friendly": 0.5})]


def test_equal_answers_are_a_tie_and_nobody_is_asked(tmp_path):
    judge = LanguageModelJudge("lm", None, DESCRIPTIONS, tmp_path / "replies.jsonl")
    assert judge.judge([Comparison(PROMPT, Preference({"concise": 1.0}), "x", "x")]) == [
        Verdict(0.5, {"concise": 0.5})
    ]


@pytest.mark.parametrize(
    ("last", "error"),
    [((500, "broken"), ConnectionError), ((200, "It depends."), ValueError)],
    ids=["down", "nonsense"],
)
def test_what_was_judged_before_a_failure_is_kept(last, error, tmp_path):
    path = tmp_path / "replies.jsonl"
    with Server([(200, "A"), last]) as server:
        endpoint = ChatEndpoint(server.url, "m", max_retries=1)
        with pytest.raises(error):
            LanguageModelJudge("lm", endpoint, DESCRIPTIONS, path, workers=1).judge([PAIR])
    assert len(path.read_text().splitlines()) == 1
    with Server([(200, "B")]) as server:  # it is up again
        (verdict,) = LanguageModelJudge("lm", ChatEndpoint(server.url, "m"), DESCRIPTIONS, path).judge([PAIR])
        assert verdict.dimensions == {"concise": 1.0, "friendly": 0.0}
        assert len(server.questions) == 1


def write_votes(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "preference", "first", "second", "choice"])
        writer.writerows(rows)
    return path


def test_votes_are_averaged_and_those_on_other_pairs_left_out(tmp_path):
    shown, turned = (
        ["What is rain?", "concise + friendly", SHORT, KIND],
        ["What is rain?", "concise + friendly", KIND, SHORT],
    )
    votes = HumanVotes(
        write_votes(tmp_path / "votes.csv", [*shown, "first"], [*shown, "tie"], [*shown, "first"], [*turned, "first"])
    )
    assert votes.judge([PAIR, PAIR.swapped()]) == [Verdict(pytest.approx(5 / 6), {}), Verdict(1.0, {})]
    cases = make_cases([PROMPT], [PAIR.preference, Preference({"concise": 1.0})])
    outcome = judge_answers(votes, cases, [SHORT] * 2, [KIND] * 2)
    assert outcome.wins[0, 0] == pytest.approx((5 / 6 + 0) / 2)
    assert outcome.wins[0, 1] != outcome.wins[0, 1]  # NaN: nobody voted
    assert outcome.position_bias == pytest.approx((5 / 6 + 1) / 2 - 0.5)


def test_votes_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="first, second or tie, got 'left' in line 2"):
        HumanVotes(write_votes(tmp_path / "votes.csv", ["p", "a", "x", "y", "left"]))
    (tmp_path / "other.csv").write_text("prompt,first,second\n")
    with pytest.raises(ValueError, match="no column choice, preference"):
        HumanVotes(tmp_path / "other.csv")


def test_a_ballot_can_be_voted_on_and_read(tmp_path):
    pairs = [Comparison(PROMPT, Preference({"concise": 1.0}), f"ours, {i}", f"theirs {i}") for i in range(20)]
    write_ballot(pairs, tmp_path / "ballot.csv")
    assert HumanVotes(tmp_path / "ballot.csv").judge(pairs) == [None] * 20  # nobody has voted yet
    with (tmp_path / "ballot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sides = [row["first"].startswith("ours") for row in rows]
    assert 4 < sum(sides) < 16  # either way round
    for row in rows:
        row["choice"] = "first" if row["first"].startswith("ours") else "second"
    voted = HumanVotes(write_votes(tmp_path / "votes.csv", *[row.values() for row in rows]))
    outcome = judge_answers(voted, make_cases([PROMPT], [Preference({"concise": 1.0})]), ["ours, 3"], ["theirs 3"])
    assert outcome.wins.tolist() == [[1.0]]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝", "'=", "'"])
def test_no_cell_of_a_ballot_is_a_formula(tmp_path, start):
    pair = Comparison(
        [{"role": "user", "content": f"{start}1+1"}], Preference({"concise": 1.0}), f"{start}2", f"{start}3"
    )
    write_ballot([pair], tmp_path / "ballot.csv")
    with (tmp_path / "ballot.csv").open(newline="", encoding="utf-8") as file:
        *_, row = csv.reader(file)
    assert not any(cell.startswith(tuple("=+-@\t\r＝")) for cell in row)
    voted = HumanVotes(write_votes(tmp_path / "votes.csv", [*row[:4], "first"]))
    assert voted.judge([pair]) != voted.judge([pair.swapped()])
    assert [*voted.judge([pair]), *voted.judge([pair.swapped()])].count(None) == 1
