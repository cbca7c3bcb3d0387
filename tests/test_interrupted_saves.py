"""Saves that are stopped, and saves at the same time: what is there afterwards is the old ensemble or the new one."""

import copy
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from hub_clients import output, run_client
from interruptions import WAYS, killed_at, stopped_at
from test_saving import run_without_the_package
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.checkpoint_staging import staged_folder

CONTEXT = torch.tensor([[21, 22, 23, 24, 25]])
MARK = ".saving/.whole"


@pytest.fixture
def folder():
    """In memory where there is such a place, for a save waits for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as found:
        yield Path(found)


def make_pair() -> tuple[PCMEnsembleForCausalLM, PCMEnsembleForCausalLM]:
    """Two ensembles of the same tensors' names and shapes that differ in weights, configuration and chat template."""
    found = []
    for seed, prompts in ((1, ("Be brief.", "Be kind.")), (2, ("Be rude, please.", "Be long."))):
        llama = tiny_llama(seed, tie_word_embeddings=True)
        experts = {name: {"model": llama, "prompt": prompt} for name, prompt in zip("ab", prompts)}
        tokenizer = tiny_tokenizer("{{ '<s>' }}" * seed)
        model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(seed), pcm_layers=1, tokenizer=tokenizer)
        torch.nn.init.normal_(model.pcm.head.weight)
        found.append(model.eval())
    return tuple(found)


@torch.no_grad()
def traits(model) -> tuple:
    """What tells one ensemble from another: logits, prompts and chat template."""
    return model(CONTEXT).logits, [expert["prompt"] for expert in model.config.experts], model.tokenizer.chat_template


def loaded(folder: Path, auto_class=PCMEnsembleForCausalLM) -> tuple:
    return traits(auto_class.from_pretrained(folder))


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and one[1:] == other[1:]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def stop_everywhere(folder: Path, old: Path, model, way: str, numbers: range, **options) -> set[str]:
    """
    Save `model` over a copy of `old`, stopped at these file operations in turn, until it is not. Each time the folder
    must load as the old or the new ensemble, and then be saved to again.

    Returns:
        Which of the two the stopped saves have left.
    """
    logging.disable_progress_bar()
    model.save_pretrained(folder / "new", **options)
    expected, outcomes = {"old": loaded(old), "new": loaded(folder / "new")}, set()
    assert not same(*expected.values())
    for number in numbers:
        target = folder / "target"
        shutil.copytree(old, target)
        finished = stopped_at(number, way, lambda: model.save_pretrained(target, **options))  # noqa: B023
        found = loaded(target)
        outcome = next((name for name, ensemble in expected.items() if same(found, ensemble)), None)
        assert outcome is not None, f"neither old nor new after operation {number}"
        assert outcome == "new" or not finished
        if not finished:
            outcomes.add(outcome)
        model.save_pretrained(target, **options)
        assert sorted(os.listdir(target)) == sorted(os.listdir(folder / "new"))
        shutil.rmtree(target)
        if finished:
            return outcomes
    raise AssertionError("it was never let through")


def left_by(way: str) -> set[str]:
    """What stopped saves leave: moving up what is whole needs no room, so that a full disk stops none of that."""
    return {"old"} if way == "disk full" else {"old", "new"}


