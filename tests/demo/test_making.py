"""The steps between trained weights and the demo checkpoint: operations, names, rounding, chats."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("optax", reason="the training dependencies are not installed")

from demo import architecture, quantize, tokenizer  # noqa: E402
from demo.chats import ChatWriter  # noqa: E402
from demo.corpus import Document  # noqa: E402
from demo.dataset import Batches, Dataset, Stream, encode_chat, windows  # noqa: E402
from demo.model import TrainableDecoder, TrainingOps  # noqa: E402
from demo.training import TrainingOptions, learning_rate_at  # noqa: E402

from jaxmoe.config.model_config import ModelConfig  # noqa: E402
from jaxmoe.ffi.ops import Weight  # noqa: E402
from jaxmoe.ffi.reference import BatchedSequenceOps  # noqa: E402
from jaxmoe.text.chat_template import ChatTemplate  # noqa: E402

_VERSES = (
    "And the fox said unto the crow, Sing thou.",
    "And the crow sang, and the cheese fell.",
    "Then did the fox eat the cheese of the crow.",
    "And the crow was wroth with the fox for the cheese.",
)
_DOCUMENTS = [
    *(Document("kjv", f"Fables {i}", _VERSES, False) for i in range(1, 6)),
    *(Document("austen", f"Emma, Chapter {i}", _VERSES, False) for i in range(1, 4)),
    Document("bierce", "crow", ("CROW, n. A bird that sings before dinner.",), False),
]


@pytest.fixture(scope="module")
def random_model():
    config = ModelConfig.from_hf(architecture.hf_config())
    model = TrainableDecoder(config, jnp.float32)
    return config, {k: np.asarray(v) for k, v in model.init(3).items()}


def test_training_ops_are_the_reference():
    random = np.random.default_rng(0)
    tokens, hidden, experts = 12, 16, 4

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    layer = {
        "gate": Weight(normal(experts, 8, hidden)),
        "up": Weight(normal(experts, 8, hidden)),
        "down": Weight(normal(experts, hidden, 8)),
    }
    x, ids = normal(tokens, hidden), np.arange(tokens * 2).reshape(tokens, 2) % experts
    combine = jax.nn.softmax(normal(tokens, 2))
    q, k = normal(tokens, 3, 24), normal(tokens, 1, 24)
    trained = TrainingOps([layer], 2)
    given, wanted = (
        (
            ops.experts(x, ids, combine, 0),
            ops.attend(q, k, None, (), None, scale=0.3, v_dim=16)[0],
            ops.linear(x, Weight(layer["gate"].data[0])),
        )
        for ops in (trained, BatchedSequenceOps([layer], 2))
    )
    for mine, want in zip(given, wanted, strict=True):
        bound = 1e-5 * float(np.abs(want).max())
        np.testing.assert_allclose(mine, want, rtol=0, atol=bound)
    np.testing.assert_array_equal(trained.loads[0], np.bincount(ids.reshape(-1)))


def test_names_are_a_bijection(random_model):
    config, params = random_model
    tensors = architecture.to_tensors(params, config)
    assert len(tensors) == 1 + 2 + 5 * (2 + 7) + 3 + 4 * (2 + 3 + 16 * 3)
    back = architecture.from_tensors(tensors, config)
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_fp8_is_within_half_a_step_of_each_block(random_model):
    config, params = random_model
    tensors = architecture.to_tensors(params, config)
    stored = quantize.store_fp8(tensors)
    loaded = quantize.load(stored)
    assert loaded.keys() == tensors.keys()
    for name, data in tensors.items():
        if stored[name].dtype == ml_dtypes.float8_e4m3fn:
            # Half a unit in the last of 4 significant bits, and half the smallest subnormal.
            bound = np.abs(data) * 2.0**-4 + np.abs(data).max() / 448 * 2.0**-10
        else:
            bound = np.abs(data) * 2.0**-8
        assert (np.abs(loaded[name] - data) <= bound * 1.001).all(), name
    codes = stored["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert stored["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    assert np.abs(codes[:128, :128].astype(np.float32)).max() == 448.0


def test_a_block_of_zeros_stays_zero():
    stored = quantize.store_fp8({"x_proj.weight": np.zeros((128, 256), np.float32)})
    assert stored["x_proj.weight_scale_inv"].tolist() == [[1.0, 1.0]]
    assert not quantize.load(stored)["x_proj.weight"].any()


def test_the_decoder_is_causal_and_trainable():
    config = ModelConfig.from_hf(architecture.hf_config() | {"num_hidden_layers": 2})
    model = TrainableDecoder(config, jnp.float32)
    tokens = jnp.arange(24).reshape(2, 12)

    @jax.jit
    def run(params, tokens):
        def loss(params):
            logits, loads = model(params, tokens)
            return jnp.mean(jax.nn.logsumexp(logits, -1)), (logits, loads)

        return jax.grad(loss, has_aux=True)(params)

    params = model.init(3)
    grads, (logits, loads) = run(params, tokens)
    assert loads.sum(1).tolist() == [2 * 12 * 4]
    _, (changed, _) = run(params, tokens.at[:, 8:].add(50))
    np.testing.assert_allclose(changed[:, :8], logits[:, :8], rtol=0, atol=1e-5)
    assert float(jnp.abs(changed[:, 8:] - logits[:, 8:]).max()) > 1e-3
    without = {name for name, grad in grads.items() if not np.abs(grad).max() > 0}
    assert without == set(model.router_biases)  # moved by the load, not by the loss


def test_chats_are_seeded_and_quote_only_their_documents():
    first = [ChatWriter(_DOCUMENTS, 7).chat() for _ in range(1)]
    writers = [ChatWriter(_DOCUMENTS, 7), ChatWriter(_DOCUMENTS, 7)]
    chats = [[w.chat() for _ in range(60)] for w in writers]
    assert chats[0] == chats[1] and chats[0][0] == first[0]
    text = " ".join(" ".join(d.paragraphs) for d in _DOCUMENTS)
    for chat in chats[0]:
        roles = [role for role, _ in chat if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for role, content in chat:
            if role == "assistant" and "demonstration model" not in content:
                assert " ".join(content.split()) in text


def test_chat_tokens_are_the_chat_templates(tmp_path):
    trained = tokenizer.train_tokenizer(d.text for d in _DOCUMENTS)
    tokenizer.write_tokenizer(trained, tmp_path, 64)
    template = ChatTemplate.from_dir(tmp_path)
    assert template is not None
    chat = [("system", "Be brief."), ("user", "Crow?"), ("assistant", "CROW, n."), ("user", "é")]
    messages = [{"role": role, "content": content} for role, content in chat]
    rendered = template.render(messages, add_generation_prompt=False)
    tokens, learn = encode_chat(chat, trained)
    assert tokens == trained.encode(rendered, add_special_tokens=False).ids
    learnt = trained.decode([t for t, m in zip(tokens, learn, strict=True) if m], False)
    assert learnt == "CROW, n.<|eos|>"
    assert template.render(messages).endswith("é<|assistant|>")


def test_batches_and_windows_predict_every_token():
    documents = [([0, *range(10 * i, 10 * i + 7), 1], [False] + [True] * 8) for i in range(1, 5)]
    stream = Stream.of(documents)
    seen = [
        token
        for tokens, counted in windows(stream, 5, 3)
        for row, mask in zip(tokens, counted, strict=True)
        for token in row[1:][mask]
    ]
    assert seen == [t for tokens, _ in documents for t in tokens[1:]]

    batches = Batches(Dataset(stream, stream, {}, {}), 2, 0)
    assert batches.tokens_per_epoch == 36 + 18
    tokens, learn = batches.next(4, 6)
    assert (tokens[1:, 0] == tokens[:-1, -1]).all() and learn.shape == (4, 6)
    assert (learn == (tokens[:, 1:] != 0)).all()


def test_learning_rate_warms_up_and_falls():
    options = TrainingOptions(warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(i, 100, options) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.03
