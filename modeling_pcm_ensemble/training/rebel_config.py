"""Settings of [`RebelTrainer`], named as TRL names them where TRL has the same thing."""

from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments

from ..rewards.scoring import SHARED_WEIGHT
from .losses import LOSSES

WEIGHT_DISTRIBUTIONS = ("equal", "dirichlet", "signed")
RENAMED = {
    "clip": "epsilon",
    "kl_coef": "beta",
    "rollout_batch_size": "generation_batch_size",
    "preference_weights": "weight_distribution",
}


@dataclass
class RebelConfig(TrainingArguments):
    r"""
    Settings of [`RebelTrainer`], beside those of [`~transformers.TrainingArguments`].

    A rollout is sampled every `num_iterations * steps_per_generation` micro-batches. On each process it has
    `per_device_train_batch_size * steps_per_generation` completions, `num_generations` for each prompt.

    Parameters that control the rollouts:
        per_device_train_batch_size (`int`, defaults to 64): completions of a micro-batch; fewer say little about which
            weights are better, since completions of one prompt differ by chance.
        num_generations (`int`, defaults to 4): K, completions of each prompt under one preference; at least 2.
        steps_per_generation (`int`, *optional*): micro-batches in a rollout; defaults to gradient accumulation's.
        num_iterations (`int`, defaults to 1): how often a rollout is gone through.
        max_completion_length (`int`, defaults to 72): most tokens of a completion.
        generation_batch_size (`int`, *optional*): rows of a rollout that one process samples at once, which bounds the
            memory; defaults to all. Unlike TRL's, it does not say how large a rollout is (`steps_per_generation`
            does), and counts one process's rows.
        num_references (`int`, defaults to 1): completions of the base model that rewards are compared with.
        reference_backbone (`int`, defaults to 0): the backbone that is the base model.

    Parameters that control the preferences:
        weight_distribution (`str`, defaults to `"equal"`): weights within a preference set: `"equal"`; `"dirichlet"`,
            uniform over all mixtures and scaled to the same sum; or, where tilts add up, `"signed"`, nine of ten times
            uniform between 0.05 and 2 times the set's, else between -1 and -0.05 times.
        text_only_fraction (`float`, defaults to 0): share of prompts whose preference is given in words alone, with
            all experts active: half as `preference_text`, half as a system message.
        exploration (`float`, defaults to 0): standard deviation, at most 10, of normal noise on the logarithms of the
            weights, in a product of their absolute values. Half of its variance is drawn once for each completion and
            expert, half anew every 12 tokens, so that a completion's reward says what it is worth to lean to an
            expert, and when. For REBEL alone, which learns from completions of any policy. Rewards, lengths and KL
            that are logged are of these completions; `evaluate` samples without noise. Added adapters need it: their
            strengths are what the policy chooses.

    Parameters that control the reward:
        shared_reward_weight (`float`, defaults to 0.5): what the trainer's `shared_reward` counts beside 1 for the
            weighted mean of the preference's own.

    Parameters that control the loss:
        loss_type (`str`, defaults to `"rebel"`): `"rebel"`, `"ppo"` or `"rloo"`.
        eta (`float`, defaults to 1.0): REBEL's η; a larger one follows the rewards further in one step.
        epsilon (`float`, defaults to 0.2): PPO's ε, the clipping range of the ratio.
        beta (`float`, defaults to 0): weight of the KL divergence to the ensemble at the user's weights, which is an
            untrained PCM's; summed over tokens, as a share of the most there could be.
        entropy_coef (`float`, defaults to 0): weight of the entropy of α, which is rewarded; likewise, for mixtures
            alone. (TRL's is of the next token.)
        description_coef (`float`, defaults to 0): weight of minus the log of the share of α that the wanted experts
            would have if all ran; likewise, for mixtures alone. What the PCM reads names them, so that no reward is
            needed to learn this.
        train_embeddings (`bool`, defaults to `False`): train the PCM's token embeddings too.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards read the dataset's columns."})

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Completions of a micro-batch."})
    num_generations: int = field(default=4, metadata={"help": "Completions of each prompt under one preference."})
    steps_per_generation: int | None = field(default=None, metadata={"help": "Micro-batches in a rollout."})
    num_iterations: int = field(default=1, metadata={"help": "How often a rollout is gone through."})
    max_completion_length: int = field(default=72, metadata={"help": "Most tokens of a completion."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "Rows that a process samples at once."})
    num_references: int = field(default=1, metadata={"help": "Base completions that rewards are compared with."})
    reference_backbone: int = field(default=0, metadata={"help": "Index of the base model's backbone."})

    weight_distribution: str = field(default="equal", metadata={"help": "equal, dirichlet or signed."})
    text_only_fraction: float = field(default=0.0, metadata={"help": "Share of prompts with preferences in words."})
    exploration: float = field(default=0.0, metadata={"help": "Noise on the weights of each completion."})

    shared_reward_weight: float = field(default=SHARED_WEIGHT, metadata={"help": "Weight of the shared reward."})

    loss_type: str = field(default="rebel", metadata={"help": "rebel, ppo or rloo."})
    eta: float = field(default=1.0, metadata={"help": "REBEL's step size."})
    epsilon: float = field(default=0.2, metadata={"help": "PPO's clipping range."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence to the user's weights."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy of the expert weights."})
    description_coef: float = field(default=0.0, metadata={"help": "Weight of choosing the described experts."})
    train_embeddings: bool = field(default=False, metadata={"help": "Train the PCM's token embeddings too."})

    def __new__(cls, *args, **settings):
        """Refuse names that settings had once, before the generated `__init__` refuses them without saying more."""
        for old in RENAMED.keys() & settings.keys():
            raise TypeError(f"`{old}` of {cls.__name__} is called `{RENAMED[old]}` now.")
        return super().__new__(cls)

    def __post_init__(self):
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "reward", True
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps

        self._check_choices()
        self._check_ranges()
        self._check_batches()

    def _check_choices(self):
        for name, accepted in (("loss_type", LOSSES), ("weight_distribution", WEIGHT_DISTRIBUTIONS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` must be one of {', '.join(accepted)}, got {getattr(self, name)!r}.")
        if self.exploration and (self.loss_type != "rebel" or self.beta):
            raise ValueError(
                "`exploration` needs `loss_type` 'rebel' and `beta` 0: other losses, and the KL divergence, are "
                f"estimated from samples of π_t alone. Got {self.loss_type!r} and {self.beta}."
            )

    def _check_ranges(self):
        # Written so that NaN, of which no comparison is true, is refused too.
        for name in (
            "eta",
            "epsilon",
            "max_completion_length",
            "steps_per_generation",
            "num_iterations",
            "num_references",
            "generation_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")

        for name in ("beta", "entropy_coef", "description_coef", "shared_reward_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be below 0, got {getattr(self, name)}.")
        for name, most in (("exploration", 10), ("text_only_fraction", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` must be between 0 and {most}, got {getattr(self, name)}.")

    def _check_batches(self):
        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2, to compare, got {self.num_generations}.")

        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                "`per_device_train_batch_size` must be a multiple of `num_generations`, so that a prompt's "
                f"completions stay together, got {self.per_device_train_batch_size} and {self.num_generations}."
            )

        if self.micro_batches_per_rollout % self.gradient_accumulation_steps:
            raise ValueError(
                "`steps_per_generation * num_iterations` must be a multiple of `gradient_accumulation_steps`, so that "
                f"an update never spans two rollouts, got {self.steps_per_generation}, {self.num_iterations} and "
                f"{self.gradient_accumulation_steps}."
            )

    @property
    def micro_batches_per_iteration(self) -> int:
        return cast(int, self.steps_per_generation)  # `__post_init__` has set it

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.micro_batches_per_iteration * self.num_iterations
