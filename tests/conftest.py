"""What tests share. Fixtures here build tiny models and recordings in process; nothing may reach the network.

Torch is imported where it is used: the process that only hands out tests to others needs none.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library is imported: a wrong name fails at once, not after retries
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: tiny models lose more by sharing work than they gain

import pytest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from speechllm import SpeechCodec
    from tokenizer.codec.quantizer import ResidualVectorQuantizer


def pytest_configure() -> None:
    """Settings of this process, and of those that it forks."""
    # in the background of a shell script Ctrl-C is ignored, and by all that is started here; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(50_000, 20, 50)  # imports and tests make many objects and little garbage


def pytest_collection_finish() -> None:
    """A search for garbage among all that was imported takes a second: from here on it is left out."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A test that reaches for another machine fails, also where there is a network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test wanted to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from the global generator does not depend on the tests before it."""
    import torch

    torch.default_generator.manual_seed(0)  # of the processor; `torch.manual_seed` takes a millisecond without a GPU


def _noise(samples: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Noise float [B, N] whose level rises and falls, so that frames differ from each other."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(batch, samples // 400 + 2, generator=generator).repeat_interleave(400, 1)[:, :samples]
    return 0.3 * level * torch.randn(batch, samples, generator=generator)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    return _noise


def _assert_same_codes(
    quantizer: ResidualVectorQuantizer, latents: Tensor, ids: Tensor, expected: Tensor, roundings: int = 16
) -> None:
    """Two searches gave the same codes, long [B, Q', T], wherever rounding cannot decide.

    latents: float [B, D, T], what was searched for.
    Other numbers of rows, chunks, threads and processors add in another order. A frame is settled in a layer when what
    is left of it lies further from the border of its two nearest codes than so many roundings of float32; behind a
    layer in which it is not, two searches may have left over something different. Most frames must be settled.
    """
    import torch

    assert ids.dtype == expected.dtype == torch.long and ids.shape == expected.shape
    assert expected.shape[::2] == latents.shape[::2]
    exact, vectors = copy.deepcopy(quantizer).double(), latents.detach().double().transpose(1, 2)
    settled = torch.ones(vectors.shape[:2], dtype=torch.bool)
    unsettled = []
    for layer, codebook in enumerate(exact.codebooks[: expected.shape[1]]):
        if (start := exact._start(layer)) is not None:
            residual = start(vectors)
        # half the squared distances, as far as they differ between codes
        scores = exact.reduce[layer](residual) @ codebook.T - codebook.square().sum(1) / 2
        best, second = scores.topk(2).values.unbind(-1)
        size = codebook.norm(dim=1).max()
        rounding = torch.finfo(torch.float32).eps * size * (latents.double().norm(dim=1) + size)
        settled &= best - second > roundings * rounding
        assert torch.equal(ids[:, layer][settled], expected[:, layer][settled]), f"layer {layer}: other codes"
        assert torch.equal(expected[:, layer][settled], scores.argmax(-1)[settled]), f"layer {layer}: not the nearest"
        residual = residual - exact.restore[layer](codebook[expected[:, layer]])
        unsettled.append(int((~settled).sum()))
    assert max(unsettled) <= max(1, settled.numel() // 5), f"of {settled.numel()} frames too close: {unsettled}"


@pytest.fixture(scope="session")
def assert_same_codes() -> Callable[..., None]:
    """For codes that two computations find; where it is one and the same computation, `torch.equal` is right."""
    return _assert_same_codes


def _standardize(last: torch.nn.Conv1d | torch.nn.Linear, latents: Tensor) -> None:
    """Change the last layer so that its latents float [D, T] get a mean of 0 and a deviation of 1."""
    import torch

    deviation, mean = torch.std_mean(latents, 1)
    last.bias.copy_((last.bias - mean) / deviation)
    weighted = last.parametrizations.weight.original0 if hasattr(last, "parametrizations") else last.weight
    weighted.div_(deviation.view(-1, *[1] * (weighted.ndim - 1)))


@pytest.fixture(scope="session")
def make_codec() -> Callable[..., SpeechCodec]:
    """Tiny codecs in eval mode: 3 codebooks of 8, placed on the latents of noise so that several codes are in use.

    These latents are standardised: untrained ones are a constant plus a thirtieth of signal, and codes so close to each
    other leave one frame in ten to rounding.
    """
    import torch

    from speechllm import SpeechCodec, SpeechCodecConfig

    made: dict[str, SpeechCodec] = {}

    def make(**settings: object) -> SpeechCodec:
        if (key := repr(sorted(settings.items()))) not in made:
            made[key] = build(settings)
        return copy.deepcopy(made[key])

    def build(settings: dict[str, object]) -> SpeechCodec:
        tiny = {"n_filters": 4, "dimension": 8, "num_codebooks": 3, "codebook_size": 8}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            codec = SpeechCodec(SpeechCodecConfig(**{**tiny, **settings})).eval()
            with torch.no_grad():
                sound = _noise(codec.hop_length * 20 * codec.codebook_size)
                last = codec.encoder.output if codec.config.body == "convnext" else codec.encoder.layers[-1].conv
                _standardize(last, codec.latents(sound)[0])
                latents = codec.latents(sound)[0].T
        codec.quantizer.initialize(latents)
        return codec

    return make


@pytest.fixture(scope="session")
def codec(make_codec: Callable[..., SpeechCodec]) -> SpeechCodec:
    """One tiny codec for tests that only look at it."""
    return make_codec()


@pytest.fixture(scope="session")
def codec_folder(codec: SpeechCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny codec as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("codec")
    codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_codec(make_codec: Callable[..., SpeechCodec]) -> SpeechCodec:
    """The codec of the language model's tests: 2 codebooks of 16."""
    return make_codec(num_codebooks=2, codebook_size=16)


@pytest.fixture(scope="session")
def other_codec(make_codec: Callable[..., SpeechCodec]) -> SpeechCodec:
    """A codec of the same shape and other weights."""
    codec = make_codec(num_codebooks=2, codebook_size=16)
    codec.quantizer.codebooks[0, 0] += 1
    return codec


@pytest.fixture(scope="session")
def make_text_tokenizer() -> Callable[[], object]:
    """Byte-level text tokenizers of about 300 tokens: new ones, because `extend_vocabulary` changes them."""

    def make() -> object:
        from speechllm.small_model import small_text_tokenizer

        return small_text_tokenizer(["TURN ON THE RED LAMP", "OPEN THE BLUE DOOR", "CALL ANNA ON MONDAY"] * 3, 300)

    return make


@pytest.fixture
def text_tokenizer(make_text_tokenizer: Callable[[], object]) -> object:
    """One for a test that needs one."""
    return make_text_tokenizer()


@pytest.fixture(scope="session")
def make_qwen2() -> Callable[..., object]:
    """Qwen2 of width 16 with decided opinions (large random weights); spare: rows beyond the text tokenizer's."""

    def make(text_tokenizer: object, tied: bool = True, spare: int = 0, seed: int = 0) -> object:
        import torch
        from transformers import Qwen2ForCausalLM

        from speechllm.small_model import small_qwen2

        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = small_qwen2(text_tokenizer, **shape, num_key_value_heads=1, initializer_range=0.5)
            if tied and not spare:
                return model.eval()
            config = model.config
            config.tie_word_embeddings, config.vocab_size = tied, config.vocab_size + spare
            return Qwen2ForCausalLM(config).eval()

    return make


LANGUAGE_MODELS = (  # names in transformers
    *("Llama", "Mistral", "Gemma", "Phi", "SmolLM3", "Qwen3", "Granite", "Cohere", "Gemma3Text"),
    *("Gemma2", "GPTJ", "Lfm2", "Qwen3Next", "Qwen3_5Text"),
)


@functools.cache
def _language_model_config(family: str, words: int, end_id: int, pad_id: int, **settings: int) -> object:
    """The family's own settings (tied or not, biases, norms, rotary parts) in a tiny shape."""
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family in ("Gemma", "Gemma2", "Gemma3Text", "Qwen3", "Mistral", "Qwen3Next", "Qwen3_5Text"):
        shape["head_dim"] = 8  # theirs does not follow from the others
    if family == "GPTJ":
        shape |= {"rotary_dim": 4}
    if family == "Lfm2":
        shape |= {"layer_types": ["conv", "full_attention"]}
    if family.startswith("Qwen3_5") or family == "Qwen3Next":
        shape |= {"layer_types": ["linear_attention", "full_attention"]}
        shape |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
        shape |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    if family == "Qwen3Next":
        shape |= {"num_experts": 2, "num_experts_per_tok": 1}
        shape |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8)
    if family == "Gemma2":
        shape |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
    if family in ("Gemma2", "Gemma3Text"):
        shape |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    if family == "Granite":  # the multipliers it is published with, or they would do nothing
        shape |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
        shape |= {"logits_scaling": 8.0}
    return getattr(transformers, f"{family}Config")(
        vocab_size=words,
        num_key_value_heads=2 if family == "Phi" else 1,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        initializer_range=0.5,
        **shape | settings,
    )


@pytest.fixture(scope="session")
def make_language_model() -> Callable[..., object]:
    """A family of LANGUAGE_MODELS in width 16 for a text tokenizer, in eval mode with large random weights."""

    def make(family: str, text_tokenizer: object, seed: int = 0, **settings: int) -> object:
        import torch
        import transformers

        ends = text_tokenizer.eos_token_id, text_tokenizer.pad_token_id
        config = copy.deepcopy(_language_model_config(family, len(text_tokenizer), *ends, **settings))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(params=LANGUAGE_MODELS)
def language_model(
    request: pytest.FixtureRequest, make_language_model: Callable[..., object], text_tokenizer: object
) -> object:
    """One model of each family, for `text_tokenizer`."""
    return make_language_model(request.param, text_tokenizer)


@pytest.fixture
def make_speech_llm(
    make_qwen2: Callable[..., object], text_tokenizer: object, small_codec: SpeechCodec
) -> Callable[..., object]:
    """A tiny SpeechLLM with the small codec and untrained weights; once per test."""

    def make(layers: int = 1, tied: bool = True, spare: int = 0, init: str = "codebook") -> object:
        from speechllm import SpeechLLM, extend_vocabulary

        model = make_qwen2(text_tokenizer, tied, spare)
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, layers, init)
        return SpeechLLM(model, text_tokenizer, vocabulary, small_codec)

    return make


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], types.ModuleType]:
    """A recipe's file as a module, read from its path because nobody imports a recipe."""

    @functools.cache
    def load(name: str) -> types.ModuleType:
        file = Path(__file__).resolve().parents[1] / "recipes" / name
        spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def config_class(recipe: Callable[[str], types.ModuleType]) -> Callable[[str], type]:
    """The configuration class of a recipe: what its `main` takes."""
    return lambda name: inspect.signature(recipe(name).main).parameters["config"].annotation


