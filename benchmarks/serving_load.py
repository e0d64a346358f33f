"""Users who ask a running server all at once: how long they wait, and whether anything goes wrong.

    gmsa serve --store "$(mktemp -d)" --auto-compress 128 &
    python benchmarks/serving_load.py http://127.0.0.1:8000 --output docs/results/serving.json

Each user, without pause: compresses a text nobody has sent before (1 request of 8), asks about a stored memory (4, half
of them streamed) or sends a long text with a question as any OpenAI client would (3). Only 429 may refuse; any other
error makes the exit code 1.

    python benchmarks/serving_load.py http://127.0.0.1:8000 --beside-api --output docs/results/serving-beside-api.json

asks the idle server and, by turns, `GMSA.answer` in this process the same questions about the same memories, one at a
time and several at once: how much of the engine's speed is left behind HTTP. Beside the clock's time stands what each
process took of the processor, which other work on the machine changes little.

    python benchmarks/serving_load.py http://127.0.0.1:8000 --prefix --output docs/results/serving-prefix.json

times the first token of a first and of a second question on memories nobody has asked about: what the server has read
of a memory is not read again.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
QUESTIONS = ["How long did the work take?", "How many bricks were used?", "Who was the chief engineer?", "Why?"]
RETELL = "Restate the aforementioned Text."
RETELL_SIZE = 2  # merge size at which it is restated surely: one that ends an answer early would compare other work
KINDS = ["compress", "ask", "ask", "stream", "stream", "long text", "long text", "long text"]
PERCENTILES = (50, 90, 99)


@dataclass
class Findings:
    """What the users met with."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0


