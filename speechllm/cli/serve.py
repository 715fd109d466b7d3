"""`speechllm serve` and `speechllm page`: speech language models behind HTTP, for programs and for people."""

import argparse
import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm.serving.hosts import is_loopback

if TYPE_CHECKING:
    from speechllm import SpeechLLM

KEY = "SPEECHLLM_API_KEY"  # in the environment, where other users of the machine do not see it


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; requests in progress are answered first."""
    key = arguments.api_key or os.environ.get(KEY)
    if not key and not is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} can be reached by others: give --api-key or set {KEY}")
    try:
        import uvicorn

        from speechllm.pauses import load_cut
        from speechllm.serving.app import make_app
        from speechllm.serving.door import Limits
        from speechllm.serving.live import MOST_BYTES
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to serve: pip install "speechllm[serve]"') from error
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    listening = socket.create_server((arguments.host, arguments.port), family=family)  # before the model is loaded
    cut = load_cut(arguments.vad)
    speech_llm = loaded(arguments.model, arguments)
    limits = Limits(arguments.max_requests, arguments.max_megabytes, arguments.max_duration, arguments.timeout)
    name = arguments.name or named(arguments.model)
    app = make_app(
        *(speech_llm, name, limits, key, arguments.batch_size, cut),
        beams=arguments.beams,
        letters_weight=arguments.letters_weight,
    )
    # no deadline for pongs: they wait behind speech that the model has no time for yet
    live: dict[str, Any] = {"ws_max_size": MOST_BYTES, "ws_ping_timeout": None}
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30, **live))
    host, port = listening.getsockname()[:2]
    print(f"{name} is served at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends cleanly and then repeats the signal
        server.run(sockets=[listening])
    return 0


def page(arguments: argparse.Namespace) -> int:
    """Show a page of the models until Ctrl-C."""
    if not is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} can be reached by others, and a page asks for no key")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from speechllm.pauses import load_cut
        from speechllm.serving.engine import Engine
        from speechllm.serving.page import launch, make_page
    except ImportError as error:
        raise ImportError(f'{error.name} is needed for the page: pip install "speechllm[page]"') from error
    cut = load_cut(arguments.vad)
    engines: dict[str, Engine] = {}
    settings = {"beams": arguments.beams, "letters_weight": arguments.letters_weight}
    with contextlib.ExitStack() as open_engines:
        for model in arguments.models:
            name = named(model) if named(model) not in engines else f"{named(model)} {len(engines) + 1}"
            engine = Engine(loaded(model, arguments), **settings)
            engines[name] = open_engines.enter_context(contextlib.closing(engine))
        launch(make_page(engines, cut), arguments.host, arguments.port)
    return 0


def loaded(model: str, arguments: argparse.Namespace) -> "SpeechLLM":
    """A model for inference, with the parts that the options name, on a GPU if there is one."""
    if arguments.letters and not arguments.letters_weight:
        raise ValueError("--letters without --letters-weight changes nothing: give both, for example 0.15")
    from speechllm import load_speech_llm, merge
    from speechllm.runs.machine import decoding_device

    codec, base = getattr(arguments, "codec", None), getattr(arguments, "base", None)  # a page has no such options
    device, dtype = decoding_device()
    return merge(load_speech_llm(model, codec, device, dtype, base, letters=arguments.letters))


def named(model: str) -> str:
    """The name of a model by its folder: RUN for RUN/model."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
