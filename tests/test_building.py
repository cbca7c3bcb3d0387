"""from_experts: what it accepts, shares, tokenises and refuses."""

import json
import shutil

import pytest
import torch
from conftest import reference, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    RobertaConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.chat_templates import leading_bos

CONTEXT = torch.tensor([[21, 22, 23, 24]])


def save(folder, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama_folder(tmp_path) -> str:
    return save(tmp_path / "llama", tiny_llama(1), tiny_tokenizer())


@pytest.fixture
def qwen_folder(tmp_path) -> str:
    return save(tmp_path / "qwen", tiny_qwen2(2))  # its tokenizer class would add a token of its own


def test_experts_from_folders_models_and_mappings_are_the_models_themselves(llama_folder, qwen_folder):
    loaded = tiny_gpt2(3)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": llama_folder, "b": loaded, "c": {"model": qwen_folder, "prompt": "Hi"}}, pcm=llama_folder, pcm_layers=1
    )
    assert len(model.config.backbones) == 3
    assert model.backbones[1] is loaded
    output = model(CONTEXT, preference=["a", "b", "c"])
    prompt = model.config.experts[2]["prompt_ids"]
    probs = [
        tiny_llama(1)(CONTEXT).logits.softmax(-1),
        tiny_gpt2(3)(CONTEXT).logits.softmax(-1),
        tiny_qwen2(2)(torch.tensor([prompt + CONTEXT[0].tolist()])).logits[:, -4:].softmax(-1),
    ]
    assert_close(output.logits.exp(), sum(probs) / 3, atol=1e-5, rtol=0)  # the PCM's head is zero


def test_experts_that_name_the_same_model_share_one_backbone(llama_folder, tmp_path):
    (tmp_path / "link").symlink_to(llama_folder)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": llama_folder, "b": {"model": llama_folder, "prompt": "x"}, "c": str(tmp_path / "link")},
        pcm=tiny_llama(5),
    )
    assert [expert["backbone"] for expert in model.config.experts] == [0, 0, 0]
    loaded = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts({"a": loaded, "b": {"model": loaded}}, pcm=loaded, pcm_layers=1)
    assert len(model.config.backbones) == 1


def test_the_pcm_is_a_copy_of_the_first_layers(llama_folder):
    model = PCMEnsembleForCausalLM.from_experts({"a": llama_folder}, pcm=llama_folder, pcm_layers=1)
    source = model.backbones[0].model
    assert len(model.pcm.body.layers) == model.config.pcm.num_hidden_layers == 1
    assert_close(model.pcm.body.layers[0].mlp.up_proj.weight, source.layers[0].mlp.up_proj.weight)
    assert model.pcm.body.embed_tokens.weight.data_ptr() != source.embed_tokens.weight.data_ptr()
    assert model.pcm.body.embed_tokens.weight.requires_grad
    assert not source.embed_tokens.weight.requires_grad
    assert model.pcm.head.weight.eq(0).all()


def test_the_pcm_may_be_made_from_a_configuration():
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=config, pcm_layers=2)
    assert len(model.pcm.body.layers) == 2


def test_the_pcm_takes_the_dtype_of_the_experts():
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    for pcm in (config, tiny_llama(2)):
        model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1).to(torch.bfloat16)}, pcm=pcm)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_zero_head_gives_the_users_weights():
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_llama(2)}, pcm=tiny_llama(3))
    assert_close(model(CONTEXT, preference=[1, 3]).expert_weights[0, 0], torch.tensor([0.25, 0.75]))


def test_a_prompt_that_leaves_no_room_for_a_context_is_refused():
    with pytest.raises(ValueError, match=r"`experts\[0\].prompt_ids` has .* tokens, which leaves no room"):
        PCMEnsembleForCausalLM.from_experts(
            {"a": {"model": tiny_llama(1), "prompt": "x" * 64, "description": "d"}},
            pcm=tiny_llama(2),
            tokenizer=tiny_tokenizer(),
        )


def test_a_plain_model_is_no_ensemble(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of the type 'llama', and no ensemble.*from_experts"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


def test_bos_is_known_where_every_text_begins_with_it_once():
    assert leading_bos(tiny_tokenizer()) is None  # <s> begins every turn
    once = "{{ '<s>' }}{% for m in messages %}{{ m['role'] + m['content'] + '<e>' }}{% endfor %}"
    assert leading_bos(tiny_tokenizer(once)) == 1
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1), "prompt": "Hi"}}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer(once)
    )
    assert model.config.prefix_bos_token_id == 1
    assert model.config.experts[0]["prompt_ids"][0] == 1


