"""Proves that vLLM answers from soft tokens as this package does: exports the decoder, serves it, compares tokens.

    make vllm-check        sets up an environment with vLLM, runs this in it, writes docs/results/vllm.json

Three ways to the same greedy tokens, in fp32: the exported decoder under transformers (the reference), a vLLM server
asked by `RemoteDecoder` (by its completions and by its chat route), and vLLM in this process by `LocalDecoder`. Answers
of `GMSA.answer` must have the same text. And `gmsa serve --decoder vllm:URL`, which has the compressor alone, must say
through OpenAI's client what `gmsa serve` says: texts, why they end, and what was read.

A further question about a memory must be found in vLLM's prefix cache, by vLLM's own counter; how long its first token
takes is measured against the first question's. All of it takes about a quarter of an hour on two busy cores: greedy
answers of 16 tokens, 50 prompts by both routes, fewer by the other ways.

    python scripts/maintain/vllm_check.py --checks front --server http://127.0.0.1:8000    one check, against a server
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gmsa import GMSA
from gmsa.io.memory import Memory
from gmsa.serve.remote import LocalDecoder, RemoteDecoder, RemotePiece

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("examples/thames.txt", "LICENSE")
QUESTIONS = (
    "Restate the aforementioned Text.",
    "What is this text about?",
    "Who is mentioned, and what did they do?",
    "Quelle est l'idée principale ?",
    "Which numbers and dates are named? List them.",
    "Continue the text.",
    "这段文字说了什么？ 🎉",
)
CHECKS = ("server", "prefix", "in-process", "front")
LENGTHS = (60, 200, 700, 1800)  # characters
MERGE_SIZES = (1, 2, 4, 8, 16)
MAX_LENGTH = 4096
CONTEXTS = (2048, 8000)  # tokens of the texts behind the memories that the prefix cache is asked about
PREFIX_SIZE = 4  # their merge size
PREFIX_ROUNDS = 2
LOCAL_PROMPTS = 10  # of the prompts, answered by vLLM in this process, too
STREAMED_PROMPTS = 5
FRONT_CHATS = 10
AT_ONCE = 8


@dataclass
class Case:
    """One prompt: a question on one or two memories."""

    question: str
    memories: list[Memory]
    embeds: Tensor
    expected: list[int] | None = None


def make_cases(gmsa: GMSA, count: int) -> list[Case]:
    """Prompts of many lengths and rates, the same each time; every fifth one has two memories."""
    text = "\n\n".join((ROOT / name).read_text() for name in TEXTS)
    lengths, sizes, questions = (itertools.cycle(values) for values in (LENGTHS, MERGE_SIZES, QUESTIONS))
    place, cases = 0, []
    for number in range(count):
        memories = []
        for _ in range(2 if number % 5 == 4 else 1):
            length = next(lengths)
            memories.append(gmsa.compress(text[place : place + length], next(sizes)))
            place = (place + length) % (len(text) - max(LENGTHS))
        question = next(questions)
        cases.append(Case(question, memories, gmsa.prompt_embeddings(question, memories)))
    return cases


@torch.no_grad()
def reference(folder: Path, cases: list[Case], ends: list[int], new_tokens: int) -> AutoModelForCausalLM:
    """Fill in what the exported decoder writes under transformers; returns it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for case in cases:
        out = model.generate(
            inputs_embeds=case.embeds[None],
            attention_mask=torch.ones(1, len(case.embeds), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends,
        )
        case.expected = cut(out[0].tolist(), ends)
    return model


def cut(tokens: list[int] | tuple[int, ...], ends: list[int]) -> list[int]:
    """Without what ends them."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


@torch.no_grad()
def margin(model: Any, case: Case, found: list[int]) -> dict[str, float | int]:
    """Where tokens part from the expected ones, and by how much the best logit there leads the next."""
    assert case.expected is not None
    place = next(
        (i for i, (a, b) in enumerate(zip(case.expected, found, strict=False)) if a != b),
        min(len(case.expected), len(found)),
    )
    said = model.get_input_embeddings()(torch.tensor(case.expected[:place], dtype=torch.long))
    logits = model(inputs_embeds=torch.cat([case.embeds, said])[None]).logits[0, -1]
    best = logits.topk(2).values
    return {"token": place, "logit_margin": round(float(best[0] - best[1]), 6)}


@contextlib.contextmanager
def server(folder: Path, name: str, key: str) -> Iterator[str]:
    """A vLLM server of the decoder; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module rather than `vllm serve`: the CPU build from PyPI has no entry point of that name that starts.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-prompt-embeds", "--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager"]
    command += ["--enable-prefix-caching"]
    with process(command, f"http://127.0.0.1:{port}", {"VLLM_API_KEY": key}) as url:
        yield url


@contextlib.contextmanager
def gmsa_server(model: str, store: Path, **options: str) -> Iterator[str]:
    """A `gmsa serve`; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gmsa", "serve", model, "--port", str(port), "--store", str(store)]
    command += ["--dtype", "float32", "--served-name", "gmsa", "--max-prompt-tokens", str(MAX_LENGTH)]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    with process(command, f"http://127.0.0.1:{port}", {}) as url:
        yield url


@contextlib.contextmanager
def process(command: list[str], url: str, environment: dict[str, str]) -> Iterator[str]:
    """A server until the block ends; yields its URL once it is healthy."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            until = time.monotonic() + 900
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    sys.exit("the server did not start:\n" + log.read()[-4000:])
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=5).is_success:
                        break
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def ask(url: str, count: int, new_tokens: int) -> list[dict[str, Any]]:
    """What a `gmsa serve` says to chats about long texts, through OpenAI's client; every fourth also as a stream."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    text = "\n\n".join((ROOT / name).read_text() for name in TEXTS)
    lengths, sizes, questions = (itertools.cycle(values) for values in (LENGTHS, MERGE_SIZES, QUESTIONS))

    def answer(number: int, part: str, size: int, question: str) -> dict[str, Any]:
        content = [{"type": "text", "text": part}, {"type": "text", "text": question}]
        fields: dict[str, Any] = {
            "model": "gmsa",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": new_tokens,
            "stop": "1" if number % 5 == 3 else None,
            "extra_body": {"auto_compress": 12, "merge_size": size},
        }
        said = client.chat.completions.create(**fields)
        (choice,) = said.choices
        read = {"prompt_tokens": said.usage.prompt_tokens, "details": said.usage.prompt_tokens_details.soft_tokens}
        found = {"text": choice.message.content, "finish": choice.finish_reason, "read": read}
        if number % 4 == 0:
            stream = client.chat.completions.create(**fields, stream=True)
            found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return found

    places = itertools.accumulate(lengths, initial=0)
    cases = [
        (n, text[place : place + LENGTHS[n % 4]], next(sizes), next(questions))
        for n, place in zip(range(count), places, strict=False)
    ]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda case: answer(*case), cases))


def check_prefix(gmsa: GMSA, url: str, key: str) -> dict[str, Any]:
    """How much of a second question on a memory vLLM had read before, and how long its first token takes."""
    text = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = gmsa.encoder_tokenizer(text, add_special_tokens=False)["input_ids"]
    first, second = "What is this text about?", "Which numbers and dates are named?"

    def hits() -> float:
        said = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
        found = [line for line in said.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    found: dict[str, Any] = {}
    with RemoteDecoder(gmsa, url, api_key=key) as remote:

        def first_token(question: str, memory: Memory) -> float:
            started = time.perf_counter()
            answer = remote.answer(question, memory, max_new_tokens=2, stream=True)
            next(answer)
            spent = time.perf_counter() - started
            list(answer)
            return spent

        first_token(first, gmsa.compress("A text to warm up with.", PREFIX_SIZE))
        found["by"] = "chat" if remote.chats else "completions"
        for length in CONTEXTS:
            rounds = []
            for number in range(PREFIX_ROUNDS):
                start = number * 997 % max(1, len(ids) - length)
                memory = gmsa.compress(gmsa.tokenizer.decode(ids[start : start + length]), PREFIX_SIZE)
                cold = first_token(first, memory)
                before = hits()
                warm = first_token(second, memory)
                row = {"first": round(cold, 3), "second": round(warm, 3), "ratio": round(warm / cold, 3)}
                rounds.append({**row, "positions": len(memory), "hit": int(hits() - before)})
            ratio = statistics.median(row["ratio"] for row in rounds)
            found[str(length)] = {"ratio": round(ratio, 3), "rounds": rounds}
    rows = [row for length in CONTEXTS for row in found[str(length)]["rounds"]]
    return {**found, "prompts": len(rows), "equal": sum(row["hit"] > row["positions"] // 2 for row in rows)}


def check_front(model: str, compressor: Path, url: str, key: str, count: int, new_tokens: int) -> dict[str, Any]:
    """A front over a vLLM server beside a `gmsa serve` of the whole model."""
    os.environ["GMSA_DECODER_API_KEY"] = key
    stores = compressor.parent
    with gmsa_server(str(compressor), stores / "front", decoder=f"vllm:{url}") as front:
        found = ask(front, count, new_tokens)
    with gmsa_server(model, stores / "local") as local:
        expected = ask(local, count, new_tokens)
    differing = {
        str(number): [ours["text"], theirs["text"]]
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True))
        if ours != theirs
    }
    return {
        "prompts": count,
        "equal": count - len(differing),
        "streams": sum("stream" in answer for answer in found),
        "finish": {reason: sum(a["finish"] == reason for a in found) for reason in ("stop", "length")},
        "distinct": len({answer["text"] for answer in found}),
        "differing": differing,
    }


def vllm_version(url: str | None, key: str) -> str:
    """Of the server there is, or of the package here."""
    if url is None:
        import vllm

        return vllm.__version__
    return httpx.get(f"{url}/version", headers={"Authorization": f"Bearer {key}"}).json()["version"]


def main() -> None:
    """Run the check; exits 1 if a token differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="folder or hub id")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--checks", default=",".join(CHECKS), help="some of these")
    parser.add_argument(
        "--server", metavar="URL", help="of the exported decoder, running; its key in GMSA_DECODER_API_KEY"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    wanted = options.checks.split(",")
    if not set(wanted) <= set(CHECKS):
        parser.error(f"--checks: some of {', '.join(CHECKS)}")
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        os.environ.setdefault(name, value)

    begun = started = time.perf_counter()
    gmsa = GMSA.from_pretrained(options.model, dtype="float32", device_map="cpu")
    ends = sorted(gmsa.ends)
    new = options.new_tokens
    result: dict[str, Any] = {"model": options.model, "compressor": gmsa.fingerprint, "new_tokens": new}
    checks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch) / "decoder"
        gmsa.export_decoder(folder)
        cases: list[Case] = []
        if {"server", "in-process"} & set(wanted):
            cases = make_cases(gmsa, options.prompts)
            model = reference(folder, cases, ends, new)

        def note(name: str, check: dict[str, Any]) -> None:
            seconds = round(time.perf_counter() - started, 1)
            checks[name] = {**check, "seconds": seconds}
            print(name, checks[name], flush=True)

        def compare(name: str, pieces: Sequence[RemotePiece]) -> None:
            found = [cut(piece.token_ids, ends) for piece in pieces]
            wrong = [i for i, (case, ids) in enumerate(zip(cases, found, strict=False)) if case.expected != ids]
            check = {"prompts": len(found), "equal": len(found) - len(wrong), "tokens": sum(map(len, found))}
            note(name, {**check, "differing": {str(i): margin(model, cases[i], found[i]) for i in wrong}})

        def compare_texts(name: str, found: Sequence[str]) -> None:
            equal = sum(a == b for a, b in zip(found, texts, strict=False))
            note(name, {"prompts": len(found), "equal": equal})

        texts = [gmsa.tokenizer.decode(case.expected, skip_special_tokens=True) for case in cases]
        if cases:
            started = time.perf_counter()
            questions, memories = [case.question for case in cases], [case.memories for case in cases]
            compare_texts("GMSA.answer", gmsa.answer(questions, memories, max_new_tokens=new))
            result["prompt_positions"] = [min(len(c.embeds) for c in cases), max(len(c.embeds) for c in cases)]
            result["distinct_answers"] = len(set(texts))
        key = os.environ.get("GMSA_DECODER_API_KEY") or secrets.token_hex(8)
        if {"server", "prefix", "front"} & set(wanted):
            served = contextlib.nullcontext(options.server) if options.server else None
            url = stack.enter_context(served or server(folder, f"gmsa-{gmsa.fingerprint}", key))
        if "server" in wanted:
            with RemoteDecoder(gmsa, url, api_key=key) as remote, ThreadPoolExecutor(AT_ONCE) as pool:
                started = time.perf_counter()
                done = pool.map(lambda case: remote.complete(case.embeds, max_new_tokens=new), cases)
                compare("server", list(done))
                started = time.perf_counter()
                done = pool.map(lambda case: remote.ask(case.question, case.memories, max_new_tokens=new), cases)
                compare("server, by chat", list(done))
                if not remote.chats:
                    sys.exit("the server takes no prompt embeddings in chats, or reads them unlike the model")
                started = time.perf_counter()
                streams = [
                    remote.answer(case.question, case.memories, max_new_tokens=new, stream=True)
                    for case in cases[:STREAMED_PROMPTS]
                ]
                compare_texts("server, streamed", ["".join(stream) for stream in streams])
        if "prefix" in wanted:
            started = time.perf_counter()
            note("prefix", check_prefix(gmsa, url, key))
        if "front" in wanted:
            started = time.perf_counter()
            gmsa.export_compressor(Path(scratch) / "compressor")
            count = min(FRONT_CHATS, options.prompts)
            note("front", check_front(options.model, Path(scratch) / "compressor", url, key, count, new))
        stack.close()
        if "in-process" in wanted:
            started = time.perf_counter()
            local = LocalDecoder(gmsa, folder, dtype="float32", max_model_len=MAX_LENGTH, enforce_eager=True)
            embeds = [case.embeds for case in cases[:LOCAL_PROMPTS]]
            compare("in process", local.complete(embeds, max_new_tokens=new))

    result |= {
        "command": "make vllm-check" if set(wanted) == set(CHECKS) else " ".join(["python", *sys.argv]),
        "checks": checks,
        "seconds": round(time.perf_counter() - begun),
        "meta": {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("gmsa", "torch", "transformers")},
            "vllm": vllm_version(options.server, key),
            "python": platform.python_version(),
        },
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    failed = [name for name, check in checks.items() if check["equal"] != check["prompts"]]
    sys.exit(f"differs: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
