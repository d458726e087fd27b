"""A tiny checkpoint with every expert chosen: in bfloat16 a router near a tie decides by the last
bit, on one device's kernels against another's too, and then all that follows differs.
"""

import json
import shutil
from pathlib import Path

_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")


def copy(source: Path, target: Path) -> Path:
    """The checkpoint `source` as `target`, changed so."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (config["num_experts_per_tok"],) = (config[k] for k in _COUNTS if k in config)
    if "topk_group" in config:
        config["topk_group"] = config["n_group"]
    (target / "config.json").write_text(json.dumps(config))
    return target
