"A small training run as a process of its own: test_training kills, interrupts and doubles it."
import json, sys, time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from segsyn.files import cli
from segsyn.training import TrainConfig, fit


class Waves:
    "Forty pairs of rows; the item's seed shifts them."
    def __len__(self): return 40
    def __getitem__(self, key):
        index, seed = key
        x = torch.linspace(0, 6, 16) + seed % 7
        return {"x": torch.stack([torch.sin(x*(1 + index % 5)), torch.cos(x)]), "y": torch.sin(x)[None]}


def make_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.1), nn.Conv1d(8, 1, 3, padding=1))


def noisy_loss(model, batch, generator):
    noise = 0.1*torch.randn(batch["x"].shape, generator=generator)
    return F.mse_loss(model(batch["x"] + noise), batch["y"]), {"noise": noise.std()}


def settings(**changes):
    return TrainConfig(**{**dict(steps=12, batch_size=12, learning_rate=1e-2, warmup_steps=3, precision="fp32", threads=1, ema_decay=0.9,
                                 gradient_accumulation=2, checkpoint_every=2, log_every=5), **changes})


def main(arguments):
    folder, delay, changes = Path(arguments[0]), float(arguments[1]), json.loads(arguments[2])

    def loss(model, batch, generator):
        time.sleep(delay)
        return noisy_loss(model, batch, generator)
    fit(make_model(), Waves(), loss, settings(**changes), folder)


if __name__ == "__main__": cli(main)
