"""Labels written as text: masks, loss and one-shot sampling against one packed sequence in NumPy, scores by hand."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf
from small import SIZES, die_after_saving
from test_layer_kinds import noisy
from trained import leave_run, make_pictures

from tosa_jax import predict
from tosa_jax.config import default_config, make_run_config
from tosa_jax.data.builders.several_items import _WORDS as WORDS
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.distributed.mesh import MeshConfig, make_mesh, to_global, tree_shardings
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.errors import ConfigError, WeightsError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.factory import build, structure
from tosa_jax.models.optim import make_optimizer
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.vit import Output
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.tasks import create_model
from tosa_jax.tasks.next_token.network import vocabulary_of
from tosa_jax.tasks.next_token.task import NextToken, NextTokenOptions
from tosa_jax.tasks.next_token.vocabulary import END, Vocabulary, shifted
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.loop import train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages
from tosa_jax.train.step import StepSetup, init_state, train_step

MODEL = {k: v for k, v in SIZES.items() if k != "num_classes"} | {
    "image_size": 16, "patch_size": 4, "depth": 2, "labels": WORDS, "branches": 6,
    "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, "plan": "selective",
}  # fmt: skip
NAMES = Vocabulary(WORDS)
TASK = NextToken(vocabulary=NAMES, mean=(0.3,), std=(0.4,))


@functools.cache
def model():
    made = noisy(create_model("vit", task="next_token", rngs=nnx.Rngs(0), **MODEL))
    decoder = made.text_decoder
    # What a branch writes depends on its tokens: some reach their end, others do not.
    decoder.embedding[...] = decoder.embedding[...] * 30
    decoder.head.bias[...] = decoder.head.bias[...].at[END].add(1.5)
    return made


@functools.cache
def compiled():
    graphdef, _ = split(model())
    return jax.jit(lambda p, x, text: set_params(graphdef, p)(x, text))


def images(count=3):
    return jax.random.normal(jax.random.key(5), (count, 16, 16, 1))


def some_text(labels):
    """What the decoder reads to write some labels, [1 m t]."""
    return shifted(jnp.asarray(NAMES.table)[jnp.asarray(labels)][None])


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def packed(tokens, texts, weights=None):
    """Logits [m t v] as published: one sequence of the image's tokens [n e] and all labels [m t], and one mask."""
    params = {k: np.asarray(v, np.float64) for k, v in get_params(model()).items()}
    params = {k.removeprefix("text_decoder/"): v for k, v in params.items() if "decoder" in k}
    texts = np.asarray(texts)
    m, t = texts.shape
    n = len(tokens)

    def linear(name, x):
        return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * params[f"{name}/scale"] + params[f"{name}/bias"]

    written = params["embedding"][texts] + params["pos_embed"][None, :t]
    x = np.concatenate([linear("project", tokens), written.reshape(m * t, -1)])
    sees = np.zeros((len(x), len(x)), bool)
    sees[:, :n] = True
    for label in range(m):
        start = n + label * t
        for i in range(t):
            sees[start + i, start : start + i + 1] = True
    for i in range(2):
        qkv = linear(f"blocks/{i}/attn/qkv", norm(f"blocks/{i}/norm1", x)).reshape(-1, 3, 2, 8)
        q, k, v = qkv.transpose(1, 2, 0, 3)
        logits = np.where(sees, q @ k.transpose(0, 2, 1) / np.sqrt(8), -np.inf)
        mixed = (softmax(logits) @ v).transpose(1, 0, 2).reshape(len(x), -1)
        x = x + linear(f"blocks/{i}/attn/proj", mixed)
        hidden = linear(f"blocks/{i}/mlp/fc1", norm(f"blocks/{i}/norm2", x))
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + linear(f"blocks/{i}/mlp/fc2", hidden)
    return linear("head", norm("norm", x[n:])).reshape(m, t, -1)


