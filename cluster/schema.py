"""The whole configuration of a run: one dataclass per room, composed. The values for a run stand in `configs/`."""

from __future__ import annotations

from dataclasses import dataclass, field

from agents.advantages import AdvantageConfig
from agents.learning.config import LearnerConfig
from agents.protocols.tags import TagsConfig
from agents.protocols.tools import ToolsConfig
from agents.sampling.config import SamplingConfig
from cluster.buffer import BufferConfig
from cluster.fleet import FleetConfig
from cluster.layout import LayoutConfig
from cluster.learner import TrainConfig
from cluster.model import ModelConfig
from cluster.placement import PlacementConfig
from cluster.rollout import RolloutConfig
from cluster.runtime import RayConfig
from cluster.vllm.engine import EngineConfig
from cluster.watchdog import WatchConfig
from cluster.world import WorldSource
from envs.config import SandboxConfig
from retrieval.backend import BackendConfig
from retrieval.service import ServiceConfig
from rewards.config import RewardConfig
from rewards.guards.monitors import MonitorConfig
from rewards.judges.base import JudgeConfig
from rewards.judges.health import MaskConfig
from rewards.seeds.shaping import ShaperConfig


@dataclass
class ProtocolConfig:
    """How the policy speaks."""

    name: str = "tools"
    """`tools` (chat template and JSON calls) or `tags` (Search-R1)."""
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    """For `name: tools`."""
    tags: TagsConfig = field(default_factory=TagsConfig)
    """For `name: tags`."""


@dataclass
class RunConfig:
    """Everything `gumshoe train` and `gumshoe eval` can be told."""

    name: str = "run"
    """Name of the run: its folder below storage_path."""
    seed: int = 0
    """Seeds the order of tasks, the engines and random weights."""
    storage_path: str = "runs"
    """Where runs and indexes lie. Absolute, or relative to the folder the command is started in."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """How it speaks."""
    world: WorldSource = field(default_factory=WorldSource)
    """Documents and tasks."""
    retrieval: BackendConfig = field(default_factory=BackendConfig)
    """The index."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """How searches are batched and cached."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What an episode may do."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How an episode is sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is rewarded."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser, loss, precision."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """One sampler engine; its `model`, `version` and `seed` are set by the run."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """How many engines."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How many rollout workers."""
    shaper: ShaperConfig = field(default_factory=ShaperConfig)
    """What a batch or a history does to rewards, before advantages."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """When masked rollouts pause the run."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Which trends are an alarm, such as right answers without evidence."""
    curriculum: str = "uniform"
    """Which task comes next."""
    buffer: BufferConfig = field(default_factory=BufferConfig)
    """Batch size and staleness."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and what on the way."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Which Ray."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Who sits on which nodes."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """How samplers and learners share the GPUs."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When an actor counts as stuck."""
    resume: str = ""
    """Go on with a run: its name in storage_path, its folder, or `auto` (go on if there is something to go on from)."""
    record: bool = False
    """Keep every scored group in the run's `groups/`, for replay."""
    replay: str = ""
    """Train from the recorded groups of this run (its folder), without samplers."""
