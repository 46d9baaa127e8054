"""A tiny run for the training tests; as a script it is what they interrupt and kill."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from retrieval_core.errors import RetrievalError
from retrieval_core.paperdoll.trainer import Trainer
from retrieval_core.paperdoll.training_settings import TrainingSettings
from retrieval_core.training.paper_objective import seed_generator


class Owner(nn.Module):
    """A trained part, a frozen part, and a parameter that gets no gradient."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trained = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2, 2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


class TinyBatches:
    def batch(self, step):
        return torch.randn(8, 4, generator=seed_generator(99, step))


def settings(**changes):
    values = {
        "steps": 300,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "ema_decay": 0.98,
        "seed": 5,
        "checkpoint_every": 4,
    }
    return TrainingSettings(**{**values, **changes})


def trainer(folder, *, loss=None, batches=None, owner=None, description=None, **changes):
    owner = owner or Owner()

    def mean_square(batch, generator):
        noise = torch.randn(batch.shape, generator=generator)
        error = ((owner.trained(batch + noise) - owner.frozen(batch)) ** 2).mean()
        return {"loss": error, "root": error.detach().sqrt()}

    return Trainer(
        owner,
        loss or mean_square,
        batches or TinyBatches(),
        settings(**changes),
        folder,
        description=description,
    )


def copy_averages(run):
    return {name: average.clone() for name, average in run.ema.averages.items()}


def everything(run):
    """All numbers that a resumed run must share with an uninterrupted one."""
    return {
        **{f"weights.{n}": t.detach().clone() for n, t in run.owner.state_dict().items()},
        **{f"ema.{n}": t for n, t in copy_averages(run).items()},
        **{f"history.{n}": torch.tensor(h).double() for n, h in run.history.items()},
        "step": torch.tensor(run.step),
    }


class _Slow(TinyBatches):
    def __init__(self, seconds):
        self.seconds = seconds

    def batch(self, step):
        time.sleep(self.seconds)
        return super().batch(step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        run = trainer(Path(sys.argv[1]), batches=_Slow(float(sys.argv[2])))
        print("started", run.step, flush=True)
        interrupted = run.run()
    except RetrievalError as error:
        sys.exit(str(error))
    sys.exit(130 if interrupted else 0)