def test_first_tokens_differ_and_tokens_spell_the_labels():
    names = Vocabulary(("boots", "boot", "Sandal", "red  boot", "red hat "))
    assert [[names.tokens[i] for i in row if i] for row in names.table] == [
        ["boots"], ["boot"], ["S", "andal"], ["red  ", "boot"], ["red h", "at", " "]
    ]  # fmt: skip
    assert [names.text(row) for row in names.table] == list(names.labels)
    assert [row.sum() for row in names.written] == [2, 2, 3, 3, 4]
    assert names.text([1, 2, 3]) is None
    assert Vocabulary(names.labels[::-1]).tokens == names.tokens


@pytest.mark.parametrize(
    ("labels", "message"),
    [((), "labels is empty: set config.model.labels"), (("a", ""), "without a name"), (("a", "b", "a"), "'a' twice")],
)  # fmt: skip
def test_labels_without_names_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        Vocabulary(labels)


def test_a_label_sees_neither_another_label_nor_what_comes_after():
    """Changed labels leave the others' logits alone, and labels in another order give logits in that order."""
    x = images(1)
    whole = np.asarray(compiled()(get_params(model()), x, some_text([7, 3, 0])).predictions["next"])
    moved = compiled()(get_params(model()), x, some_text([7, 5, 0])).predictions["next"]
    np.testing.assert_array_equal(moved[0, [0, 2]], whole[0, [0, 2]])
    assert np.abs(moved[0, 1] - whole[0, 1]).max() > 1e-3
    turned = compiled()(get_params(model()), x, some_text([0, 7, 3])).predictions["next"]
    np.testing.assert_allclose(turned[0], whole[0, [2, 0, 1]], atol=1e-5)
    text = some_text([7, 3, 0])
    later = compiled()(get_params(model()), x, text.at[0, 0, 2].set(1)).predictions["next"]
    np.testing.assert_allclose(later[0, 0, :2], whole[0, 0, :2], atol=1e-6)
    assert np.abs(later[0, 0, 2:] - whole[0, 0, 2:]).max() > 1e-3


def test_the_loss_is_that_of_one_packed_sequence():
    labels = np.zeros((3, 10), np.uint8)
    labels[0, [1, 4, 7]] = 1
    labels[1, 2] = 1
    pixels = jax.random.randint(jax.random.key(6), (3, 16, 16, 1), 0, 256).astype(jnp.uint8)
    task = NextToken(
        vocabulary=NAMES, choices=NextTokenOptions(labels_per_image=3), mean=(0.3,), std=(0.4,)
    )
    batch = task.training_batch({"image": pixels, "labels": labels}, jax.random.key(7))
    out = compiled()(get_params(model()), batch["image"], batch["read"])
    found = np.asarray(task.loss(out, batch))
    totals, counts = np.zeros(3), np.zeros(3)
    for i in range(2):
        own = np.flatnonzero(labels[i])
        rows = [[*NAMES.table[j][NAMES.written[j]]] for j in own]
        read = np.array([[END, *row[:-1], *[END] * (NAMES.length - len(row))] for row in rows])
        shares = np.log(softmax(packed(np.asarray(out.tokens[i], np.float64), read)))
        for row, share in zip(rows, shares, strict=True):
            totals[i] -= sum(share[place, token] for place, token in enumerate(row))
            counts[i] += len(row)
    np.testing.assert_allclose(found.mean(), totals.sum() / counts.sum(), rtol=1e-5)
    np.testing.assert_allclose(found, 3 * totals / counts.sum(), rtol=1e-5)


def test_of_more_labels_random_ones_are_learnt():
    labels = np.zeros((40, 10), np.uint8)
    labels[:, [1, 4, 7]] = 1
    task = NextToken(
        vocabulary=NAMES, choices=NextTokenOptions(labels_per_image=2), mean=(0.3,), std=(0.4,)
    )
    pixels = jnp.zeros((40, 16, 16, 1), jnp.uint8)
    batch = task.training_batch({"image": pixels, "labels": labels}, jax.random.key(0))
    pairs = [{NAMES.text(row) for row in rows} for rows in np.asarray(batch["write"])]
    assert {frozenset(pair) for pair in pairs} == {
        frozenset({WORDS[i], WORDS[j]}) for i, j in ((1, 4), (1, 7), (4, 7))
    }
    assert (batch["counts"].sum(axis=2) >= 2).all()


