"""Completions' final answers compared with reference answers."""

from gmpo.grading.answers import extract_answer, parse_number
from gmpo.grading.countdown import grade_countdown
from gmpo.grading.grader import Grader
from gmpo.grading.verdict import Verdict

__all__ = ["Grader", "Verdict", "extract_answer", "grade_countdown", "parse_number"]
