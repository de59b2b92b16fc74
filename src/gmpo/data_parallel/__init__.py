"""The processes of a run on one machine: one leads, the others lend it their device.

The leader runs the whole loop: prompts, rewards, AdamW's step, guard, checkpoints. Helpers hold the
same weights and do their share of the two things that take time: completions are sampled, and
log-probabilities and gradients computed. Nothing else knows how many processes there are.
"""

from gmpo.data_parallel.processes import Engine, OneProcess, Processes
from gmpo.data_parallel.shares import shares_of_batches, shares_of_prompts

__all__ = ["Engine", "OneProcess", "Processes", "shares_of_batches", "shares_of_prompts"]
