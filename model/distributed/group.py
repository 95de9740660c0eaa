"""The processes that hold one model together: started, joined, watched, ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ...runtime.backend import BackendUnavailableError
from ...runtime.launcher import launched_rank, num_local_ranks
from ..ranks import Rank

__all__ = ["RankGroup"]

logger = logging.getLogger(__name__)

_BEAT_S = 0.25
_LOST_BEATS = 40  # of the watcher's own: a stopped terminal's time doesn't count
_START = timedelta(seconds=300)  # from the first rank's arrival to the last one's
_STEP = timedelta(seconds=20)  # one rank may read its weights while another waits
_FOREVER = timedelta(days=365)  # a chat may wait for its next line
_STOP_S = 3.0
_FAULT_S = 1.0  # in which the watcher finds out why a collective failed
_SETUP, _PROBLEM = "llamac/setup", "llamac/problem"


class RankGroup:
    """One rank's view of the group.

    Each rank says every moment that it lives, in a store that the first one, or torchrun, keeps;
    the first ends the group, and its own process, when another doesn't, and the others end when
    the store does.

    Attributes:
        rank: Which one this is.
        commands: What the first rank tells the others by, however long it has nothing to say.
        local_size: How many of the ranks run on this machine.
        device: Where this one's part lies.
    """

    def __init__(
        self, store: Store, rank: Rank, processes: Sequence[subprocess.Popen[bytes]] = ()
    ) -> None:
        self.rank = rank
        self.commands: dist.ProcessGroup | None = None
        self.local_size = num_local_ranks(rank.world_size)
        self.device = torch.device("cpu")
        self._store = store
        self._processes = processes
        self._closing = threading.Event()
        work = self._watch if rank.index == 0 else self._beat
        self._thread = threading.Thread(target=work, args=(_copy(store),), daemon=True)
        self._thread.start()

    @classmethod
    def lead(cls, world_size: int, setup: Mapping[str, Any]) -> RankGroup:
        """Starts the other ranks on this machine, or meets those that torchrun started.

        Args:
            world_size: How many ranks.
            setup: What they load, as JSON.

        Returns:
            The first rank's view.

        Raises:
            ValueError: torchrun started another number, or a group exists already.
        """
        if dist.is_initialized():
            raise ValueError("this process is one of several ranks already; close that model first")
        rank = Rank(index=0, world_size=world_size)
        if (launched := launched_rank()) is not None:
            if launched != (0, world_size):
                raise ValueError(
                    f"this is rank {launched[0]} of {launched[1]}; a model in "
                    f"{world_size} parts is loaded by rank 0 of as many"
                )
            store, _, _ = next(rendezvous("env://"))
            group = cls(store, rank)
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            store = TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach())
            group = cls(store, rank, [_start(i, world_size, port) for i in range(1, world_size)])
        store.set(_SETUP, json.dumps(setup))
        return group

    @classmethod
    def join(cls) -> tuple[RankGroup, dict[str, Any]]:
        """Joins the group that the environment names.

        Returns:
            The rank's view, and what it has to load.
        """
        launched = launched_rank()
        assert launched is not None
        store, index, world_size = next(rendezvous("env://"))
        group = cls(store, Rank(index=index, world_size=world_size))
        store.wait([_SETUP], _FOREVER)
        return group, json.loads(store.get(_SETUP))

    def connect(self, device: str) -> None:
        """Makes the process groups; every rank calls it.

        Args:
            device: Where the model will lie, "cpu" or "cuda".
        """
        rank, backend = self.rank, "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        with self.guarded(), _own_interface(self.local_size == rank.world_size):
            dist.init_process_group(
                backend,
                store=self._store,
                rank=rank.index,
                world_size=rank.world_size,
                timeout=_START,
            )
            commands = dist.new_group(backend="gloo", timeout=_FOREVER)
        assert isinstance(commands, dist.ProcessGroup)
        assert dist.group.WORLD is not None
        self.commands = commands
        self.rank = replace(rank, group=dist.group.WORLD.group_name)

    def started(self) -> None:
        """Waits for all to be ready; from here on, a rank that others wait for too long is lost."""
        dist.barrier(group=self.commands)
        _set_pg_timeout(_STEP)
        if self.rank.index == 0:
            _set_pg_timeout(_STEP, self.commands)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Makes one line of what a collective raises when another rank is gone."""
        try:
            yield
        except BackendUnavailableError:
            raise
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if not isinstance(error, dist.DistError) and "gloo" not in text:
                raise
            time.sleep(_FAULT_S)  # the watcher knows more, if it finds out
            raise BackendUnavailableError(f"another rank is gone: {text[:200]}") from error

    def fail(self, problem: str) -> None:
        """Tells the first rank why this one ends, and waits for it to end first."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_PROBLEM, f"rank {self.rank.index}: {problem}")
            time.sleep(_STOP_S)

    def close(self) -> None:
        """Ends what this rank has started."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        deadline_s = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = ()
        if dist.is_initialized():
            dist.destroy_process_group()

    def kill(self) -> None:
        """Ends the processes that this rank has started at once."""
        self._closing.set()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _beat(self, store: Store) -> None:
        """Another rank's thread: the store ends with the first one."""
        count = 0
        try:
            while not self._closing.wait(_BEAT_S):
                count += 1
                store.set(_beat_key(self.rank.index), str(count))
        except RuntimeError:
            if not self._closing.is_set():
                os._exit(1)

    def _watch(self, store: Store) -> None:
        """The first rank's thread."""
        seen: dict[int, tuple[bytes, int]] = {}  # the last beat, and for how many of our own
        try:
            while not self._closing.wait(_BEAT_S):
                for i in range(1, self.rank.world_size):
                    if (problem := self._problem_of(i, store, seen)) is not None:
                        self._end(problem)
        except RuntimeError as error:
            if not self._closing.is_set():
                self._end(f"the ranks' store is gone: {' '.join(str(error).split())[:200]}")

    def _problem_of(
        self, index: int, store: Store, seen: dict[int, tuple[bytes, int]]
    ) -> str | None:
        if store.check([_PROBLEM]):
            return store.get(_PROBLEM).decode(errors="replace")
        name = f"rank {index} of {self.rank.world_size}"
        if self._processes and (code := self._processes[index - 1].poll()) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return f"{name} {how}"
        if not store.check([_beat_key(index)]):  # it is being started
            return None
        beat = store.get(_beat_key(index))
        last, since = seen.get(index, (b"", 0))
        seen[index] = (beat, since + 1 if beat == last else 0)
        if since < _LOST_BEATS:
            return None
        return f"{name} has said nothing for {_LOST_BEATS * _BEAT_S:g} s"

    def _end(self, problem: str) -> NoReturn:
        """Ends the process from the watcher's thread: the main one may wait in a collective."""
        logger.critical("%s; the others end too", problem)
        self.kill()
        os._exit(1)


def _start(index: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    place = {
        "RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(index),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "llamac.model.distributed.follower"],
        env={**os.environ, **place},
        stdin=subprocess.PIPE,  # its end is this process's
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the first rank's
    )


@contextlib.contextmanager
def _own_interface(local: bool) -> Iterator[None]:
    """Keeps the ranks of one machine to themselves."""
    name = "GLOO_SOCKET_IFNAME"
    chosen = name in os.environ
    if local and not chosen:
        os.environ[name] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        yield
    finally:
        if local and not chosen:
            del os.environ[name]


def _copy(store: Any) -> Store:
    """Another connection: threads can't share one."""
    return store.clone()


def _beat_key(index: int) -> str:
    return f"llamac/beat/{index}"
