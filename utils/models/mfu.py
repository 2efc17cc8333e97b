"""Model FLOPs utilization: tokens a second as a share of what the devices can compute.

Chowdhery et al. 2022 (PaLM), appendix B: a token costs 6N FLOPs for N parameters, and
12 x layers x hidden x sequence length for attention, however much of it is computed again. Peaks
are the dense 16-bit rates of the vendors' data sheets; a device that is not listed has no MFU. No
torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.models.estimates import SIXTEEN_BIT

# The first that the device's name contains decides, so the longer names stand first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Utilization:
    """What turns a rate of tokens into a share of what the devices can compute.

    `flops_per_token` counts forward and backward; `peak_flops` is for all devices, None where
    unknown.
    """

    flops_per_token: float
    peak_flops: float | None

    def at(self, tokens_per_second: float | None) -> float | None:
        """Return the MFU; None where the rate or the peak is not known."""
        if tokens_per_second is None or self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops


def find_peak_flops(device: str, precision: str) -> float | None:
    """Return the FLOPs a second of one device, None where they are not known.

    Only rates of 16-bit precisions are known.
    """
    if precision not in SIXTEEN_BIT:
        return None
    words = device.replace("-", " ")
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def flops_per_token(
    num_parameters: float, num_layers: float, hidden_size: float, sequence_length: float
) -> float:
    """Return the FLOPs of a token, forward and backward."""
    return 6 * num_parameters + 12 * num_layers * hidden_size * sequence_length
