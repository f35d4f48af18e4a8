"""Token mixing by a perceptron (MLP-Mixer, arXiv 2105.01601), for maps of any size."""
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from .grid import average_pool_matrix, interpolate_matrix

__all__ = ['TokenMlp']

# Leaves for torch.fx as well, not only for timm's feature extraction (register_notrace_function).
torch.fx.wrap('average_pool_matrix')
torch.fx.wrap('interpolate_matrix')


class TokenMlp(nn.Module):
    """A two-layer perceptron over the tokens, the same for every channel: a token mixer without scan or convolution.

    A Linear over the tokens fixes their number. It acts on a token grid of P x P, as the selective channel mixer's
    projections do: the map is average-pooled to the grid, mixed there, and interpolated back. Where the map *is* P x P
    this is MLP-Mixer's token mixing.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4., token_grid: int = 7, device=None, dtype=None):
        """
        Args:
            dim: number of channels in and out, d. No parameter depends on it.
            mlp_ratio: hidden width over the number of tokens of the grid.
            token_grid: side P of the token grid.
        """
        super().__init__()
        self.token_grid = token_grid
        tokens = token_grid ** 2
        self.mlp = Mlp(tokens, hidden_features=int(mlp_ratio * tokens), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, H, W, d), any H, W >= 1.

        Returns:
            (B, H, W, d).
        """
        B, H, W, d = x.shape
        P = self.token_grid
        grid = torch.matmul(average_pool_matrix(x, W, P), x.reshape(B * H, W, d)).reshape(B, H, P * d)
        grid = torch.matmul(average_pool_matrix(x, H, P), grid).reshape(B, P * P, d)
        grid = self.mlp(grid.transpose(1, 2)).transpose(1, 2)
        y = torch.matmul(interpolate_matrix(x, P, H), grid.reshape(B, P, P * d))
        return torch.matmul(interpolate_matrix(x, P, W), y.reshape(B * H, P, d)).reshape(B, H, W, d)

    def extra_repr(self) -> str:
        return f'token_grid={self.token_grid}'
