"""Trains the Preference Control Model on what the mixture itself samples; the experts stay as they are."""

import json
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..merging import log_expert_weights
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..prefixes import CachePart
from .losses import (
    expert_weight_entropy,
    leave_one_out,
    mixture_token_log_probs,
    ppo_loss,
    rebel_loss,
    rloo_loss,
    token_kl,
)
from .preference_sampling import DrawnPreference, PreferenceSampler
from .rebel_config import RebelConfig
from .rollouts import Rollout, RolloutSampler, tokenize
from .scoring import Scorer, Scores, reward_function

WEIGHTS_FILE, STATE_FILE = "pcm.safetensors", "rebel_state.json"


class RebelTrainer(Trainer):
    r"""
    Trains an ensemble's PCM online with REBEL, PPO or RLOO.

    `trainer.ensemble` is the whole; `trainer.model`, which learns and of which checkpoints are made, is its PCM, in
    float32 if it was in less. `trainer.save_model(folder)` writes the ensemble in the experts' dtype.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble, `merge="probabilities"`.
        args (`RebelConfig`, *optional*): settings.
        reward_funcs (`Mapping`): each wanted expert's name → a function `(prompts, completions, **columns)` that gives
            a list of floats, or a sequence-classification model or repository.
        train_dataset (`Dataset`): with a column `prompt`, texts or conversations; optionally `preference` (see
            [`preference_weights`]) and `reference` (one or more completions of the base model). Rewards get all
            columns.
        eval_dataset (`Dataset`, *optional*): answered under every preference set by [`evaluate`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        preference_sets (`list`, *optional*): preferences that prompts are answered under; defaults to every
            combination of one expert for each dimension.
        callbacks, optimizers: as for [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: on input that would fail later, before anything runs.

    Source: arXiv 2407.04181 (the ensemble), arXiv 2404.16767 (REBEL).
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        args: RebelConfig | None = None,
        reward_funcs: Mapping | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        preference_sets: list | None = None,
        callbacks=None,
        optimizers=(None, None),
    ):
        args = args or RebelConfig(output_dir="rebel")
        if model.config.merge != "probabilities":
            raise ValueError(
                f'REBEL trains mixtures of probabilities, but the ensemble has `merge="{model.config.merge}"`.'
            )
        tokenizer = processing_class or model.tokenizer
        if tokenizer is None:
            raise ValueError("The ensemble was built without a tokenizer. Pass `processing_class`.")
        self.preferences = PreferenceSampler(
            model.config, preference_sets, args.preference_weights, args.text_only_fraction
        )
        self.reward_funcs = {name: reward_function(name, reward) for name, reward in (reward_funcs or {}).items()}
        for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            if dataset is not None:
                self._check_dataset(model, tokenizer, dataset, name, args)
        self.ensemble = model.to(args.device)
        if model.pcm.dtype in (torch.float16, torch.bfloat16):
            model.pcm.float()  # small updates vanish in half precision
        model.pcm.body.get_input_embeddings().requires_grad_(args.train_embeddings)
        super().__init__(
            model=model.pcm,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=lambda rows: rows,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its micro-batch
        self.scorer = Scorer(self.reward_funcs)
        self.rollouts = RolloutSampler(model, tokenizer, self.scorer, args)
        self._rollout: Rollout | None = None
        self._micro_batches_done = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._staging: Path | None = None

    def _check_dataset(self, model, tokenizer, dataset, name: str, args: RebelConfig):
        if "prompt" not in dataset.column_names:
            raise ValueError(f"`{name}` needs a column `prompt`, got {', '.join(dataset.column_names)}.")
        if not len(dataset):
            raise ValueError(f"`{name}` is empty.")
        wanted = {n for s in self.preferences.sets for n, w in zip(self.preferences.names, s.weights) if w > 0}
        for row, preference in enumerate(dataset["preference"] if "preference" in dataset.column_names else ()):
            try:
                weights = self.preferences.preference(preference).weights
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {row} of `{name}`: {error}") from error
            wanted |= {n for n, w in zip(self.preferences.names, weights) if w > 0}
        missing = sorted(wanted - set(self.reward_funcs))
        if missing:
            raise ValueError(f"`reward_funcs` lacks a reward for {', '.join(missing)}, which preferences ask for.")
        room = min(
            getattr(c.get_text_config(), "max_position_embeddings", None) or 10**9
            for c in model.config.sub_config_items().values()
        )
        descriptions = sum(len(e["description_ids"]) for e in model.config.experts)
        prefix = max(descriptions, *(len(e["prompt_ids"]) for e in model.config.experts))
        for row, prompt in enumerate(dataset["prompt"]):
            length = len(tokenize(tokenizer, [prompt])[0])
            if length + prefix + args.max_completion_length > room:
                raise ValueError(
                    f"Row {row} of `{name}` has a prompt of {length} tokens. With {args.max_completion_length} tokens "
                    f"of completion and {prefix} of descriptions it exceeds the models' context of {room} tokens."
                )

    # The data of a step: the trainer draws prompts itself, so that a step's data depends on its number alone.

    @property
    def _prompts_per_rollout(self) -> int:
        """On each process."""
        return self.args.per_device_train_batch_size * self.args.steps_per_generation // self.args.num_generations

    def get_train_dataloader(self) -> DataLoader:
        """As many items as an epoch has micro-batches."""
        rollouts = max(len(self.train_dataset) // (self._prompts_per_rollout * self.args.world_size), 1)
        return DataLoader(range(rollouts * self.args.micro_batches_per_rollout), collate_fn=lambda items: items)

    def _rows_of_rollout(self, number: int) -> list[dict]:
        """This process's rows of the dataset, from shuffled passes through it."""
        each, rows = self._prompts_per_rollout, []
        start = (number * self.args.world_size + self.args.process_index) * each
        for place in range(start, start + each):
            epoch, place = divmod(place, len(self.train_dataset))
            generator = torch.Generator().manual_seed(self.args.seed + 7919 * epoch)
            index = torch.randperm(len(self.train_dataset), generator=generator)[place].item()
            rows.append(self.train_dataset[index])
        return rows

    def _next_micro_batch(self) -> Rollout:
        """Whole groups of the current rollout, or of a new one where that is due."""
        number, step = divmod(self._micro_batches_done, self.args.micro_batches_per_rollout)
        if step == 0:
            self._rollout = self._new_rollout(number)
        iteration, micro_batch = divmod(step, self.args.steps_per_generation)
        shuffle = torch.Generator().manual_seed(self._seed(number, iteration))
        groups = torch.randperm(self._prompts_per_rollout, generator=shuffle)
        groups = groups.chunk(self.args.steps_per_generation)[micro_batch]
        index = (groups[:, None] * self.args.num_generations + torch.arange(self.args.num_generations)).flatten()
        self._micro_batches_done += 1
        return self._rollout.rows(index.to(self._rollout.prompt_ids.device))

    def _seed(self, *numbers: int) -> int:
        return hash((self.args.seed, self.args.process_index, *numbers)) % 2**31

    def _new_rollout(self, number: int) -> Rollout:
        generator = random.Random(self._seed(number))
        rows = self._rows_of_rollout(number)
        draws = [self.preferences.draw(generator, row.get("preference")) for row in rows]
        rows, draws = (
            [entry for entry in entries for _ in range(self.args.num_generations)] for entries in (rows, draws)
        )
        start = time.perf_counter()
        rollout, scores = self.rollouts.sample(rows, draws, self._seed(number))
        seconds = time.perf_counter() - start
        rollout.old_log_probs = self._old_log_probs(rollout)
        self._note({"rollout_tokens_per_second": rollout.completion_mask.sum().item() / seconds})
        self._note(rollout_metrics(rollout, scores, draws))
        return rollout

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """log π_t, `(rows, seq)`, computed as the update does, so that the first ratio is 1."""
        size = self.args.per_device_train_batch_size
        parts = [rollout.rows(slice(start, start + size)) for start in range(0, len(rollout), size)]
        with self.compute_loss_context_manager():
            return torch.cat(
                [mixture_token_log_probs(self._log_expert_weights(self.model, p), p.expert_log_probs) for p in parts]
            )

    # The update

    def _log_expert_weights(self, pcm, rollout: Rollout) -> torch.Tensor:
        """log α where each completion token was predicted, `(rows, seq, experts)`. `pcm` may be wrapped."""
        num_prompt, num_tokens = rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
        positions = torch.arange(num_prompt - 1, num_prompt + num_tokens - 1, device=rollout.prompt_ids.device)
        expert_weight_logits, _ = pcm(
            torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
            torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1),
            rollout.prefix_ids,
            CachePart(),
            positions,
        )
        return log_expert_weights(expert_weight_logits, rollout.weights.log())

    def compute_loss(self, model, inputs: Rollout, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of a micro-batch of whole groups."""
        args, mask = self.args, inputs.completion_mask
        log_weights = self._log_expert_weights(model, inputs)
        log_probs = mixture_token_log_probs(log_weights, inputs.expert_log_probs)  # (rows, seq)
        log_ratios = (log_probs - inputs.old_log_probs) * mask
        groups = (-1, args.num_generations)
        rewards = inputs.rewards.view(groups)
        if args.loss_type == "rebel":
            loss = rebel_loss(log_ratios.sum(dim=1).view(groups), rewards, args.eta)
        elif args.loss_type == "ppo":
            loss = ppo_loss(log_ratios, leave_one_out(rewards).flatten(), mask, args.clip)
        else:
            loss = rloo_loss((log_probs * mask).sum(dim=1), leave_one_out(rewards).flatten())
        initial = (inputs.weights / inputs.weights.sum(dim=1, keepdim=True)).log()[:, None].expand_as(log_weights)
        kl = token_kl(log_probs, mixture_token_log_probs(initial, inputs.expert_log_probs))
        kl, entropy = (
            (values * mask).sum() / mask.sum().clamp(min=1) for values in (kl, expert_weight_entropy(log_weights))
        )
        loss = loss + args.kl_coef * kl - args.entropy_coef * entropy
        with torch.no_grad():
            self._note({"kl": kl.item(), "entropy": entropy.item(), "log_ratio": _mean(log_ratios.sum(dim=1).abs())})
            self._note(self._mean_weights(inputs, log_weights.detach().exp()))
        return (loss, log_weights) if return_outputs else loss

    def _mean_weights(self, inputs: Rollout, expert_weights: torch.Tensor) -> dict[str, float]:
        """Mean α of each expert over the tokens of the rows that run it."""
        active = (inputs.weights > 0)[:, None] * inputs.completion_mask[..., None]  # (rows, seq, experts)
        means = (expert_weights * active).sum(dim=(0, 1)) / active.sum(dim=(0, 1)).clamp(min=1)
        ran = active.any(dim=1).any(dim=0).tolist()
        return {f"expert_weights/{n}": m for n, m, r in zip(self.preferences.names, means.tolist(), ran) if r}

    def _prepare_inputs(self, inputs) -> Rollout:
        return inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As for any trainer; a rollout or reward that fails leaves a checkpoint behind."""
        try:
            inputs = self._next_micro_batch()
        except Exception:
            if self.state.global_step > 0 and self._micro_batches_done % self.args.gradient_accumulation_steps == 0:
                self._save_checkpoint(model, trial=None)
            raise
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._note({"update_tokens_per_second": inputs.completion_mask.sum().item() / (time.perf_counter() - start)})
        return loss

    # What is logged

    def _note(self, metrics: dict[str, float]):
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Add the means, over all processes, of what was noted since the last time."""
        noted = defaultdict(list)
        for metrics in gather_object([dict(self._metrics)]):
            for name, values in metrics.items():
                noted[name] += values
        self._metrics.clear()
        super().log(logs | {name: sum(values) / len(values) for name, values in sorted(noted.items())}, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Answer every prompt under every preference set once, and give the mean rewards: over all, by preference and by
        dimension. Processes share the work.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        jobs = [(row, draw) for draw in self.preferences.sets for row in dataset]
        jobs = jobs[self.args.process_index :: self.args.world_size]
        size, metrics = self.args.per_device_eval_batch_size, []
        starts = range(0, len(jobs), size)
        for start in tqdm(
            starts, desc="evaluating", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        ):
            rows, draws = zip(*jobs[start : start + size])
            _, scores = self.rollouts.sample(list(rows), list(draws), self._seed(-1, start))
            metrics.append(reward_lists(scores, draws))
        noted = defaultdict(list)
        for entry in gather_object(metrics):
            for name, values in entry.items():
                noted[f"{metric_key_prefix}_{name}"] += values
        means = {name: sum(values) / len(values) for name, values in sorted(noted.items())}
        self.log(means)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None):
        """What a checkpoint keeps of the ensemble: what learns."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            learnt = {name: p.detach() for name, p in self._pcm.named_parameters() if p.requires_grad}
            save_file(learnt, Path(output_dir) / WEIGHTS_FILE)

    @property
    def _pcm(self):
        return self.accelerator.unwrap_model(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write the ensemble, in the experts' dtype."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            pcm, dtype = self._pcm, self._pcm.dtype
            learnt = {name: tensor.clone() for name, tensor in pcm.state_dict().items()}
            pcm.to(self.ensemble.backbones[0].dtype)
            self.ensemble.save_pretrained(output_dir or self.args.output_dir)
            pcm.to(dtype).load_state_dict(learnt)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint beside its place, and move it there when it is whole."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._staging = Path(self.args.output_dir) / f".{final.name}"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging.mkdir(parents=True, exist_ok=True)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{self.state.best_global_step}"))
        folder = self._staging / final.name
        folder.mkdir(exist_ok=True)
        torch.save(self._rollout, folder / f"rollout_{self.args.process_index}.pt")
        (folder / f"{self.args.process_index}_{STATE_FILE}").write_text(json.dumps(self._rebel_state()))
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(folder, final)
            self._staging.rmdir()
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self._staging = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _rebel_state(self) -> dict:
        return {
            "settings": self._settings(),
            "micro_batches_done": self._micro_batches_done,
            "references": self.scorer.references,
            "reference_rewards": self.scorer.reference_rewards,
            "metrics": self._metrics,
        }

    def _settings(self) -> dict:
        """What must be the same for a run to go on as it began."""
        args, config = self.args, self.ensemble.config
        names = ("seed", "num_generations", "steps_per_generation", "num_iterations", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "max_completion_length", "loss_type", "world_size")  # fmt: skip
        settings = {name: getattr(args, name) for name in names}
        return settings | {
            "experts": config.expert_names,
            "pcm": config.pcm.to_diff_dict(),
            "prompts": len(self.train_dataset),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / f"{self.args.process_index}_{STATE_FILE}").read_text())
        settings = json.loads(json.dumps(self._settings()))
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"The checkpoint {str(folder)!r} was made with {name} = {state['settings'].get(name)!r}, but the "
                    f"trainer has {value!r}. Go on with the settings it was begun with, or start in another folder."
                )
        self._micro_batches_done = state["micro_batches_done"]
        self.scorer.references, self.scorer.reference_rewards = state["references"], state["reference_rewards"]
        self._metrics = defaultdict(list, state["metrics"])
        self._rollout = torch.load(
            folder / f"rollout_{self.args.process_index}.pt", map_location=self.args.device, weights_only=False
        )
        self._pcm.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False)


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()


def reward_lists(scores: Scores, draws: list[DrawnPreference]) -> dict[str, list[float]]:
    """Rewards over all, by preference and by dimension."""
    lists = defaultdict(list, {"reward": list(scores.rewards)})
    for reward, draw in zip(scores.rewards, draws):
        lists[f"reward/{draw.name}" if draw.words is None else f"reward in words/{draw.name}"].append(reward)
    return lists | {f"reward of {name}": values for name, values in scores.dimensions.items()}


def rollout_metrics(rollout: Rollout, scores: Scores, draws: list[DrawnPreference]) -> dict[str, float]:
    """What is logged of a rollout."""
    means = {name: sum(values) / len(values) for name, values in reward_lists(scores, draws).items()}
    lengths = rollout.completion_mask.sum(dim=1).float()
    ended = (lengths < rollout.completion_ids.shape[1]).float()
    wins = sum(scores.wins) / len(scores.wins)
    return means | {"win_share": wins, "completion_length": _mean(lengths), "ended": _mean(ended)}
