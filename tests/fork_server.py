"""A process that has imported what recipes import, and forks one process a recipe: starting one takes no seconds.

It reads one JSON object a line and answers with one. {"command": [file, word, ...], "folder", "output", "errors",
"environment"} starts the file as `python file word ...` does in the folder and answers its number; {"poll": number}
answers its exit code, or null while it runs. Start it with OMP_NUM_THREADS=1: threads do not survive a fork.
"""

import atexit
import faulthandler
import gc
import html
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import traceback

import accelerate
import datasets
import peft
import scipy.signal
import sklearn.cluster
import speechbrain.lobes.models.ECAPA_TDNN
import speechbrain.nnet.losses
import torch
import torch.distributed.run
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import speechllm
import tokenizer
from speechllm.reports import plots
from speechllm.runs import machine
from speechllm.training import plan

IMPORTED = accelerate, datasets, peft, scipy, sklearn, speechbrain, torch
IMPORTED += transformers.Qwen2ForCausalLM, transformers.HubertForCTC, transformers.Wav2Vec2FeatureExtractor
for package in (speechllm, tokenizer):  # every file of them, which are imported when first used
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name != "speechllm.serving.page":  # Gradio takes seconds, and no recipe needs it
            importlib.import_module(module.name)
# what is made when first used, and takes a second
plots.curves([{"step": 1, "loss": 1.0}])  # matplotlib and its fonts
get_checkpoint_conversion_mapping("")  # for whatever is loaded or saved
machine.versions()


def picture(figure: object, description: str, dpi: int) -> str:
    """A page without its drawings: they take longer than a tiny training, and recipes run in process draw them."""
    return f'<img alt="{html.escape(description)}" src="data:,">'


def curve(name: str, series: object) -> str:
    return picture(series, f"{name} by step", 150)


plots._picture, plots._curve = picture, curve
plan.SIZES["cpu"] = 16  # how fast this machine is, only the plans of real trainings must say


def serve() -> dict | None:
    """In the server None, at the end of its input; in a forked process what it was asked for."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            process, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    return None


def run(command: list[str], folder: str, output: str, errors: str, environment: dict[str, str]) -> int:
    """The exit code."""
    os.setsid()  # a process group of its own, as a command of a shell has: signals to it leave the server alone
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.register(signal.SIGUSR2)  # where its threads are, should it not end
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


gc.collect()
gc.freeze()  # a collection or the end of the interpreter would touch, and so copy, every page of the server's memory
if request := serve():
    code = run(**request)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
