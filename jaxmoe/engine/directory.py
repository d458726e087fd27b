"""What a checkpoint directory says without its weights: configuration, tokenizer, template.

The engine reads it before the weights, and the server's front process for itself; nothing here
imports jax, which the front does without.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.generation import GenerationDefaults
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.sampling_params import MAX_EOS_TOKEN_IDS
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.tokenizer import ByteTokenizer, Tokenizer
from jaxmoe.weights.prepared_marks import refuse_unfinished


@dataclasses.dataclass(frozen=True)
class Directory:
    """What a checkpoint directory says about itself, without its weights."""

    path: Path
    model_config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    notes: tuple[str, ...]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else config.json, else the tokenizer; without ids beyond the
        vocabulary, which no step draws.
        """
        return tuple(i for i in self._stated_eos if i < self.model_config.vocab_size)

    @property
    def _stated_eos(self) -> tuple[int, ...]:
        if self.defaults.eos_token_ids is not None:
            return self.defaults.eos_token_ids
        if self.model_config.eos_token_ids:
            return self.model_config.eos_token_ids
        return self.tokenizer.eos_token_ids if self.tokenizer is not None else ()

    def checked(self) -> Directory:
        """This, once its end-of-text ids were held against the vocabulary."""
        stated, used = self._stated_eos, self.eos_token_ids
        if len(used) > MAX_EOS_TOKEN_IDS:
            raise CheckpointError(
                f"{self.path}: eos_token_id has {len(used)} ids, wanted at most {MAX_EOS_TOKEN_IDS}"
            )
        if len(used) == len(stated):
            return self
        note = (
            f"end-of-text ids beyond the vocabulary of {self.model_config.vocab_size} never come "
            f"up: {', '.join(str(i) for i in stated if i not in used)[:80]}"
        )
        return dataclasses.replace(self, notes=(*self.notes, note))


def model_path(config: EngineConfig) -> Path:
    """The directory (or, for random weights, config.json) to read; the embedded demo by default."""
    if config.model is not None:
        return Path(config.model).expanduser()
    path = Path(str(resources.files("jaxmoe") / "demo"))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: the embedded demo model is not part of this installation; name a checkpoint "
            "directory with model"
        )
    return path


def read_directory(path: Path, *, dummy: bool = False) -> Directory:
    """Everything of a checkpoint but its weights. dummy: `path` may be a config.json."""
    refuse_unfinished(path)
    config_file = path if dummy and path.suffix == ".json" else path / "config.json"
    if not config_file.is_file():
        wanted = "wanted a checkpoint directory in Hugging Face layout"
        if path.is_file():
            what = "is not a directory"
            wanted += " (a config.json alone runs with load_format=dummy)"
        elif path.exists():
            what = "no config.json in it"
        else:
            what = "no such directory (nothing is downloaded)"
        raise CheckpointError(f"{path}: {what}; {wanted}")
    path = config_file.parent
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{config_file}: not valid JSON: {e}") from None
    model_config = ModelConfig.from_hf(values)
    notes = []
    tokenizer = None
    if Tokenizer.is_in(path):
        tokenizer = Tokenizer.from_dir(path)
        if tokenizer.vocab_size > model_config.vocab_size:
            notes.append(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model_config.vocab_size}"
            )
    elif dummy:
        tokenizer = ByteTokenizer(model_config.vocab_size)
        notes.append("no tokenizer: texts are taken as bytes (random weights only)")
    else:
        notes.append("no known tokenizer: prompts and answers are token ids only")
    template = ChatTemplate.from_dir(path)
    if template is None:
        notes.append("no chat template: plain prompts only")
    defaults = GenerationDefaults.from_dir(path)
    notes = tuple(notes)
    return Directory(path, model_config, defaults, tokenizer, template, notes).checked()
