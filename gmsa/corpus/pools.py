"""Who does the shards: this process, processes of this machine, or a Ray cluster.

All three yield the records of the shards as they are done, in any order. A worker that dies takes its shard down with
it and nothing else: the shard is done again.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from gmsa.corpus.shards import Job, Record, Shard, ShardWorker, open_place
from gmsa.errors import CorpusError, GmsaError

ATTEMPTS = 3  # at a shard, before it is held to be what kills workers
Note = Callable[[str], None]


def run_here(job: Job, shards: Sequence[Shard]) -> Iterator[Record]:
    """One worker in this process."""
    worker = ShardWorker(job)
    for shard in shards:
        yield worker(shard)


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str | None
    shard: Shard | None = None


def run_processes(job: Job, shards: Sequence[Shard], workers: int, note: Note) -> Iterator[Record]:
    """Processes of this machine, started afresh where they die; with GPUs, they take turns on them.

    Raises:
        CorpusError: a shard killed every worker that tried it, or a worker failed in a way of its own.
    """
    waiting = deque(shards)
    attempts: dict[int, int] = {}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [f"cuda:{i % gpus}" if gpus else None for i in range(min(workers, len(shards)))]
    running: list[_Worker] = []
    try:
        running += [_start(job, device) for device in devices]
        while waiting or any(worker.shard for worker in running):
            for worker in running:
                if worker.shard is None and waiting:
                    worker.shard = waiting.popleft()
                    with contextlib.suppress(OSError):  # it has died: noticed below
                        worker.pipe.send(worker.shard)
            busy = [worker for worker in running if worker.shard]
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                assert worker.shard is not None
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    _mourn(worker, attempts, note)
                    waiting.appendleft(worker.shard)
                    running[running.index(worker)] = _start(job, worker.device)
                    continue
                if isinstance(answer, str):
                    raise CorpusError(answer)
                worker.shard = None
                yield answer
    finally:
        for worker in running:
            _end(worker)


def _start(job: Job, device: str | None) -> _Worker:
    # A fresh interpreter: a fork of one that has run torch may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(job, device, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, device)


def _end(worker: _Worker) -> None:
    """An idle worker goes by itself once its pipe is closed; a busy one is not waited for."""
    worker.pipe.close()
    if worker.shard is None:
        worker.process.join(timeout=10)
    worker.process.kill()
    worker.process.join()


def _serve(job: Job, device: str | None, pipe: Connection) -> None:
    """What a worker process does: records for shards, or one line that says why it cannot go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    try:
        worker = ShardWorker(job, device)
        while True:
            pipe.send(worker(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except GmsaError as error:
        pipe.send(str(error))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"a worker failed: {type(error).__name__}: {error}")


def _mourn(worker: _Worker, attempts: dict[int, int], note: Note) -> None:
    assert worker.shard is not None
    worker.process.join()
    worker.pipe.close()
    number = worker.shard.number
    attempts[number] = attempts.get(number, 0) + 1
    code = worker.process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    if attempts[number] == ATTEMPTS:
        raise CorpusError(_deadly(number))
    note(f"a worker was ended {how}; its shard {number} is done again")


def _deadly(shard: int) -> str:
    return (
        f"shard {shard} ended {ATTEMPTS} workers: if memory is short, use fewer workers, a smaller --batch-size or a "
        "smaller --max-row-bytes"
    )


# -- Ray ---------------------------------------------------------------------------------------------------------------


class _RayWorker:
    """A `ShardWorker` as Ray Data calls it: with columns of one row each, for columns of one row each.

    Ray tries a task again without end, so attempts are counted in a file beside the shard; a new run counts anew.
    """

    def __init__(self, job: Job, shards: Sequence[Shard], run: str) -> None:
        self.worker = ShardWorker(job)
        self.shards = shards
        self.run = run

    def __call__(self, batch: dict[str, Sequence[int]]) -> dict[str, list[str]]:
        return {"record": [self._try(self.shards[place]).to_json() for place in batch["place"]]}

    def _try(self, shard: Shard) -> Record:
        job = self.worker.job
        fs, folder = open_place(job.output)
        tries = f"{folder}/.{shard.name}.tries-{self.run}"
        before = int(fs.cat_file(tries)) if fs.exists(tries) else 0
        if before >= ATTEMPTS:
            return Record(shard.number, job.fingerprint, error=_deadly(shard.number))
        try:
            fs.pipe_file(tries, str(before + 1).encode())
        except OSError as error:
            return Record(shard.number, job.fingerprint, error=f"cannot write {tries}: {error.strerror or error}")
        record = self.worker(shard)
        fs.rm_file(tries)
        return record


def run_ray(job: Job, shards: Sequence[Shard], workers: int) -> Iterator[Record]:
    """A pool of Ray actors, one model each, on the cluster at RAY_ADDRESS or on this machine alone.

    Each gets as many CPUs as the job has threads and, where the cluster has GPUs, one of them. Ray starts an actor that
    died anew and gives its shard to another.

    Raises:
        CorpusError: Ray is not installed, or gave up.
    """
    try:
        import ray
    except ImportError as error:
        raise CorpusError("--engine ray needs Ray: pip install 'gmsa[ray]', or use --engine local") from error
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        alone = {} if address else {"num_cpus": workers * job.threads, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="error", **alone)
        except ConnectionError as error:
            raise CorpusError(f"no Ray cluster answers at RAY_ADDRESS {address}: start it, or unset it") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    workers = min(workers, len(shards))
    try:
        rows = ray.data.from_items([{"place": place} for place in range(len(shards))], override_num_blocks=len(shards))
        done = rows.map_batches(
            _RayWorker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(job, list(shards), uuid.uuid4().hex[:8]),
            num_cpus=job.threads,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            yield Record.from_json(row["record"])
    except ray.exceptions.RayError as error:
        print(error, file=sys.stderr)
        reason = str(error).strip().splitlines()[-1]
        raise CorpusError(f"Ray gave up: {reason}") from error
    finally:
        if ours:
            ray.shutdown()
