"""What a training run keeps, and where it goes on from."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interruptions import WAYS, killed_at, stopped_at
from safetensors.torch import load_file
from test_training import PROMPTS, make_trainer, tiny_ensemble
from transformers import TrainerCallback

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from test_training import make_trainer, tiny_ensemble
from transformers.trainer_utils import get_last_checkpoint
folder = sys.argv[2]
settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "steps_per_generation": 2}
settings |= {"text_only_fraction": 0.3, "exploration": 0.5, "lr_scheduler_type": "linear", "save_total_limit": 2}
trainer = make_trainer(folder, **settings)
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).exists() else None)
torch.save((trainer.model.state_dict(), trainer.state.log_history), Path(folder) / "end.pt")
"""


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_training import make_trainer
folder, breaks_at, end = sys.argv[2], int(sys.argv[3]), sys.argv[4]
def reward(prompts, completions, **columns):
    breaks = trainer.args.process_index == 1 and trainer.state.global_step == breaks_at
    return [float("nan") if breaks else float(len(text)) for text in completions]
trainer = make_trainer(folder, rewards=dict.fromkeys(("e0", "e1", "e2"), reward), max_steps=4)
try:
    trainer.train(resume_from_checkpoint=breaks_at < 0)
    result = trainer._rows_of_rollout(0), trainer._pcm.state_dict(), trainer.state.log_history
except Exception as error:
    result = repr(error)
torch.save(result, f"{end}-{trainer.args.process_index}.pt")
torch.distributed.destroy_process_group()
"""


def run_to_its_end(folder: Path, kill_at: int | None = None) -> None:
    """Train in a process of its own, killed at once when checkpoint number `kill_at` stands there."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        while kill_at is not None and process.poll() is None:
            if (folder / f"checkpoint-{kill_at}").exists():
                process.send_signal(signal.SIGKILL)
                break
        _, errors = process.communicate()
    assert kill_at is not None or process.returncode == 0, errors.decode()


def untimed(history: list[dict]) -> list[dict]:
    """What was logged of every step, without how long it took."""
    timed = {"rollout_tokens_per_second", "update_tokens_per_second"}
    return [{name: x for name, x in entry.items() if name not in timed} for entry in history if "loss" in entry]


def test_a_run_killed_and_resumed_ends_bit_equal_to_one_never_killed(tmp_path):
    run_to_its_end(tmp_path / "whole")
    for kill_at in (1, 4):  # in the middle of a rollout, and at its end
        run_to_its_end(tmp_path / "killed", kill_at)
        assert not (tmp_path / "killed" / "end.pt").exists()
    run_to_its_end(tmp_path / "killed")
    (whole, history), (killed, other) = (
        torch.load(tmp_path / name / "end.pt", weights_only=False) for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    assert untimed(history) == untimed(other)
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))


def test_a_reward_that_fails_in_one_of_two_processes_ends_both_with_a_checkpoint_to_go_on_from(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ended = {}
    for name, folder, breaks_at in (("whole", "a", 9), ("broken", "b", 2), ("resumed", "b", -1)):
        arguments = [str(Path(__file__).parent), str(tmp_path / folder), str(breaks_at), str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr
        ended[name] = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    first, second = ended["broken"]
    assert "Another process failed: ValueError: The reward of " in first
    assert second.startswith("ValueError")
    (rows, weights, history), (other_rows, other_weights, _) = ended["whole"]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other_rows}
    assert not isinstance(ended["resumed"][0], str), ended["resumed"]
    _, resumed_weights, resumed_history = ended["resumed"][0]
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name
        assert torch.equal(value, resumed_weights[name]), name
    assert untimed(resumed_history) == untimed(history)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = make_trainer(tmp_path, num_generations=6)
    with pytest.raises(ValueError, match="made with num_generations = 3, but the trainer has 6"):
        trainer.train(resume_from_checkpoint=True)
    for changed, words in (({"eta": 3.0}, "made with eta = 1.0, but the trainer has 3.0"),
                           ({"prompts": ["another", *PROMPTS[1:]]}, "made with rows of the dataset")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make_trainer(tmp_path, **changed).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, generation_batch_size=2).train(resume_from_checkpoint=True)


def test_after_a_save_that_failed_the_ensemble_is_saved_whole(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError):
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "config.json").exists()  # the ensemble


def test_a_failing_reward_leaves_a_checkpoint_and_names_the_row(tmp_path):
    calls = []

    def breaks(prompts, completions, **columns):
        calls.append(1)
        return [float("nan") if len(calls) > 5 else 1.0] * len(prompts)

    trainer = make_trainer(tmp_path, rewards=dict.fromkeys(("e0", "e1", "e2"), breaks), max_steps=20)
    with pytest.raises(ValueError, match=r"gave nan for row 0 .*: prompt .*Rewards must be finite numbers"):
        trainer.train()
    assert trainer.state.global_step > 0
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "pcm.safetensors").exists()
    trainer = make_trainer(tmp_path, max_steps=trainer.state.global_step + 1)
    trainer.train(resume_from_checkpoint=True)


def test_a_reward_that_fails_after_a_save_leaves_that_checkpoint_as_it_is(tmp_path):
    weights, saved = tmp_path / "checkpoint-2" / "pcm.safetensors", []

    def breaks(prompts, completions, **columns):
        if trainer.state.global_step < 2:
            return [1.0] * len(prompts)
        saved.append(weights.stat().st_ino)
        return [float("nan")] * len(prompts)

    rewards = dict.fromkeys(("e0", "e1", "e2"), breaks)
    trainer = make_trainer(tmp_path, rewards=rewards, max_steps=3, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="gave nan"):
        trainer.train()
    assert [weights.stat().st_ino] == saved


