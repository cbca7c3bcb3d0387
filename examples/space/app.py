"""
One question under two preferences, side by side: which expert carries each token, and how the experts' weights move
over the answer. Or along a path: as the weight goes from one expert to another.

    pip install -r requirements.txt && python app.py FOLDER_OR_REPOSITORY

As a Space of the Hugging Face Hub, the ensemble is what the variable ENSEMBLE names. Votes go into votes.csv (VOTES
names another file), in the form that `HumanVotes` of the evaluation reads. On ZeroGPU, answers have a GPU; elsewhere
`spaces.GPU` does nothing.
"""

import csv
import itertools
import math
import os
import queue
import sys
import threading
from functools import partial

import gradio as gr
import matplotlib
import spaces  # before torch, whose CUDA calls it holds back on ZeroGPU
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

COLUMNS = ("prompt", "preference", "first", "second", "choice")
CHOICES = {"Left": "first", "Neither": "tie", "Right": "second"}
SIDES = ("left", "right")
MOST_TOKENS = 1000  # of a question: logits of every expert are held for all of them
PATH = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the weight, what the second expert has
FORMULAS = tuple("=+-@\t\r\n＝＋－＠")  # what makes a spreadsheet run a cell
WRITING = threading.Lock()


class TokenQueue(BaseStreamer):
    """Tokens of all rows as they come, `(batch,)` each; then None, or the exception that ended them."""

    def __init__(self):
        self.steps = queue.Queue()
        self.prompt_seen = False

    def put(self, value):
        if self.prompt_seen:
            self.steps.put(value)
        self.prompt_seen = True

    def end(self):
        self.steps.put(None)


class Stopped(StoppingCriteria):
    """Ends generation whose reader has gone away."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)


def load_ensemble(source: str | None, revision: str | None = None, endpoints: str = ""):
    """
    Load an ensemble and run its code: from a folder or a repository, on a GPU if there is one. It may ask the
    `endpoints`: addresses, each with `=VARIABLE` behind it where that environment variable holds its key.
    """
    if not source:
        raise ValueError("Name an ensemble: as argument, or, in a Space, by the variable ENSEMBLE.")
    options = {"revision": revision, "trust_remote_code": True}
    if endpoints:
        named = dict(entry.partition("=")[::2] for entry in endpoints.split())
        options |= {
            "allow_endpoints": list(named),
            "endpoint_keys": {where: key for where, key in named.items() if key},
        }
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if model.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer. Save the ensemble with one.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def encode(model, question: str) -> torch.Tensor:
    """Encode a question up to where the answer begins, `(1, tokens)`."""
    if model.tokenizer.chat_template is None:
        inputs = model.tokenizer(question, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": question}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = model.tokenizer.apply_chat_template(chat, **options)
    return inputs["input_ids"].to(model.device)


def preferences_of(model, values: list) -> tuple[list[dict[str, float]], list[str | None]]:
    """Read weights and words of both sides from the controls' values; words alone may choose among all experts."""
    names = model.config.expert_names
    middle = len(names) + 1  # behind a side's sliders stands its box for words
    weights, words = [], []
    for side in (values[:middle], values[middle:]):
        text = (side[-1] or "").strip() or None
        chosen = {name: float(weight) for name, weight in zip(names, side) if weight}
        weights.append(chosen or (dict.fromkeys(model.config.weighted_names, 1.0) if text else {}))
        words.append(text)
    return weights, words


