"""Runs jobs in several processes of one thread each, which changes nothing of what they find."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

__all__ = ["run_jobs"]

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Yield every job with its result, in the order in which they end.

    Args:
        function: a module's function: it travels to other processes by its name.
        jobs: started in this order.
        workers: processes; 0 runs all in this one.
    """
    if not workers:
        yield from ((job, function(job)) for job in jobs)
        return
    # A forked child would wait for threads that only its parent has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = {pool.submit(function, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
