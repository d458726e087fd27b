"""jaxmoe_doctor: this machine, and machines laid out in files."""

import json
import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from jaxmoe.cli import doctor, doctor_machine, doctor_software
from jaxmoe.cli.doctor_check import FAIL, OK, WARN, Check, guarded
from jaxmoe.weights.memory import Room

Usage = namedtuple("Usage", "total used free")


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_this_machine_for_people_and_for_programs(tmp_path, capsys):
    argv = ["jaxmoe_doctor", f"--cache_dir={tmp_path}"]
    assert doctor.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in told["checks"]]
    wanted = "Python jax extension CPU AMX cores NUMA memory overcommit limits disk GPU".split()
    assert told["ok"] and set(wanted) <= set(names)
    assert all(set(c) == {"name", "status", "found", "meaning", "action"} for c in told["checks"])
    assert all(c["action"] for c in told["checks"] if c["status"] != OK)
    assert not any("could not be checked" in c["found"] for c in told["checks"])
    assert doctor.main(argv) == 0
    out = capsys.readouterr().out
    assert all(any(line[6:].startswith(n) for line in out.splitlines()) for n in names)
    assert max(map(len, out.splitlines())) <= 100


def test_a_failed_check_is_exit_code_1(monkeypatch, capsys):
    failing = Check("memory", FAIL, "none", "no model fits", "buy some")
    monkeypatch.setattr(doctor_machine, "memory", lambda: failing)
    assert doctor.main(["jaxmoe_doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  memory" in out and "do: buy some" in out
    assert doctor.main(["jaxmoe_doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("argv", [["--jsno"], ["stray"], ["--json=5"]])
def test_bad_command_lines(argv, capsys):
    assert doctor.main(["jaxmoe_doctor", *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxmoe_doctor: error: ") and err.count("\n") == 1


def test_a_check_that_breaks_does_not_take_the_others_with_it():
    def breaks():
        raise KeyError("odd machine")

    check = guarded("x", breaks)
    assert check.status == WARN and "odd machine" in check.found


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "3:cpu:/c\n"}, None),
    ],
)
def test_cpu_quota_of_both_versions(tmp_path, files, quota):
    assert doctor_machine.cpu_quota(lay_out(tmp_path, files)) == quota


def test_cores(monkeypatch):
    monkeypatch.setattr(doctor_machine, "cpu_quota", lambda: 0.5)
    assert doctor_machine.cores().status == WARN and "pays for 0.5" in doctor_machine.cores().found
    monkeypatch.setattr(doctor_machine, "cpu_quota", lambda: None)
    assert doctor_machine.cores().status == OK


def test_numa(tmp_path):
    folder = "sys/devices/system/node"
    one = {f"{folder}/node0/cpulist": "0-3\n"}
    one[f"{folder}/node0/meminfo"] = "Node 0 MemTotal:       2097152 kB\n"
    check = doctor_machine.numa(lay_out(tmp_path, one))
    assert check.found == "node0: CPUs 0-3, 2.00 GiB" and "One node" in check.meaning
    two = {name.replace("node0", "node1"): text for name, text in one.items()}
    check = doctor_machine.numa(lay_out(tmp_path, two))
    assert check.found.count("GiB") == 2 and "split over the nodes" in check.meaning


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always [madvise] never", OK),
        ("[always] madvise never", OK),
        ("always madvise [never]", WARN),
    ],
)
def test_huge_pages(tmp_path, text, status):
    assert doctor_machine.huge_pages(tmp_path).status == WARN
    files = {"sys/kernel/mm/transparent_hugepage/enabled": text + "\n"}
    assert doctor_machine.huge_pages(lay_out(tmp_path, files)).status == status


@pytest.mark.parametrize(
    ("free", "status", "words"),
    [
        ([64, 70], OK, "may take 64.00 GiB"),
        ([64, 8], WARN, "control group, not the machine"),
        ([64, 0.5], FAIL, "Even the demo"),
        ([0.1], FAIL, "Even the demo"),
    ],
)
def test_memory(monkeypatch, free, status, words):
    rooms = [Room(int(g * 2**30), f"source {i}") for i, g in enumerate(free)]
    monkeypatch.setattr(doctor_machine.memory_facts, "rooms", lambda root: rooms)
    check = doctor_machine.memory()
    assert check.status == status and words in check.meaning


