"""Models; importing this registers them with timm."""
from .tsm2 import TSM2
from .vim2 import VisionMambaMixer

__all__ = ['TSM2', 'VisionMambaMixer']