def test_one_shot_sampling_is_greedy_decoding_of_each_first_token():
    graphdef, params = split(model())
    x = images(2)
    out = jax.jit(lambda p, x: set_params(graphdef, p)(x))(params, x)
    texts, shares = (np.asarray(out.predictions[name]) for name in ("text", "probability"))
    assert 0 < (shares > 0).sum() < shares.size
    for i in range(2):
        tokens = np.asarray(out.tokens[i], np.float64)
        first = softmax(packed(tokens, [[END]])[0, 0])
        wanted = {}
        for begin in np.argsort(-first[1:])[:6] + 1:
            row, share = [int(begin)], first[begin]
            while row[-1] != END and len(row) < NAMES.length:
                after = softmax(packed(tokens, [[END, *row]])[0, -1])
                row.append(int(after.argmax()))
                share *= after.max()
            ended = row[-1] == END
            wanted[tuple(row + [END] * (NAMES.length - len(row)))] = share if ended else 0.0
        assert {tuple(row) for row in texts[i].tolist()} == wanted.keys()
        np.testing.assert_allclose(shares[i], sorted(wanted.values(), reverse=True), rtol=1e-4)
        found = dict(zip(map(tuple, texts[i].tolist()), shares[i], strict=True))
        for row, share in wanted.items():
            np.testing.assert_allclose(found[row], share, rtol=1e-4)


def test_weights_of_the_decoder_start_by_their_width():
    sizes = MODEL | {"decoder_dim": 64, "decoder_heads": 4}
    decoder = create_model("vit", task="next_token", rngs=nnx.Rngs(0), **sizes).text_decoder
    kernels = {k: np.asarray(v) for k, v in get_params(decoder).items() if k.endswith("kernel")}
    assert len(kernels) == 2 + 2 * 4
    for name, kernel in kernels.items():
        np.testing.assert_allclose(kernel.std(), len(kernel) ** -0.5, rtol=0.1, err_msg=name)
    np.testing.assert_allclose(np.asarray(decoder.embedding[...]).std(), 0.02, rtol=0.1)


def test_a_merged_token_counts_as_often_as_those_it_stands_for():
    graphdef, params = split(model().text_decoder)

    @jax.jit
    def read(params, tokens, weights):
        decoder = set_params(graphdef, params)
        return decoder.logits(some_text([7, 3]), decoder.read_image(tokens, weights))

    tokens = jax.random.normal(jax.random.key(1), (1, 4, 16))
    weighted = read(params, tokens, jnp.array([[3.0, 1, 1, 0]]))
    repeated = read(params, tokens[:, jnp.array([0, 0, 0, 1, 2])], None)
    np.testing.assert_allclose(weighted, repeated, atol=1e-4)
    assert model().text_decoder.macs(4, 6) == (
        4 * 16 * 16 + 2 * (12 * 4 * 256 + 2 * 16 * 16)  # the image's tokens
        + 2 * (12 * 256 + 2 * 5 * 16) + 16 * NAMES.size  # the start
        + 2 * (2 * 6 * (12 * 256 + 2 * (5 + 2 * 6) * 16) + 6 * 16 * NAMES.size)
    )  # fmt: skip


