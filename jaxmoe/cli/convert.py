"""jaxmoe_convert: writes a checkpoint in the prepared form.

    jaxmoe_convert --model=DIR --output=DIR [--expert_dtype=int4]

Prepared weights lie on disk as they will lie in memory, written by Orbax; every --model option
takes the directory. Run the same command again after an interruption: it goes on where it stopped.
Weights keep their bits; --expert_dtype alone rounds them, and the last line says by how much.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxmoe.cli import flags as option_flags
from jaxmoe.cli import interrupt
from jaxmoe.common.errors import ConfigError, JaxMoeError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.quant.int4 import Int4Format
from jaxmoe.weights.convert import PIECE_BYTES, convert
from jaxmoe.weights.safetensors_reader import Checkpoint

EXPERT_DTYPES: dict[str | None, Int4Format] = {
    "int4": "int4_g32",
    "int4_g32": "int4_g32",
    "int4_g128": "int4_g128",
}


def define_flags() -> flags.FlagValues:
    """This command's own flags, apart from those of other commands in the process."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "checkpoint directory to read", flag_values=values)
    flags.DEFINE_string("output", None, "directory to write", flag_values=values)
    flags.DEFINE_integer(
        "piece_mb",
        PIECE_BYTES >> 20,
        "most MiB of weights in memory at once (one leaf or expert may be larger); a whole number "
        f"above 0 (default {PIECE_BYTES >> 20})",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "expert_dtype",
        None,
        [name for name in EXPERT_DTYPES if name],
        "round the routed experts, if they are BF16, F32 or FP8, to symmetric INT4 with a BF16 "
        "scale for 32 (int4 is int4_g32) or 128 inputs of a row; default: keep them as they are",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "progress", None, "draw a progress bar; default: on a terminal", flag_values=values
    )
    flags.DEFINE_boolean("verbose", False, "log what is done", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if the prepared checkpoint is complete, 1 after an error."""
    argv = sys.argv if argv is None else argv
    values = define_flags()
    if {"-h", "--help", "-help"} & set(argv[1:]):
        print(option_flags.usage(values, __doc__ or ""))
        return 0
    try:
        rest = option_flags.parse_args(values, argv)
        wanted = "wanted --model=DIR --output=DIR; see --help"
        if rest:
            raise ConfigError(f"unexpected argument {rest[0]!r}; {wanted}")
        if missing := [f"--{name}" for name in ("model", "output") if not values[name].value]:
            raise ConfigError(f"{' and '.join(missing)} missing; {wanted}")
        logging.basicConfig(level=logging.WARNING)
        if values.verbose:
            logging.getLogger("jaxmoe").setLevel(logging.INFO)
        output = Path(values.output)
        with interrupt.kept(), Checkpoint.open(values.model) as source:
            report = convert(
                source,
                ModelConfig.from_hf(source.config()),
                registry,
                output,
                piece_bytes=values.piece_mb << 20,
                expert_format=EXPERT_DTYPES.get(values.expert_dtype),
                progress=values.progress,
            )
    except (JaxMoeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on")
    print(f"{output}: {report.describe()}")
    return 0


def _fail(message: str) -> int:
    print(f"jaxmoe_convert: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
