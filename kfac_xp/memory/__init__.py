"""What a step of training will take in memory, from shapes alone."""

from kfac_xp.memory.planning import LayerMemory, MemoryPlan, plan

__all__ = ["LayerMemory", "MemoryPlan", "plan"]
