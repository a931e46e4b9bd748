"""Ranks that are connected by :mod:`torch.distributed`, and notice when one of them ends.

Only a few short messages go between them, over the gloo backend of :mod:`torch.distributed`:
what each has found and done, and that one has failed. Every rank has a connection to rank 0, and
a thread that listens to it. The operating system closes the connection of a process that ends,
however it ends, so that a rank that was killed is noticed at once. Rank 0 then tells the others;
each looks between two batches, and ends.

The first failure that rank 0 hears of is the run's: the rank that it is of says what is wrong,
the others end without a word, all with the same exit code. Of a rank that was killed rank 0
speaks; if it was rank 0, all do. (A machine that loses its network or power closes nothing, and a
rank that ends before all are connected is only missed after some minutes: both are noticed by
``torchrun``, whose processes look after each other and after their own ranks.)
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from know_cli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    KnowError,
    UsageError,
    was_interrupted,
)
from know_cli.ranks.alone import PeerError, Ranks
from know_cli.ranks.environment import environment_number

# All ranks are started at about the same time, but from a cold file system torch loads slowly.
_START_SECONDS = 300.0
_FOREVER = timedelta(days=365)
# How long a rank that is about to end waits for another; after it, the user is told what it does.
_PATIENCE_SECONDS = 10.0
# torchrun ends the others as soon as one rank has ended; the reason may come a little later.
_REASON_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_LARGEST_PORT = 2**16 - 1

_VALUE, _FAILED, _END = "value", "failed", "end"


@dataclass(frozen=True)
class _Failure:
    """Which rank has failed, with which exit code, and whether it could say so itself."""

    rank: int
    code: int
    is_told: bool

    def error(self) -> PeerError:
        how = "has failed" if self.is_told else "ended without a word, perhaps for want of memory"
        return PeerError(
            f"rank {self.rank} {how}; the output is left as it was, run the same command again",
            self.code,
            is_told=self.is_told,
        )


class TorchRanks(Ranks):
    """One of several processes, connected by torch.distributed; see :class:`Ranks`."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.rank, self.size = environment_number("RANK"), environment_number("WORLD_SIZE")
        local = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "RANK"
        self.local_rank = environment_number(local)
        self._tell = tell
        self._lock = threading.Lock()
        self._failure: _Failure | None = None
        # Peers that take no more messages; whose work is done; that were told that ours is.
        self._gone: set[int] = set()
        self._ended: set[int] = set()
        self._let_go: set[int] = set()
        self._has_failed = threading.Event()
        self._has_told = threading.Event()
        self._is_interrupted = False
        self._handlers: dict[int, Any] = {}
        peers = range(1, self.size) if self.rank == 0 else range(1)
        self._inboxes: dict[int, queue.SimpleQueue[Any]] = {k: queue.SimpleQueue() for k in peers}
        self._outboxes = {k: threading.Lock() for k in peers}
        self._listeners = [
            # No daemons: the interpreter must not end while one is in the middle of a wait.
            threading.Thread(target=self._listen, args=(peer,), name=f"rank {peer}")
            for peer in peers
        ]

    def __enter__(self) -> TorchRanks:
        try:
            self._connect()
        except RuntimeError as error:  # also that of torch.distributed
            raise UsageError(
                f"rank {self.rank} of {self.size} does not reach the other ranks "
                f"({' '.join(str(error).split())}); start all of them with torchrun, or, if this "
                "is to be the only one, unset WORLD_SIZE"
            ) from error
        self._take_signals()
        for listener in self._listeners:
            listener.start()
        try:
            # Only when all are connected does any rank begin, and so can fail.
            self.gather(None)
            self.broadcast(None)
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def _connect(self) -> None:
        store = self._open_store()
        # A script may be what torchrun starts, and predict several times, one after the other. (It
        # is to end after the first that fails: signals do not interrupt that end.)
        turn = (store.add("know-predict", 1) - 1) // self.size
        store = dist.PrefixStore(f"know-predict {turn}", store)  # type: ignore[attr-defined]
        self._meet(store)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=_START_SECONDS),
        )

    def _open_store(self) -> Any:
        """The store of torchrun, or one of rank 0."""
        host, port = os.environ["MASTER_ADDR"], environment_number("MASTER_PORT")
        if not 0 < port <= _LARGEST_PORT:
            raise UsageError(f"MASTER_PORT={port} in the environment is no port")
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        is_master = self.rank == 0 and not of_torchrun
        if not is_master:
            self._wait_until(lambda: _answers(host, port), f"nothing answers at {host}:{port}")
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=_START_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _meet(self, store: Any) -> None:
        """Wait until all ranks are there."""
        here = [f"rank {rank}" for rank in range(self.size)]
        store.set(here[self.rank], "")
        self._wait_until(lambda: bool(store.check(here)), "not all have come")

    def _wait_until(self, is_there: Callable[[], bool], missing: str) -> None:
        """Look again and again: torch's own ways to wait could not be interrupted.

        Raises:
            RuntimeError: it has taken too long; says what was missing.
        """
        began = time.monotonic()
        is_told = False
        while not is_there():
            waited = time.monotonic() - began
            if waited > _START_SECONDS:
                raise RuntimeError(missing)
            if waited > _PATIENCE_SECONDS and not (self.rank or is_told):
                self._tell(
                    f"rank {self.rank} of {self.size}: waiting for the other ranks ({missing}); if "
                    "this is to be the only process, unset WORLD_SIZE"
                )
                is_told = True
            time.sleep(_LOOK_SECONDS)

    def _take_signals(self) -> None:
        """From now on an interruption is one exception, however many signals come.

        torchrun passes Ctrl-C on while the terminal does the same, and what is being taken back
        must not be interrupted.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(wish) is not signal.SIG_IGN:
                self._handlers[wish] = signal.signal(wish, self._interrupt)

    def _interrupt(self, wish: int, frame: FrameType | None) -> None:
        if not self._is_interrupted:
            self._is_interrupted = True
            raise KeyboardInterrupt

    # ------------------------------------------------------------------ messages

    def _send(self, peer: int, what: str, value: Any, patience: float = _START_SECONDS) -> None:
        """Send a message, and wait until it is taken.

        Raises:
            RuntimeError: the peer has gone, or does not take it.
        """
        text = json.dumps([what, value]).encode()
        errors: list[RuntimeError] = []
        # In a thread: of a peer that goes in this moment gloo may tell the listener only, and
        # leave the sender waiting.
        sender = threading.Thread(target=self._deliver, args=(peer, text, errors), daemon=True)
        sender.start()
        until = time.monotonic() + patience
        while sender.is_alive():
            sender.join(_LOOK_SECONDS)
            if sender.is_alive() and (peer in self._gone or time.monotonic() > until):
                raise RuntimeError(f"rank {peer} does not answer")
        if errors:
            raise errors[0]

    def _deliver(self, peer: int, text: bytes, errors: list[RuntimeError]) -> None:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        try:
            with self._outboxes[peer]:
                for part in (torch.tensor([len(data)]), data):
                    dist.send(part, peer)
        except RuntimeError as error:
            errors.append(error)

    def _receive(self, peer: int) -> Any:
        length = torch.empty(1, dtype=torch.int64)
        self._wait(length, peer)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._wait(data, peer)
        return json.loads(data.numpy().tobytes())

    def _wait(self, out: torch.Tensor, peer: int) -> None:
        work = dist.irecv(out, peer)
        assert work is not None, "this rank is in the group"
        work.wait(_FOREVER)

    def _listen(self, peer: int) -> None:
        """Take a peer's messages until it ends."""
        try:
            while True:
                what, value = self._receive(peer)
                if what == _VALUE:
                    self._inboxes[peer].put(value)
                elif what == _END:
                    self._ended.add(peer)
                    return
                else:
                    self._settle(_Failure(*value))
                    if self.rank:
                        # Rank 0 may go any moment now, and nobody listens for that any more.
                        self._gone.add(peer)
                        return
        except RuntimeError:
            self._gone.add(peer)
            self._settle(_Failure(peer, EXIT_OUTPUT, is_told=False))

    def _settle(self, failure: _Failure) -> None:
        """The first failure counts; rank 0 tells the others of it."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        self._has_failed.set()
        if self.rank == 0:
            told = [failure.rank, failure.code, True]
            for peer in self._outboxes.keys() - self._let_go:
                with suppress(RuntimeError):  # it may be the one that has ended
                    self._send(peer, _FAILED, told, _PATIENCE_SECONDS)
            self._has_told.set()

    # ------------------------------------------------------------------ what the engine needs

    def check(self) -> None:
        """See :meth:`Ranks.check`."""
        if self._failure is not None:
            raise self._failure.error()

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        if self.rank:
            self._tell_peer(0, value)
            return []
        return [value, *(self._next(peer) for peer in self._inboxes)]

    def broadcast(self, value: Any) -> Any:
        """See :meth:`Ranks.broadcast`."""
        if self.rank:
            return self._next(0)
        for peer in self._outboxes:
            self._tell_peer(peer, value)
        return value

    def _tell_peer(self, peer: int, value: Any) -> None:
        self.check()
        try:
            self._send(peer, _VALUE, value)
        except RuntimeError:
            # The listener has the same broken connection before it, and knows more.
            self._has_failed.wait(_PATIENCE_SECONDS)
            self.check()
            raise

    def _next(self, peer: int) -> Any:
        while True:
            self.check()
            has_ended = peer in self._ended  # to be looked at before what it may have left
            with suppress(queue.Empty):
                return self._inboxes[peer].get(timeout=_LOOK_SECONDS)
            if has_ended:
                raise UsageError(
                    f"rank {peer} has ended, having less to do than rank {self.rank}; start all "
                    "ranks with the same command"
                )

    # ------------------------------------------------------------------ the end

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
        else:
            self._finish()

    def _finish(self) -> None:
        if self.rank:
            self._is_interrupted = True  # its work is done: what comes now is for rank 0 to tell
        for peer in self._outboxes:
            self._let_go.add(peer)
            with suppress(RuntimeError):
                self._send(peer, _END, None)
        for listener in self._listeners:
            listener.join()
        if self.rank:
            self.check()  # rank 0 may have failed in its very last steps
        dist.destroy_process_group()
        for wish, handler in self._handlers.items():
            signal.signal(wish, handler)

    def _fail(self, error: BaseException) -> None:
        self._is_interrupted = True  # from here on it is about to end anyhow
        if isinstance(error, KeyboardInterrupt):
            self._has_failed.wait(_REASON_SECONDS)
        own = _Failure(self.rank, _exit_code(error), is_told=True)
        if self.rank == 0:
            self._settle(own)
            self._has_told.wait(_PATIENCE_SECONDS)
        elif self._failure is None:
            with suppress(RuntimeError):
                self._send(0, _FAILED, [own.rank, own.code, own.is_told], _PATIENCE_SECONDS)
            if 0 not in self._ended:
                self._has_failed.wait(_PATIENCE_SECONDS)
        if self.rank:
            with suppress(RuntimeError):
                self._send(0, _END, None, _PATIENCE_SECONDS)
        found = self._failure
        if found is None or found.rank == self.rank or isinstance(error, PeerError):
            return
        raise found.error() from error


def _answers(host: str, port: int) -> bool:
    """Whether something listens there; a name that is not known may become so."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KnowError):
        return error.exit_code
    if was_interrupted(error):
        return EXIT_INTERRUPTED
    # Rich answers a broken pipe with the latter.
    if isinstance(error, BrokenPipeError | SystemExit):
        return EXIT_BROKEN_PIPE
    return EXIT_OUTPUT if isinstance(error, OSError) else EXIT_BUG
