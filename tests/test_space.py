"""The Space in a real browser: sliders, two streamed answers, colours, charts, a vote."""

import csv
import importlib
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio as gr
import pytest
from conftest import tiny_llama, tiny_tokenizer
from endpoint_server import EndpointServer, save_one_here_one_there
from huggingface_hub import RepoCard
from playwright.sync_api import expect, sync_playwright
from test_lora import lora_ensemble, peft_adapter

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference, demo
from modeling_pcm_ensemble.evaluation import HumanVotes
from modeling_pcm_ensemble.evaluation.judges import Comparison

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
PICTURE = ROOT / "docs" / "space.png"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Address of the running app, and its file of votes."""
    folder = tmp_path_factory.mktemp("space")
    demo.trained_ensemble().save_pretrained(folder / "ensemble")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | settings | {"VOTES": str(folder / "votes.csv")}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "app.py", str(folder / "ensemble")]
        app = subprocess.Popen(command, cwd=SPACE, env=environment, stdout=log, stderr=log)
    try:
        wait_for(port, app, folder / "log")
        yield f"http://127.0.0.1:{port}", folder / "votes.csv"
    finally:
        app.terminate()
        app.wait()


def wait_for(port: int, app: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 180
    while app.poll() is None and time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture
def page(request):
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    space = request.getfixturevalue("space")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(120_000)
        page.goto(space[0])
        yield page
        browser.close()


def move(page, slider: str, value: float):
    number = page.locator(f"#{slider} input[type=number]")
    number.fill(str(value))
    number.press("Tab")


@pytest.mark.real_model
def test_two_preferences_answer_side_by_side_and_are_voted_on(space, page, tmp_path):
    move(page, "left-elementary", 0)
    move(page, "left-knowledgeable", 1)
    move(page, "left-friendly", 1.2)
    move(page, "right-knowledgeable", 0)
    page.locator("#right-words textarea").fill(demo.PREFERENCES["elementary"][1])
    page.locator("#question textarea").fill("What is gravity?")
    page.locator("#answer").click()
    for side in ("left", "right"):
        expect(page.locator(f"#{side}-chart img")).to_be_visible(timeout=120_000)
    answers = {side: page.locator(f"#{side}-answer .textfield").inner_text() for side in ("left", "right")}
    assert all(len(answer) > 50 for answer in answers.values())
    assert answers["left"] != answers["right"]
    legend = page.locator("#left-answer").inner_text()
    assert "friendly" in legend
    colours = page.locator("#left-answer .textfield span[style*=background]").evaluate_all(
        "spans => spans.map(span => span.style.backgroundColor)"
    )
    assert len({colour for colour in colours if colour}) >= 2  # both wanted experts carried tokens
    page.screenshot(path=PICTURE if os.environ.get("WRITE_PICTURES") else tmp_path / "space.png", full_page=True)

    page.locator("#vote-first").click()
    expect(page.locator("#thanks")).to_contain_text("Thank you.")
    votes = HumanVotes(space[1])
    ((prompt, preference, first, second),) = votes.votes
    assert (prompt, preference) == ("What is gravity?", "knowledgeable=1 + friendly=1.2")
    wanted = Preference({"knowledgeable": 1.0, "friendly": 1.2})
    (verdict,) = votes.judge([Comparison([{"role": "user", "content": prompt}], wanted, first, second)])
    assert verdict.winner == 1.0


@pytest.mark.real_model
def test_answers_go_from_one_expert_to_another(page, tmp_path):
    page.get_by_role("tab", name="From one to another").click()
    page.locator("#path").click()
    expect(page.locator("#path-5-answer .textfield span[style*=background]").first).to_be_visible(timeout=120_000)
    boxes = [page.locator(f"#path-{number}-answer") for number in range(1, 6)]
    assert "elementary=1.8 + unfriendly=0.2" in boxes[0].inner_text()
    assert "elementary=0.2 + unfriendly=1.8" in boxes[4].inner_text()
    answers = [box.locator(".textfield").inner_text() for box in boxes]
    assert all(len(answer) > 50 for answer in answers)
    assert answers[0] != answers[4]
    page.screenshot(
        path=PICTURE.with_name("path.png") if os.environ.get("WRITE_PICTURES") else tmp_path / "path.png",
        full_page=True,
    )


@pytest.mark.real_model
def test_what_cannot_be_answered_is_said(page):
    page.locator("#question textarea").fill(" ")
    page.locator("#answer").click()
    expect(page.get_by_text("Ask something.")).to_be_visible()
    page.locator("#question textarea").fill("Why?")
    move(page, "left-elementary", 0)
    page.locator("#answer").click()
    expect(page.get_by_text("Give each side an expert with a weight above 0")).to_be_visible()
    page.locator("#vote-tie").click()
    expect(page.get_by_text("Let both sides answer first.")).to_be_visible()
    move(page, "left-elementary", 1)
    page.locator("#question textarea").fill("why " * 9000)
    page.locator("#answer").click()
    expect(page.get_by_text("Ask in at most 1000.")).to_be_visible()


def test_the_spaces_card_names_what_the_tests_ran_with():
    card = RepoCard.load(SPACE / "README.md")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert card.data.sdk_version == pinned["gradio"]
    assert (SPACE / card.data.app_file).exists()
    assert len(card.data.short_description) <= 60  # the Hub's limit


def test_an_app_without_an_ensemble_says_what_to_do():
    environment = {name: value for name, value in os.environ.items() if name != "ENSEMBLE"}
    result = subprocess.run([sys.executable, "app.py"], cwd=SPACE, env=environment, capture_output=True, text=True)
    assert "Name an ensemble: as argument, or, in a Space, by the variable ENSEMBLE." in result.stderr


@pytest.fixture
def app(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("app")


CELLS = [
    "=1+1",
    "+1",
    "-2 is it",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n-",
    "＝1+1",
    "'=1",
    "''@x",
    "'quoted'",
    "'",
    "",
    "a=1",
    "é",
]


@pytest.mark.parametrize("text", CELLS, ids=repr)
def test_a_vote_is_no_formula_and_is_read_as_it_was(app, tmp_path, text):
    votes = tmp_path / "votes.csv"
    for place in range(4):
        shown = ["What is gravity?", "a", "one", "other"]
        shown[place] = text
        app.add_vote(str(votes), (*shown, "first"))
    with votes.open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells)
    assert [key[place] for place, key in enumerate(HumanVotes(votes).votes)] == [text] * 4


def test_what_is_no_number_is_refused_with_the_sliders_name(app, tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    sliders = [block for block in app.build_app(model, str(tmp_path)).blocks.values() if isinstance(block, gr.Slider)]
    assert len(sliders) == 4
    for slider in sliders:
        for payload in (None, "1", [1], {}, float("nan"), True):
            with pytest.raises(gr.Error, match=f"'{re.escape(slider.label)}' must be a number from .*, got"):
                slider.preprocess(payload)
        with pytest.raises(gr.Error, match="greater than maximum"):
            slider.preprocess(10**9)
        assert slider.preprocess(slider.maximum) == slider.maximum


def test_a_path_goes_from_one_expert_to_another(app):
    experts = {"a": tiny_llama(1), "b": tiny_llama(3)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    steps = list(app.answer_path(model, "what", 4, 0, "a", "b"))
    assert len(steps) > 1
    first, *_, last = steps[-1]
    assert (first["label"], last["label"]) == ("a=1.8 + b=0.2", "a=0.2 + b=1.8")
    assert {carrier for _, carrier in first["value"]} == {"a"}
    assert {carrier for _, carrier in last["value"]} == {"b"}
    for ends in (("a", "a"), ("a", None), ("a", ["b"]), ("c", "a")):
        with pytest.raises(gr.Error, match="Choose two experts of a, b"):
            app.check_path(model, "what", 4, 0, *ends)
    app.check_path(model, "what", 4, 0, "b", "a")


def test_what_a_gpu_of_zerogpu_gives_back_can_be_pickled(app):
    experts = {"a": tiny_llama(1), "b": tiny_llama(3)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    both = app.answer_both(model, {"a": "#ff0000", "b": "#0000ff"}, "what", 4, 0, 1.0, 0.5, "", 0.0, 1.0, "")
    for step in (*both, *app.answer_path(model, "what", 4, 0, "a", "b")):
        pickle.loads(pickle.dumps(step))


def test_an_answer_up_to_the_longest_context_is_explained_but_for_its_last_token(app):
    experts = {"a": tiny_llama(1), "b": tiny_llama(3)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    model.generation_config.eos_token_id = None
    tokens = 62 + 1 - app.encode(model, "w").shape[1]  # two of 64 positions have the BOS and the description
    *_, last = app.answer_both(model, {"a": "#ff0000", "b": "#0000ff"}, "w", 256, 0, 1.0, 0, "", 0, 1.0, "")
    for carrier, coloured, chart in zip("ab", last[:2], last[2:4]):
        assert [name for _, name in coloured] == [carrier] * (tokens - 1) + [None]
        assert chart.axes[0].get_xlim() == (0, tokens - 1)
    *_, boxes = app.answer_path(model, "w", 256, 0, "a", "b")
    assert boxes[0]["value"][-1][1] is None


def test_a_question_that_is_too_long_is_refused(app):
    experts = {"a": tiny_llama(1), "b": tiny_llama(3)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    for check, values in ((app.check_sides, (1.0, 0, "", 0, 1.0, "")), (app.check_path, ("a", "b"))):
        check(model, "w" * app.MOST_TOKENS, 4, 0, *values)
        with pytest.raises(gr.Error, match=r"too long: it has 1001 tokens\. Ask in at most 1000"):
            check(model, "w" * (app.MOST_TOKENS + 1), 4, 0, *values)


def test_an_ensemble_of_one_expert_has_no_path(app, tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    tabs = [block.label for block in app.build_app(model, str(tmp_path)).blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Side by side"]


def test_no_words_are_no_words(app):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer())
    assert app.preferences_of(model, [1, None, 0, " brief "]) == ([{"a": 1.0}, {"a": 1.0}], [None, "brief"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("merge", ["product", "adapters"])
def test_where_tilts_add_up_sliders_go_below_0_and_strengths_are_drawn_as_lines(app, tmp_path, merge):
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(tmp_path / name, backbone, seed) for seed, name in enumerate("ab")}
    model = lora_ensemble(backbone, adapters)
    model.config.merge = merge
    model._tokenizer = tiny_tokenizer()
    colors = {"a": "#ff0000", "b": "#0000ff"}

    sliders = [block for block in app.build_app(model, str(tmp_path)).blocks.values() if isinstance(block, gr.Slider)]
    assert [(slider.minimum, slider.maximum) for slider in sliders if slider.label in "ab"] == [(-1, 2)] * 4

    *_, last = app.answer_both(model, colors, "what", 4, 0, 1.0, -0.5, "", 0, 0, "")
    texts, charts, shown = last[:2], last[2:4], last[4]
    assert shown[:2] == ("what", "a=1 + b=-0.5")
    assert all(len(pieces) > 0 for pieces in texts)
    lines = charts[0].axes[0].get_lines()
    assert {line.get_label() for line in lines} >= {"a", "b"}
    carriers = {carrier for _, carrier in texts[0]}
    assert carriers <= ({None} if merge == "adapters" else {"a", "b"})
    assert {carrier for _, carrier in texts[1]} == {None}  # nothing is wanted: the bare backbone


def test_a_products_reference_has_no_slider_to_move(app, tmp_path):
    experts = {"base": tiny_llama(1), "a": tiny_llama(3)}
    model = PCMEnsembleForCausalLM.from_experts(
        experts, pcm=tiny_llama(2), tokenizer=tiny_tokenizer(), merge="product", reference="base"
    )
    blocks = app.build_app(model, str(tmp_path)).blocks.values()
    sliders = {block.label: block for block in blocks if isinstance(block, gr.Slider)}
    assert not sliders["base"].interactive
    assert sliders["a"].interactive
    assert app.preferences_of(model, [0, 0, "kind", 0, 1, ""])[0] == [{"a": 1.0}, {"a": 1.0}]


def test_a_space_asks_the_endpoints_that_it_is_told_of(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    app = importlib.import_module("app")
    monkeypatch.setenv("PCM_TEST_KEY", "abc")
    backbones = {name: tiny_llama(seed, max_position_embeddings=128) for seed, name in enumerate(("here", "there"))}
    with EndpointServer(backbones, tiny_tokenizer(), key="abc") as server:
        save_one_here_one_there(server, tmp_path / "ensemble")
        with pytest.raises(PermissionError, match="names the endpoint"):
            app.load_ensemble(str(tmp_path / "ensemble"))

        loaded = app.load_ensemble(str(tmp_path / "ensemble"), endpoints=f"{server.endpoint}=PCM_TEST_KEY")
        ids = app.encode(loaded, "hello")
        weights = [{"here": 1.0, "there": 1.0}, {"there": 1.0}]
        *_, tokens = app.stream_tokens(loaded, ids, weights, [None, None], 4, 0.0)
        coloured, expert_weights = app.explain(loaded, ids, tokens[1].tolist(), weights[1], None)
    assert {name for _, name in coloured} == {"there"}
    assert expert_weights.tolist() == [[0.0, 1.0]] * 4
