"""`genarm` in processes on CPUs that accelerate takes for GPUs, so that FSDP really splits weights over them.

accelerate offers FSDP to processes on GPUs alone; torch's FSDP itself works on CPUs too. Only accelerate's name for the
group is changed here: the splitting, gathering, saving and loading are the real ones, over gloo. With the variable
DIE_AT=MODULE:CLASS:METHOD:N, a process kills itself when that method is called for the Nth time.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from genarm.cli.main import main


def rename_group() -> None:
    original = PartialState.__init__

    def renamed(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed


def die_at(module: str, owner: str, name: str, n: str) -> None:
    holder = getattr(importlib.import_module(module), owner)
    original, calls = getattr(holder, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(n):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, dying)


if __name__ == "__main__":
    rename_group()
    if "DIE_AT" in os.environ:
        die_at(*os.environ["DIE_AT"].split(":"))
    sys.exit(main())
