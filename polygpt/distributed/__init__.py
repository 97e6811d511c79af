"""Several processes that train one run: how they find each other, agree, and stop together.

Without several processes every function here does nothing, at no cost. JAX is imported only where it is used.
"""

from polygpt.distributed.agreement import agree, exchange, main_decides, shared_folder
from polygpt.distributed.launch import Launch, find_launch, start
from polygpt.distributed.processes import (
    ProcessFailedError,
    announce_failure,
    is_main,
    leave,
    process_count,
    process_index,
)
from polygpt.distributed.stopping import StopAgreement
from polygpt.distributed.watch import collective_errors, watching

__all__ = [
    "Launch",
    "ProcessFailedError",
    "StopAgreement",
    "agree",
    "announce_failure",
    "collective_errors",
    "exchange",
    "find_launch",
    "is_main",
    "leave",
    "main_decides",
    "process_count",
    "process_index",
    "shared_folder",
    "start",
    "watching",
]
