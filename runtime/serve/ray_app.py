"""The same application as a deployment of Ray Serve, for more than one machine."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette

from ..load import LoadOptions
from .admission import Limits
from .app import ServeConfig, create_app
from .messages import EngineSetup

__all__ = ["deployment"]


def deployment(
    source: str,
    *,
    options: LoadOptions | None = None,
    num_replicas: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_queue: int = 64,
) -> Any:
    """Makes what `serve.run` of Ray takes; each replica is a front with an engine of its own.

    Args:
        source: A checkpoint or a bundle, there on every machine.
        options: How it is loaded; see load.
        num_replicas: How many.
        num_cpus: Of each.
        num_gpus: Of each.
        max_queue: Completions that may wait in each.

    Returns:
        A Ray Serve application.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]

    config = ServeConfig(
        setups=[
            EngineSetup(
                source=source,
                options=options or LoadOptions(threads=max(1, int(num_cpus))),
                generation_config=True,
                exact=False,
                default_batch=8,
                environment={"OMP_WAIT_POLICY": "passive"},
            )
        ],
        limits=Limits(max_queue=max_queue),
        starts_loaded=True,
    )

    def make_app() -> Starlette:  # where the replica runs
        return create_app(config)

    @serve.deployment(
        num_replicas=num_replicas,
        max_ongoing_requests=max_queue + 64,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    )
    @serve.ingress(make_app)
    class Llamac:
        pass

    return Llamac.bind()  # pyright: ignore[reportAttributeAccessIssue]
