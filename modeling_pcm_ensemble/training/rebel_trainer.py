"""Trains the Preference Control Model on what the mixture itself samples; the experts stay as they are."""

import random
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..checkpoint_staging import finish_save
from ..merging import log_expert_weights
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..rewards.models import reward_function
from ..rewards.scoring import Scorer, Scores
from .checkpoints import CheckpointTrainer
from .checks import check_dataset, check_model
from .losses import (
    expert_weight_entropy,
    leave_one_out,
    log_described_share,
    mixture_token_log_probs,
    ppo_loss,
    rebel_loss,
    rloo_loss,
    token_kl,
)
from .pcm_trainer import padding_tokenizer
from .preference_sampling import DrawnPreference, PreferenceSampler
from .rebel_config import RebelConfig
from .rollouts import Rollout, RolloutSampler, completion_weight_logits


class RebelTrainer(CheckpointTrainer):
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
        check_model(model, args)
        tokenizer = padding_tokenizer(model, processing_class)
        if preference_sets is None and train_dataset is not None and None not in _column(train_dataset, "preference"):
            preference_sets = []  # every row has its own
        self.preferences = PreferenceSampler(
            model.config, preference_sets, args.preference_weights, args.text_only_fraction
        )
        rewards = {name: reward_function(name, reward, args.device) for name, reward in (reward_funcs or {}).items()}
        for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            if dataset is not None:
                check_dataset(dataset, name, model, tokenizer, self.preferences, set(rewards), args)
        super().__init__(
            model,
            args,
            args.train_embeddings,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reward_funcs = rewards
        self.scorer = Scorer(rewards)
        self.rollouts = RolloutSampler(model, tokenizer, self.scorer, args)

    def train(self, *args, **kwargs):
        """As for any trainer, from a checkpoint after what a killed run had saved whole is in its place."""
        if self.train_dataset is None:
            raise ValueError("There is nothing to train on. Pass `train_dataset`.")
        finish_save(self.args.output_dir)
        self._rollout, self._micro_batches_done, self._micro_batches_saved = None, 0, 0  # or a checkpoint's
        return super().train(*args, **kwargs)

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
        rollout, scores = self.rollouts.sample(rows, draws, self._seed(number), exploration=self.args.exploration)
        seconds = time.perf_counter() - start
        rollout.old_log_probs, expert_weights = self._old_log_probs(rollout)
        self._note({"rollout_tokens_per_second": rollout.completion_mask.sum().item() / seconds})
        self._note(rollout_metrics(rollout, scores, draws, self.rollouts.ended(rollout)))
        self._note(weight_metrics(expert_weights, rollout.weights, draws, self.preferences.names))
        return rollout

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """
        log π_t, `(rows, seq)`, computed as the update does, so that the first ratio is 1; and each row's mean α,
        `(rows, experts)`.
        """
        size, log_probs, means = self.args.per_device_train_batch_size, [], []
        for start in range(0, len(rollout), size):
            part = rollout.rows(slice(start, start + size))
            with self.compute_loss_context_manager():
                log_weights = log_expert_weights(self._expert_weight_logits(self.model, part), part.weights.log())
                log_probs.append(mixture_token_log_probs(log_weights, part.expert_log_probs))
            mask = part.completion_mask[..., None]
            means.append((log_weights.exp() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        return torch.cat(log_probs), torch.cat(means)

    # The update

    def _expert_weight_logits(self, pcm, rollout: Rollout) -> torch.Tensor:
        pcm.train(self.args.gradient_checkpointing)  # which layers do in training only; there is no dropout then
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prefix_ids")
        return completion_weight_logits(pcm, **{name: getattr(rollout, name) for name in names})

    def compute_loss(self, model, inputs: Rollout, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of a micro-batch of whole groups."""
        args, mask = self.args, inputs.completion_mask
        expert_weight_logits = self._expert_weight_logits(model, inputs)
        log_weights = log_expert_weights(expert_weight_logits, inputs.weights.log())
        log_probs = mixture_token_log_probs(log_weights, inputs.expert_log_probs)  # (rows, seq)
        log_ratios = (log_probs - inputs.old_log_probs) * mask
        groups = (-1, args.num_generations)
        rewards = inputs.rewards.view(groups)
        initial = log_expert_weights(torch.zeros_like(expert_weight_logits), inputs.weights.log())
        kl = token_kl(log_probs, mixture_token_log_probs(initial, inputs.expert_log_probs))  # (rows, seq)
        entropy = expert_weight_entropy(log_weights)
        described = log_described_share(expert_weight_logits, inputs.shares > 0)
        if args.loss_type == "rebel":
            loss = rebel_loss(log_ratios.sum(dim=1).view(groups), rewards, args.eta)
        elif args.loss_type == "ppo":
            loss = ppo_loss(log_ratios, leave_one_out(rewards).flatten(), mask, args.clip, args.max_completion_length)
        else:
            loss = rloo_loss(log_ratios.sum(dim=1), leave_one_out(rewards).flatten())
        # Over the most tokens there could be, so that a batch may be split in any way.
        penalty = (args.kl_coef * kl - args.entropy_coef * entropy - args.description_coef * described) * mask
        loss = loss + penalty.sum() / (len(mask) * args.max_completion_length)
        with torch.no_grad():
            terms = {"kl": kl, "entropy": entropy, "described_share": described.exp()}
            means = {name: ((x * mask).sum() / mask.sum()).item() for name, x in terms.items()}
            self._note(means | {"log_ratio": _mean(log_ratios.sum(dim=1).abs())})
        return (loss, log_weights) if return_outputs else loss

    def _prepare_inputs(self, inputs) -> Rollout:
        return inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As for any trainer; a rollout or reward that fails leaves a checkpoint behind."""
        inputs = self._all_or_none(self._next_micro_batch)
        self._micro_batches_done += 1
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()  # what is timed has run
        self._note({"update_tokens_per_second": inputs.completion_mask.sum().item() / (time.perf_counter() - start)})
        return loss

    def _all_or_none(self, call):
        """What `call` gives. Where it fails on any process, all of them write a checkpoint and raise."""
        value, error = None, None
        noted = {name: list(values) for name, values in self._metrics.items()}
        try:
            value = call()
        except Exception as caught:
            error = caught
        failed = [message for message in gather_object([error and f"{type(error).__name__}: {error}"]) if message]
        if failed:
            self._metrics = defaultdict(list, noted)  # to which processes that did not fail have added
            error = error or RuntimeError(f"Another process failed: {failed[0]}")
            if self.is_in_train and self._micro_batches_done > self._micro_batches_saved:
                try:
                    self._save_checkpoint(self.model_wrapped, trial=None)
                except OSError as unsaved:
                    raise error from unsaved
            raise error
        return value

    # What is logged

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Answer every prompt under every preference set once, and give the mean rewards: over all, by preference and by
        dimension. Processes share the work.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is nothing to evaluate on. Pass `eval_dataset`.")
        check_dataset(
            dataset,
            "eval_dataset",
            self.ensemble,
            self.processing_class,
            self.preferences,
            set(self.scorer.reward_funcs),
            self.args,
        )
        metrics = self._all_or_none(lambda: self._evaluation_metrics(dataset))
        pending, self._metrics = self._metrics, defaultdict(list)
        noted = defaultdict(list)
        for entry in gather_object(metrics):
            for name, values in entry.items():
                noted[f"{metric_key_prefix}_{name}"] += values
        means = {name: sum(values) / len(values) for name, values in sorted(noted.items())}
        self.log(means)
        self._metrics = pending
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means

    def _evaluation_metrics(self, dataset) -> list[dict[str, list[float]]]:
        """Rewards of this process's share of the prompts and preferences."""
        jobs = [(row, draw) for row in dataset for draw in self._evaluated(row)]
        jobs = jobs[self.args.process_index :: self.args.world_size]
        size, metrics = self.args.per_device_eval_batch_size, []
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        for start in tqdm(range(0, len(jobs), size), desc="evaluating", disable=quiet, leave=False):
            rows, draws = zip(*jobs[start : start + size])
            _, scores = self.rollouts.sample(list(rows), list(draws), self._seed(-1, start))
            metrics.append(reward_lists(scores, list(draws)))
        return metrics

    def _evaluated(self, row: dict) -> list[DrawnPreference]:
        if row.get("preference") is not None:
            return [self.preferences.preference(row["preference"])]
        return self.preferences.sets


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()


def reward_lists(scores: Scores, draws: list[DrawnPreference]) -> dict[str, list[float]]:
    """Rewards over all, by preference and by dimension."""
    lists = defaultdict(list, {"reward": list(scores.rewards)})
    for reward, draw in zip(scores.rewards, draws):
        lists[f"reward/{draw.name}" if draw.words is None else f"reward in words/{draw.name}"].append(reward)
    return lists | {f"reward of {name}": values for name, values in scores.dimensions.items()}


def rollout_metrics(
    rollout: Rollout, scores: Scores, draws: list[DrawnPreference], ended: torch.Tensor
) -> dict[str, float]:
    """What is logged of a rollout."""
    means = {name: sum(values) / len(values) for name, values in reward_lists(scores, draws).items()}
    lengths = rollout.completion_mask.sum(dim=1).float()
    wins = sum(scores.wins) / len(scores.wins)
    return means | {"win_share": wins, "completion_length": _mean(lengths), "ended": _mean(ended.float())}


def weight_metrics(
    expert_weights: torch.Tensor, weights: torch.Tensor, draws: list[DrawnPreference], names: list[str]
) -> dict[str, float]:
    """Mean α of each expert where it ran, over all and by preference; arguments `(rows, experts)`."""
    found = defaultdict(list)
    for row, active, draw in zip(expert_weights.tolist(), (weights > 0).tolist(), draws):
        preference = draw.name if draw.words is None else f"{draw.name} in words"
        for name, value, ran in zip(names, row, active):
            if ran:
                found[f"expert_weights/{name}"].append(value)
                found[f"expert_weights/{preference}/{name}"].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _column(dataset, name: str) -> list:
    return list(dataset[name]) if name in getattr(dataset, "column_names", ()) else [None]
