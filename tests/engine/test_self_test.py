"""The self-test passes on what works, and notices what does not."""

from jaxmoe.cli import doctor_software
from jaxmoe.engine import self_test
from jaxmoe.ffi.cpu_runtime import supported_isas
from jaxmoe.ffi.native_ops import NativeOps


def test_every_path_of_this_machine_is_tried():
    paths = self_test.run()
    assert all(path.good for path in paths)
    assert {path.isa for path in paths} == set(supported_isas())
    assert len(paths) == 4 * len(supported_isas())
    assert {"fp8" in path.kernel for path in paths} == {True, False}


def test_a_kernel_that_is_a_little_wrong_fails(monkeypatch):
    experts = NativeOps.experts
    monkeypatch.setattr(
        NativeOps, "experts", lambda self, *args, **more: 1.02 * experts(self, *args, **more)
    )
    monkeypatch.setattr(self_test, "supported_isas", lambda: ["scalar"])
    check = doctor_software.self_test()
    assert check.status == "fail" and "scalar" in check.found and "error 0.02" in check.found
