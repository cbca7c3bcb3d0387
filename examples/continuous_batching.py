"""
Continuous batching: requests under different preferences join and leave a running batch, one token of each at a step.

    python examples/continuous_batching.py
"""

import argparse

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.scheduler import Request, Scheduler

QUESTIONS = [
    ("What is gravity?", {"friendly": 1.0}),
    ("How do I learn to cook?", {"simple": 1.0, "expert": 0.5}),
    ("Why is the sky blue?", ["simple", "friendly"]),
    ("What does a bank do?", "expert"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--quick", action="store_true", help="6 tokens")
    arguments = parser.parse_args()
    tokens = 6 if arguments.quick else arguments.tokens

    smollm2 = demo.fetch_smollm2()  # "HuggingFaceTB/SmolLM2-135M-Instruct", or a model of yours
    experts = {
        "simple": {"model": smollm2, "prompt": "Answer so that an elementary school student understands."},
        "expert": {"model": smollm2, "prompt": "Answer so that only a PhD student in the field understands."},
        "friendly": {"model": smollm2, "prompt": "Answer in a friendly way, like a close friend."},
    }
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=smollm2, pcm_layers=4)

    question_of = {}  # by request
    for question, preference in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        question_of[Request(inputs["input_ids"], preference, max_new_tokens=tokens)] = question

    # At most three run at once. A server would add each request when it arrives, and call `step` in a loop.
    scheduler = Scheduler(model, max_rows=3)
    coming = list(question_of)
    step = 0
    while coming or scheduler.waiting or scheduler.running:
        if coming and step % 3 == 0:
            request = coming.pop(0)
            scheduler.add(request)
            print(f"step {step}: {question_of[request]!r} has arrived")

        for request in scheduler.step():
            answer = model.tokenizer.decode(request.tokens, skip_special_tokens=True)
            print(f"step {step}: {question_of[request]!r}, {request.preference}, has left with: {answer}")
        step += 1


if __name__ == "__main__":
    main()
