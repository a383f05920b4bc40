"""Threads that each run their torch operations on one core.

An operation of some microseconds gains nothing from being shared out to the threads of OpenMP, and waits milliseconds at its
barrier while another process holds one of the cores. Work made of many small operations is therefore cut into tasks, and each
thread here takes whole tasks. How many threads there are is what the caller has set (`torch.get_num_threads`), and that stays
as it is for the caller and for all threads that others start.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device | None = None
) -> list[Result]:
    """Call a function for each item, on the CPU in several threads that each run torch operations on one core.

    Without gradients and without autocast, whatever is set outside.

    Args:
        function (`Callable`): The function. Results must not depend on the order of the calls.
        items (`Iterable`): What it is called for.
        device (`torch.device`, *optional*): Where the operations run; elsewhere than on the CPU, which is the default, this
            thread makes all calls.

    Returns:
        `list`: The results, in the order of the items.

    Raises:
        Exception: What the function raised for the first item that failed.
    """
    device = torch.device("cpu") if device is None else device
    is_inference = torch.is_inference_mode_enabled()

    def call(item: Item) -> Result:
        with torch.inference_mode(is_inference), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(item)

    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    if num_threads == 1:
        return [call(item) for item in items]
    return list(_pool(num_threads).map(call, items))


def _pool(num_threads: int) -> ThreadPoolExecutor:
    with _lock:
        if num_threads not in _pools:
            _pools[num_threads] = ThreadPoolExecutor(
                num_threads, thread_name_prefix="segmenter", initializer=_use_one_core
            )
        return _pools[num_threads]


def _use_one_core() -> None:
    """In a new thread: let its operations run on one core."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    # That holds for this thread, but torch also takes it as the default of threads that start from now on: put that back.
    thread = threading.Thread(target=torch.set_num_threads, args=(default,))
    thread.start()
    thread.join()


def _forget_pools() -> None:
    """In a process that was forked: threads are not copied."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)

__all__ = ["run_in_threads"]
