"""The edits that `mutation.py` makes: each breaks one property of the objective."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One replacement; `old` occurs exactly once in the file (a path inside the package)."""

    file: str
    old: str
    new: str
    why: str


RATIO = "objective/ratio.py"
GMPO = "objective/gmpo.py"
GRPO = "objective/grpo.py"
GSPO = "objective/gspo.py"
KL = "objective/kl.py"
DIAGNOSTICS = "objective/diagnostics.py"
ADVANTAGES = "advantages.py"

EDITS = (
    Edit(
        file=RATIO,
        old="torch.where(mask, policy_logprobs - old_logprobs, 0.0)",
        new="torch.where(mask, old_logprobs - policy_logprobs, 0.0)",
        why="ratio inverted",
    ),
    Edit(
        file=RATIO,
        old="torch.where(mask, policy_logprobs - old_logprobs, 0.0)",
        new="(policy_logprobs - old_logprobs) * mask",
        why="mask multiplied: 0 * nan is nan",
    ),
    Edit(
        file=RATIO,
        old="torch.where(mask, policy_logprobs - old_logprobs, 0.0)",
        new="policy_logprobs - old_logprobs",
        why="mask dropped from the log-ratio",
    ),
    Edit(
        file=RATIO,
        old="torch.where((advantages == 0)[:, None], 0.0, log_ratio)",
        new="log_ratio",
        why="guard of advantage 0 removed",
    ),
    Edit(
        file=RATIO,
        old="torch.where(raises, log_ratio.clamp(max=high), log_ratio.clamp(min=low))",
        new="log_ratio.clamp(min=low, max=high)",
        why="clip on both sides",
    ),
    Edit(
        file=RATIO,
        old="torch.where(raises, log_ratio.clamp(max=high), log_ratio.clamp(min=low))",
        new="torch.where(raises, log_ratio.clamp(min=low), log_ratio.clamp(max=high))",
        why="clip on the wrong side (max for min)",
    ),
    Edit(
        file=RATIO,
        old="torch.where(raises, log_ratio.clamp(max=high), log_ratio.clamp(min=low))",
        new="log_ratio",
        why="clip removed",
    ),
    Edit(
        file=RATIO,
        old="clipped_high = raises & (log_ratio > high)",
        new="clipped_high = log_ratio > high",
        why="high clip counted where A < 0 leaves it open",
    ),
    Edit(
        file=RATIO,
        old="clipped_low = lowers & (log_ratio < low)",
        new="clipped_low = log_ratio < low",
        why="low clip counted where A > 0 leaves it open",
    ),
    Edit(
        file=RATIO,
        old="torch.where(lowers, bounded.clamp(max=negative_high), bounded)",
        new="bounded.clamp(max=negative_high)",
        why="second clip acts on positive advantages too",
    ),
    Edit(
        file=RATIO,
        old="clipped_high = clipped_high | (lowers & (log_ratio > negative_high))",
        new="pass",
        why="second clip not counted",
    ),
    Edit(
        file=RATIO,
        old="torch.where(mask, values, 0.0).sum(dim=-1) / num_tokens",
        new="torch.where(mask, values, 0.0).sum(dim=-1) / values.shape[-1]",
        why="divided by T instead of the count",
    ),
    Edit(
        file=RATIO,
        old="torch.where(mask, values, 0.0).sum(dim=-1) / num_tokens",
        new="torch.where(mask, values, 0.0).sum(dim=-1)",
        why="sum instead of mean",
    ),
    Edit(
        file=RATIO,
        old="torch.where(mask, values, 0.0).sum(dim=-1) / num_tokens",
        new="values.sum(dim=-1) / num_tokens",
        why="mask dropped from the mean",
    ),
    Edit(
        file=RATIO,
        old="if (num_tokens == 0).any():",
        new="if False:",
        why="empty completion let through",
    ),
    Edit(
        file=GMPO,
        old="""    sequence_ratio = token_mean(clipped, mask=mask).exp()
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,""",
        new="""    sequence_ratio = token_mean(clipped, mask=mask).exp()
    return ObjectiveTerms(
        loss=advantages * sequence_ratio,""",
        why="sign of the loss flipped",
    ),
    Edit(
        file=GMPO,
        old="token_mean(clipped, mask=mask).exp()",
        new="token_mean(clipped.exp(), mask=mask)",
        why="arithmetic instead of geometric mean",
    ),
    Edit(
        file=GMPO,
        old="        high=clip_high,\n        negative_high=clip_negative_high,",
        new="        high=clip_high + 0.05,\n        negative_high=clip_negative_high,",
        why="high clip moved by 0.05 nats",
    ),
    Edit(
        file=GMPO,
        old="        low=-clip_low,\n        high=clip_high,\n        negative_high",
        new="        low=-clip_high,\n        high=clip_low,\n        negative_high",
        why="low and high clip swapped",
    ),
    Edit(
        file=GMPO,
        old="        clip_low=clip_low,\n        clip_high=clip_high,\n",
        new="        clip_low=clip_high,\n        clip_high=clip_low,\n",
        why="gmpo_loss hands its clips on swapped",
    ),
    Edit(
        file=GMPO,
        old="clip_negative_high=clip_negative_high,\n    ).loss",
        new="clip_negative_high=None,\n    ).loss",
        why="gmpo_loss loses the second clip",
    ),
    Edit(
        file=GMPO,
        old="token_mean(used, mask=mask).exp()",
        new="token_mean(log_ratio, mask=mask).exp()",
        why="no clip: guard of advantage 0 bypassed",
    ),
    Edit(
        file=GMPO,
        old="(clipped[:, 0] / count_tokens(mask).to(clipped.dtype)).exp()",
        new="(clipped[:, 0] / mask.shape[-1]).exp()",
        why="sequence clip: divided by T instead of the count",
    ),
    Edit(
        file=GMPO,
        old="used.sum(dim=-1, keepdim=True), advantages",
        new="token_mean(used, mask=mask)[:, None], advantages",
        why="sequence clip: clip after the exponent",
    ),
    Edit(
        file=GMPO,
        old="clipped_high=high & mask,",
        new="clipped_high=high & ~mask,",
        why="sequence clip: padding counted as clipped",
    ),
    Edit(
        file=GMPO,
        old="clipped.sum(dim=-1).exp()",
        new="token_mean(clipped, mask=mask).exp()",
        why="no norm: exponent 1/|o| kept",
    ),
    Edit(
        file=GMPO,
        old="    count_tokens(mask)\n",
        new="",
        why="no norm: empty completion let through",
    ),
    Edit(
        file=GRPO,
        old="sequence_ratio = token_mean(ratio, mask=mask)\n    return ObjectiveTerms(\n"
        "        loss=-advantages",
        new="sequence_ratio = token_mean(ratio, mask=mask)\n    return ObjectiveTerms(\n"
        "        loss=advantages",
        why="sign of the loss flipped",
    ),
    Edit(
        file=GRPO,
        old="used, advantages=advantages, low=",
        new="used, advantages=-advantages, low=",
        why="max instead of min: the optimistic clip",
    ),
    Edit(
        file=GRPO,
        old="high=math.log1p(clip_high)",
        new="high=clip_high",
        why="high clip in log space",
    ),
    Edit(
        file=GRPO,
        old="low=math.log1p(-clip_low)",
        new="low=-clip_low",
        why="low clip in log space",
    ),
    Edit(
        file=GRPO,
        old="sequence_ratio = token_mean(ratio, mask=mask)",
        new="sequence_ratio = token_mean(ratio.log(), mask=mask).exp()",
        why="geometric instead of arithmetic mean",
    ),
    Edit(
        file=GRPO,
        old="torch.where(mask, ratio, 0.0).sum(dim=-1) / max_tokens",
        new="torch.where(mask, ratio, 0.0).sum(dim=-1) / count_tokens(mask)",
        why="Dr. GRPO: divided by the count",
    ),
    Edit(
        file=GRPO,
        old="torch.where(mask, ratio, 0.0).sum(dim=-1) / max_tokens",
        new="ratio.sum(dim=-1) / max_tokens",
        why="Dr. GRPO: mask dropped",
    ),
    Edit(
        file=GSPO,
        old="""    mean_log_ratio = token_mean(used, mask=mask)[:, None]
    clipped, low, high = pessimistic_log_ratio(
        mean_log_ratio,
        advantages=advantages,
        low=math.log1p(-clip_low),
        high=math.log1p(clip_high),
    )
    sequence_ratio = clipped[:, 0].exp()""",
        new="""    clipped, low, high = pessimistic_log_ratio(
        used,
        advantages=advantages,
        low=math.log1p(-clip_low),
        high=math.log1p(clip_high),
    )
    sequence_ratio = token_mean(clipped, mask=mask).exp()""",
        why="tokens clipped before the mean",
    ),
    Edit(
        file=GSPO,
        old="low=math.log1p(-clip_low)",
        new="low=-clip_low",
        why="low clip in log space",
    ),
    Edit(
        file=GSPO,
        old="clipped_low=low & mask,",
        new="clipped_low=low.expand_as(mask),",
        why="padding counted as clipped",
    ),
    Edit(
        file=KL,
        old="return p_logprobs - q_logprobs",
        new="return q_logprobs - p_logprobs",
        why="k1 of the other direction",
    ),
    Edit(
        file=KL,
        old="log_q_over_p = q_logprobs - p_logprobs",
        new="log_q_over_p = p_logprobs - q_logprobs",
        why="k3 of the other direction",
    ),
    Edit(
        file=KL,
        old="torch.expm1(log_q_over_p) - log_q_over_p",
        new="0.5 * log_q_over_p.square()",
        why="k2 in place of k3",
    ),
    Edit(
        file=DIAGNOSTICS,
        old='"clip/low_fraction": num_clipped_low / len(flat)',
        new='"clip/low_fraction": num_clipped_high / len(flat)',
        why="clipped share of the wrong side",
    ),
    Edit(
        file=DIAGNOSTICS,
        old='"clip/high_fraction": num_clipped_high / len(flat)',
        new='"clip/high_fraction": num_clipped_high / sum(mask.numel() for mask in masks)',
        why="clipped share of the padding too",
    ),
    Edit(
        file=DIAGNOSTICS,
        old="kl_k1(p_logprobs=zeros, q_logprobs=flat[None])",
        new="kl_k1(p_logprobs=flat[None], q_logprobs=zeros)",
        why="KL to the old policy of the other direction",
    ),
    Edit(
        file=DIAGNOSTICS,
        old="torch.where(mask, log_ratio, -torch.inf).logsumexp(dim=-1)",
        new="log_ratio.logsumexp(dim=-1)",
        why="AM-GM gap counts padding",
    ),
    Edit(
        file=ADVANTAGES,
        old="(num_valid - 1).clamp(min=1)",
        new="num_valid.clamp(min=1)",
        why="biased standard deviation",
    ),
    Edit(
        file=ADVANTAGES,
        old="torch.where(is_equal | ~valid, 0.0, centered)",
        new="torch.where(~valid, 0.0, centered)",
        why="rule of equal rewards removed",
    ),
    Edit(
        file=ADVANTAGES,
        old="is_equal = spread <= _EQUAL_SPREAD * magnitude",
        new="is_equal = spread <= _EQUAL_SPREAD",
        why="equality not relative to the rewards' size",
    ),
    Edit(
        file=ADVANTAGES,
        old="kept - kept.sum(dim=-1, keepdim=True) / num_valid.clamp(min=1)",
        new="kept - kept.mean(dim=-1, keepdim=True)",
        why="invalid rollouts enter the mean",
    ),
    Edit(
        file=ADVANTAGES,
        old="kept - kept.sum(dim=-1, keepdim=True) / num_valid.clamp(min=1)",
        new="kept - kept.sum() / num_valid.sum()",
        why="mean over the batch instead of the group",
    ),
    Edit(
        file=ADVANTAGES,
        old="(variance.sqrt() + eps)",
        new="variance.sqrt()",
        why="eps ignored",
    ),
    Edit(
        file=ADVANTAGES,
        old="if broken.any():",
        new="if False:",
        why="reward that is not finite let through",
    ),
)
