import dataclasses

import pytest
from absl import flags as absl_flags

from jaxmoe.cli import flags
from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import rules
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.sampling_params import SamplingParams


def collect(*argv, env=None):
    values = absl_flags.FlagValues()
    flags.define(values)
    flags.parse_args(values, ["program", *argv])
    return flags.collect(values, env or {})


def test_every_field_has_a_flag_that_says_its_default():
    values = absl_flags.FlagValues()
    flags.define(values)
    options = flags.options()
    for table, cls in (("engine", EngineConfig), ("sampling", SamplingParams)):
        fields = {o.field for o in options if o.table == table}
        built = {"structured"}  # a grammar: callers build it, there is no flag
        assert fields == {f.name for f in dataclasses.fields(cls)} - built == set(rules(cls))
    assert len({o.flag for o in options}) == len(options)
    assert "seed" in values and "engine_seed" in values
    text = flags.usage(values, "doc")
    for option in options:
        assert option.flag in text and option.rule.help.split()[0] in text
    assert "(default 512)" in text and "from 0.0 to 100.0" in text
    assert "(default: the checkpoint's, else 1.0)" in text


def test_nothing_given_gives_nothing():
    assert collect() == flags.Given({}, {})


@pytest.mark.parametrize(
    "argv,engine,sampling",
    [
        (["--model=x", "--max_num_seqs=3"], {"model": "x", "max_num_seqs": 3}, {}),
        (["--temperature=0.5", "--top_k", "7"], {}, {"temperature": 0.5, "top_k": 7}),
        (["--seed=1", "--engine_seed=2"], {"seed": 2}, {"seed": 1}),
        (["--ignore_eos"], {}, {"ignore_eos": True}),
        (["--noskip_special_tokens"], {}, {"skip_special_tokens": False}),
        (["--max_tokens=none", "--isa=None"], {"isa": None}, {"max_tokens": None}),
        (["--stop=a,b", "--stop=c"], {}, {"stop": ("a,b", "c")}),
        (["--stop_token_ids=1,2", "--stop_token_ids=3"], {}, {"stop_token_ids": (1, 2, 3)}),
        (["--logit_bias=5:-100,7:2.5"], {}, {"logit_bias": {5: -100.0, 7: 2.5}}),
    ],
)
def test_values(argv, engine, sampling):
    assert collect(*argv) == flags.Given(engine, sampling)
    EngineConfig.of(engine), SamplingParams.of(sampling)


def test_precedence_is_toml_then_environment_then_flags(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        "max_num_seqs = 1\npage_size = 2\nprefill_chunk_tokens = 16\n"
        "[sampling]\ntop_k = 1\nstop = ['x']\n[engine]\nseed = 9\n"
    )
    env = {
        "JAXMOE_PAGE_SIZE": "3",
        "JAXMOE_PREFILL_CHUNK_TOKENS": "17",
        "JAXMOE_STOP": "y",
        "JAXMOE_IGNORE_EOS": "true",
        "JAXMOE_VENV": "not an option",
    }
    got = collect(f"--config={file}", "--prefill_chunk_tokens=18", env=env)
    assert got.engine == {"max_num_seqs": 1, "page_size": 3, "prefill_chunk_tokens": 18, "seed": 9}
    assert got.sampling == {"top_k": 1, "stop": ("y",), "ignore_eos": True}
    assert collect(env=env | {"JAXMOE_CONFIG": str(file)}).engine["max_num_seqs"] == 1


def test_misspelt_variables_are_named():
    env = {
        "JAXMOE_PROT": "1",
        "JAXMOE_MAX_NUM_SEQ": "1",
        "JAXMOE_SOMETHING_ELSE": "1",
        "JAXMOE_PORT": "1",
        "JAXMOE_SEED": "1",
        "JAXMOE_API_KEY": "k",
        "JAXMOE_CONFIG": "c",
        "JAXMOE_ENGINE_SEED": "1",
        "PATH": "x",
    }
    words = "\n".join(flags.unknown_variables(env))
    assert "JAXMOE_PROT is no option of jaxmoe (did you mean 'JAXMOE_PORT'?)" in words
    assert "did you mean 'JAXMOE_MAX_NUM_SEQS'" in words and "JAXMOE_SOMETHING_ELSE" in words
    assert len(words.splitlines()) == 3


@pytest.mark.parametrize(
    "argv,env,words",
    [
        (["--temprature=1"], {}, "unknown flag --temprature.*did you mean 'temperature'"),
        (["--max_num_seq=1"], {}, "did you mean 'max_num_seqs'"),
        (["--top_k"], {}, "top_k"),
        (["--top_k=x"], {}, "--top_k: got 'x', wanted a whole number from -1"),
        (["--temperature=hot"], {}, "--temperature: got 'hot', wanted a finite number"),
        (["--ignore_eos=maybe"], {}, "ignore_eos"),
        (["--logit_bias=5"], {}, "--logit_bias: got '5', wanted ID:BIAS"),
        (["--stop_token_ids=a"], {}, "--stop_token_ids: got 'a', wanted ID,ID"),
        ([], {"JAXMOE_IGNORE_EOS": "maybe"}, "JAXMOE_IGNORE_EOS: got 'maybe'"),
        ([], {"JAXMOE_TOP_K": "1.5"}, "JAXMOE_TOP_K: got '1.5'"),
    ],
)
def test_refusals(argv, env, words):
    with pytest.raises(ConfigError, match=words):
        collect(*argv, env=env)


@pytest.mark.parametrize(
    "text,words",
    [
        ("temprature = 1", "unknown option 'temprature'.*did you mean 'temperature'"),
        ("[engine]\ntemperature = 1", "unknown option 'temperature'; known: model"),
        ("engine = 3", "'engine' is 3, wanted a table"),
        ("a = ", "not valid TOML"),
    ],
)
def test_bad_toml(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        collect(f"--config={file}")
