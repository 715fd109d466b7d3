"""What starting costs before any work is done."""

import subprocess
import sys
from collections.abc import Sequence

import torch

from speechllm.benchmarks.timing import Measured, compare, measured
from speechllm.runs.launch import recipe_environment

STARTS = {
    "import speechllm": ["-c", "import speechllm"],
    "speechllm --help": ["-m", "speechllm.cli.main", "--help"],
    "train_asr --help": ["-m", "speechllm.cli.main", "run", "train_asr", "--help"],
    "import torch, transformers": ["-c", "import torch, transformers"],
}


def imports(repeats: int) -> Measured:
    """Processor time of starting Python for our package and command, and of what every peer imports first."""

    def start(words: Sequence[str]) -> list[str]:
        command = [sys.executable, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=recipe_environment())
        return []

    ways = {name: lambda _, words=words: start(words) for name, words in STARTS.items()}
    return measured("Starting", {"": compare(ways, repeats, torch.device("cpu"))})