def test_descriptions_default_to_the_prompt_and_then_to_the_name():
    backbone = tiny_llama(1)
    tokenizer = tiny_tokenizer()
    model = PCMEnsembleForCausalLM.from_experts(
        {
            "a": {"model": backbone, "prompt": "p", "description": "d", "dimension": "style"},
            "b": {"model": backbone, "prompt": "p"},
            "c": backbone,
        },
        pcm=backbone,
        tokenizer=tokenizer,
    )
    assert [tokenizer.decode(e["description_ids"]) for e in model.config.experts] == ["d\n", "p\n", "c\n"]
    assert model.config.experts[0]["dimension"] == "style"
    expected = reference(model, CONTEXT[0].tolist(), [1.0, 2.0, 0.0])
    output = model(CONTEXT, preference=[1, 2, 0])
    assert_close(output.logits[0], expected["log_probs"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kwargs", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}], ids=lambda k: next(iter(k))
)
def test_options_of_from_pretrained_reach_every_part(llama_folder, qwen_folder, kwargs):
    model = PCMEnsembleForCausalLM.from_experts({"a": llama_folder, "b": qwen_folder}, pcm=llama_folder, **kwargs)
    parts = [*model.backbones, model.pcm.body]
    assert len(parts) == 3
    for part in parts:
        assert part.dtype == kwargs.get("dtype", torch.float32)
        assert part.config._attn_implementation == kwargs.get("attn_implementation", "sdpa")


def test_default_preference_and_merge_reach_the_config():
    options = {"default_preference": {"b": 2.0}, "expert_top_k": 7}
    experts = {"a": tiny_llama(1), "b": tiny_llama(2)}
    config = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), **options).config
    assert (config.default_preference, config.expert_top_k) == ({"b": 2.0}, 7)
    assert PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), merge="logits").config.merge == "logits"


SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 2, "intermediate_size": 8}


def bert(is_decoder: bool) -> BertLMHeadModel:
    return BertLMHeadModel(BertConfig(**SMALL, **HEADS, is_decoder=is_decoder))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MambaConfig(**SMALL), id="no-key-value-cache"),
        pytest.param(RwkvConfig(**SMALL, attention_hidden_size=16), id="a-state-no-mask-reaches"),
        pytest.param(RobertaConfig(**SMALL, **HEADS, is_decoder=True), id="positions-of-its-own"),
        pytest.param(OpenAIGPTConfig(vocab_size=99, n_embd=16, n_layer=2, n_head=2), id="no-cache"),
    ],
)
def test_models_that_cannot_serve_padded_cached_rows_are_refused(config):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"The model of expert 'a', a .*Use a causal LM with attention"):
        PCMEnsembleForCausalLM.from_experts({"a": AutoModelForCausalLM.from_config(config)}, pcm=tiny_llama(2))


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**SMALL, **HEADS),
        OPTConfig(**SMALL, word_embed_proj_dim=16, num_attention_heads=2, ffn_dim=8),
        BloomConfig(vocab_size=99, hidden_size=16, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures_are_the_models_themselves(config):
    torch.manual_seed(0)
    expert = AutoModelForCausalLM.from_config(config).eval()
    expected = expert(input_ids=CONTEXT).logits.log_softmax(-1)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    assert_close(model(CONTEXT).logits, expected, atol=1e-4, rtol=0)


def test_parts_of_different_dtypes_are_refused():
    experts = {"a": tiny_llama(1), "b": tiny_llama(2).to(torch.bfloat16)}
    with pytest.raises(
        ValueError, match=r"must have one dtype, got expert 'a' torch.float32, expert 'b' torch.bfloat16"
    ):
        PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3))


def test_a_tokenizer_with_more_tokens_is_refused_with_the_first_of_them(llama_folder, tmp_path):
    more = tiny_tokenizer()
    more.add_tokens(["<x>"])
    other = save(tmp_path / "other", tiny_llama(2, vocab_size=112), more)
    with pytest.raises(ValueError, match=r"token 99 is None in .*llama', but '<x>' in .*other'"):
        PCMEnsembleForCausalLM.from_experts({"a": llama_folder, "b": other}, pcm=llama_folder)


