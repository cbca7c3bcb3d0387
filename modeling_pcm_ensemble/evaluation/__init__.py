"""
Comparing ways to answer under a preference: baselines, judges, statistics, reports. Needs the `evaluation` extra.
`held_out_proxies` holds rewards that nothing was trained on.
"""

from .baselines import Baseline, Mixture, PlainModel, WeightAverage, label
from .comparison import (
    Job,
    Outcome,
    agreement,
    collect_answers,
    judge_answers,
    make_jobs,
    processes,
    read_by_all,
    summarise,
)
from .cost import measure_cost
from .evaluation import evaluate, expert_weights_over
from .judges import ChatEndpoint, Comparison, HumanVotes, Judge, LanguageModelJudge, RewardJudge, Verdict, write_ballot
from .kept_lines import KeptLines
from .report import eval_results, write_report
from .statistics import bootstrap_interval, holm, omega_squared, permutation_p_value

__all__ = [
    "Baseline",
    "ChatEndpoint",
    "Comparison",
    "HumanVotes",
    "Job",
    "Judge",
    "KeptLines",
    "LanguageModelJudge",
    "Mixture",
    "Outcome",
    "PlainModel",
    "RewardJudge",
    "Verdict",
    "WeightAverage",
    "agreement",
    "bootstrap_interval",
    "collect_answers",
    "eval_results",
    "evaluate",
    "expert_weights_over",
    "holm",
    "judge_answers",
    "label",
    "make_jobs",
    "measure_cost",
    "omega_squared",
    "permutation_p_value",
    "processes",
    "read_by_all",
    "summarise",
    "write_ballot",
    "write_report",
]