# Every operation would take minutes: some of each kind of save are tried, and all in the slow tests.
STRIDES = [pytest.param(11, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [None, "20KB"], ids=["whole", "sharded"])
def test_a_save_that_is_stopped_leaves_the_old_ensemble_or_the_new_one(folder, way, size, stride):
    old, new = make_pair()
    old.save_pretrained(folder / "old", max_shard_size="20KB" if size is None else "50GB")
    numbers = range(1 + (2 * WAYS.index(way) + (size is None)) % stride, 999, stride)
    options = {} if size is None else {"max_shard_size": size}
    assert stop_everywhere(folder, folder / "old", new, way, numbers, **options) == left_by(way)


THIN = """
import sys
sys.path.insert(0, TESTS)
from pathlib import Path
import torch
from test_interrupted_saves import WAYS, PCMEnsembleForCausalLM, left_by, stop_everywhere, tiny_tokenizer
model, old = PCMEnsembleForCausalLM.from_pretrained("owner/ensemble"), Path(FOLDER) / "old"
model._tokenizer = tiny_tokenizer()
model.save_pretrained(old, thin=True)
torch.nn.init.ones_(model.pcm.head.weight)
model.config.experts[0]["prompt"] = "Be long."
for start, way in enumerate(WAYS * (STRIDE > 0), start=1):
    assert stop_everywhere(Path(FOLDER), old, model, way, range(start, 999, STRIDE), thin=True) <= left_by(way)
print("done")
"""


@pytest.mark.parametrize("stride", [pytest.param(31, id="some"), STRIDES[1]])
def test_a_thin_save_that_is_stopped_leaves_the_old_ensemble_or_the_new_one(hub, thin, tmp_path, folder, stride):
    values = {"TESTS": str(Path(__file__).parent), "FOLDER": str(folder)}
    output(run_client(THIN, hub, tmp_path, STRIDE=0, **values))  # fills the cache
    offline = {"HF_HUB_OFFLINE": "1"}  # what is forked must not share a connection
    assert output(run_client(THIN, hub, tmp_path, None, offline, STRIDE=stride, **values)) == "done"


@pytest.mark.parametrize("way", WAYS)
def test_a_first_save_that_is_stopped_leaves_nothing_or_an_ensemble(folder, way):
    _, new = make_pair()
    new.save_pretrained(folder / "new")
    expected, outcomes = loaded(folder / "new"), set()
    for number in range(1 + WAYS.index(way), 999, 7):
        target = folder / f"target-{number}"
        finished = stopped_at(number, way, lambda: new.save_pretrained(target))  # noqa: B023
        must_load = finished or (target / MARK).exists()
        try:
            assert same(loaded(target), expected)
            outcomes |= set() if finished else {"ensemble"}
        except OSError:
            assert not must_load
            outcomes.add("nothing")
        if finished:
            break
    assert outcomes == ({"nothing"} if way == "disk full" else {"ensemble", "nothing"})


def test_a_disk_that_fills_up_in_the_middle_of_the_weights_leaves_the_old_ensemble(folder):
    """safetensors writes past Python's file operations."""
    old, new = make_pair()
    old.save_pretrained(folder)
    expected, size = loaded(folder), (folder / "model.safetensors").stat().st_size

    def save_with_room_for(size: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        new.save_pretrained(folder)

    for part in (size // 2, size - 1):
        assert not stopped_at(999, "killed", lambda: save_with_room_for(part))  # noqa: B023
        assert hidden(folder) == []
        assert same(loaded(folder), expected)


def leave_whole(folder: Path, old, new, waiting: str) -> None:
    """Save `new` over `old` and be killed when all is written, and the file `waiting` is the next to be moved up."""
    old.save_pretrained(folder)
    killed_at("os.rename", f".saving/{waiting}", lambda: new.save_pretrained(folder))
    assert (folder / MARK).exists()
    assert (folder / ".saving" / waiting).exists()


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder + "-tokenizer", trust_remote_code=True)
    assert tokenizer.chat_template == "{{ '<s>' }}{{ '<s>' }}", tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.tensor([[21, 22, 23, 24, 25]])).logits
    print(logits.double().sum().item(), model.config.experts[0]["prompt"])
"""


def test_the_auto_classes_finish_a_save_with_this_package_and_without_it(folder):
    """Whoever reads the folder first, and however many of the new files are in their place."""
    old, new = make_pair()
    new.save_pretrained(folder / "new")
    expected, remote = loaded(folder / "new"), []
    for waiting in (
        "checkpoint_staging.py",
        "compile_attention.py",
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ):
        stopped = folder / waiting.replace(".", "_")
        leave_whole(stopped, old, new, waiting)
        copies = [Path(f"{stopped}-{reader}") for reader in ("config", "tokenizer", "remote", "remote-tokenizer")]
        for copied in copies:
            shutil.copytree(stopped, copied)
        assert same(loaded(stopped, AutoModelForCausalLM), expected)
        assert AutoConfig.from_pretrained(copies[0]).experts == new.config.experts
        assert AutoTokenizer.from_pretrained(copies[1]).chat_template == expected[2]
        remote.append(str(copies[2]))
    printed = run_without_the_package(REMOTE, *remote).splitlines()
    assert printed == [f"{expected[0].double().sum().item()} Be rude, please."] * len(remote)


def test_weights_are_not_loaded_with_a_configuration_that_was_read_before_they_were_replaced(folder):
    old, new = make_pair()
    old.save_pretrained(folder / "a")
    config = AutoConfig.from_pretrained(folder / "a")
    leave_whole(folder / "a", old, new, "model.safetensors")
    with pytest.raises(OSError, match=r"`config` may have been read before that; read it again"):
        PCMEnsembleForCausalLM.from_pretrained(folder / "a", config=config)
    config = AutoConfig.from_pretrained(folder / "a")
    assert same(traits(PCMEnsembleForCausalLM.from_pretrained(folder / "a", config=config)), traits(new))


def test_an_ensemble_that_is_saved_to_while_it_is_loaded_is_refused(folder):
    old, new = make_pair()
    old.save_pretrained(folder / "a")
    saves = []

    def load():
        def hook(event: str, arguments: tuple):
            if event == "open" and str(arguments[0]).endswith("a/generation_config.json") and not saves:
                saves.append(True)
                new.save_pretrained(folder / "a")

        sys.addaudithook(hook)
        with pytest.raises(OSError, match=r"was saved to while it was loaded.* load it again"):
            loaded(folder / "a")
        assert same(loaded(folder / "a"), traits(new))

    assert stopped_at(9999, "killed", load)


def test_a_whole_save_that_cannot_be_moved_up_is_named(folder):
    old, new = make_pair()
    leave_whole(folder / "a", old, new, "model.safetensors")
    (folder / "a" / "model.safetensors").unlink()
    (folder / "a" / "model.safetensors").mkdir()  # which no file replaces, even for root
    with pytest.raises(OSError, match=r"is whole, but in part still in '.*/a/\.saving', from where it could not be"):
        loaded(folder / "a")
    (folder / "a" / "model.safetensors").rmdir()
    assert same(loaded(folder / "a"), traits(new))


def test_processes_that_save_to_one_folder_at_once_all_succeed(folder):
    pair, start, savers = make_pair(), os.pipe(), []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(start[1])
                os.read(start[0], 1)  # until the other end is closed
                for turn in range(6):
                    pair[(number + turn) % 2].save_pretrained(folder / "a", max_shard_size=("20KB", "1GB")[number % 2])
                code = 0
            finally:
                os._exit(code)
        savers.append(pid)
    os.close(start[0])
    os.close(start[1])
    assert [os.waitpid(pid, 0)[1] for pid in savers] == [0, 0, 0]
    assert any(same(loaded(folder / "a"), traits(model)) for model in pair)
    assert hidden(folder / "a") == []


def test_threads_that_save_to_one_folder_at_once_all_succeed(folder):
    pair, errors = make_pair(), []

    def save(model):
        try:
            for _ in range(3):
                model.save_pretrained(folder / "a")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=[model]) for model in (*pair, *pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert any(same(loaded(folder / "a"), traits(model)) for model in pair)
    assert hidden(folder / "a") == []


def test_who_waits_for_another_writer_says_so_and_goes_on_when_that_one_is_killed(folder, transformers_log):
    old, new = make_pair()
    old.save_pretrained(folder / "a")
    ready = os.pipe()
    holder = os.fork()
    if holder == 0:
        with staged_folder(folder / "a") as staging:
            Path(staging, "model.safetensors").write_text("half of it")
            os.write(ready[1], b"x")
            signal.pause()
    try:
        os.read(ready[0], 1)
        waiting = threading.Thread(target=new.save_pretrained, args=[folder / "a"])
        waiting.start()
        while not any(f"is saving to '{folder}/a'" in message for message in transformers_log()):
            assert waiting.is_alive()
            time.sleep(0.05)
        assert same(loaded(folder / "a"), traits(old))
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        waiting.join()
    assert same(loaded(folder / "a"), traits(new))
    assert hidden(folder / "a") == []


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_ensemble_survives_sixty_kills_at_random_moments(tmp_path):
    torch.manual_seed(0)
    old = demo.trained_ensemble(dtype=torch.bfloat16)
    new = copy.deepcopy(old)
    torch.nn.init.ones_(new.pcm.head.weight)
    new.config.experts[0]["prompt"] = "Be old."
    expected = {}
    for name, model in (("old", old), ("new", new)):
        begun = time.time()
        model.save_pretrained(tmp_path / name)
        seconds = time.time() - begun
        expected[name] = loaded(tmp_path / name)
    outcomes = {"old": 0, "new": 0}
    for delay in (torch.rand(60) * 1.3 * seconds).tolist():
        subject = tmp_path / "target"
        shutil.copytree(tmp_path / "old", subject)
        pid = os.fork()
        if pid == 0:
            new.save_pretrained(subject)
            os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = loaded(subject)
        outcome = next((name for name, ensemble in expected.items() if same(found, ensemble)), None)
        assert outcome is not None, f"neither old nor new after {delay} s"
        outcomes[outcome] += 1
        shutil.rmtree(subject)
    print(f"{outcomes} after kills within {1.3 * seconds:.2f} s", file=sys.stderr)
    assert min(outcomes.values()) > 0
