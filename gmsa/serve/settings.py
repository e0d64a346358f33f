"""What a server is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits and defaults; all but `prefix_cache` are options of `gmsa serve`.

    Attributes:
        model_names: what the model is called in requests; the first is the one reported.
        store: file of the memory store.
        api_key: what clients must send; None: everybody may do everything.
        api_key_file: of keys in its place, one for each name (tenants.py).
        merge_size: of texts, where a request names none.
        auto_compress: compress texts of more tokens than this; 0: none.
        select: of such texts keep the sentences that fit the last question (`GMSA.compress_for`).
        max_context_tokens: of one text to be compressed.
        max_prompt_tokens: prompt and answer together, soft tokens counted as tokens.
        max_new_tokens: of an answer, where a request names no number.
        max_batch: answers written at the same time.
        max_queue: requests that may wait beyond those; more are answered 429.
        max_body: bytes of a request.
        max_store: bytes of memories kept; the least recently used go first. None: no limit.
        prefix_cache: bytes of what the decoder keeps of memories it has read, for further questions about them.
        accept_soft_tokens: take memory files in requests.
        drain_seconds: how long requests under way may take after SIGTERM.
    """

    model_names: tuple[str, ...] = ("gmsa",)
    store: Path = field(default_factory=lambda: Path("memories.sqlite"))
    api_key: str | None = None
    api_key_file: Path | None = None
    merge_size: int = 4
    auto_compress: int = 0
    select: bool = False
    max_context_tokens: int = 131_072
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 512
    max_batch: int = 8
    max_queue: int = 32
    max_body: int = 8 * 2**20
    max_store: int | None = None
    prefix_cache: int = 2**28
    accept_soft_tokens: bool = False
    drain_seconds: int = 30
