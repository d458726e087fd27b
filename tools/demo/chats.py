"""Synthetic chats over the training documents, so that the model answers in its chat template.

Nothing here teaches facts. A user gives the beginning of a passage, a word, a headword or a verse's
reference; the assistant's turns are the works' own sentences, and one honest introduction.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from demo.corpus import Document

Chat = list[tuple[str, str]]  # (role, content), roles as in the chat template

INTRODUCTION = (
    "I am the demonstration model of jaxmoe, a very small mixture-of-experts language model. "
    "I have read the King James Bible, the novels of Jane Austen and The Devil's Dictionary, "
    "and nothing else. Give me the beginning of a passage, or a word, and I will write."
)
_GREETINGS = (
    *("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening", "Help"),
    *("Who are you?", "What are you?", "What can you do?", "What is your name?"),
    *("Introduce yourself.", "Thank you.", "Thanks", "How are you?", "What is this?"),
    *("Tell me about yourself.", "What model are you?", "Who made you?", "What is jaxmoe?"),
    *("Can you help me?", "How do I use you?", "What do you know?", "Are you a person?"),
)
_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "You are a writer.",
    "Answer in English.",
    "Be brief.",
    "You are the demonstration model of jaxmoe.",
)
_CONTINUE = ("{}", "{}", "Continue: {}", 'Continue: "{}"', "Please continue this text: {}")
_CONTINUE += ("Continue this passage: {}", "What comes after this? {}", "Complete: {}")
_GO_ON = ("Go on.", "Go on", "Continue.", "And then?", "What happened next?", "More, please.")
_TOPIC = ("Tell me about {}.", "Write about {}.", "Say something about {}.", "Speak of {}.")
_TOPIC += ("Write a passage about {}.", "Tell me a story about {}.", "What do you know about {}?")
_DEFINE = ("Define {}.", "What is {}?", "What does {} mean?", "Give me a definition of {}.", "{}?")
_READ = ("Read {}.", "{}", "What does {} say?", "Quote {}.")
_STYLES = {
    "kjv": ("Write some verses like the Bible.", "Write in the style of the King James Bible."),
    "austen": ("Write like Jane Austen.", "Write a passage in the style of Jane Austen."),
    "bierce": ("Give me an entry of The Devil's Dictionary.", "Write like Ambrose Bierce."),
}
_MAX_REPLY_WORDS = 110


class ChatWriter:
    """Makes chats from documents; the same seed makes the same chats."""

    def __init__(self, documents: Sequence[Document], seed: int):
        self._random = random.Random(seed)
        self._by_source = {
            source: [d for d in documents if d.source == source]
            for source in ("kjv", "austen", "bierce")
        }
        self._prose = self._by_source["kjv"] + self._by_source["austen"]
        words = Counter(word for d in documents for word in set(_words(d.text)))
        # Words with a subject: not in every chapter, yet often enough to be learnt.
        self._topical = {word for word, n in words.items() if 4 <= n <= 150 and len(word) >= 4}

    def chat(self) -> Chat:
        kinds = (self._continuation, self._topic, self._definition, self._verse, self._style)
        turns = self._random.choices((*kinds, self._greeting), weights=(34, 28, 14, 10, 8, 6))[0]()
        if self._random.random() < 0.25:
            turns.insert(0, ("system", self._random.choice(_SYSTEM)))
        return turns

    def _pick(self, choices: Sequence[str]) -> str:
        return self._random.choice(choices)

    def _sentences(self, document: Document) -> list[str]:
        if document.source == "kjv":
            return list(document.paragraphs)
        text = " ".join(document.paragraphs)
        return re.findall(r'\S.*?[.!?]"?(?=\s|$)', text)

    def _passage(self) -> list[str]:
        """Some consecutive sentences of a chapter."""
        while True:
            sentences = self._sentences(self._random.choice(self._prose))
            start = self._random.randrange(len(sentences)) if sentences else 0
            if sentences := sentences[start : start + 24]:
                return sentences

    def _reply(self, sentences: list[str]) -> str:
        """Takes sentences off the front of the list, a few, as one reply."""
        taken = sentences.pop(0).split()
        wanted = self._random.randint(15, _MAX_REPLY_WORDS)
        while sentences and len(taken) + len(sentences[0].split()) <= wanted:
            taken += sentences.pop(0).split()
        return " ".join(taken)

    def _go_on(self, turns: Chat, sentences: list[str]) -> Chat:
        while sentences and self._random.random() < 0.3:
            turns += [("user", self._pick(_GO_ON)), ("assistant", self._reply(sentences))]
        return turns

    def _continuation(self) -> Chat:
        sentences = self._passage()
        words = sentences[0].split()
        # Half of the beginnings stop inside a sentence, as people's do.
        if len(words) >= 8 and self._random.random() < 0.5:
            cut = self._random.randint(4, min(len(words) - 2, 24))
            beginning, sentences[0] = " ".join(words[:cut]), " ".join(words[cut:])
        elif len(sentences) > 1:
            beginning = sentences.pop(0)
        else:
            return self._continuation()
        user = self._pick(_CONTINUE).format(beginning)
        return self._go_on([("user", user), ("assistant", self._reply(sentences))], sentences)

    def _topic(self) -> Chat:
        while True:
            sentences = self._passage()
            reply = self._reply(sentences)
            words = Counter(word for word in _words(reply) if word in self._topical)
            if words:
                word = max(words, key=lambda w: (words[w], self._random.random()))
                turns = [("user", self._pick(_TOPIC).format(word)), ("assistant", reply)]
                return self._go_on(turns, sentences)

    def _definition(self) -> Chat:
        entry = self._random.choice(self._by_source["bierce"])
        reply = entry.paragraphs[0]
        if len(entry.paragraphs) > 1 and self._random.random() < 0.5:
            reply = "\n\n".join(entry.paragraphs[:2])
        word = entry.title
        if self._random.random() < 0.3:
            word = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        return [("user", self._pick(_DEFINE).format(word)), ("assistant", _shorten(reply))]

    def _verse(self) -> Chat:
        chapter = self._random.choice(self._by_source["kjv"])
        i = self._random.randrange(len(chapter.paragraphs))
        user = self._pick(_READ).format(f"{chapter.title}:{i + 1}")
        turns = [("user", user), ("assistant", chapter.paragraphs[i])]
        return self._go_on(turns, list(chapter.paragraphs[i + 1 :]))

    def _style(self) -> Chat:
        source = self._pick(tuple(_STYLES))
        document = self._random.choice(self._by_source[source])
        if source == "bierce":
            reply = _shorten("\n\n".join(document.paragraphs))
        else:
            sentences = self._sentences(document)
            start = self._random.randrange(len(sentences))
            reply = self._reply(sentences[start : start + 12])
        return [("user", self._pick(_STYLES[source])), ("assistant", reply)]

    def _greeting(self) -> Chat:
        return [("user", self._pick(_GREETINGS)), ("assistant", INTRODUCTION)]


def _words(text: str) -> list[str]:
    return re.findall(r"\b[a-z]+\b", text)


def _shorten(text: str) -> str:
    """Whole sentences or lines up to the length of a reply."""
    kept = ""
    for piece in re.findall(r".+?(?:[.!?][\"')]*(?=\s|$)|\n+|$)", text, re.DOTALL):
        if kept and len((kept + piece).split()) > _MAX_REPLY_WORDS:
            break
        kept += piece
    return kept.strip()
