"""The thread that owns the decoder: it runs the decoding loop for as long as the server lives."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from gmsa.decode.loop import Loop, Piece, Row

log = logging.getLogger(__name__)
T = TypeVar("T")


class Channel(Generic[T]):
    """What other threads tell the event loop that it was made in, in their order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[T] = asyncio.Queue()

    def put(self, told: T) -> None:
        """Tell it, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._told.put_nowait, told)

    async def get(self) -> T:
        """The next that was told."""
        return await self._told.get()


class Scheduler:
    """Runs a loop's turns from `start` to `stop`. `RemoteScheduler` has the same methods over a decoder elsewhere.

    Args:
        loop: for this thread alone from now on.
        on_step: called after each turn with the rows under way and the rows waiting.
    """

    def __init__(self, loop: Loop, *, on_step: Callable[[int, int], None] = lambda batch, waiting: None) -> None:
        self.loop = loop
        self.on_step = on_step
        self._inbox: list[Row] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gmsa-decoder", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current turn; rows under way end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether rows are being worked on."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """The same here."""
        return self.alive

    relays_chats = False  # whether chats go, as they are, to a server that writes the answers

    @property
    def max_length(self) -> int | None:
        """As many positions as the decoder has."""
        return getattr(self.loop.model.decoder.config, "max_position_embeddings", None)

    def submit(self, row: Row) -> None:
        """Queue a row. Its pieces begin to arrive when its turn has come."""
        with self._changed:
            self._inbox.append(row)
            stopped = self._stopping
            self._changed.notify()
        if stopped:
            row.say(Piece("", 0, finish="error"))

    def cancel(self, row: Row) -> None:
        """Give up a row, wherever it is; its place is free at the next turn. Fine for one that has ended."""
        with self._changed:
            self.loop.cancel(row)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._inbox or self.loop.busy)
                arrived, self._inbox = self._inbox, []
                if self._stopping:
                    break
            try:
                for row in arrived:
                    self.loop.submit(row)
                self.loop.turn()
            except Exception:  # out of memory, most likely: these rows fail, the next ones may do
                log.exception("a step of the decoder failed; its rows were given up")
                self.loop.fail()
            self.on_step(len(self.loop), len(self.loop.waiting))
        for row in arrived:
            row.say(Piece("", 0, finish="error"))
        self.loop.fail(waiting=True)
