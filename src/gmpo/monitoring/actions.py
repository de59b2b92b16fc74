"""What is recommended for each thing that a detector can find, in training and in serving."""

from __future__ import annotations

from collections.abc import Mapping

from gmpo.guard_events import RESPONSES

__all__ = ["ACTIONS"]

ACTIONS: Mapping[str, str] = {
    **{alarm: response.recommended_action for alarm, response in RESPONSES.items()},
    "ratio_spread": "few tokens carry each step: lower training.learning_rate, or take fewer "
    "training.steps_per_round",
    "policy_jump": "a round's steps move the policy too far: lower training.learning_rate, or take "
    "fewer training.steps_per_round",
    "success_drop": "read `error` of recent answers in the store; go back to the version before if "
    "it did not have these errors",
    "quality_drop": "read recent answers of low quality; go back to the version before if its "
    "answers were better, and look at what is asked now",
    "latency_rise": "look at gmpo_gateway_queued_requests and at what else runs on the machine; "
    "shorten answers, or add a gateway",
    "latency_tail": "look for prompts or answers that are far longer than others; lower "
    "--max-tokens or --request-seconds",
    "cut_share_rise": "look for answers that do not end: repetition, or a limit that is too short "
    "for what is asked now",
    "token_probability_drop": "the model has become unsure: see whether other things are asked "
    "than before, or whether the weights or the chat template changed",
    "token_probability_rise": "look for repetition and for answers that are all alike; more "
    "probable is not better",
    "memory_growth": "look at queued requests and the length of prompts; if memory grows without "
    "them, restart the gateway and report it",
}
"""By detector; the keys are those of `SERVING_DETECTORS` and `TRAINING_DETECTORS`."""
