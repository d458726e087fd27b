"""The interface fuzzed by its own description: no 500, no hang, every answer as described."""

import os
import subprocess
import sys

import pytest
from support.front import serving_in_thread

pytest.importorskip("schemathesis", reason="pip install .[serve_test]")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,negative_data_rejection"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_endpoint(tmp_path):
    examples = os.environ.get("JAXMOE_FUZZ_EXAMPLES", "150")
    with serving_in_thread(lambda prompt: b"an answer", allowed_hosts="*") as url:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
                *("--max-examples", examples, "--checks", CHECKS, "--request-timeout", "10"),
                *("--phases", "examples,coverage,fuzzing", "--seed", "1"),
                *("--suppress-health-check", "all", "--max-failures", "20"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    print(done.stdout[-20000:], done.stderr[-2000:])
    assert done.returncode == 0
