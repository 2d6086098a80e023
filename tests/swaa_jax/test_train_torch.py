"""Five steps against torch + Transformers + PEFT: the same data, masks and optimizer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.lora import LoraConfig, add_lora
from swaa_jax.train import OptimizerConfig, StepConfig, make_step
from tests.support import tiny_hf
from tests.support.training import examples, packed, to_host

torch = tiny_hf.torch
# peft 0.21 asks Transformers 5 by a name that will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
STEPS = 5
OPTIMIZER = {
    "learning_rate": 5e-3,
    "schedule": "linear",
    "total_steps": 20,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "clip_norm": 0.5,
}


def batches():
    """Ragged rows, one example each, with a weight or two that is not 1."""
    found = []
    for seed in range(STEPS):
        batch = packed([[example] for example in examples(4, seed=seed)], width=13)
        batch["loss_weights"][1] *= 2.0
        found.append(batch)
    return found


def train_torch(model):
    """The losses; AdamW, a linear schedule and clipping as Transformers' Trainer has them."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": spared, "weight_decay": 0.0}],
        lr=OPTIMIZER["learning_rate"],
        weight_decay=OPTIMIZER["weight_decay"],
    )
    schedule = tiny_hf.transformers.get_linear_schedule_with_warmup(
        optimizer, OPTIMIZER["warmup_steps"], OPTIMIZER["total_steps"]
    )
    history = []
    for batch in batches():
        inputs = {name: torch.tensor(value) for name, value in batch.items()}
        mask = torch.arange(13)[None] < inputs["lengths"][:, None]
        logits = model(inputs["tokens"].long(), attention_mask=mask.long()).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), inputs["targets"].long().flatten(), reduction="none"
        )
        weights = inputs["loss_weights"].flatten()
        loss = (weights * nll).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*decayed, *spared], OPTIMIZER["clip_norm"])
        history.append((float(loss.detach()), float(norm), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return history


def train_ours(model, **changes):
    trainer = make_step(
        model,
        StepConfig(
            optimizer=OptimizerConfig(**OPTIMIZER), dtype="float32", scan_layers=True, **changes
        ),
    )
    state, history = trainer.init(), []
    for batch in batches():
        state, metrics = trainer(state, batch)
        history.append(
            tuple(float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate"))
        )
    assert trainer.num_compiles() == 1
    return to_host(state.trainable), history


def load(tmp_path):
    hf = tiny_hf.build("qwen3", num_hidden_layers=2)
    tiny_hf.save(hf, tmp_path)
    return hf, swaa.load_model(tmp_path, policy=swaa.AttentionPolicy(), dtype="float32")


def assert_same_weights(ours, theirs):
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-4, err_msg=name)


def test_lora_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    hf, model = load(tmp_path)
    config = LoraConfig(rank=4, alpha=16.0)
    model = add_lora(model, config, rngs=nnx.Rngs(0))
    theirs = peft.get_peft_model(
        hf, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    rng = np.random.default_rng(0)

    def pairs():
        for number, layer in enumerate(model.layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                prefix = f"base_model.model.model.layers.{number}.self_attn.{name}"
                adapter = getattr(layer.self_attn, name).adapter
                for factor in ("lora_A", "lora_B"):
                    other = theirs.get_parameter(f"{prefix}.{factor}.default.weight")
                    ours = f"layers.{number}.self_attn.{name}.adapter.{factor}"
                    yield ours, getattr(adapter, factor), other

    for _, param, other in pairs():
        value = param.get_value()
        if not np.any(value):  # B: zero would leave A without a gradient
            value = rng.normal(size=param.shape).astype(np.float32) * 0.05
            param.set_value(jnp.asarray(value))
        other.data = torch.tensor(np.asarray(value).T.copy())
    history = train_torch(theirs.train())
    trained, ours = train_ours(model)
    np.testing.assert_allclose(ours, history, rtol=1e-4, atol=1e-6)
    assert_same_weights(trained, {name: other.detach().numpy().T for name, _, other in pairs()})


def test_full_fine_tuning_equals_transformers(tmp_path):
    hf, model = load(tmp_path)
    history = train_torch(hf.train())
    trained, ours = train_ours(model, trainable="all")
    np.testing.assert_allclose(ours, history, rtol=1e-4, atol=1e-6)
    directory = tmp_path / "theirs"
    tiny_hf.save(hf, directory)
    other = swaa.load_model(directory, dtype="float32")
    theirs = {
        ".".join(map(str, path)): np.asarray(param.get_value())
        for path, param in nnx.to_flat_state(nnx.state(other))
    }
    assert_same_weights(trained, theirs)


@pytest.mark.parametrize(
    "schedule, changes",
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant_with_warmup", {"schedule": "constant"}),
        ("warmup_stable_decay", {"decay_steps": 7}),
    ],
)
def test_schedules_are_those_of_transformers(schedule, changes):
    from swaa_jax.train import learning_rate

    config = OptimizerConfig(
        **{"learning_rate": 0.5, "schedule": schedule, "warmup_ratio": 0.13, "total_steps": 30}
        | changes
    )
    specific = None
    if config.decay_steps is not None:
        specific = {"num_decay_steps": config.decay_steps, "decay_type": "linear"}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = tiny_hf.transformers.get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=config.num_warmup_steps,
        num_training_steps=30,
        scheduler_specific_kwargs=specific,
    )
    for step in range(31):
        ours = learning_rate(config, jnp.int32(step))
        np.testing.assert_allclose(ours, theirs.get_last_lr()[0], rtol=1e-5, atol=1e-7)
        optimizer.step()
        theirs.step()
