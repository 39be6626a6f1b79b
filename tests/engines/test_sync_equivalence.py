"""`max_staleness=0` is plain synchronous training: the same losses, norms and weights on recorded rollouts."""

import copy

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.advantages import AdvantageConfig, to_samples
from agents.curriculum import Uniform
from agents.learning.config import LearnerConfig
from agents.learning.learner import Learner
from agents.types import Task, Version
from cluster.buffer import Buffer, BufferConfig, BufferSetup
from tests.builders import a_group
from tests.reference_loop import reference_optimizer, reference_step

STEPS, GROUPS, SIZE = 4, 2, 3
TASKS = [Task(f"t{i}", "question?", ("x",)) for i in range(STEPS * GROUPS)]
ADVANTAGE = AdvantageConfig(name="c_grpo")


def recorded(task: Task, lease: str, step: int):
    """What was rolled out for a task, on record: the same whoever asks."""
    seed = int(task.id[1:])
    return a_group((1.0, 0.0, float(seed % 2)), task=task.id, group=lease, version=Version(0, step), seed=seed)


def tiny_model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


async def test_staleness_zero_equals_a_plain_synchronous_loop():
    config = LearnerConfig(lr=1e-3)
    pipeline, plain = tiny_model(), tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(pipeline.parameters(), plain.parameters(), strict=True))

    buffer = Buffer(BufferSetup(BufferConfig(0, GROUPS, SIZE), ADVANTAGE, STEPS), Uniform(TASKS, seed=3))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    learner = Learner(pipeline, config)
    through_the_pipeline = []
    for step in range(STEPS):
        while (lease := await buffer.lease("w", 0.01)) is not None:
            assert await buffer.put(lease.id, [recorded(lease.task, lease.id, step)])
        batch = await buffer.next_batch(0, step)
        assert batch.stats["staleness/max"] == 0
        metrics = learner.step(list(batch.shards[0]))
        through_the_pipeline.append((metrics["loss"], metrics["grad_norm"]))
        await buffer.settle(0, step, {})
        await buffer.published(0, step + 1, {})
        assert batch.last == (step == STEPS - 1)

    order, optimizer, synchronous = Uniform(TASKS, seed=3), reference_optimizer(plain, config), []
    for step in range(STEPS):
        groups = [recorded(task, f"plain-{task.id}", step) for task in order.sample(GROUPS)]
        samples = [s for group in groups for s in to_samples(group, ADVANTAGE)[0]]
        synchronous.append(reference_step(plain, samples, copy.deepcopy(config), optimizer))

    for (loss, norm), (plain_loss, plain_norm) in zip(through_the_pipeline, synchronous, strict=True):
        assert abs(loss - plain_loss) < 1e-5 and abs(norm - plain_norm) < 1e-4
    worst = max(
        float((a - b).detach().abs().max()) for a, b in zip(pipeline.parameters(), plain.parameters(), strict=True)
    )
    assert worst < 1e-5
    assert any(loss != through_the_pipeline[0][0] for loss, _ in through_the_pipeline[1:]), "the weights moved"