def test_a_text_ends_where_any_expert_ends_it():
    other = tiny_llama(2)
    other.generation_config.eos_token_id = [7, 2]
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": other}, pcm=tiny_llama(3))
    assert model.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(
    ("experts", "error", "words"),
    [
        pytest.param({}, ValueError, "`experts` is empty", id="none"),
        pytest.param(["a"], TypeError, "must map names to a repository", id="list"),
        pytest.param({"": "x"}, TypeError, "names must be non-empty strings", id="empty-name"),
        pytest.param({"a": 5}, TypeError, "`model` of expert 'a' must be a repository", id="number"),
        pytest.param({"a": {"prompt": "x"}}, TypeError, "`model` of expert 'a'", id="no-model"),
        pytest.param({"a": {"model": "x", "promt": "y"}}, ValueError, r"unknown fields \['promt'\]", id="misspelt"),
        pytest.param({"a": {"model": "x", "prompt": 3}}, TypeError, "`prompt` of expert 'a' must be", id="prompt"),
        pytest.param({"a": lambda: bert(False)}, ValueError, "looks at later tokens", id="bidirectional"),
        pytest.param(
            {"a": lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2))},
            ValueError, "is an encoder-decoder", id="encoder-decoder",
        ),
        pytest.param({"a": lambda: LlamaModel(tiny_llama(1).config)}, ValueError, "has no LM head", id="headless"),
        pytest.param(
            {"a": {"model": lambda: tiny_llama(1), "prompt": "x"}}, ValueError, "none of the models has a tokenizer",
            id="prompt-without-tokenizer",
        ),
        pytest.param(
            {"a": lambda: tiny_llama(1), "b": lambda: tiny_llama(1, vocab_size=112)}, ValueError,
            "vocabularies have different sizes .*99.*112", id="vocabularies",
        ),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_used_are_refused_by_name(experts, error, words):
    def build(spec):
        if callable(spec):
            return spec()
        return {k: build(v) for k, v in spec.items()} if isinstance(spec, dict) else spec

    with pytest.raises(error, match=words):
        PCMEnsembleForCausalLM.from_experts(build(experts), pcm=tiny_llama(9))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pcm": 5}, TypeError, "`pcm` must be a repository"),
        ({"pcm_layers": 3}, ValueError, "`pcm_layers` must be between 1 and 2"),
        ({"default_preference": "z"}, ValueError, "unknown expert 'z'"),
        ({"expert_top_k": 0}, Exception, "`expert_top_k` must be at least 1"),
        (
            {"merge": "weights"},
            Exception,
            "`merge` must be one of 'probabilities', 'logits', 'product', 'adapters', got 'weights'",
        ),
        ({"merge": "logits", "expert_top_k": 3}, Exception, "cannot be used with"),
    ],
)
def test_options_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, **{"pcm": tiny_llama(2)} | options)


def test_an_ensemble_is_refused_as_an_expert(prompted):
    with pytest.raises(ValueError, match="is an ensemble itself"):
        PCMEnsembleForCausalLM.from_experts({"a": prompted}, pcm=tiny_llama(2))


def test_unequal_tokenizers_are_refused_with_the_first_token_that_differs(llama_folder, tmp_path):
    other = save(tmp_path / "other", tiny_llama(2), tiny_tokenizer(letters="BA"))
    with pytest.raises(ValueError, match=r"token 36 is 'A' in .*llama', but 'C' in .*other'"):
        PCMEnsembleForCausalLM.from_experts({"a": llama_folder, "b": other}, pcm=llama_folder)


def test_a_model_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 99 tokens, but the model of expert 'a' only 50"):
        PCMEnsembleForCausalLM.from_experts(
            {"a": tiny_llama(1, vocab_size=50)}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer()
        )


