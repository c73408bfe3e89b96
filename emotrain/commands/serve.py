"""`emotrain serve`: a server whose models are the subsets of one checkpoint."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotrain.commands.common import add_checkpoint, add_device
from emotrain.errors import UserError
from emotrain.files import json_text

if TYPE_CHECKING:
    from emotrain.serving.gate import Gate
    from emotrain.serving.models import ModelTable

log = logging.getLogger("emotrain")

DESCRIPTION = """\
Serve a checkpoint and subsets of its experts to clients of OpenAI's interface. All of them share
one copy of the model, and their requests run in the same batch."""
EPILOG = """\
examples:
  emotrain serve runs/quickstart
  emotrain serve runs/quickstart --subset rust=rust.json --subset law=law.json --memory 24MB
  emotrain serve runs/quickstart --host 0.0.0.0 --api-key-file keys.txt

then, from another terminal:
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "rust", "prompt": "fn main() {", "max_tokens": 32}'

A request names the model it wants: the checkpoint (its folder's name, or --name), a subset, or
auto:8, which keeps the 8 experts a layer that the prompt itself chooses. /docs in a browser lists
everything.

Anybody on this machine may ask. An address that others can reach needs --api-key-file. A first
Ctrl-C or SIGTERM lets running requests end, another Ctrl-C does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument(
        "--subset",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="serve the experts of a file of `emotrain select` under a name; may be repeated",
    )
    parser.add_argument(
        "--subset-folder",
        metavar="DIR",
        help="let clients load files of subsets from there (/v1/load_subset)",
    )
    parser.add_argument("--name", help="of the full model (default: its folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="keys that clients must send, one a line"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory that the weights may take, for example 2GB: experts are read when they are "
        "needed (default: load all of them)",
    )
    for name, default, text in (
        ("context", 0, "most tokens of a prompt and its text (default: as in training)"),
        ("sequences", 32, "most sequences that run at once (default: 32)"),
        ("waiting", 256, "most that run or wait; more get 429 (default: 256)"),
        ("connections", 512, "most connections at once; more get 503 (default: 512)"),
        ("cache-tokens", 0, "tokens whose keys and values fit (default: 16 whole contexts)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--request-seconds", type=float, default=300.0, metavar="S", help="longest answer"
    )
    parser.add_argument(
        "--body-mb", type=float, default=4.0, metavar="MB", help="largest body (default: 4)"
    )
    add_device(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the address and the models as one JSON object once requests are taken",
    )


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from emotrain.serving.connection import server_config
        from emotrain.serving.gate import read_keys
    except ImportError:
        raise UserError(
            "emotrain serve needs FastAPI and uvicorn; pip install 'emotrain[serve]'"
        ) from None

    keys = read_keys(args.api_key_file) if args.api_key_file else []
    if not keys and not _is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: others can reach it; give --api-key-file, or --host 127.0.0.1"
        )
    for name in ("sequences", "waiting", "connections"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    for name in ("request_seconds", "body_mb"):
        if not getattr(args, name) > 0:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: give more than 0")

    class Server(uvicorn.Server):
        """Says where it is once it can be reached."""

        async def startup(self, sockets: list[Any] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                address = f"http://{args.host}:{port}"
                models = served.names()
                log.info("serving %s at %s", ", ".join(models), address)
                if args.json:
                    print(json_text({"address": address, "models": models}), flush=True)

    gate, served = _application(args, keys)
    server = Server(
        server_config(gate, args.host, args.port, args.connections, args.request_seconds)
    )
    # uvicorn raises the signal again when it has drained: the work is done, and so is the command.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run()
    return 0 if server.started else 1


def _application(args: argparse.Namespace, keys: list[bytes]) -> tuple[Gate, ModelTable]:
    from emotrain.generation.engine import Engine, EngineLimits
    from emotrain.generation.loading import load_weights, open_generator
    from emotrain.modular.budget import read_size
    from emotrain.modular.lazy_experts import store_of
    from emotrain.serving.app import Service, build_app
    from emotrain.serving.chat import ChatTemplate
    from emotrain.serving.completions import TokenTexts
    from emotrain.serving.gate import Gate
    from emotrain.serving.metrics import ServerMetrics
    from emotrain.serving.models import ModelTable, named_files
    from emotrain.serving.worker import Worker

    files = named_files(args.subset)
    memory = read_size(args.memory) if args.memory else None
    folder, config, tokenizer = open_generator(args.checkpoint)
    name = args.name or Path(args.checkpoint).resolve().name
    table = ModelTable(
        name, folder, config, Path(args.subset_folder) if args.subset_folder else None
    )
    for subset, file in files.items():
        table.load(subset, file)
    context = args.context or config.data.sequence_length
    model = load_weights(folder, args.device, memory)
    limits = EngineLimits(args.sequences, args.cache_tokens or 16 * context, context)
    metrics = ServerMetrics(store_of(model))
    worker = Worker(Engine(model, limits, tokenizer), metrics, args.waiting)
    service = Service(
        worker,
        table,
        tokenizer,
        ChatTemplate(folder),
        metrics,
        args.request_seconds,
        TokenTexts(tokenizer),
    )
    app = build_app(service)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    return Gate(app, metrics, paths, keys, int(args.body_mb * 1e6)), table


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
