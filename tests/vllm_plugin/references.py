"""
Write small ensembles, and what this library's own `generate` answers with them, for an environment that has vLLM.

    python tests/vllm_plugin/references.py FOLDER

vLLM brings an older transformers than ensembles run with, so that no process can do both. FOLDER gets, for each
ensemble, its checkpoint and `<name>.json`: a list of requests with `extra_args` (as vLLM takes them), `prompt`,
`tokens`, `logprobs` of each, and the log-probabilities of the `prompt`'s own tokens.
"""

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer  # noqa: E402
from hub_clients import client_environment  # noqa: E402
from local_hub import LocalHub  # noqa: E402
from test_lora import peft_adapter  # noqa: E402

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo  # noqa: E402

NAMES = ("brief", "kind", "plain", "rude")
TOKENS = 12
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # this and small adapters: float32 is then within 4e-5 of float64
}

PROMPTS = {"brief": "Be brief, in all that you say.", "plain": "Talk plainly."}

BOS_TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ m['role'] + m['content'] + '<e>' }}{% endfor %}"

# What a request may say, as JSON carries it; over HTTP, mappings as strings
ASKED = [
    {},
    {"preference": "kind"},
    {"preference": ["brief", "rude"]},
    {"preference": {"brief": 1.0, "kind": 0.5, "plain": 0.25}},
    {"preference": '{"rude": 0.3, "plain": 2}'},
    {"preference": [0.0, 2.0, 0.5, 0.0]},
    {"preference": {"kind": 1.0}, "preference_text": "Be nice, and quick."},
    {"preference_text": "Say it plainly."},
    {"preference": ["plain", "kind"], "preference_ids": [40, 41, 42, 43]},
]
SIGNED = [{"preference": {"kind": 1.5, "rude": -0.5}}, {"preference": {"brief": -1.0}}]


def prompts() -> list[list[int]]:
    """Contexts of all lengths, two of them alike at the beginning."""
    generator = torch.Generator().manual_seed(7)
    lengths = (5, 12, 33, 64, 130, 180, 200, 7)
    texts = [torch.randint(10, 99, (length,), generator=generator).tolist() for length in lengths]
    texts[6][:150] = texts[5][:150]
    return texts


# One expert that cannot be added, which a request may not ask for
OTHERS_TOO = {"merge": "adapters", "prompts": {"plain": "Be yourself."}, "default_preference": {"kind": 1.0}}


def make_ensemble(
    backbone, folder: Path, repository: str | None = None, prompts: dict[str, str] | None = None, **options
) -> PCMEnsembleForCausalLM:
    """Three adapters of unlike ranks, scales and layers on one backbone, and the backbone; some with prompts."""
    backbone.save_pretrained(folder / "backbone")
    adapters = {
        "brief": {"r": 4, "lora_alpha": 3},
        "kind": {"r": 3, "lora_alpha": 2, "use_rslora": True},
        "rude": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    }
    experts = {}
    for seed, name in enumerate(NAMES):
        experts[name] = {"model": repository or backbone, "description": f"Be {name}."}
        if prompts and name in prompts:
            experts[name]["prompt"] = prompts[name]
        if name in adapters:
            experts[name]["adapter"] = peft_adapter(folder / name, backbone, seed, **adapters[name])

    if options.get("merge") == "adapters":
        # Each expert needs one there, which may change nothing.
        experts["plain"]["adapter"] = peft_adapter(folder / "plain", backbone, 9, r=1, target_modules=["o_proj"])
    pcm = tiny_llama(9, **SIZES | {"num_attention_heads": 4, "hidden_size": 128})
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=pcm, **{"tokenizer": tiny_tokenizer()} | options)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.pcm.head.weight, std=0.1)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def answer(model: PCMEnsembleForCausalLM, prompt: list[int], extra_args: dict) -> dict:
    """Answer greedily, and score answer and prompt by forward passes."""
    told = dict(extra_args)
    if isinstance(told.get("preference"), str) and told["preference"].startswith("{"):
        told["preference"] = json.loads(told["preference"])
    if "preference_ids" in told:
        told["preference_ids"] = torch.tensor(told["preference_ids"])

    ids = torch.tensor([prompt])
    sequence = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **told)
    log_probs = model(sequence, **told).logits[0, :-1].log_softmax(dim=-1)
    of_tokens = log_probs.gather(1, sequence[0, 1:, None])[:, 0].tolist()
    return {
        "extra_args": extra_args,
        "prompt": prompt,
        "tokens": sequence[0, len(prompt) :].tolist(),
        "logprobs": of_tokens[len(prompt) - 1 :],
        "prompt_logprobs": of_tokens[: len(prompt) - 1],
        "next": log_probs[len(prompt) - 1].tolist(),
    }