class User:
    """One of them."""

    def __init__(self, number: int, http: httpx.AsyncClient, text: str, memory: str, new: int, found: Findings) -> None:
        self.random = random.Random(number)
        self.http = http
        self.text = text
        self.memory = memory
        self.new = new
        self.found = found

    async def run(self, until: float) -> None:
        """Ask, and ask again."""
        while time.perf_counter() < until:
            kind = self.random.choice(KINDS)
            try:
                await self.one(kind)
            except httpx.HTTPError as error:
                self.found.errors.append(f"{kind}: {type(error).__name__} {error}")

    async def one(self, kind: str) -> None:
        """One request, to its last byte."""
        started = time.perf_counter()
        if kind == "compress":
            begin = self.random.randrange(len(self.text) // 2)
            body = {"text": f"{self.random.random()} {self.text[begin:]}", "label": "load"}
            answer = await self.http.post("/v1/memories", json=body)
        elif kind == "stream":
            await self.stream(started)
            return
        else:
            answer = await self.http.post("/v1/chat/completions", json=self.question(kind == "long text"))
        if self.noted(kind, answer.status_code, answer.text):
            self.found.seconds[kind].append(time.perf_counter() - started)
            self.found.tokens += answer.json().get("usage", {}).get("completion_tokens", 0)

    async def stream(self, started: float) -> None:
        """A streamed answer; its first word is timed, too."""
        first, lines = None, []
        body = {**self.question(False), "stream": True, "stream_options": {"include_usage": True}}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                lines += [line] if line else []
                if first is None and '"content": "' in line and '"content": ""' not in line:
                    first = time.perf_counter() - started
        if not self.noted("stream", answer.status_code, "".join(lines)):
            return
        if lines[-1] != "data: [DONE]":
            self.found.errors.append(f"stream: ended with {lines[-1][:200]}")
            return
        self.found.seconds["stream"].append(time.perf_counter() - started)
        self.found.seconds["stream, first word"] += [first] if first is not None else []
        self.found.tokens += json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]

    def noted(self, kind: str, status: int, said: str) -> bool:
        """Count a status; whether it was a success."""
        self.found.statuses[str(status)] += 1
        if status not in (200, 201, 429):
            self.found.errors.append(f"{kind}: {status} {said[:200]}")
        return status in (200, 201)

    def question(self, long: bool) -> dict[str, object]:
        """A request for a short answer."""
        question = self.random.choice(QUESTIONS)
        if long:
            content: object = f"{self.text}\n\n{question}"
        else:
            content = [{"type": "memory", "memory_id": self.memory}, {"type": "text", "text": question}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": self.new}


def connect(options: argparse.Namespace) -> httpx.AsyncClient:
    """A client of the server."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600, limits=limits)


def machine() -> dict[str, object]:
    """Where this runs. Answers wait for other work on the machine, too: the load says how much of it there was."""
    return {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}


async def measure_users(options: argparse.Namespace) -> dict[str, object]:
    """Let the users loose; what they found, in numbers."""
    users, new, text = options.users, options.new_tokens, options.text.read_text()
    found = Findings()
    async with connect(options) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
        made = (await http.post("/v1/memories", json={"text": text, "label": "load"})).raise_for_status().json()
        started = time.perf_counter()
        crowd = [User(number, http, text, made["id"], new, found) for number in range(users)]
        await asyncio.gather(*(user.run(started + options.seconds) for user in crowd))
        spent = time.perf_counter() - started
        health = (await http.get("/health")).json()["status"]
    answered = found.statuses["200"] + found.statuses["201"]
    return {
        "model": model["id"],
        "users": users,
        "seconds": round(spent, 1),
        "new_tokens": new,
        "text_tokens": made["origin_tokens"],
        "requests_per_second": round(answered / spent, 2),
        "tokens_per_second": round(found.tokens / spent, 1),
        "statuses": dict(sorted(found.statuses.items())),
        "errors": found.errors,
        "health_after": health,
        "latency_seconds": {kind: summary(values) for kind, values in sorted(found.seconds.items())},
        "meta": machine(),
    }


async def ask_server(http: httpx.AsyncClient, memories: list[str], new: int) -> tuple[list[str], float]:
    """Answers about stored memories, asked for all at once, and the seconds they took."""

    async def one(memory: str) -> str:
        content = [{"type": "memory", "memory_id": memory}, {"type": "text", "text": RETELL}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": new, "temperature": 0}
        answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    started = time.perf_counter()
    return await asyncio.gather(*map(one, memories)), time.perf_counter() - started


async def processor_seconds(http: httpx.AsyncClient) -> float:
    """What the server's process has taken so far."""
    said = (await http.get("/metrics")).raise_for_status().text
    found = [line for line in said.splitlines() if line.startswith("process_cpu_seconds_total ")]
    return float(found[0].split()[1]) if found else math.nan  # told on Linux alone


async def measure_beside_api(options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of the server and of the API, by turns, and of their processes' time; medians over rounds."""
    from gmsa import GMSA

    gmsa = GMSA.from_pretrained(options.model, dtype=options.dtype)
    text = options.text.read_text()
    found: list[dict[str, float]] = []

    def tokens(texts: Sequence[str]) -> int:
        return sum(len(gmsa.template.encode(text)) for text in texts)

    async with connect(options) as http:
        for rows in options.rows:
            rounds, agreed = [], 0
            for turn in range(options.rounds + 1):  # the first one warms up
                # New texts each time: the server would find what it has read before.
                texts = [f"{turn} {row} {text[40 * row : 40 * row + 600]}" for row in range(rows)]
                made = [await http.post("/v1/memories", json={"text": t, "merge_size": RETELL_SIZE}) for t in texts]
                ids = [answer.raise_for_status().json()["id"] for answer in made]
                memories = [[memory] for memory in gmsa.compress(texts, RETELL_SIZE)]
                taken = await processor_seconds(http)
                said, spent = await ask_server(http, ids, options.new_tokens)
                taken = max(await processor_seconds(http) - taken, 0.01)  # the clock's tick
                started, begun = time.perf_counter(), time.process_time()
                answers = gmsa.answer([RETELL] * rows, memories, max_new_tokens=options.new_tokens, batch_size=rows)
                alone, used = time.perf_counter() - started, time.process_time() - begun
                server, api = tokens(said), tokens(answers)
                if turn:
                    agreed += sum(a == b for a, b in zip(said, answers, strict=True))
                    ratio, of_processor = server / spent / (api / alone), server / taken / (api / used)
                    rounds.append((api / alone, server / spent, ratio, of_processor))
            names = ("api", "server", "server_over_api", "by_processor_time")
            medians = {
                name: round(statistics.median(v), 3) for name, v in zip(names, zip(*rounds, strict=True), strict=True)
            }
            found.append({"rows": rows, **medians, "same_answers": agreed / (rows * options.rounds)})
    return {
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "tokens_per_second": found,
        "meta": machine(),
    }


async def first_token(http: httpx.AsyncClient, memory: str, question: str) -> float:
    """Seconds to the first token of a streamed answer about a memory."""
    content = [{"type": "memory", "memory_id": memory}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0, "stream": True}
    started, first = time.perf_counter(), 0.0
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not first and ('"finish_reason": "' in line or ('"content": "' in line and '"content": ""' not in line)):
                first = time.perf_counter() - started
    return first


async def measure_prefix(options: argparse.Namespace) -> dict[str, object]:
    """Time to the first token of a second question over that of the first, for users with a memory each, at once."""
    base = options.text.read_text()
    found: list[dict[str, object]] = []
    async with connect(options) as http:

        async def remember(text: str) -> dict[str, Any]:
            body = {"text": text, "merge_size": options.merge_size, "label": "load"}
            return (await http.post("/v1/memories", json=body)).raise_for_status().json()

        tokens = (await remember(base))["origin_tokens"]
        length = round(len(base) * options.tokens / tokens)
        text = base * (length // len(base) + 1)
        for users in options.at_once:
            rounds = []
            for turn in range(options.rounds + 1):  # the first one warms up
                made = [await remember(f"{turn} {users} {user} {text}"[:length]) for user in range(users)]
                times = []
                for question in QUESTIONS[:2]:
                    asked = (first_token(http, memory["id"], question) for memory in made)
                    times.append(await asyncio.gather(*asked))
                rounds.append([statistics.median(seconds) for seconds in times])
            first, second = (statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True))
            ratio = statistics.median(later / earlier for earlier, later in rounds[1:])
            row = {"users": users, "first": round(first, 3), "second": round(second, 3), "ratio": round(ratio, 3)}
            found.append({**row, "origin_tokens": made[0]["origin_tokens"], "soft_tokens": made[0]["soft_tokens"]})
    return {
        "merge_size": options.merge_size,
        "rounds": options.rounds,
        "seconds_to_first_token": found,
        "meta": machine(),
    }


def summary(values: list[float]) -> dict[str, float]:
    """How many, and percentiles."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"n": len(values), **{f"p{p}": round(cuts[p - 1], 3) for p in PERCENTILES}, "max": round(max(values), 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; 1 if anything but 429 went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a running server")
    parser.add_argument("--api-key")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--new-tokens", type=int, help="longest answer (16; 64 with --beside-api)")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "thames.txt")
    parser.add_argument("--output", type=Path, help="JSON of what is printed")
    beside = parser.add_argument_group("with --beside-api")
    beside.add_argument("--beside-api", action="store_true", help="compare with GMSA.answer in this process")
    beside.add_argument("--model", default="default", help="which the server runs, too")
    beside.add_argument("--dtype", help="which the server runs with")
    beside.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="asked at once")
    parser.add_argument("--rounds", type=int, default=5, help="with --beside-api and --prefix")
    prefix = parser.add_argument_group("with --prefix")
    prefix.add_argument("--prefix", action="store_true", help="ask twice about a memory, and time the first tokens")
    prefix.add_argument("--tokens", type=int, default=4096, help="of the text")
    prefix.add_argument("--merge-size", type=int, default=8)
    prefix.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="users")
    options = parser.parse_args(arguments)
    options.new_tokens = options.new_tokens or (64 if options.beside_api else 16)
    measure = measure_prefix if options.prefix else measure_beside_api if options.beside_api else measure_users
    found: dict[str, Any] = asyncio.run(measure(options))
    found["meta"]["command"] = " ".join(["python", "benchmarks/serving_load.py", *sys.argv[1:]])
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if measure is not measure_users:
        for row in found["seconds_to_first_token" if options.prefix else "tokens_per_second"]:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
        return 0
    print(f"{'':20}{'n':>6}" + "".join(f"{f'p{p}':>9}" for p in PERCENTILES) + f"{'max':>9}")
    for kind, row in found["latency_seconds"].items():
        print(
            f"{kind:20}{row['n']:>6}"
            + "".join(f"{row[f'p{p}']:>7.2f} s" for p in PERCENTILES)
            + f"{row['max']:>7.2f} s"
        )
    rates = f"{found['requests_per_second']} requests and {found['tokens_per_second']} tokens per second"
    print(f"{rates}; statuses {found['statuses']}")
    for error in found["errors"][:20]:
        print(error, file=sys.stderr)
    return 1 if found["errors"] or found["health_after"] != "ok" else 0


if __name__ == "__main__":
    sys.exit(main())
