"""`python -m gmpo.helper_process DESCRIPTOR`: a process that lends a training run its device.

The run starts it (`training.processes`) with the descriptor of a pipe for an argument. It ends when
the run hangs up or is gone.
"""

from __future__ import annotations

import signal
import sys
import tomllib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from gmpo.data_parallel.exchange import (
    Orders,
    answer_requests_from,
    answered,
    join_group,
    receive,
)
from gmpo.data_parallel.helper_work import HelperWork
from gmpo.engine import build_engine
from gmpo.host_memory import keep_freed_memory
from gmpo.leash import end_with_parent
from gmpo.policy.load import load_tokenizer
from gmpo.recipe import recipe_of_table

__all__ = ["main"]


def main() -> None:
    """Answer the leader's requests until it hangs up."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the leader's to hear
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    with Connection(int(sys.argv[1])) as line:
        orders: Orders = receive(line)
        config = recipe_of_table(tomllib.loads(orders.recipe), source="the leader's recipe")
        torch.set_num_threads(orders.threads)
        device = config.model.device
        if device == "cuda":
            torch.cuda.set_device(orders.rank)  # what "cuda" means from here on
        elif device == "cpu":
            keep_freed_memory()

        def warn(sentence: str) -> None:
            print(f"note: process {orders.rank}: {sentence}", file=sys.stderr)

        work: dict[str, Callable[..., Any]] = {}

        def begin() -> None:
            tokenizer = load_tokenizer(config.model.name)
            engine = build_engine(config, tokenizer=tokenizer, warn=warn)
            work.update(HelperWork(engine).by_name())

        line.send_bytes(answered(begin))
        if work:  # else the leader has been told why not
            join_group(orders.rendezvous, rank=orders.rank, size=orders.size, device=device)
            answer_requests_from(line, work)


if __name__ == "__main__":
    main()