@pytest.fixture
def new_accelerator() -> Iterator[Callable[[], None]]:
    """What recipes have told Accelerate begins and ends with the test; between two recipes, a call forgets it."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()


@pytest.fixture
def stages_here(
    recipe: Callable[[str], types.ModuleType], config_class: Callable[[str], type], monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Stages run their recipes in this process, one at a time and without pictures; the commands so far."""
    from speechllm.runs.config import load_config
    from speechllm.runs.stages import Stages

    ran: list[list[str]] = []
    turn = threading.Lock()

    def run(stages: Stages, commands: list[list[str]], processes: int = 1) -> None:
        for command in commands:
            script = next(word for word in command if word.endswith(".py"))
            words, name = command[command.index(script) + 1 :], Path(script).name
            with turn, _no_pictures():
                ran.append([name, *words])
                file = words.pop(0).removeprefix("--config=") if words[0].startswith("--config=") else None
                recipe(name).main(load_config(config_class(name), file, words))

    monkeypatch.setattr(Stages, "_run", run)
    return ran


def _save_nothing(figure: object, file: object, **_: object) -> None:
    if isinstance(file, str | Path):
        Path(file).touch()


@contextlib.contextmanager
def _no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its patches
        patch.setattr("matplotlib.figure.Figure.savefig", _save_nothing)
        patch.setattr("speechllm.reports.plots._curve", lambda name, series: f"{name} by step")
        yield


