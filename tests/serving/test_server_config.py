"""Options of the server, and where API keys come from."""

import os

import pytest

from jaxmoe.common.errors import ConfigError
from jaxmoe.serving.server_config import ServerConfig, read_api_keys


def write(path, text, mode=0o600):
    path.write_text(text)
    os.chmod(path, mode)
    return str(path)


def test_no_key_is_needed_on_this_machine_only():
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert read_api_keys(ServerConfig(host=host), {}) == {}
    for host in ("0.0.0.0", "::", "192.168.1.4", "box.lan"):
        with pytest.raises(ConfigError, match="allow_unauthenticated"):
            read_api_keys(ServerConfig(host=host), {})
        assert read_api_keys(ServerConfig(host=host, allow_unauthenticated=True), {}) == {}
        assert read_api_keys(ServerConfig(host=host), {"JAXMOE_API_KEY": "long-enough"})


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = write(tmp_path / "keys", "# ours\nann:key-of-ann-1\n\n  key-without-name \n")
    keys = read_api_keys(
        ServerConfig(api_key_file=file), {"JAXMOE_API_KEY": "env-key-one, env-key-two"}
    )
    assert keys == {
        "ann": "key-of-ann-1",
        "key-2": "key-without-name",
        "env-1": "env-key-one",
        "env-2": "env-key-two",
    }


@pytest.mark.parametrize(
    "text, mode, words",
    [
        ("", 0o600, "holds no key"),
        ("# none\n", 0o600, "holds no key"),
        ("short\n", 0o600, "at least 8"),
        ("ann:key with spaces\n", 0o600, "without spaces"),
        ("a:key-of-ann-1\na:key-of-ann-2\n", 0o600, "twice"),
        ("ann:key-of-ann-1\n", 0o644, "chmod"),
    ],
)
def test_bad_key_files(tmp_path, text, mode, words):
    file = write(tmp_path / "keys", text, mode)
    with pytest.raises(ConfigError, match=words) as e:
        read_api_keys(ServerConfig(api_key_file=file), {})
    assert "key-of-ann" not in str(e.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_api_keys(ServerConfig(api_key_file=str(tmp_path / "none")), {})


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="port"):
        ServerConfig(port=70000)
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        ServerConfig.of({"prot": 1})
