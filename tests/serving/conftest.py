"""One real server process for all tests that only ask it things."""

import pytest
from support.serve_process import demo_with_tools, serve


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    folder = demo_with_tools(tmp_path_factory.mktemp("serve") / "jaxmoe-demo")
    with serve(f"--model={folder}") as server:
        yield server
