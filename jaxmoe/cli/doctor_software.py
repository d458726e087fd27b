"""jaxmoe_doctor's checks of what runs here: Python, jax, the extension and its kernels, GPUs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from jaxmoe.cli.doctor_check import FAIL, OK, WARN, Check

_REBUILD = "Install jaxmoe again in this environment: python -m pip install --force-reinstall ."
_TESTED = ((3, 11), (3, 12))

# Run in a process of its own: a broken driver may hang or crash whoever asks it.
_ASK_CUDA = """
import ctypes, json
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as e:
    print(json.dumps({"missing": str(e)})); raise SystemExit
version, count = ctypes.c_int(), ctypes.c_int()
error = cuda.cuInit(0)
cuda.cuDriverGetVersion(ctypes.byref(version))
devices = []
if not error:
    error = cuda.cuDeviceGetCount(ctypes.byref(count))
for i in range(count.value):
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), i)
    cuda.cuDeviceGetName(name, 100, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    devices.append([name.value.decode(), size.value])
print(json.dumps({"error": error, "version": version.value, "devices": devices}))
"""


def python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info[:2] < _TESTED[0]:
        return Check("Python", FAIL, found, "jaxmoe needs 3.11 or newer.", "Install Python 3.12.")
    if sys.version_info[:2] not in _TESTED:
        return Check("Python", WARN, found, "Tested on 3.11 and 3.12.", "Prefer Python 3.12.")
    return Check("Python", OK, found)


def packages() -> Check:
    names = ("jaxmoe", "jax", "jaxlib", "flax", "numpy", "ml_dtypes")
    versions, missing = {}, []
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if missing:
        return Check(
            "jax", FAIL, f"{found}; not installed: {', '.join(missing)}", "It is needed.", _REBUILD
        )
    if versions["jax"] != versions["jaxlib"]:
        return Check(
            "jax",
            WARN,
            found,
            "jax and jaxlib of different releases are not tested together.",
            f"python -m pip install jaxlib=={versions['jax']}",
        )
    return Check("jax", OK, found)


def extension() -> Check:
    try:
        from jaxmoe.ffi import _native
        from jaxmoe.ffi.registry import register_targets

        register_targets()
    except Exception as e:
        return Check(
            "extension",
            FAIL,
            f"{type(e).__name__}: {e}",
            "The native kernels do not load, or not into this jaxlib.",
            _REBUILD,
        )
    version = ffi_api_version()
    return Check(
        "extension",
        OK,
        f"{len(_native.handlers())} operations registered with XLA"
        + (f", FFI API {version} in jaxlib's headers" if version else ""),
        f"Loaded from {_native.__file__}.",
    )


def ffi_api_version() -> str | None:
    """MAJOR.MINOR of the XLA FFI that the installed jaxlib's headers state."""
    from jax import ffi

    header = Path(ffi.include_dir()) / "xla/ffi/api/c_api.h"
    words = [line.split() for line in header.read_text().splitlines() if "XLA_FFI_API_M" in line]
    numbers = {w[1]: w[2] for w in words if len(w) == 3 and w[0] == "#define"}
    try:
        return f"{numbers['XLA_FFI_API_MAJOR']}.{numbers['XLA_FFI_API_MINOR']}"
    except KeyError:
        return None


def instruction_set() -> Check:
    if platform.machine() not in ("x86_64", "AMD64"):
        return Check(
            "CPU",
            FAIL,
            f"{cpu_name()} ({platform.machine()})",
            "The kernels are written for x86-64.",
            "Use an x86-64 machine.",
        )
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    with CpuRuntime() as runtime:
        found = f"{cpu_name()}; {' '.join(runtime.describe().split())}"
        isa = runtime.isa
    if isa == "scalar":
        return Check(
            "CPU",
            WARN,
            found,
            "Without AVX2 everything runs, at a small part of the speed.",
            "In a virtual machine, pass the host's CPU through (QEMU: -cpu host).",
        )
    return Check("CPU", OK, found, f"Kernels use {isa}, the best there is here.")


def amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    from jaxmoe.ffi.cpu_runtime import supported_isas

    has = {"amx_tile", "amx_bf16"} <= cpu_flags(cpuinfo)
    if "amx" in supported_isas():
        return Check("AMX", OK, "present and permitted", "Prompts are read with its matrix units.")
    if not has:
        return Check(
            "AMX",
            OK,
            "this CPU (or its virtual machine) shows none",
            "Prompts are read with vector units, several times slower; decoding is not affected.",
        )
    return Check(
        "AMX",
        WARN,
        "present, but the kernel refuses its use",
        "Prompts are read with vector units, several times slower.",
        "Use Linux 5.16 or newer, and a container runtime whose seccomp profile allows "
        "arch_prctl(ARCH_REQ_XCOMP_PERM).",
    )


def cpu_flags(cpuinfo: Path) -> set[str]:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unnamed CPU"


def gpu() -> Check:
    asked = ask_cuda()
    smi = nvidia_smi()
    told = f"nvidia-smi: {smi}" if smi else "no nvidia-smi"
    if "missing" in asked:
        status = WARN if smi else OK
        return Check(
            "GPU",
            status,
            f"no CUDA driver library ({told})",
            "Everything runs on the CPU.",
            "Inside a container, start it with the NVIDIA runtime." if smi else "",
        )
    if asked.get("error") or "devices" not in asked:
        return Check(
            "GPU",
            WARN,
            f"the CUDA driver fails: {asked.get('error')} ({told})",
            "Everything runs on the CPU until it works.",
            "Error 803: driver and library are of different versions, reboot; 100: no device is "
            "visible; 999: reload the nvidia modules.",
        )
    version = asked["version"]
    devices = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in asked["devices"])
    found = f"CUDA {version // 1000}.{version % 1000 // 10}: {devices or 'no device'} ({told})"
    if not devices:
        return Check("GPU", OK, found, "Everything runs on the CPU.")
    plugin = gpu_plugin()
    if plugin is None:
        return Check(
            "GPU",
            WARN,
            found,
            "JAX has no CUDA plugin here, so everything runs on the CPU.",
            'Install it beside jaxmoe: pip install "jax[cuda13]".',
        )
    return Check(
        "GPU",
        OK,
        f"{found}, {plugin}",
        "All but the routed experts runs on the GPU (--device=auto), where the model's formats "
        "have kernels; the start-up report says what lies where.",
    )


