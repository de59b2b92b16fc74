"""The objectives: each equation of the papers in one function, torch only.

`OBJECTIVES` maps a recipe's name to the function that returns its `ObjectiveTerms`.
"""

from collections.abc import Callable, Mapping

from gmpo.objective.diagnostics import am_gm_gap, effective_sample_fraction, step_diagnostics
from gmpo.objective.gmpo import (
    gmpo_loss,
    gmpo_no_clip_terms,
    gmpo_no_norm_terms,
    gmpo_sequence_clip_terms,
    gmpo_terms,
)
from gmpo.objective.grpo import dr_grpo_terms, grpo_loss, grpo_terms
from gmpo.objective.gspo import gspo_loss, gspo_terms
from gmpo.objective.kl import kl_k1, kl_k3
from gmpo.objective.ratio import ObjectiveTerms, token_mean

__all__ = [
    "OBJECTIVES",
    "ObjectiveTerms",
    "am_gm_gap",
    "dr_grpo_terms",
    "effective_sample_fraction",
    "gmpo_loss",
    "gmpo_no_clip_terms",
    "gmpo_no_norm_terms",
    "gmpo_sequence_clip_terms",
    "gmpo_terms",
    "grpo_loss",
    "grpo_terms",
    "gspo_loss",
    "gspo_terms",
    "kl_k1",
    "kl_k3",
    "step_diagnostics",
    "token_mean",
]

OBJECTIVES: Mapping[str, Callable[..., ObjectiveTerms]] = {
    "gmpo": gmpo_terms,
    "gmpo_no_clip": gmpo_no_clip_terms,
    "gmpo_sequence_clip": gmpo_sequence_clip_terms,
    "gmpo_no_norm": gmpo_no_norm_terms,
    "grpo": grpo_terms,
    "dr_grpo": dr_grpo_terms,
    "gspo": gspo_terms,
}
