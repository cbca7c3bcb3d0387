"""`transformers serve` as it is, and OpenAI's client: preferences by `generation_config`, streams, many at once."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer
from openai import APIStatusError, OpenAI

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

CHAT = [{"role": "user", "content": "hello"}]
LENGTH = 8
PREFERENCES = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 1.5}, None]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> PCMEnsembleForCausalLM:
    positions = {"max_position_embeddings": 512}
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1, **positions), "prompt": "Be brief."}, "b": tiny_qwen2(2)},
        pcm=tiny_llama(3, **positions),
        tokenizer=tiny_tokenizer(),
    )
    torch.manual_seed(5)
    torch.nn.init.normal_(model.pcm.head.weight)
    folder = str(tmp_path_factory.mktemp("served") / "ensemble")
    model.save_pretrained(folder)
    return PCMEnsembleForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(ensemble):
    """OpenAI's client of a running server, which has not got this package imported: it takes the checkpoint's code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(sys.executable).with_name("transformers")
    command = [script, "serve", ensemble.name_or_path, "--trust-remote-code", "--port", str(port), "--device", "cpu"]
    log = Path(ensemble.name_or_path).parent / "log"
    with log.open("w") as output:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)
    try:
        deadline = time.monotonic() + 120
        while not healthy(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").is_success
    except httpx.TransportError:
        return False


def ask(client, model, chat=CHAT, stream=False, **settings) -> str:
    options = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": 2, "pad_token_id": 0} | settings
    answer = client.chat.completions.create(
        model=model.name_or_path, messages=chat, stream=stream, extra_body={"generation_config": json.dumps(options)}
    )
    if not stream:
        return answer.choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
    assert len(parts) > 2
    return "".join(parts)


def expected(model, chat=CHAT, **preference) -> str:
    inputs = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, **preference)
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("preference", PREFERENCES, ids=str)
def test_a_preference_goes_with_the_request(client, ensemble, preference, stream):
    settings = {} if preference is None else {"preference": preference}
    assert ask(client, ensemble, stream=stream, **settings) == expected(ensemble, preference=preference)


def test_words_for_the_pcm_go_with_the_request_or_in_a_system_message(client, ensemble):
    given = {"preference_text": "Make me laugh out loud!"}
    assert ask(client, ensemble, **given) == expected(ensemble, **given)
    chat = [{"role": "system", "content": "Make me laugh!"}, *CHAT]
    assert ask(client, ensemble, chat) == expected(ensemble, chat)


def test_an_unknown_expert_is_an_error_and_the_server_lives(client, ensemble):
    with pytest.raises(APIStatusError, match="Error code: 500"):
        ask(client, ensemble, preference={"nobody": 1.0})
    assert ask(client, ensemble, preference={"a": 1.0}) == expected(ensemble, preference={"a": 1.0})


def test_thirty_two_requests_at_once_are_each_answered_under_their_own_preference(client, ensemble):
    wanted = [PREFERENCES[i % 3] for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda preference: ask(client, ensemble, preference=preference), wanted))
    answer_to = {str(preference): expected(ensemble, preference=preference) for preference in PREFERENCES}
    assert answers == [answer_to[str(preference)] for preference in wanted]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("preference", ["a", "b", None])
def test_the_command_line_chat_takes_a_preference_from_its_generation_config(client, ensemble, preference, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps({} if preference is None else {"preference": preference}))
    command = [Path(sys.executable).with_name("transformers"), "chat", ensemble.name_or_path]
    command += [str(client.base_url).removesuffix("/v1/"), "--generation-config", str(tmp_path / "chat.json")]
    command += ["do_sample=False", f"max_new_tokens={LENGTH}", "eos_token_id=2", "pad_token_id=0"]
    typed = "hello\nn\n!exit\n"  # n: it asks whether an answer that was cut should go on
    chat = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert chat.returncode == 0, chat.stderr
    assert expected(ensemble, preference=preference).strip() in chat.stdout
