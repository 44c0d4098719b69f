"""Independent runs of a simulation over several processes, their results in the order of the tasks."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")


def in_order(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator[Any]:
    """function(*task) for every task. With one worker nothing leaves this process."""
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, *zip(*tasks, strict=True))
