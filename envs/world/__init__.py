"""Synthetic worlds with exact evidence chains, expert traces in them, and the tiny policy that is warmed up there."""

from envs.world.world import World, WorldConfig, build_world

__all__ = ["World", "WorldConfig", "build_world"]
