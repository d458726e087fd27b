"""How the engine runs: every option with its default and its bounds, stated once.

Command-line flags, the TOML file and the environment are made from these fields (cli/flags.py);
`LLM` takes them as keywords. What it does not do: describe the model (that is model_config.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import check_fields, checked, nearest, rules

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Immutable and validated: a wrong value raises ConfigError naming the option."""

    model: str | None = checked(
        None,
        "str",
        "checkpoint directory in Hugging Face layout, or one that jaxmoe_convert wrote; "
        "default: the embedded demo model",
        optional=True,
    )
    load_format: str = checked(
        "auto",
        "str",
        "auto reads the checkpoint; dummy makes random weights of config.json's shape",
        choices=("auto", "dummy"),
    )
    backing: str = checked(
        "arena",
        "str",
        "where the routed experts lie: arena reads them into memory at the start; mmap starts at "
        "once and reads from the files, which must not be changed or truncated meanwhile",
        choices=("arena", "mmap"),
    )
    shared_weights: bool | None = checked(
        None,
        "bool",
        "keep the routed experts in named shared memory (/dev/shm), so that a restarted engine "
        "attaches to them in seconds; default: only where the engine is a process of its own",
        optional=True,
    )
    compute_dtype: str = checked(
        "bfloat16",
        "str",
        "type of activations and KV cache; float32 is for audits",
        choices=("bfloat16", "float32"),
    )
    max_model_len: int | None = checked(
        None,
        "int",
        "longest prompt + output in tokens; default: the model's limit, or what 512 MiB of KV "
        "cache holds",
        low=2,
        high=2**24,
        optional=True,
    )
    max_num_seqs: int = checked(8, "int", "sequences decoded together at most", low=1, high=1024)
    target_tpot_ms: float | None = checked(
        None,
        "float",
        "longest time per output token wanted: fewer sequences are decoded together, and prompts "
        "are computed in smaller chunks between their tokens, until measured steps keep it; "
        "default: max_num_seqs and prefill_chunk_tokens alone limit them",
        low=0.0,
        high=1e6,
        low_open=True,
        optional=True,
    )
    kv_cache_gb: float | None = checked(
        None,
        "float",
        "memory for the KV cache in GiB; default: 0.5, or what one sequence of max_model_len needs",
        low=0.0,
        high=65536.0,
        low_open=True,
        optional=True,
    )
    preempted_kv_gb: float = checked(
        1.0,
        "float",
        "host memory in GiB, taken when it is needed, for the KV pages of sequences that have to "
        "give them to others; what does not fit, or is under penalties, is computed again; 0: "
        "everything",
        low=0.0,
        high=65536.0,
    )
    max_queued_requests: int = checked(
        256, "int", "requests a server lets wait before it refuses more", low=1, high=2**20
    )
    max_queued_tokens: int = checked(
        2**20, "int", "prompt tokens a server lets wait before it refuses more", low=1, high=2**40
    )
    page_size: int = checked(16, "int", "tokens of a KV cache page", low=1, high=1024)
    prefix_cache: bool = checked(
        True,
        "bool",
        "keep the KV pages of prompts and share them with later prompts that begin alike; texts "
        "are the same without it",
    )
    state_cache_gb: float | None = checked(
        None,
        "float",
        "memory in GiB in which the prefix cache keeps recurrent states, of models that have them "
        "(Qwen3-Next, Qwen3.5); 0: their prompts are always computed whole; default: 1",
        low=0.0,
        high=65536.0,
        optional=True,
    )
    prefill_chunk_tokens: int = checked(
        512, "int", "prompt tokens computed in one step at most", low=16, high=16384
    )
    device: str = checked(
        "auto",
        "str",
        "where everything but the routed experts runs: gpu, cpu, or a GPU where there is one and "
        "its kernels know the model",
        choices=("auto", "cpu", "gpu"),
    )
    prefill: str = checked(
        "auto",
        "str",
        "how prompts are computed: chunked (routed experts on the CPU), slp (experts streamed to "
        "the device, layer by layer), dslp (the same on all devices of the host at once, each with "
        "a part of the prompt and of the experts), or (auto) of what the host can do whatever is "
        "predicted to be fastest, prompt by prompt",
        choices=("auto", "chunked", "slp", "dslp"),
    )
    disaggregate: str = checked(
        "auto",
        "str",
        "on: long prompts are computed on a second device (with device=cpu: a GPU where there is "
        "one) while the first one decodes, both on one copy of the experts; process: the same by a "
        "second process, which attaches to the shared experts (on the CPU platform so far); off: "
        "they take turns on one device; auto: off, until it was measured on two GPUs",
        choices=("auto", "off", "on", "process"),
    )
    prefill_weights: str = checked(
        "auto",
        "str",
        "of a device that computes prompts while another one decodes, everything but the routed "
        "experts: resident there, or streamed from host memory layer by layer beside them, for "
        "devices with little memory; auto: resident where there is room",
        choices=("auto", "resident", "streamed"),
    )
    prefill_bandwidth_share: float = checked(
        1.0,
        "float",
        "share of the rate at which the experts stream alone that they may take while others "
        "decode; what is left of the memory's bandwidth is decode's",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    stand_in_copy_gb_s: float | None = checked(
        None,
        "float",
        "with device=cpu: GB/s of the copies that stand in for a GPU's bus, for measurements, and "
        "prefill=auto may stream; default: as fast as memory, and it does not",
        low=0.0,
        high=1e6,
        low_open=True,
        optional=True,
    )
    speculative: str = checked(
        "off",
        "str",
        "guess the next tokens with the draft head (multi-token prediction) that some checkpoints "
        "ship, and verify them in the next step: mtp always, auto where it is predicted and "
        "measured to be faster; off: the head is not loaded. Texts are the same",
        choices=("off", "auto", "mtp"),
    )
    max_draft_tokens: int = checked(
        1, "int", "with speculative: tokens of a sequence guessed at once at most", low=1, high=8
    )
    num_threads: int | None = checked(
        None,
        "int",
        "threads of the CPU kernels; default: the physical cores this process may use",
        low=1,
        high=1024,
        optional=True,
    )
    calibrate: bool = checked(
        True,
        "bool",
        "measure once on this machine from how many tokens an expert on work is cut into small "
        "pieces, and keep the answer in cache_dir; only with a gibibyte of experts and more; "
        "results are the same without it",
    )
    isa: str | None = checked(
        None,
        "str",
        "instruction set of the CPU kernels, for tests; default: the best this machine has",
        choices=ISAS,
        optional=True,
    )
    seed: int = checked(
        0,
        "int",
        "where the seeds of requests that bring none start, and the seed of dummy weights",
        low=0,
        high=2**63 - 1,
    )
    cache_dir: str | None = checked(
        "~/.cache/jaxmoe",
        "str",
        "where compiled programs are kept for the next start; empty: nowhere",
        optional=True,
    )
    warm_up: bool | None = checked(
        None,
        "bool",
        "compile the programs of all sizes of steps in the background, so that few requests wait "
        "for one; default: only in servers",
        optional=True,
    )
    profile: str | None = checked(
        None,
        "str",
        'count where the time of every step goes, for /metrics and the end of a run: "seconds", '
        "or the file (*.json) for a trace that ui.perfetto.dev opens",
        optional=True,
    )
    show_progress: bool = checked(True, "bool", "show a progress bar while weights are loaded")

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        check_fields(self, ConfigError)
        if self.profile not in (None, "seconds") and not self.profile.endswith(".json"):
            raise ConfigError(
                f'profile: got {self.profile!r}, wanted "seconds" or the name of a .json file'
            )
        if self.disaggregate == "process":
            self._check_process()
        if self.prefill_weights != "auto" and self.disaggregate not in ("on", "process"):
            raise ConfigError(
                f"prefill_weights: got {self.prefill_weights!r}, wanted auto where the device that "
                "computes prompts decodes too and needs its weights; use disaggregate=on"
            )

    def _check_process(self) -> None:
        """What two processes on one copy of the experts need."""
        refused = {"shared_weights": False, "backing": "mmap", "load_format": "dummy"}
        for name, value in refused.items():
            if getattr(self, name) == value:
                raise ConfigError(
                    f"disaggregate: process, but with {name}={str(value).lower()} the experts are "
                    "not in named shared memory; leave it out, or use disaggregate=on or off"
                )
        if self.prefill in ("chunked", "dslp"):
            raise ConfigError(
                f"disaggregate: process, but prefill={self.prefill} streams no prompt to one "
                "device; use prefill=auto or slp"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EngineConfig:
        """A config with the `given` options; an unknown name is a ConfigError."""
        known = rules(cls)
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"unknown engine option {name!r}{nearest(name, known)}; known: "
                    + ", ".join(known)
                )
        return cls(**given)

    @property
    def cache_path(self) -> Path | None:
        return Path(self.cache_dir).expanduser() if self.cache_dir else None

    @property
    def trace_path(self) -> Path | None:
        """Where the trace goes; None where none is wanted."""
        return None if self.profile in (None, "seconds") else Path(self.profile)

    def describe(self) -> str:
        """The effective options on one line."""
        return " ".join(f"{name}={getattr(self, name)}" for name in rules(type(self)))
