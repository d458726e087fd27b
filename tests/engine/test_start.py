"""What a checkpoint directory says about itself, before a weight is read."""

import json

import pytest
from support import tiny_models

from jaxmoe.common.errors import CheckpointError
from jaxmoe.engine.directory import read_directory


def write(path, **generation):
    (path / "config.json").write_text(json.dumps(tiny_models.hf_config("qwen3_moe")))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_end_of_text_ids_beyond_the_vocabulary_are_left_out_and_noted(tmp_path):
    directory = read_directory(write(tmp_path, eos_token_id=[3, 2**40, 5]))
    assert directory.eos_token_ids == (3, 5)
    assert any("1099511627776" in note for note in directory.notes)
    directory = read_directory(write(tmp_path, eos_token_id=[3, 5]))
    assert not any("end-of-text" in note for note in directory.notes)


def test_more_end_of_text_ids_than_a_step_can_ban_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="eos_token_id has 129 ids, wanted at most 128"):
        read_directory(write(tmp_path, eos_token_id=list(range(129))))


def test_an_unfinished_conversion_is_told_from_a_missing_config(tmp_path):
    (tmp_path / "jaxmoe_unfinished.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not finished; run jaxmoe_convert"):
        read_directory(tmp_path)


def test_a_config_file_alone_is_for_random_weights(tmp_path):
    file = write(tmp_path, eos_token_id=[3]) / "config.json"
    assert read_directory(file, dummy=True).eos_token_ids == (3,)
    with pytest.raises(CheckpointError, match="is not a directory; .*load_format=dummy"):
        read_directory(file)
