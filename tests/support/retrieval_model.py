"""A model made by hand, of which it is known which layers retrieve what is far away.

Six layers without feed-forward blocks. Content is one-hot in blocks of the residual stream; heads
match the block of one token with that of another, whatever their distance (RoPE's base is so large
that the dimensions used hardly turn). What matches nothing attends to the first token.

    layer       0      1            2            3, 4                5
    does        idle   retrieves    retrieves    decoys: look far,   idle
                                                 to no effect
    KV head            1            0            both

A sample is ``BOS filler needles filler QUESTION`` and an answer token. Two kinds of model:

    "halves"    the answer is a pair; layer 1 finds one half of it, layer 2 the other, each by the
                question. With one of both layers full half of the answer is known.
    "chain"     layer 1 finds, by the question, what layer 2 then looks for. One alone is of no use.
"""

import dataclasses

import numpy as np

from swaa_jax.data import Sample
from swaa_jax.models import CausalLM, model_from_config

RETRIEVING = (1, 2)
RETRIEVING_HEADS = {1: (1,), 2: (0,)}
DECOYS = (3, 4)
NUM_LAYERS = 6
SIZE = 4  # of a one-hot block
HEAD_DIM = 16
_BLOCKS = ("key1", "value1", "key2", "value2", "ask", "ask2", "out1", "out2", "junk")
BASE, BOS_MARK, FIRST = 0, 1, 2
WIDTH = FIRST + SIZE * len(_BLOCKS) + 2
# Token ids.
BOS, FILLER, NEEDLE1, NEEDLE2, QUESTION, ANSWER = 0, 1, 9, 25, 41, 45
VOCAB = ANSWER + SIZE * SIZE


def _block(name: str) -> slice:
    start = FIRST + SIZE * _BLOCKS.index(name)
    return slice(start, start + SIZE)


def _embedding() -> np.ndarray:
    table = np.zeros((VOCAB, WIDTH), np.float32)
    table[:, BASE] = 3.0  # keeps the norm of all tokens about the same
    table[BOS, BOS_MARK] = 1.0
    for one in range(SIZE):
        table[QUESTION + one, _block("ask")][one] = 1.0
        for other in range(SIZE):
            for start, kind in ((NEEDLE1, "1"), (NEEDLE2, "2")):
                token = start + SIZE * one + other
                table[token, _block(f"key{kind}")][one] = 1.0
                table[token, _block(f"value{kind}")][other] = 1.0
    return table


def _head() -> np.ndarray:
    """Logits: of answers, what both halves say; of other tokens, low."""
    matrix = np.zeros((WIDTH, VOCAB), np.float32)
    matrix[BASE, :ANSWER] = -5.0
    for one in range(SIZE):
        for other in range(SIZE):
            token = ANSWER + SIZE * one + other
            matrix[_block("out1"), token][one] = 8.0
            matrix[_block("out2"), token][other] = 8.0
    return matrix


@dataclasses.dataclass
class _Weights:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray


def _idle() -> _Weights:
    """Both heads attend to the first token, and write nothing."""
    into, out_of = (WIDTH, 2 * HEAD_DIM), (2 * HEAD_DIM, WIDTH)
    weights = _Weights(*(np.zeros(shape, np.float32) for shape in (into, into, into, out_of)))
    for head in range(2):
        weights.q[BASE, HEAD_DIM * head + 1] = 1.0  # dimension 0 turns a radian a token
        weights.k[BOS_MARK, HEAD_DIM * head + 1] = 4.0
    return weights


def _retrieving(head: int, *, ask: str, key: str, value: str, out: str) -> _Weights:
    weights = _idle()
    for one in range(SIZE):
        place = HEAD_DIM * head + 2 + one
        weights.q[_block(ask), place][one] = 8.0
        weights.k[_block(key), place][one] = 5.0
        weights.v[_block(value), HEAD_DIM * head + one][one] = 1.0
        weights.o[HEAD_DIM * head + one, _block(out)][one] = 1.0
    return weights


def _decoy() -> _Weights:
    """Every query attends to all needles, and copies a little of them to where nobody looks."""
    weights = _idle()
    for head in range(2):
        weights.k[BOS_MARK] = 0.0
        for one in range(SIZE):
            weights.k[_block("key1"), HEAD_DIM * head + 1][one] = 8.0
            weights.v[_block("value1"), HEAD_DIM * head + one][one] = 0.1
            weights.o[HEAD_DIM * head + one, _block("junk")][one] = 1.0
    return weights


def retrieval_model(kind: str) -> CausalLM:
    """The model; `kind` is "halves" or "chain"."""
    model = model_from_config(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 8,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e30,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
        dtype="float32",
    )
    model.embed_tokens.embedding[...] = _embedding()
    assert model.lm_head is not None
    model.lm_head.kernel[...] = _head()
    first = {"ask": "ask", "key": "key1", "value": "value1"}
    second = {"ask": "ask" if kind == "halves" else "ask2", "key": "key2", "value": "value2"}
    special = {
        1: _retrieving(1, **first, out="out1" if kind == "halves" else "ask2"),
        2: _retrieving(0, **second, out="out2"),
        3: _decoy(),
        4: _decoy(),
    }
    for number, layer in enumerate(model.layers):
        weights = special.get(number, _idle())
        for name in "qkvo":
            getattr(layer.self_attn, f"{name}_proj").kernel[...] = getattr(weights, name)
        layer.mlp.down_proj.kernel[...] = np.zeros_like(layer.mlp.down_proj.kernel[...])
    scale = np.ones(WIDTH, np.float32)
    scale[_block("junk")] = 0.0
    model.norm.scale[...] = scale
    return model


def retrieval_samples(
    kind: str, *, count: int = 6, filler: int = 40, seed: int = 0
) -> list[Sample]:
    """Samples of one width; needles stand at least `filler` tokens before the question."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        first, second = rng.permutation(SIZE), rng.permutation(SIZE)
        asked = int(rng.integers(SIZE))
        if kind == "halves":
            answer = ANSWER + SIZE * int(first[asked]) + int(second[asked])
            targets = [answer]
        else:  # either half of the pair that names it: the other half says nothing
            found = int(second[first[asked]])
            targets = [ANSWER + SIZE * int(rng.integers(SIZE)) + found]
        needles = [NEEDLE1 + SIZE * key + int(first[key]) for key in range(SIZE)]
        needles += [NEEDLE2 + SIZE * key + int(second[key]) for key in range(SIZE)]
        rng.shuffle(needles)
        fill = FILLER + rng.integers(8, size=filler + int(rng.integers(8)))
        tokens = np.array([BOS, *needles, *fill, QUESTION + asked, *targets], np.int32)
        is_answer = np.arange(len(tokens)) >= len(tokens) - len(targets)
        samples.append(
            Sample(tokens=tokens, stage_ids=is_answer.astype(np.int32), is_target=is_answer)
        )
    return samples
