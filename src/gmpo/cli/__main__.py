"""The `gmpo` command as `python -m gmpo.cli`: for processes that this interpreter starts."""

from gmpo.cli import main

__all__ = []  # a program, which gives no names

main()
