"""Ranks connected by :mod:`torch.distributed`, which notice when one of them ends.

They exchange only a few short messages, over the gloo backend: what each has found and done, and
that one has failed. Every rank has a connection to rank 0, and a thread that listens to it. The
operating system closes the connections of a process that ends, however it ends, so a rank that was
killed is noticed at once. Rank 0 then tells the others, and each checks between two batches.

The first failure that reaches rank 0 decides how the run ends: the rank that failed says what is
wrong, the others end silently, and all have the same exit code. If a rank was killed, rank 0
reports it; if rank 0 was killed, all the others do. (A machine that loses its network or power
closes no connection, and a rank that ends before all are connected is only missed after some
minutes. ``torchrun`` notices both, since its agents watch each other and their own ranks.)
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

# All ranks start at about the same time, but torch loads slowly from a cold file system.
_START_SECONDS = 300.0
# When all have arrived, all that is left to do is to connect.
_CONNECT_SECONDS = 60.0
_FOREVER = timedelta(days=365)
# How long a rank that is about to end waits for another, and how long until the user is told
# that the ranks are waiting for each other.
_PATIENCE_SECONDS = 10.0
# torchrun ends the others as soon as one rank has ended; the reason may arrive a little later.
_REASON_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_QUICK_SECONDS = 0.01
_LARGEST_PORT = 2**16 - 1

_VALUE, _FAILED, _END = "value", "failed", "end"


@dataclass(frozen=True)
class _Failure:
    """Which rank failed, with which exit code, and whether it reported the cause itself."""

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
        # Peers that take no more messages; peers that are done; peers that know that we are.
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
            # Not daemons: the interpreter must not exit while one is still waiting.
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
            # No rank begins, and so none can fail, before all are connected.
            self.gather(None)
            self.broadcast(None)
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def _connect(self) -> None:
        store = self._open_store()
        # torchrun may have started a script that predicts several times in a row. (It should stop
        # after the first failure, because signals do not interrupt the end of a failed run.)
        turn = (store.add("know-predict", 1) - 1) // self.size
        store = dist.PrefixStore(f"know-predict {turn}", store)  # type: ignore[attr-defined]
        self._meet(store)
        self._join(store)

    def _join(self, store: Any) -> None:
        """Connect with the other ranks, which have all arrived; one may be stopped or gone since.

        Raises:
            RuntimeError: that is not done within a minute, or fails.
        """
        errors: list[BaseException] = []

        def join() -> None:
            try:
                dist.init_process_group(
                    "gloo",
                    store=store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=_START_SECONDS),  # also of all that is sent later
                )
            except BaseException as error:
                errors.append(error)

        # In a thread, which can be left: torch would wait as long as for all later messages.
        joining = threading.Thread(target=join, daemon=True)
        joining.start()
        missing = "not all have connected"
        self._wait_until(lambda: not joining.is_alive(), missing, _CONNECT_SECONDS, _QUICK_SECONDS)
        if errors:
            raise errors[0]

    def _open_store(self) -> Any:
        """Connect to torchrun's store, or to one that rank 0 opens."""
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
        """Wait until all ranks have arrived."""
        here = [f"rank {rank}" for rank in range(self.size)]
        store.set(here[self.rank], "")
        self._wait_until(lambda: bool(store.check(here)), "not all have come")

    def _wait_until(
        self,
        is_there: Callable[[], bool],
        missing: str,
        limit: float | None = None,
        pause: float | None = None,
    ) -> None:
        """Poll, because torch's own waiting functions cannot be interrupted.

        Raises:
            RuntimeError: it took too long; the message says what was missing.
        """
        began = time.monotonic()
        is_told = False
        while not is_there():
            waited = time.monotonic() - began
            if waited > (limit or _START_SECONDS):
                raise RuntimeError(missing)
            if waited > _PATIENCE_SECONDS and not (self.rank or is_told):
                self._tell(
                    f"rank {self.rank} of {self.size}: waiting for the other ranks ({missing}); if "
                    "this is to be the only process, unset WORLD_SIZE"
                )
                is_told = True
            time.sleep(pause or _LOOK_SECONDS)

    def _take_signals(self) -> None:
        """From now on, raise KeyboardInterrupt once, however many signals arrive.

        Both the terminal and torchrun pass Ctrl-C on, and the clean-up after the first must not be
        interrupted by the second.
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
        """Send a message and wait until it is received.

        Raises:
            RuntimeError: the peer is gone or does not respond.
        """
        text = json.dumps([what, value]).encode()
        errors: list[RuntimeError] = []
        # In a thread: if the peer goes away at this moment, gloo may tell only the listener and
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
        """Receive a peer's messages until it ends."""
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
                        # Rank 0 may go away at any moment, and nobody listens for that any more.
                        self._gone.add(peer)
                        return
        except RuntimeError:
            self._gone.add(peer)
            self._settle(_Failure(peer, EXIT_OUTPUT, is_told=False))

    def _settle(self, failure: _Failure) -> None:
        """Keep the first failure; rank 0 tells the others about it."""
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
            # The listener sees the same broken connection and knows more about it.
            self._has_failed.wait(_PATIENCE_SECONDS)
            self.check()
            raise

    def _next(self, peer: int) -> Any:
        while True:
            self.check()
            has_ended = peer in self._ended  # read before the inbox, where it may have left more
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
            self._is_interrupted = True  # our work is done: rank 0 reports what happens now
        for peer in self._outboxes:
            self._let_go.add(peer)
            with suppress(RuntimeError):
                self._send(peer, _END, None)
        for listener in self._listeners:
            listener.join()
        if self.rank:
            self.check()  # rank 0 may have failed in its last steps
        dist.destroy_process_group()
        for wish, handler in self._handlers.items():
            signal.signal(wish, handler)

    def _fail(self, error: BaseException) -> None:
        self._is_interrupted = True  # it is ending anyway
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
    """Whether something is listening there. A host name that is unknown now may be known later."""
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
    # Rich turns a broken pipe into SystemExit.
    if isinstance(error, BrokenPipeError | SystemExit):
        return EXIT_BROKEN_PIPE
    return EXIT_OUTPUT if isinstance(error, OSError) else EXIT_BUG
