"""The `gmpo` command as `python -m gmpo.cli`: for processes that this interpreter starts."""

from gmpo.cli import main

main()