def test_scores_are_counted_by_hand():
    """A text that two branches spell counts once, a text that ends late or spells no label is no hit."""
    names = Vocabulary(("do", "dog", "bg"))
    assert names.tokens == ("", "b", "do", "dog", "g")
    task = NextToken(vocabulary=names, mean=(0.3,), std=(0.4,))
    do, dog, dog_again, bag, bad, late = [2, 0, 0], [3, 0, 0], [2, 4, 0], [1, 4, 0], [1, 0, 0], [1, 4, 4]  # fmt: skip
    text = jnp.array(
        [[dog, dog_again, bag, bad, late], [bag, do, bad, dog, late], [do, dog, bag, late, late]]
    )
    share = jnp.array([[0.4, 0.3, 0.25, 0.2, 0], [0.5, 0.2, 0.1, 0.1, 0], [0.3, 0.2, 0.1, 0, 0]])
    labels = jnp.array([[0, 1, 1], [1, 0, 0], [1, 1, 1]], jnp.uint8)
    out = Output({"text": text, "probability": share}, None, (), {})
    found = jax.jit(lambda out: task.metrics(out, {"labels": labels}))(out)
    # Seven tenths are .595 of .85, in {dog, bag}; .63 of .9, in {bag, do}; and .42 of .6, in {do, dog}.
    wanted = {
        "f1": [1, 2 / 3, 0.8], "recall": [1, 1, 2 / 3], "precision": [1, 0.5, 1],
        "r_precision": [1, 0, 1],
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    guesses = task.guesses(np.asarray(text[0]), np.asarray(share[0]))
    assert [(g.label, g.name) for g in guesses] == [(1, "dog"), (2, "bg"), (None, "b")]


SHALLOW = {"depth": 1, "plan": "standard", "decoder_depth": 1}


def run_of(data_dir, **fields):
    config = default_config(task="next_token")
    config.update(batch_size=16, log_steps=2)
    config.model.update(MODEL | {"dtype": "bfloat16"})
    config.data.update(name="several_digits/16-4-64-40", data_dir=data_dir, in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.eval.update(batch_size=40, figure_images=2)
    config.pretrain.update(steps=4, checkpoint_steps=2, learning_rate=3e-3)
    for name, value in fields.items():
        config[name].update(value)
    return make_run_config(config)


def test_a_run_resumes_exactly_and_is_scored(tmp_path, monkeypatch, one_device):
    runner = Runner(run_of(str(tmp_path), model=SHALLOW), tmp_path, StopRequest())
    stage_run = runner.stage_run(plan_stages(runner.run)[0][0])

    def train(folder, die=False):
        with Checkpoints(folder, "f1") as checkpoints, MetricWriter(folder) as writer:
            if die:
                die_after_saving(checkpoints, 2, monkeypatch)
            found = train_stage(
                stage_run, runner.run, runner.mesh, checkpoints, writer, StopRequest()
            )
            return jax.device_get(found[0]), found[1]

    straight, facts = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", die=True)
    resumed, _ = train(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert facts["after"].keys() == {"f1", "recall", "precision", "r_precision"}
    assert 0 <= min(facts["after"].values()) and max(facts["after"].values()) <= 1


def test_a_mesh_and_parts_of_a_batch_change_nothing():
    config = run_of("unused", model=SHALLOW | {"dtype": "float32"}).model
    graphdef, params = structure(config)
    params = get_params(build(config, rngs=nnx.Rngs(0)))
    optim = run_of("unused").pretrain.optim(4, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 1), np.uint8)
    labels = (np.random.default_rng(1).random((16, 10)) < 0.3).astype(np.uint8)
    assert labels.sum(axis=1).max() <= TASK.choices.labels_per_image
    batch = {"image": pixels, "labels": labels}
    devices = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    setup = StepSetup(
        graphdef, TASK, make_optimizer(optim), lambda step: 0.0, 0.0, 0, 0, accumulate=2
    )
    state = init_state(setup, jax.tree.map(np.asarray, params), {})
    state = jax.device_put(state, tree_shardings(state, devices))
    step = jax.jit(functools.partial(train_step, setup=setup, mesh=devices))
    new, metrics = step(state, to_global(batch, devices))
    kernel = new.params["text_decoder/blocks/0/attn/qkv/kernel"]
    assert kernel.sharding.shard_shape((16, 48)) == (8, 24)

    @jax.jit
    def whole(params, batch):
        # All labels take part, so that no draw matters.
        rows = TASK.training_batch(batch, jax.random.key(1))
        out = set_params(graphdef, params)(rows["image"], rows["read"])
        return TASK.loss(out, rows).mean()

    np.testing.assert_allclose(metrics["loss"], whole(params, batch), rtol=1e-5)


def test_predict_prints_texts_and_an_exported_file_writes_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    run = run_of("unused", model={"dtype": "float32"})
    network = build(run.model, rngs=nnx.Rngs(0))
    leave_run(tmp_path / "run", run, WORDS, set_params(split(network)[0], get_params(model())))
    folder = str(make_pictures(tmp_path / "in", 2)[0].parent)
    argv = [f"--workdir={tmp_path / 'run'}", folder, f"--export={tmp_path / 'a.safetensors'}"]
    assert predict.main([*argv, "--json", "--top=4"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    own = Predictor.from_weights(tmp_path / "a.safetensors", batch_sizes=(2,))
    paths = sorted((tmp_path / "in").iterdir())
    out = own(np.stack([own.prepare(path) for path in paths]))
    for record, texts, shares in zip(records, *out.predictions.values(), strict=True):
        parts = dict(zip(out.predictions, (texts, shares), strict=True))
        wanted = own.task.guesses(parts["text"], parts["probability"])[:4]
        assert [(x["class"], x["name"]) for x in record["top"]] == [g[:2] for g in wanted]
        assert record["top"]
    assert predict.main([f"--weights={tmp_path / 'a.safetensors'}", str(paths[0])]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    guesses = own.task.guesses(*(out.predictions[name][0] for name in ("text", "probability")))
    together = np.cumsum([guess.probability for guess in guesses])
    assert len(lines) == 1 + (together < 0.7 * together[-1]).sum() < len(guesses)
    assert all(line.split() == [*g.name.split(), f"{g.probability:.1%}"]
               for line, g in zip(lines, guesses, strict=False))  # fmt: skip


def test_weights_state_their_labels_and_a_backbone_moves_between_tasks(tmp_path):
    save_weights(model(), tmp_path / "a.safetensors")
    turned = create_model("vit", task="next_token", **MODEL | {"labels": WORDS[::-1]})
    with pytest.raises(WeightsError, match="pass labels="):
        load_pretrained(turned, tmp_path / "a.safetensors", on_message=lambda line: None)
    said = []
    sizes = {k: v for k, v in MODEL.items() if k in SIZES}
    classifier = create_model("vit", num_classes=3, **sizes)
    load_pretrained(classifier, tmp_path / "a.safetensors", on_message=said.append)
    kernel = "blocks/1/mlp/fc1/kernel"
    assert (get_params(classifier)[kernel] == get_params(model())[kernel]).all()
    assert any("its text_decoder is not used" in line for line in said)
    save_weights(classifier, tmp_path / "b.safetensors")
    load_pretrained(turned, tmp_path / "b.safetensors", on_message=said.append)
    assert "the text_decoder stays as the model has it, untrained" in said[-1]


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [("model", {"labels": ()}, "labels is empty: set"),
     ("model", {"branches": 60}, "branches=60 is more than the 19 tokens"),
     ("model", {"decoder_heads": 3}, "decoder_heads=3 does not divide decoder_dim=16"),
     ("task", {"top_p": 0.0}, "top_p=0.0 is not in"),
     ("pretrain", {"mixup": 0.8}, "config.pretrain.mixup is for classification: 'next_token'")],
)  # fmt: skip
def test_bad_fields_are_one_line(section, fields, message):
    with pytest.raises(ConfigError, match=message):
        run_of("unused", **{section: fields})


def test_labels_of_other_data_are_refused(tmp_path):
    run = run_of(str(tmp_path), model={"labels": WORDS[::-1]})
    facts = open_dataset(run.data).facts
    with pytest.raises(ConfigError, match="config.model.labels=.*'nine', 'eight'.* set it to them"):
        NextToken.check_dataset(run, facts)
    with pytest.raises(ConfigError, match="has no sets of labels: name another set, or a recipe"):
        NextToken.check_dataset(run, facts.__class__(1, 1, 10, WORDS, "classification"))
    assert vocabulary_of(WORDS) is vocabulary_of(WORDS)