def test_strict_overcommit_and_no_shared_memory(tmp_path):
    lay_out(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    assert doctor_machine.overcommit(tmp_path).status == WARN
    assert doctor_machine.shared_memory(tmp_path).status == WARN


def test_limits(monkeypatch):
    unlimited = doctor_machine.resource.RLIM_INFINITY
    for files, space, status in (
        (256, unlimited, WARN),
        (4096, 2**34, WARN),
        (4096, unlimited, OK),
    ):
        given = {
            doctor_machine.resource.RLIMIT_NOFILE: (files, files),
            doctor_machine.resource.RLIMIT_AS: (space, space),
        }
        monkeypatch.setattr(doctor_machine.resource, "getrlimit", given.__getitem__)
        assert doctor_machine.limits().status == status


def test_disk(tmp_path, monkeypatch):
    assert doctor_machine.disk("").status == WARN
    assert doctor_machine.disk(str(tmp_path / "new" / "folder")).status == OK
    (tmp_path / "file").touch()
    assert "cannot be written" in doctor_machine.disk(str(tmp_path / "file" / "x")).found
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda p: Usage(1, 1, 5 << 20))
    assert doctor_machine.disk(str(tmp_path)).status == WARN


def test_amx_that_the_kernel_refuses(tmp_path, monkeypatch):
    import jaxmoe.ffi.cpu_runtime as runtime

    monkeypatch.setattr(runtime, "supported_isas", lambda: ["scalar", "avx2", "avx512"])
    file = tmp_path / "cpuinfo"
    file.write_text("model name : A\nflags\t\t: sse avx2 amx_tile amx_bf16\n")
    assert doctor_software.amx(file).status == WARN and doctor_software.cpu_name(file) == "A"
    file.write_text("flags\t\t: sse avx2\n")
    assert doctor_software.amx(file).status == OK
    monkeypatch.setattr(runtime, "supported_isas", lambda: ["scalar", "amx"])
    assert "permitted" in doctor_software.amx(file).found


H100 = {"error": 0, "version": 12080, "devices": [["H100", 80 << 30]]}


@pytest.mark.parametrize(
    ("asked", "smi", "plugin", "status", "words", "meaning"),
    [
        ({"missing": "a"}, "", None, OK, "driver library (no nvidia-smi)", "runs on the CPU."),
        ({"missing": "a"}, "driver 570.1", None, WARN, "no CUDA driver library", "on the CPU."),
        ({"error": 803}, "", None, WARN, "fails: 803", "until it works"),
        ({"error": "no answer in 30 s"}, "", None, WARN, "no answer", "until it works"),
        (H100 | {"devices": []}, "", "p 1", OK, "12.8: no device", "runs on the CPU."),
        (H100, "driver 570.1", None, WARN, "(nvidia-smi: driver 570.1)", "no CUDA plugin"),
        (H100, "driver 570.1", "p 1", OK, "CUDA 12.8: H100 80.0 GiB", "experts runs on the GPU"),
    ],
)
def test_gpu(monkeypatch, asked, smi, plugin, status, words, meaning):
    monkeypatch.setattr(doctor_software, "ask_cuda", lambda: asked)
    monkeypatch.setattr(doctor_software, "nvidia_smi", lambda: smi)
    monkeypatch.setattr(doctor_software, "gpu_plugin", lambda: plugin)
    check = doctor_software.gpu()
    assert check.status == status and words in check.found and meaning in check.meaning


def test_a_driver_that_crashes_or_hangs_is_reported(monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(doctor_software, "_ASK_CUDA", crash)
    assert "ended the process that asked (code -11)" in doctor_software.ask_cuda()["error"]

    def hang(*args, **kw):
        raise subprocess.TimeoutExpired(args, 30)

    monkeypatch.setattr(doctor_software.subprocess, "run", hang)
    assert doctor_software.ask_cuda() == {"error": "no answer in 30 s"}


def test_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_software.nvidia_smi() == ""
    program = tmp_path / "nvidia-smi"
    for body, wanted in (("echo 570.86.10", "driver 570.86.10"), ("exit 9", "fails")):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        assert doctor_software.nvidia_smi() == wanted


def test_an_extension_that_does_not_load_fails_the_check():
    code = (
        "import sys; sys.modules['jaxmoe.ffi._native'] = None\n"
        "from jaxmoe.cli import doctor\n"
        "sys.exit(doctor.main(['jaxmoe_doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 1 and "fail  extension" in done.stdout, done.stderr
    assert "Install jaxmoe again" in done.stdout and "ok    Python" in done.stdout
