"""What the recipe is worth: configs/speedrun.json against transformers.Trainer with AdamW.

Model, data and tokens of a step are the same. Trainer has each rate and schedule of its case; the
lowest validation loss that one of them ends with is the target. The recipe has its own length, and
once more Trainer's. All take turns, step by step (`benchmarks/turns.py`), and are evaluated on all
held-out samples by the same lines, out of the measured time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS, TRAINER
from benchmarks.figures import prepare_sample
from benchmarks.training import CASES, EVERYTHING_ON
from benchmarks.turns import FIRST_STEP, Contestant, take_turns
from configs.training_config import get_training_config

RECIPE = "speedrun"
MOST_SEEDS = 2
FIRST_SEED = 42
TRAINER_STEPS = 100
TRAINER_WARMUP_STEPS = 10
TRAINER_EVAL_STEPS, RECIPE_EVAL_STEPS = 20, 3
MODEL_20M = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Curve:
    """Validation losses by step, and the seconds of the measured steps, one after the other."""

    losses: Mapping[int, float]
    seconds: Sequence[float]

    @property
    def last_step(self) -> int:
        """The step of the last loss."""
        return max(self.losses)

    @property
    def last_loss(self) -> float:
        """The loss at the end."""
        return self.losses[self.last_step]

    def step_seconds(self, count: int) -> float:
        """Return the mean seconds of the first measured steps."""
        return sum(self.seconds[:count]) / len(self.seconds[:count])


def measure_recipe(folder: Path, runs: int) -> dict[str, str]:
    """Measure it with the test preset; a seed a run, two at most."""
    variants = [(kind, rate) for kind in ("linear", "cosine") for rate in (1e-3, 2e-3, 4e-3)]
    return _measure(folder, runs, {}, variants, Path("recipe.png"))


def measure_recipe_20m(folder: Path, runs: int) -> dict[str, str]:
    """Measure it with a model of 20M parameters."""
    variants = [("linear", 5e-4), ("linear", 1e-3), ("linear", 2e-3), ("cosine", 1e-3)]
    return _measure(folder, runs, MODEL_20M, variants, Path("recipe-20m.png"))


def _measure(
    folder: Path,
    runs: int,
    overrides: Mapping[str, Any],
    variants: Sequence[tuple[str, float]],
    picture: Path,
) -> dict[str, str]:
    shape = {**CASES["test preset"], "data_uri": str(prepare_sample(folder))}
    shape |= {"model_overrides": dict(overrides)}
    step_tokens = shape["global_batch_size"] * shape["sequence_length"]
    found: dict[str, str] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + min(runs, MOST_SEEDS)):
        peers, ours = train_in_turns({**shape, "seed": seed}, variants, folder)
        rows = compare(peers, ours, step_tokens)
        found |= {f"seed {seed}, {name}": figure for name, figure in rows.items()}
        if seed == FIRST_SEED:
            best = min(peers, key=lambda name: peers[name].last_loss)
            draw({f"Trainer, {best}": peers[best], **ours}, step_tokens, picture)
            found["picture"] = str(picture)
    return found


def train_in_turns(
    shape: dict[str, Any], variants: Sequence[tuple[str, float]], folder: Path
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Return the curves of Trainer, and those of the recipe, its own length first."""
    tasks: dict[str, tuple[str, int, dict[str, Any]]] = {}
    for kind, rate in variants:
        own = {"lr_scheduler_type": kind, "learning_rate": rate, "max_steps": TRAINER_STEPS}
        own |= {"warmup_steps": TRAINER_WARMUP_STEPS}
        tasks[f"{kind}, {rate:.1e}"] = (TRAINER, TRAINER_EVAL_STEPS, {**EVERYTHING_ON, **own})
    recipe = get_training_config(RECIPE)
    lengths = {recipe.max_steps: RECIPE_EVAL_STEPS, TRAINER_STEPS: TRAINER_EVAL_STEPS}
    for steps, eval_steps in lengths.items():
        share = steps / recipe.max_steps
        own = {"config": RECIPE, "max_steps": steps}
        own |= {"warmup_steps": round(share * recipe.warmup_steps)}
        decay = round(share * recipe.lr_scheduler_kwargs["num_decay_steps"])
        own |= {"lr_scheduler_kwargs.num_decay_steps": decay}
        tasks[f"recipe, {steps} steps"] = (OURS, eval_steps, own)
    with contextlib.ExitStack() as stack:
        contestants = {
            name: stack.enter_context(
                Contestant(
                    who,
                    {**own, **shape},
                    folder,
                    turns=own["max_steps"] - FIRST_STEP,
                    eval_steps=eval_steps,
                )
            )
            for name, (who, eval_steps, own) in tasks.items()
        }
        take_turns(list(contestants.values()))
    tokens = shape["global_batch_size"] * shape["sequence_length"]
    curves = {
        name: Curve(one.losses, [tokens / rate for rate in one.rates])
        for name, one in contestants.items()
    }
    peers = {name: curve for name, curve in curves.items() if tasks[name][0] == TRAINER}
    return peers, {name: curve for name, curve in curves.items() if name not in peers}


def compare(
    peers: Mapping[str, Curve], ours: Mapping[str, Curve], step_tokens: int
) -> dict[str, str]:
    """Return the table: final losses, tokens and seconds until the lowest of the peers', curves.

    A curve is there at the first evaluation that is at or below it. Seconds are steps times the
    mean step, both taken over the turns that the two have in common.
    """
    found = {f"Trainer, {name}": f"{curve.last_loss:.4f}" for name, curve in peers.items()}
    best = min(peers.values(), key=lambda curve: curve.last_loss)
    for name, curve in ours.items():
        found[name] = f"{curve.last_loss:.4f}"
        until = next((at for at in sorted(curve.losses) if curve.losses[at] <= best.last_loss), 0)
        count = min(len(curve.seconds), len(best.seconds))
        step, peer_step = curve.step_seconds(count), best.step_seconds(count)
        found[f"{name}: a step / Trainer's"] = f"{step / peer_step:.2f}x"
        if not until:
            found[f"{name}: until Trainer's best"] = "never"
            continue
        found[f"{name}: tokens until Trainer's best"] = (
            f"{until * step_tokens:,}: {until / best.last_step:.2f} of Trainer's"
        )
        seconds, peer_seconds = until * step, best.last_step * peer_step
        found[f"{name}: seconds until Trainer's best"] = (
            f"{seconds:.0f}: {seconds / peer_seconds:.2f} of Trainer's {peer_seconds:.0f}"
        )
    for at in sorted(best.losses):
        losses = [curve.losses.get(at) for curve in ours.values()]
        shown = ", ".join("ended" if loss is None else f"{loss:.4f}" for loss in losses)
        found[f"after {at * step_tokens:,} tokens: Trainer; recipe"] = (
            f"{best.losses[at]:.4f}; {shown}"
        )
    return found


def draw(curves: Mapping[str, Curve], step_tokens: int, path: Path) -> None:
    """Draw the validation losses by tokens and by seconds, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        steps = sorted(curve.losses)
        losses = [curve.losses[step] for step in steps]
        seconds = curve.step_seconds(len(curve.seconds))
        style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "label": name}
        by_tokens.plot([step * step_tokens / 1000 for step in steps], losses, **style)
        by_seconds.plot([step * seconds for step in steps], losses, **style)
    for axes, label in ((by_tokens, "thousand tokens"), (by_seconds, "seconds of training")):
        axes.axhline(next(iter(curves.values())).last_loss, color="gray", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.set_ylabel("validation loss")
    by_tokens.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
