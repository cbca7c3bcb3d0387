"""
Comparing ways to answer under a preference: baselines, judges, statistics, reports. Needs the `evaluation` extra.
`held_out_proxies` holds rewards that nothing was trained on; `steering` measures whether answers follow weights.
"""

from .answering_judge import AnsweringJudge
from .answers import Case, collect_answers, collect_text_features, distributed_state, make_cases
from .baselines import Baseline, PlainModel, PromptedInWords, PromptedModel, WeightAverage
from .comparison import Outcome, agreement, judge_answers, summarise
from .cost import measure_cost
from .ensemble_baselines import (
    EnsembleBaseline,
    SingleExpert,
    StaticWeights,
    ToldInWords,
    TrainedEnsemble,
    WithoutContext,
    WithoutDescription,
    with_settings,
    without_pcm,
)
from .judges import ChatEndpoint, Comparison, HumanVotes, Judge, LanguageModelJudge, RewardJudge, Verdict, write_ballot
from .kept_lines import KeptLines
from .learned_judges import LearnedJudge
from .report import eval_results, write_report
from .run import evaluate, expert_weights_over
from .statistics import adjust_p_values, bootstrap_interval, omega_squared, permutation_p_value

__all__ = [
    "AnsweringJudge",
    "Baseline",
    "Case",
    "ChatEndpoint",
    "Comparison",
    "EnsembleBaseline",
    "HumanVotes",
    "Judge",
    "KeptLines",
    "LanguageModelJudge",
    "LearnedJudge",
    "Outcome",
    "PlainModel",
    "PromptedInWords",
    "PromptedModel",
    "RewardJudge",
    "SingleExpert",
    "StaticWeights",
    "ToldInWords",
    "TrainedEnsemble",
    "Verdict",
    "WeightAverage",
    "WithoutContext",
    "WithoutDescription",
    "adjust_p_values",
    "agreement",
    "bootstrap_interval",
    "collect_answers",
    "collect_text_features",
    "distributed_state",
    "eval_results",
    "evaluate",
    "expert_weights_over",
    "judge_answers",
    "make_cases",
    "measure_cost",
    "omega_squared",
    "permutation_p_value",
    "summarise",
    "with_settings",
    "without_pcm",
    "write_ballot",
    "write_report",
]
