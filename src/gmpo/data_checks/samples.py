"""What a model's sampled solutions say about rows: how hard they are, and whether to trust them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from gmpo.data_checks.rows import answers_of
from gmpo.errors import DataError
from gmpo.grading import Grader, extract_answer, parse_number
from gmpo.records import Prompt

__all__ = ["SampledRow", "Sampler", "Samples", "Scorer", "gold_completion", "sample_rows"]

Sampler = Callable[[Sequence[Prompt]], Sequence[Sequence[str]]]
"""Completions of each prompt, as many for each, drawn from the model as in training."""

Scorer = Callable[[str, Prompt], bool]
"""Whether a completion of a prompt earns the whole reward."""


@dataclass(frozen=True, kw_only=True)
class SampledRow:
    """What one row's samples say.

    Attributes:
        num_samples: completions.
        num_right: of them.
        agreed: the answer that enough of them give, the row's own included; None if they do not
            agree or the row's grading accepts many answers.
        is_disputed: whether that is another answer than the row's own.
    """

    num_samples: int
    num_right: int
    agreed: str | None
    is_disputed: bool

    @property
    def pass_rate(self) -> float:
        """Share that was right."""
        return self.num_right / self.num_samples


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sampled rows in the order asked, and what they come to."""

    rows: tuple[SampledRow, ...]

    @property
    def num_agreed(self) -> int:
        """Rows on whose answer the samples agree."""
        return sum(row.agreed is not None for row in self.rows)

    @property
    def num_disputed(self) -> int:
        """Rows on another answer than whose own the samples agree."""
        return sum(row.is_disputed for row in self.rows)


def gold_completion(prompt: Prompt) -> str:
    """A completion that gives the reference answer and nothing else, marked as final."""
    answer = answers_of(prompt)[0]
    return answer if prompt.columns.get("grading") else f"\\boxed{{{answer}}}"


def sample_rows(
    prompts: Sequence[Prompt], *, sampler: Sampler, scorer: Scorer | None, consensus: float
) -> Samples:
    """Ask a model each prompt several times and compare the answers.

    Args:
        prompts: with their reference answers.
        sampler: asked once, for all of them.
        scorer: of completions; None grades by the prompt's columns.
        consensus: share of a row's samples, above 0.5, that must give one answer to agree.

    Raises:
        DataError: the sampler gives no completion, or not as many for each prompt.
    """
    drawn = [list(texts) for texts in sampler(prompts)]
    counts = {len(texts) for texts in drawn}
    if len(drawn) != len(prompts) or len(counts - {0}) != 1 or 0 in counts:
        raise DataError(
            f"the sampler gave completions of {len(drawn)} prompts, {sorted(counts)} of each, for "
            f"{len(prompts)} prompts; it must give as many of each, at least one"
        )
    if scorer is not None:
        return _judged(prompts, drawn, scorer, consensus)
    with Grader() as grader:
        return _judged(
            prompts,
            drawn,
            lambda text, prompt: grader.grade_item(text, prompt.columns).is_correct,
            consensus,
        )


def _judged(
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[str]],
    scorer: Scorer,
    consensus: float,
) -> Samples:
    return Samples(
        rows=tuple(
            _row(prompt, texts, [scorer(text, prompt) for text in texts], consensus)
            for prompt, texts in zip(prompts, drawn, strict=True)
        )
    )


def _row(
    prompt: Prompt, texts: Sequence[str], right: Sequence[bool], consensus: float
) -> SampledRow:
    own = answers_of(prompt)[0]
    agreed, is_disputed = None, False
    # Where a program decides, many answers are right, and agreement says nothing.
    if prompt.columns.get("grading") is None:
        wants_number = all(parse_number(form) is not None for form in answers_of(prompt))
        given: Counter[str | Fraction | None] = Counter()
        shown: dict[str | Fraction | None, str] = {}
        for text, is_right in zip(texts, right, strict=True):
            answer = own if is_right else extract_answer(text, wants_number=wants_number)
            if answer is None:
                continue
            # All right answers are one, however they are written.
            key = None if is_right else _comparable(answer)
            given[key] += 1
            shown.setdefault(key, answer)
        if given:
            key, count = given.most_common(1)[0]
            if count >= consensus * len(texts):
                agreed, is_disputed = shown[key], key is not None
    return SampledRow(
        num_samples=len(texts), num_right=sum(right), agreed=agreed, is_disputed=is_disputed
    )


def _comparable(answer: str) -> str | Fraction:
    number = parse_number(answer)
    return " ".join(answer.casefold().split()) if number is None else number
