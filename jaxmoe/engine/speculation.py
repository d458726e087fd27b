"""Whether the draft head is loaded and run (models/draft.py), and how many guesses are verified.

Where it cannot be, `mtp` is refused by name, and `auto` is off and says why.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import MlaConfig, ModelConfig
from jaxmoe.engine.directory import Directory
from jaxmoe.ffi.device_driver import Device
from jaxmoe.models import registry
from jaxmoe.scheduler.draft_policy import AlwaysDraft, DraftCosts, DraftPolicy, DraftWherePays
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.loader import leaf_bytes
from jaxmoe.weights.memory import gib
from jaxmoe.weights.prepared_marks import MANIFEST
from jaxmoe.weights.safetensors_reader import Checkpoint

_WHAT = "speculative decoding"


def with_draft(config: EngineConfig, directory: Directory, device: Device) -> Directory:
    """The directory with a model that runs its draft head, if that is wanted and can be; a note
    where it was wanted and cannot.

    Raises: ConfigError where `speculative="mtp"` cannot be; CheckpointError.
    """
    if config.speculative == "off":
        return directory
    model = directory.model_config
    problem = unsupported(model, config, device)
    if problem is None and config.load_format != "dummy":
        name = registry.name_map(model, {}).weight_name("draft.join")
        with Checkpoint.open(directory.path) as checkpoint:
            if (directory.path / MANIFEST).exists():
                problem = "prepared checkpoints hold no draft head; the one it was made of may"
            elif name not in checkpoint.tensors:
                problem = f"the checkpoint has no draft head (no tensor {name!r})"
    if problem is None:
        return dataclasses.replace(directory, model_config=model.with_draft())
    if config.speculative == "mtp":
        raise ConfigError(f"speculative: mtp, but {problem}; use speculative=off")
    return dataclasses.replace(directory, notes=(*directory.notes, f"{_WHAT} is off: {problem}"))


def unsupported(model: ModelConfig, config: EngineConfig, device: Device) -> str | None:
    """Why the draft head of a model cannot be run with these options; None where it can."""
    if model.linear_attention is not None:
        return "recurrent states cannot be taken back where a guess is wrong"
    if model.num_draft_layers == 0:
        return "config.json names no draft head"
    if isinstance(model.attention, MlaConfig) and model.attention.indexer is not None:
        return "draft heads whose attention has an indexer are not supported"
    if not registry.SUPPORTED[model.architecture].has_draft_head:
        return f"draft heads of {model.architecture} are not supported"
    if config.prefill in ("slp", "dslp"):
        return f"prompts streamed by prefill={config.prefill} leave its cache empty"
    if config.disaggregate in ("on", "process"):
        return (
            f"prompts computed beside decode (disaggregate={config.disaggregate}) leave its cache "
            "empty"
        )
    if device.platform != "cpu":
        return "it is not supported beside a GPU (device=cpu runs it)"
    return None


def costs_of(model: ModelConfig, loaded: LoadedModel) -> DraftCosts:
    """What steps of a model that runs its draft head read."""
    assert loaded.host_store is not None
    own = (f"layers.{model.num_layers}.", "draft.")
    sizes = {path: leaf_bytes(spec) for path, spec in loaded.specs.items()}
    output = "embedding." if model.tie_embeddings else "lm_head."
    head = sum(n for path, n in sizes.items() if path.startswith(own))
    logits = sum(n for path, n in sizes.items() if path.startswith(output))
    looked_up = 0 if model.tie_embeddings else sizes["embedding.data"]
    layout = loaded.host_store.layouts[-1]
    return DraftCosts(
        num_moe_layers=len(model.moe_layers) - 1,
        num_experts=layout.num_experts,
        experts_per_token=model.moe.router.experts_per_token,
        step_bytes=sum(sizes.values()) - head - looked_up,
        expert_bytes=layout.total_bytes / layout.num_experts,
        head_bytes=head,
        logits_bytes=logits,
    )


def make_policy(
    config: EngineConfig, model: ModelConfig, loaded: LoadedModel
) -> DraftPolicy | None:
    """How many guesses a decode verifies; None where the draft head is not run."""
    if not model.runs_draft:
        return None
    if config.speculative == "mtp":
        return AlwaysDraft(config.max_draft_tokens)
    return DraftWherePays(costs_of(model, loaded), config.max_draft_tokens)


def describe(config: EngineConfig, model: ModelConfig, loaded: LoadedModel) -> str | None:
    """For the start-up report; None where there is nothing to say of a draft head."""
    if not model.runs_draft:
        if config.speculative != "off" or unsupported_model(model):
            return None
        return f"{_WHAT}: off; the checkpoint may have a draft head (speculative=auto or mtp)"
    costs = costs_of(model, loaded)
    layout = costs.head_bytes + costs.expert_bytes * costs.num_experts
    plain, one = costs.of_step(1, 0), costs.of_step(1, 1)
    how = "always" if config.speculative == "mtp" else "where it pays by bytes and measured steps"
    return (
        f"{_WHAT}: {how}, up to {config.max_draft_tokens} tokens a sequence; the draft head takes "
        f"{gib(int(layout))}; one sequence reads {gib(int(plain))} a step, {gib(int(one))} with a "
        f"guess, so it pays from {one / plain - 1:.0%} of guesses that are right"
    )


def unsupported_model(model: ModelConfig) -> bool:
    """Whether no option would have the draft head run."""
    has_head = registry.SUPPORTED[model.architecture].has_draft_head
    return not has_head or model.num_draft_layers == 0
