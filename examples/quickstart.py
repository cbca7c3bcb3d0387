"""
Six experts on one SmolLM2-135M, whose wishes add up token by token under a trained PCM: one question, under several
preferences, as weights and in words.

    python examples/quickstart.py
    python examples/quickstart.py --preference friendly elementary=2,concise=-0.5 --words "Be brief"
"""

import argparse
import subprocess
import sys
import timeit
from functools import partial
from statistics import median

from rich.console import Console

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.terminal import parse_preference, stream_answers, weights_table

NAMES = list(demo.PREFERENCES)
PREFERENCES = [Preference({"elementary": 1.0}), Preference({"elementary": 1.0, "friendly": 0.5, "concise": 0.5})]
WORDS = ("Be very brief, and a little bit funny.",)
FRESH_INTERPRETER = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
inputs = model.tokenizer("Gravity is", return_tensors="pt")
print(model.generate(**inputs, preference="friendly", max_new_tokens=16, do_sample=False).tolist())
"""


def seconds_per_token(model, inputs, **options) -> float:
    options |= {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    return median(timeit.repeat(lambda: model.generate(**inputs, **options), number=1, repeat=3)) / 16


def main():
    parse = partial(parse_preference, names=NAMES, adds_up=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="What is gravity?")
    parser.add_argument("--preference", type=parse, action="extend", nargs="+", help="experts and weights")
    parser.add_argument("--words", action="extend", nargs="+", help="preferences in words")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer (default 60)")
    parser.add_argument("--output", default="ensemble", help="folder to save the ensemble in (default ensemble)")
    arguments, console = parser.parse_args(), Console(markup=False)
    if not (arguments.preference or arguments.words):
        arguments.preference, arguments.words = PREFERENCES, WORDS

    model = demo.trained_ensemble(merge="product")
    preferences = {preference.label: preference for preference in arguments.preference or []}
    for text in arguments.words or []:
        (preferences[f"“{text}”"],) = Preference.parse_batch(model.config, 1, None, text, None, model.tokenizer)
    chat = [{"role": "user", "content": arguments.question}]
    inputs = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    console.rule(arguments.question)
    sequences = stream_answers(model, inputs, preferences, arguments.tokens, console)
    console.print()
    console.print(weights_table(model, sequences, preferences, inputs["input_ids"].shape[1]))

    alone = seconds_per_token(model.backbones[0], inputs)
    console.print(f"{1 / alone:5.1f} tokens per second for the plain model")
    for names in (NAMES[::2], NAMES):
        merged = seconds_per_token(model, inputs, preference=names)
        ratio = f"{merged / alone:.2f}× the time of one"
        console.print(f"{1 / merged:5.1f} tokens per second for {len(names)} experts, base model and PCM: {ratio}")

    model.save_pretrained(arguments.output)
    inputs = model.tokenizer("Gravity is", return_tensors="pt")
    here = model.generate(**inputs, preference="friendly", max_new_tokens=16, do_sample=False).tolist()
    command = [sys.executable, "-c", FRESH_INTERPRETER, arguments.output]
    there = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert there.strip() == str(here), "the loaded ensemble wrote another text"
    console.print(f"Saved in {arguments.output!r}; a fresh interpreter loaded it and wrote the same text.")


if __name__ == "__main__":
    main()