def test_padded_vocabularies_are_accepted_with_a_tokenizer():
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": tiny_llama(1, vocab_size=112), "b": tiny_llama(2)}, pcm=tiny_llama(3), tokenizer=tiny_tokenizer()
    )
    assert model(CONTEXT).logits.shape[-1] == 99


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda w: w.pop("model.norm.weight"), r"1 missing \(the first is model.norm.weight", id="missing"
        ),
        pytest.param(
            lambda w: w.update({"model.norm.weight": torch.ones(5)}), r"1 mismatched \(.*model.norm.weight", id="shape"
        ),
    ],
)
def test_a_checkpoint_whose_config_and_weights_disagree_is_refused(llama_folder, change, words):
    path = f"{llama_folder}/model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        PCMEnsembleForCausalLM.from_experts({"a": llama_folder}, pcm=tiny_llama(2))


def test_a_missing_folder_is_refused_with_its_name(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        PCMEnsembleForCausalLM.from_experts({"a": str(tmp_path / "nowhere")}, pcm=tiny_llama(2))


def test_a_context_longer_than_a_submodels_positions_is_refused_before_any_model_runs():
    short = tiny_gpt2(1, n_positions=16)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": short, "prompt": "12345"}, "b": tiny_llama(2)},
        pcm=tiny_llama(3),
        tokenizer=tiny_tokenizer(None),
    )
    hook = short.register_forward_hook(lambda *_: pytest.fail("a model ran"))
    words = r"context of 12 tokens is too long for expert 'a', which has 16 positions and reads 5 .* at most 11 tokens"
    with pytest.raises(ValueError, match=words):
        model(torch.full((1, 12), 20))
    with pytest.raises(ValueError, match=words):
        model.generate(torch.full((1, 12), 20), max_new_tokens=3)
    hook.remove()
    assert model(torch.full((1, 12), 20), preference="b").logits.shape == (1, 12, 99)
    assert model.config.max_position_embeddings == 11


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"inputs_embeds": torch.ones(1, 2, 32)}, "`inputs_embeds` cannot be used"),
        ({"input_ids": None}, "`input_ids` must have the shape"),
        ({"input_ids": torch.ones(1, 0).long()}, "at least one token"),
        ({"input_ids": CONTEXT, "position_ids": torch.arange(1, 5)[None]}, "`position_ids`, .* cannot be used"),
        ({"input_ids": CONTEXT, "attention_mask": torch.ones(1, 3)}, r"the shape \(1, 3\), but .* make \(1, 4\)"),
        ({"input_ids": CONTEXT, "preference_text": "x"}, "needs a tokenizer"),
        ({"input_ids": CONTEXT, "preference": "e9"}, "unknown expert 'e9'"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused_before_any_model_runs(prompted, inputs, words):
    for part in (*prompted.backbones, prompted.pcm.body):
        part.register_forward_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=words):
        prompted(**inputs)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "a", "backbone": 1}, "names backbone 1, but there are 1"),
        ({"name": ""}, "needs a `name`"),
        ({"name": "a", "promt": "x"}, r"unknown fields \['promt'\]"),
    ],
)
def test_a_config_with_a_wrong_expert_is_refused(entry, words):
    with pytest.raises(Exception, match=words):
        PCMEnsembleConfig(backbones=[tiny_llama(1).config], experts=[entry], pcm=tiny_llama(2).config)


def test_duplicate_names_are_refused():
    with pytest.raises(Exception, match="must have a name of its own each, got"):
        PCMEnsembleConfig(backbones=[tiny_llama(1).config], experts=[{"name": "a"}] * 2, pcm=tiny_llama(2).config)


def test_an_empty_config_is_refused_by_the_model():
    with pytest.raises(ValueError, match="An ensemble needs at least one entry"):
        PCMEnsembleForCausalLM(PCMEnsembleConfig())


def test_a_config_with_a_part_that_transformers_does_not_have_is_refused(tmp_path, llama_folder):
    model = PCMEnsembleForCausalLM.from_experts({"a": llama_folder}, pcm=llama_folder)
    folder = save(tmp_path / "ensemble", model)
    config = json.loads((tmp_path / "ensemble" / "config.json").read_text())
    config["backbones"][0]["model_type"] = "mystery"
    (tmp_path / "ensemble" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`model_type` 'mystery', which transformers does not have"):
        PCMEnsembleForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)


def test_what_could_not_be_saved_is_not_added():
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": tiny_llama(1, max_position_embeddings=64)}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="which leaves no room for a context in the 64 positions"):
        model.add_expert("b", {"model": model.backbones[0], "prompt": "a" * 64})
    assert model.config.expert_names == ["a"]
