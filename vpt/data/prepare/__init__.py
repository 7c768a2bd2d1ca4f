"""Originals of VTAB-1k, as their authors or torchvision give them, turned once into the layout of `VTABDataModule`."""

from vpt.data.prepare.vtab_tasks import TASKS, prepare

__all__ = ["TASKS", "prepare"]
