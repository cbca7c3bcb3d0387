"""Tiny random models, and the mixture worked out by hand: one expert, one row at a time, without cache or batch."""

import os

import pytest
import torch
from hub_clients import PUSH_ENSEMBLE, output, run_client
from hypothesis import settings
from local_hub import LocalHub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    logging,
)

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

collect_ignore = ["vllm_plugin"]  # in an environment of its own: tests/vllm_plugin/run

VOCAB = 99
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_llama(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES | HEADS | {"max_position_embeddings": 64, "initializer_range": 0.3} | kwargs)
    return LlamaForCausalLM(config).eval()


def tiny_qwen2(seed: int = 0, **kwargs) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | HEADS | {"initializer_range": 0.3} | kwargs)).eval()


def tiny_mistral(seed: int = 0, **kwargs) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(**SIZES | HEADS | {"sliding_window": 4, "initializer_range": 0.3} | kwargs)
    return MistralForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0, **kwargs) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes | tokens | kwargs)).eval()


def make_ensemble(backbones, experts, seed: int = 0, **config_kwargs) -> PCMEnsembleForCausalLM:
    """An ensemble whose PCM has opinions. `experts` lists (backbone index, prompt ids, description ids)."""
    entries = [
        {"name": f"e{i}", "backbone": backbone, "prompt_ids": prompt, "description_ids": description}
        for i, (backbone, prompt, description) in enumerate(experts)
    ]
    body = tiny_llama(seed + 100, hidden_size=16, num_attention_heads=2).model
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = PCMEnsembleConfig(
        backbones=[model.config for model in backbones], pcm=body.config, experts=entries, **tokens | config_kwargs
    )
    model = PCMEnsembleForCausalLM(config, backbones, body).eval()
    torch.manual_seed(seed + 200)
    torch.nn.init.normal_(model.pcm.head.weight)
    model.generation_config.eos_token_id = None  # answers of one length, unless a test sets it
    return model


@pytest.fixture
def ensemble() -> PCMEnsembleForCausalLM:
    """Three architectures, one of them tied and prompted, and a PCM with opinions."""
    model = PCMEnsembleForCausalLM.from_experts(
        {
            "a": {"model": tiny_llama(1, tie_word_embeddings=True), "prompt": "Be brief."},
            "b": tiny_gpt2(2),
            "c": tiny_qwen2(3),
        },
        pcm=tiny_llama(4),
        pcm_layers=1,
        tokenizer=tiny_tokenizer(),
    )
    torch.manual_seed(5)
    torch.nn.init.normal_(model.pcm.head.weight)
    return model


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """What stands on a Hub after the author's pushes, by whether they were thin, and the logits' sum."""
    folder, found = tmp_path_factory.mktemp("published"), {}
    llama = tiny_llama(1, tie_word_embeddings=True, max_position_embeddings=256)
    for name, model in (("llama", llama), ("gpt2", tiny_gpt2(2, n_positions=256))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for thin in (False, True):
        with LocalHub() as hub:
            for name in ("llama", "gpt2"):
                hub.add(f"someone/{name}", folder / name)
            expected = output(
                run_client(PUSH_ENSEMBLE, hub, folder / "author", OPTIONS={"thin": thin, "private": not thin})
            )
        found[thin] = hub.repositories, expected
    return found


@pytest.fixture
def whole(hub, published) -> str:
    """The whole ensemble is on the Hub, private."""
    return hub.hold(published[False])


@pytest.fixture
def thin(hub, published) -> str:
    """The thin ensemble and its backbones are on the Hub."""
    return hub.hold(published[True])


@pytest.fixture
def mixed() -> PCMEnsembleForCausalLM:
    """Four architectures, six experts, of which two share the Llama and two the Mistral; four have prompts."""
    return make_ensemble(
        [tiny_llama(1), tiny_gpt2(2), tiny_qwen2(3), tiny_mistral(4)],
        [
            (0, [5, 6, 7], [11, 12]),
            (0, [], [13]),
            (1, [8, 9], [14, 15, 16]),
            (2, [10], [17]),
            (3, [5, 5, 6, 6, 7], [18, 19]),
            (3, [], [20]),
        ],
    )


@pytest.fixture
def prompted() -> PCMEnsembleForCausalLM:
    """Three prompted experts on one backbone."""
    return make_ensemble([tiny_llama(1)], [(0, [5, 6, 7], [11, 12]), (0, [8], [13]), (0, [], [14, 15])])


@torch.no_grad()
def reference(model, context: list[int], weights: list[float], description: list[int] | None = None) -> dict:
    """
    The mixture of one row by the formula: `log_probs` (seq, vocab), `expert_weights` (seq, experts) and
    `expert_log_probs` (experts, seq, vocab), each expert run alone on [prompt | context].
    """
    config, weights = model.config, torch.tensor(weights)
    if description is None:
        active = [e for e, w in zip(config.experts, weights) if w > 0]
        description = [] if len(set(weights.tolist())) == 1 else [t for e in active for t in e["description_ids"]]
    hidden = model.pcm.body(torch.tensor([description + context])).last_hidden_state[0, -len(context) :]
    scores = model.pcm.head(hidden).float()  # (seq, experts)
    unnormalised = scores.exp() * weights
    expert_weights = unnormalised / unnormalised.sum(-1, keepdim=True)
    rows = []
    for expert in config.experts:
        backbone = model.backbones[expert["backbone"]]
        logits = backbone(torch.tensor([expert["prompt_ids"] + context])).logits[0, -len(context) :]
        rows.append(logits.float().log_softmax(-1))
    expert_log_probs = torch.stack(rows)  # (experts, seq, vocab)
    mixture = torch.einsum("te,etv->tv", expert_weights, expert_log_probs.exp())
    return {
        "log_probs": mixture.log(),
        "expert_weights": expert_weights,
        "expert_log_probs": expert_log_probs,
    }


def left_pad(rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of rows of unequal length."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


SYSTEM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nYou are a test.<e>\n' }}{% endif %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = SYSTEM_TEMPLATE, letters: str = "") -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character (and line break), 99 in all with <p>, <s> and <e>."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    characters = [c for c in characters if c not in letters] + list(letters)
    vocabulary = {token: i for i, token in enumerate(["<p>", "<s>", "<e>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<e>",
        pad_token="<p>",
        chat_template=chat_template,
        padding_side="left",
    )


@pytest.fixture
def transformers_log(caplog):
    """Gives what transformers has logged since the test began, at warning level or above."""
    logging.enable_propagation()
    logging.set_verbosity_warning()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    logging.disable_propagation()
