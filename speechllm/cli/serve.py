"""`speechllm serve`: a speech language model behind HTTP."""

import argparse
import contextlib
import ipaddress
import os
from pathlib import Path

KEY = "SPEECHLLM_API_KEY"  # in the environment, where other users of the machine do not see it


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; requests in progress are answered first."""
    key = arguments.api_key or os.environ.get(KEY)
    if not key and not is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} can be reached by others: give --api-key or set {KEY}")
    try:
        import uvicorn

        from speechllm.serving.app import make_app
        from speechllm.serving.door import Limits
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to serve: pip install "speechllm[serve]"') from error
    import torch

    from speechllm import load_speech_llm, merge

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    speech_llm = merge(load_speech_llm(arguments.model, arguments.codec, device, dtype, arguments.base))
    limits = Limits(arguments.max_requests, arguments.max_megabytes, arguments.max_duration, arguments.timeout)
    name = arguments.name or named(arguments.model)
    app = make_app(speech_llm, name, limits, key, arguments.batch_size)
    config = uvicorn.Config(app, arguments.host, arguments.port, log_level="warning", timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    host, port = socket.getsockname()[:2]
    print(f"{name} is served at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends cleanly and then repeats the signal
        server.run(sockets=[socket])
    return 0


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def named(model: str) -> str:
    """The name of a model by its folder: RUN for RUN/model."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
