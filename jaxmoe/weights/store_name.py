"""What names the shared memory of a checkpoint's experts.

Name and fingerprint come from the layout, from where each matrix lies, and from the files' paths,
sizes, times and inodes: a file that was changed makes another name.
"""

from __future__ import annotations

import hashlib
import os

from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.shared_store import StoreName
from jaxmoe.weights.tensor_table import TensorTable


def store_name(checkpoint: Checkpoint, table: TensorTable) -> StoreName:
    """Of a checkpoint's routed experts, as they are on disk now."""
    digest = hashlib.sha256(f"{table.layouts}".encode())
    for file in sorted({plan.weight.file for plan in table.matrices}):
        info = os.stat(file)
        facts = file.resolve(), info.st_size, info.st_mtime_ns, info.st_dev, info.st_ino
        digest.update(f"{facts}".encode())
    for plan in table.matrices:
        scale = plan.scale and (plan.scale.file.name, plan.scale.offset)
        place = plan.moe_layer_idx, plan.expert, plan.which, plan.weight.file.name
        digest.update(f"{place} {plan.weight.offset} {scale} {plan.form}".encode())
    return StoreName.of(digest.digest())
