"""`llamac serve`: its options, and what they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import launched_rank, num_local_ranks
from ..load import LoadOptions
from .terminal import say
from .text_options import given

if TYPE_CHECKING:
    from ..serve.app import ServeConfig

__all__ = ["add_serve_options", "serve"]

_MAX_REPLICAS = 64


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that serve alone has."""
    group = parser.add_argument_group("of the server")
    group.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, nobody else's)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    group.add_argument("--name", metavar="NAME", help="of the model (default: its folder's)")
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="jinja (default: the model's own)"
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one a line (default: none needed)"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page that may call from a browser; repeatable (default: this server's own)",
    )
    group.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes with a model (default: 1)"
    )
    group.add_argument(
        "--max-queue", type=int, default=128, metavar="N", help="completions waiting (default: 128)"
    )
    group.add_argument(
        "--max-queued-tokens",
        type=int,
        default=262_144,
        metavar="N",
        help="of their prompts (default: 262144)",
    )
    group.add_argument(
        "--request-timeout", type=float, metavar="S", help="seconds a text takes (default: none)"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30,
        metavar="S",
        help="seconds that running texts get after SIGTERM (default: 30)",
    )
    group.add_argument(
        "--max-body-bytes", type=int, default=8 << 20, metavar="N", help="(default: 8 MiB)"
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="logits without a rounding that depends on other requests; slower",
    )
    group.add_argument(
        "--ignore-generation-config",
        action="store_true",
        help="not the model's own sampling settings",
    )


def serve(args: argparse.Namespace) -> int:
    """Serves a model until a signal ends it.

    Args:
        args: Of `add_serve_options`, and how the source is loaded.

    Returns:
        The exit code.

    Raises:
        ValueError: An option is out of its range, or the model can't be loaded.
        OSError: A file or the address can't be had.
    """
    from ..serve.run import run_server

    source = args.model or (args.words.pop(0) if args.words else None)
    if args.words:
        raise ValueError(f"{args.words[0]!r} is one source too many; serve takes one")
    config = _config(args, source, LoadOptions(**given(args, tuple(LoadOptions.__annotations__))))
    return run_server(config, host=args.host, port=args.port, announce=say)


def _config(args: argparse.Namespace, source: str | None, options: LoadOptions) -> ServeConfig:
    from ..serve.admission import Limits
    from ..serve.app import ServeConfig
    from ..serve.messages import EngineSetup
    from ..serve.middleware import read_keys
    from ..serve.run import serving_threads

    for name, low, high in (
        ("port", 0, 65535),
        ("replicas", 1, _MAX_REPLICAS),
        ("max_queue", 0, 10**6),
        ("max_queued_tokens", 0, 2**40),
        ("shutdown_timeout", 0, 86400),
        ("max_body_bytes", 1, 2**40),
    ):
        if not low <= getattr(args, name) <= high:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}; it must be from {low} to {high}")
    if args.request_timeout is not None and not args.request_timeout > 0:
        raise ValueError(f"--request-timeout is {args.request_timeout}; it must be above 0")
    if args.replicas > 1 and launched_rank() is not None:
        raise ValueError(
            f"--replicas is {args.replicas}; ranks that were started together are one model, so "
            "start a server for each"
        )
    ranks = max(1, num_local_ranks(options.get("tensor_parallel", 1)))
    setups = []
    for index in range(args.replicas):
        own = LoadOptions(**{"threads": serving_threads(args.replicas * ranks), **options})
        # A core that spins while it waits for others is one that they could use.
        environment = {"OMP_WAIT_POLICY": "passive"}
        if args.replicas > 1 and own.get("provider", "cpu") != "cpu":
            own["device_id"] = index
        if args.replicas > 1 and own.get("device") == "cuda":
            own_devices = range(index * ranks, (index + 1) * ranks)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own_devices))
        setups.append(
            EngineSetup(
                source=source,
                options=own,
                generation_config=not args.ignore_generation_config,
                exact=args.exact,
                default_batch=8,
                environment=environment,
            )
        )
    return ServeConfig(
        setups=setups,
        limits=Limits(
            max_queue=args.max_queue,
            max_queued_tokens=args.max_queued_tokens,
            request_timeout_s=args.request_timeout,
        ),
        name=args.name or _name_of(source),
        template_file=args.chat_template,
        api_keys=read_keys(args.api_key_file) if args.api_key_file else (),
        cors_origins=args.cors_origin,
        max_body_bytes=args.max_body_bytes,
        shutdown_timeout_s=args.shutdown_timeout,
    )


def _name_of(source: str | None) -> str | None:
    """What clients call a source: the name of its file or folder, or the one that it has."""
    if source is None:
        return None
    if Path(source).is_dir():
        return Path(source).resolve().name
    return Path(source).stem if Path(source).is_file() else source
