"""Progress bars of work that may take long; of the processes on a machine only the first shows one."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable[Any] | None, description: str, **settings: Any) -> tqdm:
    """A bar over `items`, or with None one to `update`; settings: of tqdm."""
    usual = {
        "disable": os.environ.get("LOCAL_RANK", "0") != "0",
        "dynamic_ncols": True,
        "mininterval": 0.5 if sys.stderr.isatty() else 10,  # fewer lines in a log file
        "delay": 1,  # seconds of work that deserve none
    }
    return tqdm(items, description, **(usual | settings))