def stream_tokens(model, input_ids, weights, words, max_new_tokens: int, temperature: float):
    """Yield the tokens of all answers so far, `(answers, tokens)`, as generation goes on beside."""
    streamer = TokenQueue()
    gone = threading.Event()
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    def generate():
        try:
            model.generate(
                input_ids.repeat(len(weights), 1),
                preference=weights,
                preference_text=words if any(words) else None,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=[Stopped(gone)],
                **sampling,
            )
        except Exception as error:  # belongs to whoever reads
            streamer.steps.put(error)

    threading.Thread(target=generate, daemon=True).start()
    steps = []
    try:
        while (step := streamer.steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            steps.append(step)
            yield torch.stack(steps, dim=1)
    finally:
        gone.set()


def cut_at_end(model, tokens: torch.Tensor) -> list[int]:
    """Cut an answer's tokens before the first that ends it."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(itertools.takewhile(lambda token: token not in ends, tokens.tolist()))


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """Give the text that each token adds; a character of several tokens comes with its last one."""
    texts = [""] + [tokenizer.decode(ids[:end]).rstrip("�") for end in range(1, len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def explain(model, input_ids, answer: list[int], weights: dict[str, float], words: str | None):
    """Give tokens with the expert that contributed most to each, and weights at each: `(tokens, experts)`."""
    ids = torch.cat([input_ids, torch.tensor([answer], device=input_ids.device)], dim=1)
    given = {"preference": [weights], "preference_text": words}
    start = input_ids.shape[1] - 1
    with torch.no_grad():
        expert_weights = model.compute_expert_weights(ids[:, :-1], **given)[0, start:].cpu()
        if model.config.merge == "adapters" or not weights:  # one model: no expert predicts apart
            carriers = [None] * len(answer)
        else:
            try:
                shares = model.attribute(ids, **given)
            except ValueError:  # generation, which does not read its last token, may end behind the longest context
                shares = model.attribute(ids[:, :-1], **given)
            most, experts = shares[0, start:].max(dim=-1)
            names = [model.config.expert_names[index] for index in experts.tolist()]
            carriers = [name if share > 0 else None for name, share in zip(names, most.tolist())]

    return list(itertools.zip_longest(pieces(model.tokenizer, answer), carriers)), expert_weights


def draw(expert_weights: torch.Tensor, names: list[str], colors: dict[str, str], adds_up: bool) -> Figure:
    """Draw `(tokens, experts)` over an answer: α, whose parts make 1, as areas, and strengths as lines."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()

    wanted = [index for index in range(len(names)) if expert_weights[:, index].any()]
    tokens, labels = range(len(expert_weights)), [names[i] for i in wanted]
    if adds_up:
        for index, name in zip(wanted, labels):
            axis.plot(tokens, expert_weights[:, index].tolist(), label=name, color=colors[name])
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(ylabel="strength", title="strengths over the answer; 1 is an expert's full tilt")
    else:
        values = expert_weights[:, wanted].T.tolist()
        axis.stackplot(tokens, values, labels=labels, colors=[colors[name] for name in labels])
        axis.set(ylabel="α", title="α over the answer", ylim=(0, 1))

    axis.set(xlabel="token", xlim=(0, max(len(expert_weights) - 1, 1)))
    if labels:
        axis.legend(fontsize=8, loc="lower left")
    return figure


def label(weights: dict[str, float], words: str | None) -> str:
    """Write a preference in the votes: `elementary=2 + concise=0.5`, as the evaluation writes it."""
    equal = set(weights.values()) == {1.0}
    named = " + ".join(name if equal else f"{name}={weight:g}" for name, weight in weights.items()) or "nothing"
    return named if words is None else f"{named}: {words}"


def as_cell(text: str) -> str:
    """Write a text so that a spreadsheet shows it and does not run it; `HumanVotes` of the evaluation reads it."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULAS) else text


def slider(lowest: float, highest: float, value: float, **options) -> gr.Slider:
    """Make a slider that says so where the API sends what is no number."""
    made = gr.Slider(lowest, highest, value, **options)
    read = made.preprocess

    def preprocess(payload):
        if type(payload) not in (int, float) or math.isnan(payload):
            raise gr.Error(f"{made.label!r} must be a number from {lowest} to {highest}, got {payload!r}.")
        return read(payload)

    made.preprocess = preprocess
    return made


def add_vote(path: str, row: tuple[str, ...]):
    """Append a row to the file of votes, which begins with the columns' names."""
    with WRITING, open(path, "a", newline="", encoding="utf-8") as file:
        new = file.tell() == 0
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow([as_cell(text) for text in row])


def stream_answers(model, question, weights, words, max_new_tokens, temperature):
    """Yield the tokens of each answer so far, without its end: lists, one for each preference."""
    try:
        input_ids = encode(model, question)
        for tokens in stream_tokens(model, input_ids, weights, words, int(max_new_tokens), temperature):
            yield [cut_at_end(model, row) for row in tokens]
    except ValueError as error:  # such as a question that is too long
        raise gr.Error(str(error)) from error


def explain_all(model, question, answers, weights, words):
    """Give [`explain`]'s pieces of each answer, and its expert weights; nothing of an answer without tokens."""
    input_ids = encode(model, question)
    explained = [explain(model, input_ids, *row) if row[0] else ([], ()) for row in zip(answers, weights, words)]
    return zip(*explained)


def as_shown(model, answers: list[list[int]]) -> list[list[tuple[str, None]]]:
    """Show each answer's text before it is known who carried which token."""
    return [[(model.tokenizer.decode(ids), None)] for ids in answers]


def check_question(model, question: str | None):
    if not (question or "").strip():
        raise gr.Error("Ask something.")
    if (tokens := len(model.tokenizer.tokenize(question))) > MOST_TOKENS:
        raise gr.Error(f"The question is too long: it has {tokens} tokens. Ask in at most {MOST_TOKENS}.")


def check_sides(model, question, max_new_tokens, temperature, *values):
    check_question(model, question)
    weights, _ = preferences_of(model, list(values))
    if not all(weights) and not model.config.adds_up:
        raise gr.Error("Give each side an expert with a weight above 0, or words.")


def answer_both(model, colors: dict[str, str], question, max_new_tokens, temperature, *values):
    """Yield both answers' text as it comes; at the end tokens by expert, α, and what a vote is about."""
    weights, words = preferences_of(model, list(values))
    for answers in stream_answers(model, question, weights, words, max_new_tokens, temperature):
        yield *as_shown(model, answers), None, None, None

    coloured, expert_weights = explain_all(model, question, answers, weights, words)
    charts = []
    for of_tokens in expert_weights:
        drawn = (of_tokens, model.config.expert_names, colors, model.config.adds_up)
        charts.append(draw(*drawn) if len(of_tokens) else None)
    texts = [model.tokenizer.decode(ids) for ids in answers]
    yield *coloured, *charts, (question, label(weights[0], words[0]), *texts)


def path_weights(first: str, second: str) -> list[dict[str, float]]:
    """Weights of the answers along a path, which sum to 2: in the middle, both experts have 1."""
    return [{first: round(2 - 2 * share, 1), second: round(2 * share, 1)} for share in PATH]


def check_path(model, question, max_new_tokens, temperature, first, second):
    check_question(model, question)
    names = model.config.weighted_names
    if first == second or first not in names or second not in names:
        raise gr.Error(f"Choose two experts of {', '.join(names)}.")


def answer_path(model, question, max_new_tokens, temperature, first, second):
    """Yield the answers along a path between two experts, rows of one batch; at the end tokens by expert."""
    weights, words = path_weights(first, second), [None] * len(PATH)
    titles = [label(wanted, None) for wanted in weights]
    for answers in stream_answers(model, question, weights, words, max_new_tokens, temperature):
        yield [gr.update(value=text, label=title) for text, title in zip(as_shown(model, answers), titles)]

    coloured, _ = explain_all(model, question, answers, weights, words)
    yield [gr.update(value=pieces, label=title) for pieces, title in zip(coloured, titles)]


def vote(votes: str, shown, button):
    """Write down a vote on what is shown, which is forgotten then."""
    if shown is None:
        raise gr.Error("Let both sides answer first.")
    add_vote(votes, (*shown, CHOICES[button]))
    return None, "Thank you."


def side_controls(model, side: str, wanted: int) -> list:
    """Lay out a side's sliders, that of index `wanted` at 1, and its box for words."""
    gr.Markdown(f"### {side.capitalize()}")
    controls = []
    lowest = -1 if model.config.adds_up else 0  # a tilt can be turned around, a share cannot
    for index, expert in enumerate(model.config.experts):
        value, name = float(index == wanted), expert["name"]
        options = {"label": name, "info": expert["description"], "elem_id": f"{side}-{name}"}
        options["interactive"] = name in model.config.weighted_names  # the reference of a product has no weight
        controls.append(slider(lowest, 2, value * options["interactive"], step=0.1, **options))

    words = "Words instead of the descriptions; with all sliders at 0 they choose among all experts"
    return [*controls, gr.Textbox(label=words, elem_id=f"{side}-words")]


def answer_box(title: str, name: str, colors: dict[str, str], show_legend: bool = True) -> gr.HighlightedText:
    return gr.HighlightedText(
        label=title,
        color_map=colors,
        combine_adjacent=True,
        show_legend=show_legend,
        show_inline_category=False,
        elem_id=f"{name}-answer",
    )


def on_gpu(check, answer):
    """
    Let ZeroGPU lend a GPU to `answer`, after `check` has let the controls' values pass: a GPU counts from a visitor's
    quota. Elsewhere, `answer` runs as it is.
    """

    def seconds(question, max_new_tokens, *values) -> int:
        return 30 + int(max_new_tokens) // 2

    @spaces.GPU(duration=seconds)
    def lent(*values):
        yield from answer(*values)

    def checked(*values):
        check(*values)
        yield from lent(*values)

    return checked


def lay_out_sides(model, votes: str, colors: dict[str, str], asked: list):
    """Lay out two preferences side by side, whose answers are voted on; `asked` are the controls above."""
    controls, texts, charts = [], [], []
    with gr.Row():
        for number, side in enumerate(SIDES):
            with gr.Column():
                controls += side_controls(model, side, number)
    run = gr.Button("Answer", variant="primary", elem_id="answer")
    with gr.Row():
        for side in SIDES:
            with gr.Column():
                texts.append(answer_box(f"Answer, {side}", side, colors))
                charts.append(gr.Plot(show_label=False, elem_id=f"{side}-chart"))

    shown = gr.State()
    gr.Markdown("Which answer fits the **left** preference better?")
    with gr.Row():
        buttons = [gr.Button(name, elem_id=f"vote-{CHOICES[name]}") for name in CHOICES]
    thanks = gr.Markdown(elem_id="thanks")

    answer = on_gpu(partial(check_sides, model), partial(answer_both, model, colors))
    run.click(answer, [*asked, *controls], [*texts, *charts, shown], api_name="answer")
    for button in buttons:
        button.click(partial(vote, votes), [shown, button], [shown, thanks], api_name="vote")


def lay_out_path(model, colors: dict[str, str], asked: list):
    """Lay out answers along a path from one expert to another; `asked` are the controls above."""
    names = model.config.weighted_names
    gr.Markdown("Five answers, as the weight goes from one expert to another.")
    with gr.Row():
        ends = [
            gr.Dropdown(names, value=names[0], label="From", elem_id="path-from"),
            gr.Dropdown(names, value=names[-1], label="to", elem_id="path-to"),
        ]
    run = gr.Button("Answer along the path", variant="primary", elem_id="path")
    numbers = range(1, len(PATH) + 1)
    boxes = [answer_box(f"Answer {number}", f"path-{number}", colors, number == 1) for number in numbers]
    answer = on_gpu(partial(check_path, model), partial(answer_path, model))
    run.click(answer, [*asked, *ends], boxes, api_name="path")


def build_app(model, votes: str) -> gr.Blocks:
    """Lay out the page; votes go into the file `votes`."""
    palette = matplotlib.colormaps["tab10"].colors
    colors = {}
    for index, name in enumerate(model.config.expert_names):
        colors[name] = matplotlib.colors.to_hex(palette[index % 10])

    with gr.Blocks(title="PCM Ensemble") as app:
        gr.Markdown("# PCM Ensemble\nOne question, many preferences. Colours: the expert that carried each token.")
        question = gr.Textbox(label="Question", value="What is gravity?", elem_id="question")
        with gr.Row():
            max_new_tokens = slider(8, 256, 64, step=8, label="Most tokens")
            temperature = slider(0, 1.5, 0, step=0.1, label="Temperature (0: the most probable token)")

        asked = [question, max_new_tokens, temperature]
        with gr.Tab("Side by side"):
            lay_out_sides(model, votes, colors, asked)
        if len(model.config.weighted_names) > 1:
            with gr.Tab("From one to another"):
                lay_out_path(model, colors, asked)
    return app


def main():
    source = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ENSEMBLE")
    model = load_ensemble(source, os.environ.get("REVISION"), os.environ.get("ENDPOINTS", ""))
    build_app(model, os.environ.get("VOTES", "votes.csv")).launch()


if __name__ == "__main__":
    main()
