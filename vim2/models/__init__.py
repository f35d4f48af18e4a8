"""Models; importing this registers them with timm."""
from .vim2 import VisionMambaMixer

__all__ = ['VisionMambaMixer']
