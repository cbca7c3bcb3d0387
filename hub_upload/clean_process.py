"""
What somebody does who has not got this package. Run as a script:

    python clean_process.py logits SOURCE REVISION INPUT OUTPUT OPTIONS   # input_ids in, logits and tokens out
    python clean_process.py code FILE                             # the code blocks of a model card, one after another

INPUT and OUTPUT are safetensors, OPTIONS what `from_pretrained` is given, as JSON. After --with-package it is somebody
who has got it.
"""

import json
import sys
from collections.abc import Callable

MODULE = "modeling_pcm_ensemble"
LOGITS = ("default", "preferred")  # under two preferences


def logits(source: str, revision: str, inputs: str, outputs: str, options: str):
    """Write what [`run`] gives of the model of a folder or repository."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, revision=revision or None, trust_remote_code=True, **json.loads(options)
    )
    save_file(run(model, load_file(inputs)["input_ids"], torch), outputs)


def run(model, input_ids, torch) -> dict:
    """Log-probabilities of a text, under two preferences, and the tokens that greedy decoding adds to it."""
    preferences = dict(zip(LOGITS, (None, dict(zip(names_to_ask_for(model.config), (1.0, 0.5))))))
    with torch.no_grad():
        found = {
            name: model(input_ids, preference=preference).logits.float().contiguous()
            for name, preference in preferences.items()
        }
    return found | {"tokens": model.generate(input_ids, max_new_tokens=8, do_sample=False).contiguous()}


def names_to_ask_for(config) -> list[str]:
    """Name the experts that may have a weight; `config` is of the checkpoint's own code, which may be an older one."""
    experts = [expert for expert in config.experts if expert["name"] in config.weighted_names]
    if config.merge == "adapters":
        experts = [expert for expert in experts if expert["adapter"] and not expert["prompt_ids"]]
    return [expert["name"] for expert in experts]


def code(path: str):
    """Run a file."""
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[0] = ""  # this folder's files are not what the card's code may import
    arguments = sys.argv[1:]
    if arguments[0] == "--with-package":
        del arguments[0]
    else:
        sys.modules[MODULE] = None  # type: ignore[assignment]  # by which Python hides the package
    commands: dict[str, Callable[..., None]] = {"logits": logits, "code": code}
    commands[arguments[0]](*arguments[1:])
