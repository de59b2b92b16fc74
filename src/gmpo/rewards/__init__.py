"""Rewards: groups of rollouts in, the same groups with their components and rewards out.

`gmpo.rewards.classifier`, the one reward that needs torch, is imported by its own name.
"""

from gmpo.rewards.calls import RewardFunctions
from gmpo.rewards.combination import floored_geometric_mean, weighted_sum
from gmpo.rewards.components import (
    CorrectReward,
    correct_reward,
    format_reward,
    length_reward,
)
from gmpo.rewards.convention import RewardFault, RewardFunction, completion_text
from gmpo.rewards.scoring import RewardRule, ScoredGroups, joined, score_groups

__all__ = [
    "CorrectReward",
    "RewardFault",
    "RewardFunction",
    "RewardFunctions",
    "RewardRule",
    "ScoredGroups",
    "completion_text",
    "correct_reward",
    "floored_geometric_mean",
    "format_reward",
    "joined",
    "length_reward",
    "score_groups",
    "weighted_sum",
]