@pytest.fixture
def without_pictures() -> Iterator[None]:
    """Pages without what matplotlib draws, which takes two thirds of the time of a tiny training; others draw it."""
    with _no_pictures():
        yield


@pytest.fixture(scope="module")
def module_without_pictures() -> Iterator[None]:
    """The same for a file in which nobody looks at them, and for what its fixtures run."""
    with _no_pictures():
        yield


PATIENCE_S = 5.0  # for processes of which another has failed


class Started:
    """Processes of one recipe, forked by the server; used like a `subprocess.Popen`."""

    def __init__(self, ask: Callable[[dict], int | None], requests: list[dict]):
        self.ask, self.requests = ask, requests
        self.returncode: int | None = None
        self.failed_s: float | None = None  # when the first one ended with an error
        self.codes: dict[int, int | None] = {ask(request): None for request in requests}

    def poll(self) -> int | None:
        """The exit code once all have ended, the first that is not zero."""
        for process, code in self.codes.items():
            self.codes[process] = self.ask({"poll": process}) if code is None else code
        if None not in self.codes.values():
            self.returncode = next((code for code in self.codes.values() if code), 0)
        elif any(self.codes.values()):
            self.failed_s = self.failed_s or time.monotonic()
            if time.monotonic() - self.failed_s > PATIENCE_S:
                self.kill()  # the others wait for it
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What they wrote, once they have ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send(signal.SIGUSR2)  # they write where they are
                time.sleep(1)
                self.kill()
                command, errors = self.requests[0]["command"], self._read("errors")
                raise AssertionError(f"{command} did not end in {timeout:g} s:\n{errors}")
            time.sleep(0.02)  # asking takes time of two processes
        return self._read("output"), self._read("errors")

    def _read(self, log: str) -> str:
        return "".join(Path(request[log]).read_text() for request in self.requests)

    def send(self, number: int) -> None:
        for process, code in self.codes.items():
            if code is None:
                os.kill(process, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


FORK_SERVER = pytest.StashKey[tuple[int, TextIO, TextIO]]()  # its number, what it reads, what it answers


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fork the server off what was imported for the tests: it need not import torch once more.

    Before the first test: once gradients were computed in a process, torch computes none in its forks.
    """
    if any("start_recipe" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[FORK_SERVER] = _fork_off_server()


def _fork_off_server() -> tuple[int, TextIO, TextIO]:
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    if process := os.fork():
        os.close(asked)
        os.close(answer)
        return process, os.fdopen(ask, "w"), os.fdopen(answers)
    try:
        for number, end in enumerate((asked, answer)):
            os.dup2(end, number)
        for end in (asked, ask, answers, answer):
            os.close(end)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        file = Path(__file__).with_name("fork_server.py")
        os.environ |= {
            "PYTHONPATH": str(file.parents[1]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # equal to the last bit is a promise for one machine and one kind of processor
            "ACCELERATE_USE_CPU": "true",
            "TOKENIZERS_PARALLELISM": "false",
        }
        sys.path.insert(0, str(file.parent))
        if sys.stdin.buffer.peek(1):  # what is still to import takes its time only where a recipe is started
            runpy.run_path(str(file), run_name="__main__")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


@pytest.fixture(scope="session")
def _ask_fork_server(pytestconfig: pytest.Config) -> Iterator[Callable[[dict], int | None]]:
    process, questions, answers = pytestconfig.stash[FORK_SERVER]

    def ask(request: dict) -> int | None:
        questions.write(json.dumps(request) + "\n")
        questions.flush()
        return json.loads(answers.readline())

    yield ask
    questions.close()
    os.waitpid(process, 0)


@pytest.fixture(scope="session")
def start_recipe(
    _ask_fork_server: Callable[[dict], int | None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Started]:
    """Start `python recipes/<name> words` in a folder, one thread a process, without the seconds of importing.

    With processes > 1 they find each other as those of torch.distributed.run do.
    """
    root, logs, number = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("started"), itertools.count()

    def start(
        name: str, words: str, folder: Path, processes: int = 1, environment: dict[str, str] | None = None
    ) -> Started:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{_free_port()}"} if processes > 1 else {}
        requests = []
        for rank in range(processes):
            log, place = logs / f"{next(number)}", {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            size = {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
            requests.append(
                {
                    "command": [str(root / "recipes" / name), *words.split()],
                    "folder": str(folder),
                    "output": f"{log}.out",
                    "errors": f"{log}.err",
                    "environment": {**(environment or {}), **meeting, **(place | size if meeting else {})},
                }
            )
        return Started(_ask_fork_server, requests)

    return start


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """A context in which the recording of that name cannot be opened, as on a disk that fails."""
    from tokenizer import audio

    @contextlib.contextmanager
    def failing(recording: str) -> Iterator[None]:
        open_it = audio._open_at_once

        def fail(path: str, flags: int) -> int:
            if path == recording:
                raise OSError(5, "Input/output error", path)
            return open_it(path, flags)

        with monkeypatch.context() as patch:
            patch.setattr(audio, "_open_at_once", fail)
            yield

    return failing