def gpu_plugin() -> str | None:
    """JAX's plugin for NVIDIA GPUs and its version, if one is installed."""
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def ask_cuda() -> dict:
    """What libcuda says: {"missing"}, or {"error", "version", "devices"}."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_CUDA], capture_output=True, text=True, timeout=30
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": "no answer in 30 s"}
    except ValueError:
        return {"error": f"it ended the process that asked (code {done.returncode})"}


def nvidia_smi() -> str:
    """The driver's version, "" where there is no nvidia-smi or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"fails ({type(e).__name__})"
    lines = done.stdout.split()
    return f"driver {lines[0]}" if lines and not done.returncode else "fails"


def self_test() -> Check:
    """A small MoE layer on every kernel path against the reference (engine/self_test.py)."""
    from jaxmoe.engine import self_test

    paths = self_test.run()
    worst = max(paths, key=lambda p: p.error if p.error == p.error else float("inf"))
    wrong = [p for p in paths if not p.good]
    if wrong:
        names = ", ".join(f"{p.kernel} (error {p.error:.2g})" for p in wrong)
        return Check(
            "self-test",
            FAIL,
            f"an MoE layer comes out wrong with {names}",
            "Answers would be wrong.",
            _REBUILD + " If that does not help, test the memory, or run with a lower --isa.",
        )
    isas = ", ".join(dict.fromkeys(p.isa for p in paths))
    return Check(
        "self-test",
        OK,
        f"an MoE layer on {len(paths)} kernel paths ({isas}) is the reference's; largest error "
        f"{worst.error:.1e} of the largest value",
    )


def bandwidth() -> Check:
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    with CpuRuntime() as runtime:
        rates = sorted(runtime.read_bandwidth(1 << 30, 5))
    return Check(
        "bandwidth",
        OK,
        f"{rates[-1] / 1e9:.1f} GB/s read from memory, {rates[len(rates) // 2] / 1e9:.1f} median",
        "Decoding one sequence cannot be faster than this over the bytes a token reads.",
    )
