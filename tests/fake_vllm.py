"""A small server that speaks vLLM's completions and chat APIs and runs an exported decoder under transformers."""

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LIMIT = 300  # positions of prompt and answer


class FakeVllm(ThreadingHTTPServer):
    """As vLLM answers /v1/models and /v1/completions, with faults to order."""

    daemon_threads = True

    def __init__(self, folder: Path, tokenizer: Any, name: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = tokenizer
        self.names = [name]
        self.fault = ""
        self.seen: list[dict[str, Any]] = []
        self.chats = False  # older servers take no prompt embeddings in chats
        self.chats_seen: list[dict[str, Any]] = []
        self.gone = threading.Event()  # a client left in the middle
        self.go_on = threading.Event()  # what "holds" waits for
        self.lists = threading.Event()  # what a look at the models waits for
        self.lists.set()
        self.asked_for_models = threading.Event()
        self._sampling = threading.Lock()
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """As a process that ends: connections end with it."""
        super().server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def embeds_of(self, messages: list[dict[str, Any]]) -> torch.Tensor:
        """What vLLM reads for a chat: the template's tokens, prompt embeddings in place of what marks them."""
        given: list[torch.Tensor] = []
        rendered = []
        for message in messages:
            content = message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = []
            for part in parts:
                if part["type"] == "prompt_embeds":
                    given.append(torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True))
                texts.append(part["text"] if part["type"] == "text" else "<|pad|>")
            rendered.append({"role": message["role"], "content": "\n".join(texts)})
        ids = self.tokenizer.apply_chat_template(rendered, add_generation_prompt=True, return_dict=False)
        table = self.decoder.get_input_embeddings().weight
        rest = iter(given)
        return torch.cat([next(rest) if i == self.tokenizer.pad_token_id else table[i : i + 1] for i in ids])

    @torch.no_grad()
    def write(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            embeds = self.embeds_of(body["messages"])
        else:
            embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        with self._sampling:
            torch.manual_seed(body.get("seed", 0))
            new = self.decoder.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=body["temperature"] > 0,
                eos_token_id=body["stop_token_ids"],
            )
        return new[0].tolist()

    @property
    def answered(self) -> list[dict[str, Any]]:
        """Requests but for those that only try the server."""
        return [body for body in [*self.seen, *self.chats_seen] if body["max_tokens"] > 1]


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked_for_models.set()
        self.server.lists.wait(20)
        if self.headers.get("Authorization") != "Bearer secret":
            self.reply(401, {"error": "Unauthorized"})
        elif self.server.fault == "no-openai":
            self.reply(200, {"hello": "there"})
        elif self.server.fault == "no-json":
            self.reply(200, None, b"<html>a proxy</html>")
        else:
            models = [{"id": name, "max_model_len": LIMIT} for name in self.server.names]
            self.reply(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.fault  # as it was when the request was seen to be there
        if self.path.endswith("/chat/completions"):
            if not self.server.chats:
                self.reply(404, {"detail": "Not Found"})
                return
            self.server.chats_seen.append(body)
        else:
            self.server.seen.append(body)
        if fault == "disabled":
            message = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            self.reply(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        elif fault == "router":  # vllm-router 0.1.17
            self.reply(422, None, b"Failed to deserialize the JSON body into the target type: missing field `prompt`")
        elif fault == "busy":
            self.reply(503, None, b"upstream   connect error")
        elif fault == "hangs-up" or (fault == "hangs-up-on-long" and body["max_tokens"] > 1):
            self.close_connection = True
        elif fault == "tells-no-ids":
            self.reply(200, {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
        elif fault == "refuses":
            self.reply(400, {"error": {"message": "the prompt is not to its taste", "code": 400}})
        elif body.get("stream"):
            self.stream(self.server.write(body), body, fault)
        else:
            tokens = self.server.write(body)
            text = self.server.tokenizer.decode(tokens, skip_special_tokens=True)
            said: dict[str, Any] = {"text": text}
            usage = {"completion_tokens": len(tokens)}
            if "messages" in body:
                said = {"message": {"role": "assistant", "content": text, "reasoning": "as it likes"}}
                usage["prompt_tokens"] = len(self.server.embeds_of(body["messages"]))
            choice = {"index": 0, **said, "token_ids": tokens, "finish_reason": self.reason(tokens, body)}
            self.reply(200, {"id": "theirs", "model": body["model"], "choices": [choice], "usage": usage})

    def reason(self, tokens: list[int], body: dict[str, Any]) -> str:
        return "stop" if tokens[-1] in body["stop_token_ids"] else "length"

    def stream(self, tokens: list[int], body: dict[str, Any], fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            if fault == "dies-first":
                self.event({"error": {"message": "the engine died", "code": 500}})
                return
            sent = ""
            for number, token in enumerate(tokens, start=1):
                last = number == len(tokens)
                whole = self.server.tokenizer.decode(tokens[:number], skip_special_tokens=True)
                # A character may take several tokens; it is sent once it is there.
                text = whole[len(sent) :] if last or not whole.endswith("\ufffd") else ""
                sent += text
                if fault == "marks":
                    text = "\u2028a\x85b"
                choice = {
                    **({"index": 0, "delta": {"content": text}} if "messages" in body else {"text": text}),
                    "token_ids": [token],
                    "finish_reason": self.reason(tokens, body) if last else None,
                }
                self.event({"choices": [choice], "usage": {"completion_tokens": number}})
                if fault == "holds" and number == 1:
                    self.server.go_on.wait(20)
                if number == 2 and fault == "breaks-off":
                    return
                if number == 2 and fault == "gives-up":
                    self.event({"error": {"message": "the engine died", "code": 500}})
                    return
                while fault == "endless":
                    self.event({"choices": [{"text": "x", "finish_reason": None}]})
            usage = {"completion_tokens": len(tokens)}
            if "messages" in body:
                usage["prompt_tokens"] = len(self.server.embeds_of(body["messages"]))
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone.set()

    def event(self, facts: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(facts, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def reply(self, status: int, facts: Any, raw: bytes | None = None) -> None:
        content = raw if raw is not None else json.dumps(facts).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(server: FakeVllm) -> Iterator[FakeVllm]:
    """Serve until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
