"""Token streams for training and measuring.

A dataset file holds three flat streams of documents: `chapters` and `chats` to train on, `heldout`
to measure on. Each document is its tokens between <|bos|> and <|eos|>.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo.chats import Chat, ChatWriter
from demo.corpus import Document
from demo.tokenizer import ASSISTANT, BOS, EOS, SYSTEM, USER

_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents end to end.

    tokens: uint16 `[num_tokens]`.
    learn: bool `[num_tokens]`, the tokens the model is to predict (of a chat, the assistant's).
    starts: int64 `[num_documents + 1]`, where each document begins, and the end.
    """

    tokens: np.ndarray
    learn: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[tuple[list[int], list[bool]]]) -> Stream:
        return cls(
            np.array([t for tokens, _ in documents for t in tokens], np.uint16),
            np.array([m for _, learn in documents for m in learn], bool),
            np.cumsum([0, *(len(tokens) for tokens, _ in documents)]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """heldout: source -> its held-out documents; heldout_bytes: their UTF-8 length."""

    chapters: Stream
    chats: Stream
    heldout: dict[str, Stream]
    heldout_bytes: dict[str, int]


def encode_document(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [tokenizer.token_to_id(BOS), *ids, tokenizer.token_to_id(EOS)]
    return tokens, [False] + [True] * (len(tokens) - 1)


def encode_chat(chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of the chat template's text, of which the assistant's are to be learnt."""
    tokens, learn = [tokenizer.token_to_id(BOS)], [False]
    for role, content in chat:
        ids = tokenizer.encode(content, add_special_tokens=False).ids
        is_reply = role == "assistant"
        if is_reply:
            ids.append(tokenizer.token_to_id(EOS))
        tokens += [tokenizer.token_to_id(_ROLES[role]), *ids]
        learn += [False] + [is_reply] * len(ids)
    return tokens, learn


def build(
    documents: Sequence[Document], tokenizer: Tokenizer, num_chats: int, seed: int
) -> Dataset:
    training = [d for d in documents if not d.heldout]
    heldout = {
        source: [d for d in documents if d.heldout and d.source == source]
        for source in dict.fromkeys(d.source for d in documents)
    }
    writer = ChatWriter(training, seed)
    return Dataset(
        Stream.of([encode_document(d.text, tokenizer) for d in training]),
        Stream.of([encode_chat(writer.chat(), tokenizer) for _ in range(num_chats)]),
        {
            s: Stream.of([encode_document(d.text, tokenizer) for d in ds])
            for s, ds in heldout.items()
        },
        {s: sum(len(d.text.encode()) for d in ds) for s, ds in heldout.items()},
    )


def save(dataset: Dataset, path: Path) -> None:
    streams = {"chapters": dataset.chapters, "chats": dataset.chats}
    streams |= {f"heldout_{source}": stream for source, stream in dataset.heldout.items()}
    arrays = {}
    for name, stream in streams.items():
        for field in dataclasses.fields(Stream):
            arrays[f"{name}.{field.name}"] = getattr(stream, field.name)
    # Bytes, not an object array: the file loads without pickle.
    arrays["heldout_bytes"] = np.frombuffer(json.dumps(dataset.heldout_bytes).encode(), np.uint8)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> Dataset:
    with np.load(path) as arrays:

        def stream(name: str) -> Stream:
            return Stream(*(arrays[f"{name}.{f.name}"] for f in dataclasses.fields(Stream)))

        num_bytes = json.loads(arrays["heldout_bytes"].tobytes())
        heldout = {source: stream(f"heldout_{source}") for source in num_bytes}
        return Dataset(stream("chapters"), stream("chats"), heldout, num_bytes)


class Batches:
    """Endless training batches: an epoch is all chapters and a share of the chats, shuffled."""

    def __init__(self, dataset: Dataset, chats_per_epoch: int, seed: int):
        self._dataset = dataset
        self._random = np.random.default_rng(seed)
        self._chats_per_epoch = min(chats_per_epoch, len(dataset.chats))
        self._tokens, self._learn = np.zeros(0, np.uint16), np.zeros(0, bool)
        self.tokens_per_epoch = len(dataset.chapters.tokens) + round(
            len(dataset.chats.tokens) * self._chats_per_epoch / len(dataset.chats)
        )

    def next(self, num_sequences: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 tokens `[B, S + 1]` and bool learn `[B, S]` for the S predictions."""
        wanted = num_sequences * length + 1
        while len(self._tokens) < wanted:
            self._extend()
        span = np.arange(num_sequences)[:, None] * length + np.arange(length + 1)
        tokens, learn = self._tokens[span], self._learn[span]
        self._tokens, self._learn = self._tokens[wanted - 1 :], self._learn[wanted - 1 :]
        return tokens.astype(np.int32), learn[:, 1:]

    def _extend(self) -> None:
        chosen = self._random.permutation(len(self._dataset.chats))[: self._chats_per_epoch]
        pieces = [(self._dataset.chapters, i) for i in range(len(self._dataset.chapters))]
        pieces += [(self._dataset.chats, i) for i in chosen]
        order = [pieces[i] for i in self._random.permutation(len(pieces))]
        slices = [(s, slice(s.starts[i], s.starts[i + 1])) for s, i in order]
        self._tokens = np.concatenate([self._tokens, *(s.tokens[span] for s, span in slices)])
        self._learn = np.concatenate([self._learn, *(s.learn[span] for s, span in slices)])


def windows(stream: Stream, length: int, per_batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every prediction of the stream once, in windows of `length` without overlap.

    Yields int32 tokens `[B, S + 1]` and bool counted `[B, S]`: what follows a document's <|bos|> is
    predicted from it, <|bos|> itself is not counted.
    """
    rows = []
    for start in range(0, len(stream.tokens) - 1, length):
        tokens = stream.tokens[start : start + length + 1].astype(np.int32)
        counted = stream.learn[start + 1 : start + length + 1]
        short = length - len(counted)
        rows.append((np.pad(tokens, (0, short)), np.pad(counted, (0, short))))
    rows += [(np.zeros_like(rows[0][0]), np.zeros_like(rows[0][1]))] * (-len(rows) % per_batch)
    for i in range(0, len(rows), per_batch):
        batch = rows[i : i + per_batch]
        yield np.stack([t for t, _ in batch]), np.stack([c for _, c in batch])
