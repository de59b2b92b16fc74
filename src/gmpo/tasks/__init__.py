"""Prompts with reference answers, split into a training and a held-out side."""

from gmpo.tasks.arithmetic import arithmetic_task
from gmpo.tasks.bundled import bundled_task
from gmpo.tasks.countdown import countdown_task
from gmpo.tasks.dataset import dataset_task
from gmpo.tasks.gym import gym_task
from gmpo.tasks.jsonl import jsonl_rows, jsonl_rows_and_faults, jsonl_task
from gmpo.tasks.rows import RowForm
from gmpo.tasks.task import Task, few_shot_prompt

__all__ = [
    "RowForm",
    "Task",
    "arithmetic_task",
    "bundled_task",
    "countdown_task",
    "dataset_task",
    "few_shot_prompt",
    "gym_task",
    "jsonl_rows",
    "jsonl_rows_and_faults",
    "jsonl_task",
]