def test_a_run_keeps_its_own_newest_checkpoint_beside_one_of_more_updates(tmp_path):
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    os.utime(tmp_path / "checkpoint-3", (0, 0))  # transformers trusts no times that are within a second
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_reason_why_a_run_ended_is_told_where_its_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    def breaks(prompts, completions, **columns):
        monkeypatch.setattr(torch, "save", full)
        return [float("nan")] * len(prompts)

    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    trainer = make_trainer(tmp_path, rewards=dict.fromkeys(("e0", "e1", "e2"), breaks), save_strategy="no")
    with pytest.raises(ValueError, match="gave nan"):
        trainer.train()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    rewards = {e["step"]: e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e}
    best = max(rewards, key=rewards.get)
    assert trainer.state.best_global_step == best
    learnt = load_file(Path(trainer.state.best_model_checkpoint) / "pcm.safetensors")
    assert torch.equal(learnt["head.weight"], trainer.model.head.weight)


def test_a_best_step_that_was_not_saved_is_not_looked_for(tmp_path):
    def falls(prompts, completions, **columns):
        return [-float(trainer.state.global_step)] * len(prompts)

    trainer = make_trainer(
        tmp_path, rewards=dict.fromkeys(("e0", "e1", "e2"), falls), max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint is None
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_reward_that_fails_in_an_evaluation_leaves_a_checkpoint(tmp_path):
    def breaks(prompts, completions, **columns):
        return [float("nan") if trainer.state.global_step == 2 else 1.0] * len(prompts)

    rewards = dict.fromkeys(("e0", "e1", "e2"), breaks)
    trainer = make_trainer(tmp_path, rewards=rewards, max_steps=3, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="gave nan"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "pcm.safetensors").exists()


def test_frozen_weights_that_differ_are_not_resumed(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    model = tiny_ensemble()
    model.pcm.body.get_input_embeddings().weight.data[5] += 1
    with pytest.raises(ValueError, match="frozen weights of the PCM"):
        make_trainer(tmp_path, model).train(resume_from_checkpoint=True)


def test_a_run_does_not_go_on_with_experts_that_predict_otherwise(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    model = tiny_ensemble()
    next(model.backbones.parameters()).data[5] += 1
    with pytest.raises(ValueError, match="weights of the experts"):
        make_trainer(tmp_path, model).train(resume_from_checkpoint=True)


class Beginning(TrainerCallback):
    """Keeps the PCM's head as it is when a run goes on."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.head = model.head.weight.detach().clone()


def resumed_head(folder: Path, checkpoint: str | bool = True) -> torch.Tensor:
    beginning, trainer = Beginning(), make_trainer(folder, max_steps=1)
    trainer.add_callback(beginning)
    trainer.train(resume_from_checkpoint=checkpoint)
    return beginning.head


@pytest.mark.parametrize("stride", [pytest.param(19, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_over", [True, False], ids=["over-another", "beside-another"])
def test_a_checkpoint_that_is_stopped_while_it_is_written_is_the_old_or_the_new_one(tmp_path, way, is_over, stride):
    """A run that is begun anew in its old folder writes over a checkpoint of the same number."""
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    heads = [trainer.model.head.weight.detach().clone()]
    trainer.model.head.weight.data += 1
    heads.append(trainer.model.head.weight.detach().clone())
    trainer.state.global_step += not is_over
    outcomes, finished, number = set(), False, 1 + 4 * WAYS.index(way) % stride
    while not finished:
        folder = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path / "run", folder)
        trainer.args.output_dir = str(folder)
        finished = stopped_at(number, way, lambda: trainer._save_checkpoint(trainer.model, None))
        found = [torch.equal(resumed_head(folder), head) for head in heads]
        assert sum(found) == 1, number
        outcomes.add(found.index(True))
        number += stride
    assert outcomes == {0, 1}
    assert found == [False, True]
    trainer._save_checkpoint(trainer.model, None)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_run_that_is_killed_between_the_old_checkpoint_and_the_new_one_has_the_new_one(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    trainer.model.head.weight.data += 1
    killed_at("os.rename", ".saving/checkpoint-2", lambda: trainer._save_checkpoint(trainer.model, None))
    assert not (tmp_path / "checkpoint-2").exists()
    assert torch.equal(resumed_head(tmp_path), trainer.model.head.weight)


def test_two_runs_in_one_folder_leave_each_others_checkpoints_whole(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    runs = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for turn in range(8):
                    trainer.state.global_step = 1 + turn // 2
                    trainer.model.head.weight.data.fill_(number + 1)
                    make_trainer(tmp_path).train() if turn % 4 == 3 else trainer._save_checkpoint(trainer.model, None)
                code = 0
            finally:
                os._exit(code)
        runs.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in runs] == [0, 0]
    for number in range(1, 5):
        head = resumed_head(tmp_path, str(tmp_path / f"checkpoint-{number}"))
        assert set(head.flatten().tolist()) in ({1.0}, {2.0})


def test_checkpoints_are_as_readable_as_the_umask_says(tmp_path):
    trainer, before = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1), os.umask(0o027)
    try:
        trainer.train()
        trainer.save_model(str(tmp_path / "ensemble"))
    finally:
        os.umask(before)
    for name in ("checkpoint-1/pcm.safetensors", "ensemble/model.safetensors", "ensemble/pcm_training.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


def test_a_folder_that_the_ensemble_could_not_be_saved_to_is_refused_before_training(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        trainer.train()
    assert trainer.state.global_step == 0
