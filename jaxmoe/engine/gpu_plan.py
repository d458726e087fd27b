"""What a start would take of a GPU's memory: what is resident, the ring, the KV cache, temporaries.

From the same arithmetic that the start goes by (placement.py, long_prompts.py, prefill/plan.py);
no GPU is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxmoe.common.errors import CapacityError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.long_prompts import SHARE
from jaxmoe.engine.placement import MEMORY_FRACTION
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.prefill.device import prompt_shape
from jaxmoe.prefill.plan import OtherWeights, SlpPlan, plan_slp
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.loader import leaf_bytes
from jaxmoe.weights.memory import gib
from jaxmoe.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """memory_bytes: of the GPU, of which XLA may take room_bytes. slp: how long prompts would be
    streamed beside weights and cache, or None, and problem says why. alone: how a GPU of this size
    would compute prompts while another device decodes, with alone_kv_bytes of pages, or None where
    it could not.
    """

    memory_bytes: int
    room_bytes: int
    weight_bytes: int
    kv_bytes: int
    slp: SlpPlan | None
    problem: str
    alone: SlpPlan | None
    alone_kv_bytes: int

    @property
    def alone_bytes(self) -> int:
        return self.alone_kv_bytes + (0 if self.alone is None else self.alone.device_bytes)

    @property
    def fits(self) -> bool:
        """Whether weights and cache do: without room for streaming, prompts go in chunks."""
        return self.weight_bytes + self.kv_bytes <= self.room_bytes

    def describe(self) -> list[str]:
        """For people."""
        lines = [
            f"GPU        {gib(self.memory_bytes)}, of which {gib(self.room_bytes)} may be taken",
            f"  {gib(self.weight_bytes):>10}  weights but the routed experts, resident",
            f"  {gib(self.kv_bytes):>10}  KV cache",
        ]
        if not self.fits:
            short = self.weight_bytes + self.kv_bytes - self.room_bytes
            advice = "use device=cpu, or a smaller model"
            if self.weight_bytes < self.room_bytes:
                advice = "lower kv_cache_gb, or use device=cpu"
            elif self.alone is not None:
                advice = (
                    "use device=cpu with disaggregate=on: the CPU decodes, and the GPU computes "
                    "long prompts"
                )
            lines.append(f"DOES NOT FIT a GPU that decodes: short by {gib(short)}; {advice}")
        elif self.slp is None:
            lines.append(f"  long prompts are computed in chunks: {self.problem}")
        else:
            slp = self.slp
            total = self.weight_bytes + self.kv_bytes + slp.device_bytes
            lines += [
                f"  {gib(slp.ring_bytes):>10}  ring of {slp.num_slots} slots of "
                f"{slp.group_experts} experts",
                f"  {gib(slp.activation_bytes):>10}  temporaries of prompts, {slp.max_tokens} "
                "tokens in one pass over the experts",
                f"  {gib(total):>10}  at the peak",
            ]
        if self.alone is not None and (not self.fits or self.slp is None):
            lines.append(
                f"  prompts alone (disaggregate=on) would take {gib(self.alone_bytes)}: "
                f"{self.alone.describe()}; {gib(self.alone_kv_bytes)} pages of one prompt"
            )
        return lines


def plan_gpu(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    layouts: Sequence[ExpertLayout],
    specs: Mapping[str, ParamSpec],
    memory_bytes: int,
) -> GpuPlan:
    """For a GPU with `memory_bytes`; layouts: of the experts, specs: of all other weights."""
    room = int(memory_bytes * float(MEMORY_FRACTION))
    others = _other_weights(specs)
    expert = layouts[0].total_bytes // layouts[0].num_experts
    shape = prompt_shape(model, expert, 2 if config.compute_dtype == "bfloat16" else 4)
    slp = alone = None
    problem = "prefill=chunked" if config.prefill == "chunked" else ""
    left = room - others.all_bytes - layout.total_bytes
    if not problem:
        try:
            slp = plan_slp(shape, int(max(left, 0) * SHARE), layout.max_model_len)
        except CapacityError as error:
            problem = str(error)
    one_prompt = layout.pages_per_sequence * layout.page_size * layout.token_bytes
    try:
        free = int(max(room - one_prompt, 0) * SHARE)
        alone = plan_slp(shape, free, layout.max_model_len, others=others)
    except CapacityError:
        pass
    return GpuPlan(
        memory_bytes,
        room,
        others.all_bytes,
        layout.total_bytes,
        slp,
        problem,
        alone,
        one_prompt,
    )


def _other_weights(specs: Mapping[str, ParamSpec]) -> OtherWeights:
    """By the leaves' paths: those of "layers.3" are layer 3's."""
    layers: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
    sizes: dict[str, int] = {}
    for path, spec in specs.items():
        if path.startswith("layers."):
            _, number, rest = path.split(".", 2)
            layers.setdefault(number, []).append((rest, spec.shape, spec.dtype))
            sizes[number] = sizes.get(number, 0) + leaf_bytes(spec)
    shapes = {tuple(leaves): sizes[number] for number, leaves in layers.items()}
    return OtherWeights(sum(map(leaf_bytes, specs.values())), tuple(shapes.values()))
