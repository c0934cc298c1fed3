"""Makes and publishes one shard of a source, and reports how far it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsft.corpus.encode import Encoder
from dsft.corpus.listing import RawShard
from dsft.corpus.progress import Reporter
from dsft.corpus.shard import ShardTask, prepare_shard
from dsft.corpus.token_shard import index_token_shard
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DamagedFileError


def with_limit(raw: RawShard, limit: int | None) -> RawShard:
    """A raw shard of which so many documents are taken (None: all): something else than the whole one."""
    return raw if limit is None else replace(raw, identity=f"{raw.identity}, first {limit} documents")


def encode_shard(
    folder: Path,
    task: ShardTask,
    encoder: Encoder,
    vocab_tokens: int,
    number: int,
    raw: RawShard,
    limit: int | None,
    reporter: Reporter,
) -> None:
    """Tokenise a raw shard; once more where it is remote and came damaged."""
    task = replace(task, max_documents=limit)
    raw = with_limit(raw, limit)
    try:
        prepare_shard(folder, number, raw, task, encoder, vocab_tokens, reporter.at, reporter.say)
    except DamagedFileError as error:
        if not any(file.is_remote for file in raw.files):
            raise
        reporter.say(f"{error} Reading it once more.")  # the network may have damaged it
        prepare_shard(folder, number, raw, task, encoder, vocab_tokens, reporter.at, reporter.say)


def index_shard(
    folder: Path, tokenizer: Tokenizer, number: int, raw: RawShard, limit: int | None, reporter: Reporter
) -> None:
    """Make a token file of another program a shard, where it lies."""
    assert limit is None, "only held-out sets have limits, and they are text"
    index_token_shard(folder, number, raw, tokenizer, reporter.at, reporter.say)
