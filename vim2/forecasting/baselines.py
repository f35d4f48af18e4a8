"""Baselines, trained and measured as TSM2 is."""
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['DLinear']


class DLinear(nn.Module):
    """DLinear (Zeng et al., AAAI 2023): a moving average and the rest, each by one Linear over time.

    (B, lookback, M) to (B, horizon, M); the weights are shared by the variates, as in the paper's default.
    """

    def __init__(self, num_variates: int, lookback: int = 512, horizon: int = 96, kernel: int = 25):
        """
        Args:
            num_variates: number of variates; no parameter depends on it.
            lookback, horizon: steps read and forecast.
            kernel: steps of the moving average, odd; the ends are padded with their own value.
        """
        super().__init__()
        self.lookback, self.horizon, self.kernel = lookback, horizon, kernel
        self.trend, self.seasonal = nn.Linear(lookback, horizon), nn.Linear(lookback, horizon)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        half = (self.kernel - 1) // 2
        trend = F.avg_pool1d(F.pad(x, (half, half), mode='replicate'), self.kernel, stride=1)
        return (self.trend(trend) + self.seasonal(x - trend)).transpose(1, 2)