def write(model: PCMEnsembleForCausalLM, folder: Path, name: str, asked: list[dict], texts: list[list[int]]):
    model.save_pretrained(folder / name)
    lines = []
    for number, text in enumerate(texts):
        lines += [answer(model, text, asked[(number + step) % len(asked)]) for step in (0, 3, 5)]
    (folder / f"{name}.json").write_text(json.dumps(lines))


def push(folder: Path):
    """Push a thin checkpoint, in a process that knows a Hub."""
    model = make_ensemble(tiny_llama(1, **SIZES), folder / "parts" / "thin", "someone/base")
    model.push_to_hub("owner/ensemble", thin=True)
    write(model, folder, "thin", ASKED, prompts())


def write_hub(folder: Path):
    """Write what stands on a Hub after that."""
    base = folder / "parts" / "base"
    tiny_llama(1, **SIZES).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    with LocalHub() as hub, tempfile.TemporaryDirectory() as home:  # a cache of an earlier run has an earlier base
        hub.add("someone/base", base)
        command = [sys.executable, __file__, str(folder), "--push"]
        subprocess.run(command, env=client_environment(hub, Path(home), "hf_owner"), check=True)
        (folder / "hub.pickle").write_bytes(pickle.dumps(hub.repositories))


def main(folder: Path):
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    llama, texts = tiny_llama(1, **SIZES), prompts()
    ensembles = {
        "probabilities": (llama, {}, ASKED),
        "top-k": (llama, {"expert_top_k": 5}, ASKED),
        "logits": (llama, {"merge": "logits"}, ASKED),
        "product": (llama, {"merge": "product"}, ASKED + SIGNED),
        "product-top-k": (llama, {"merge": "product", "expert_top_k": 8}, ASKED + SIGNED),
        "reference": (llama, {"merge": "product", "reference": "plain"}, [{"preference": "kind"}, *SIGNED]),
        "adapters": (llama, {"merge": "adapters"}, ASKED + SIGNED),
        "adapters-and-a-prompt": (
            llama,
            OTHERS_TOO,
            [{"preference": "kind"}, {"preference": {"brief": 0.5, "rude": -1}}],
        ),
        "prompted": (llama, {"prompts": PROMPTS}, ASKED),
        "prompted-product": (llama, {"prompts": PROMPTS, "merge": "product", "reference": "plain"}, SIGNED),
        "qwen2": (tiny_qwen2(2, **SIZES), {"default_preference": {"kind": 1.0, "rude": 0.5}}, ASKED),
    }
    for name, (backbone, options, asked) in ensembles.items():
        write(make_ensemble(backbone, folder / "parts" / name, **options), folder, name, asked, texts)

    # Contexts with BOS, one without, and one that is nothing else
    begins = [[1, *text] for text in texts[:6]] + [texts[6], [1]]
    bos = make_ensemble(llama, folder / "parts" / "bos", prompts=PROMPTS, tokenizer=tiny_tokenizer(BOS_TEMPLATE))
    assert bos.config.prefix_bos_token_id == 1
    write(bos, folder, "bos", ASKED, begins)

    zeroed = make_ensemble(llama, folder / "parts" / "zeroed")
    zeroed.pcm.head.weight.data.zero_()
    write(zeroed, folder, "zeroed", ASKED, texts)

    for merge in ("probabilities", "adapters"):
        model = demo.trained_ensemble(merge=merge, dtype=torch.float32)
        chats = [[{"role": "user", "content": text}] for text in ("What is gravity?", "Why is the sky blue?")]
        texts = [model.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
        asked = [{"preference": {"elementary": 1.0, "friendly": 0.5}}, {"preference_text": "Be very concise."}]
        write(model, folder, f"smollm2-{merge}", asked, texts)

    write_hub(folder)


if __name__ == "__main__":
    work = push if "--push" in sys.argv else main
    work(Path(sys.argv[1]))
