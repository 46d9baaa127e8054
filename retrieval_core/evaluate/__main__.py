"""`python -m retrieval_core.evaluate`: the protocol of §5.3 on the bundled weights, or on anything.

Beside the core's own network (`trained`, over its strength, where 0 is no retrieval), every
`--workflow NAME=FILE.json` is a method: a ComfyUI workflow in the API form, run by `--server`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import RetrievalError
from ..metrics.encoders import load_clip, load_dino
from ..metrics.model_folder import find_model
from ..metrics.vqa_models import load_vqa
from ..paperdoll.bundle import JUDGE_FILE, bundled, load_bundle
from ..paperdoll.generate import Sampling
from ..paperdoll.judge import load_judge
from ..sampling.applications import GUIDANCES
from . import summary
from .characters import Character, from_folder, paperdolls
from .comfy import SERVER, Client, ComfyMethod
from .evaluation import Evaluation, means
from .methods import Method, TrainedMethod, TrainingFreeMethod
from .protocol import PRESETS, Protocol
from .scores import ModelScorer, PaperdollScorer, Scorer
from .workflow import load_workflow, parse_bindings

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
# --quick: 4 characters, 2 seeds, 2 samples: 80 pictures a weight.
QUICK = {"in_domain": 2, "held_out": 2, "seeds": 2, "samples": 2}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.evaluate",
        description=(__doc__ or "").split(": ", 1)[1].splitlines()[0],
    )
    paper = Protocol()
    out = parser.add_argument_group("where")
    out.add_argument("--out", type=Path, default=Path("output/evaluation"))
    out.add_argument("--json", action="store_true", help="the means as one JSON object")
    out.add_argument("--report", action="store_true", help="only writes the reports again")
    numbers = parser.add_argument_group("protocol (defaults: §5.3)")
    numbers.add_argument("--quick", action="store_true", help=f"{QUICK}")
    numbers.add_argument("--in-domain", type=int, help=f"characters ({paper.in_domain})")
    numbers.add_argument("--held-out", type=int, help=f"characters ({paper.held_out})")
    numbers.add_argument("--references", type=int, default=paper.references)
    numbers.add_argument("--seeds", type=int, help=f"runs of a prompt ({paper.seeds})")
    numbers.add_argument("--samples", type=int, help=f"pictures a run ({paper.samples})")
    numbers.add_argument("--seed", type=int, default=paper.seed, help="another, others")
    numbers.add_argument("--masked", action="store_true", help="references without background")
    numbers.add_argument(
        "--prompts", help=f"{', '.join(PRESETS)}, or a text file with one prompt a line"
    )
    numbers.add_argument(
        "--characters", type=Path, metavar="FOLDER",
        help="in_domain/NAME/*.png and held_out/NAME/*.png (default: paper dolls)",
    )  # fmt: skip
    methods = parser.add_argument_group("methods")
    methods.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    methods.add_argument("--weights", type=Path, help="folder of paper-doll weights")
    methods.add_argument("--name", default="trained", help="of the network's curve")
    methods.add_argument("--training-free", action="store_true", help="a curve of that mode, too")
    methods.add_argument("--steps", type=int, default=Sampling.steps)
    methods.add_argument("--cfg", type=float, default=Sampling.cfg)
    methods.add_argument("--guidance", choices=GUIDANCES)
    methods.add_argument("--no-core", action="store_true", help="workflows only")
    methods.add_argument("--workflow", action="append", default=[], metavar="NAME=FILE.json")
    methods.add_argument(
        "--bind", action="append", default=[], metavar="[NAME:]ROLE=NODE.INPUT",
        help="where a workflow takes prompt, seed, strength, samples, reference1...; NODE is an id "
        "or a title; without it, titles say {prompt}, {seed}, ...",
    )  # fmt: skip
    methods.add_argument("--server", default=SERVER, help="of the running ComfyUI")
    methods.add_argument("--timeout", type=float, default=600.0, help="seconds a workflow may take")
    scores = parser.add_argument_group("scores of a folder of characters (name or folder)")
    scores.add_argument("--clip", help="CLIP for CLIP-I and CLIP-T")
    scores.add_argument("--dino", help="DINO for DINO-I")
    scores.add_argument("--vqa", help="VQA model for the diversity score")
    return parser.parse_args(given)


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The protocol that the command line asks for."""
    paper = Protocol()
    counts = {}
    for name in ("in_domain", "held_out", "seeds", "samples"):
        asked = getattr(options, name)
        default = QUICK[name] if options.quick else getattr(paper, name)
        counts[name] = default if asked is None else asked
    named = options.prompts or ("retribooru" if options.characters else "paperdoll")
    return Protocol(
        **counts,
        references=options.references,
        prompts=_prompts(named),
        seed=options.seed,
        masked=options.masked,
    )


def _prompts(named: str) -> tuple[str, ...]:
    if named in PRESETS:
        return PRESETS[named]
    try:
        lines = Path(named).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"The prompts '{named}' are neither a preset ({', '.join(PRESETS)}) nor a text file "
            f"that can be read ({error})."
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def methods_of(options: argparse.Namespace) -> list[Method]:
    """The core's method and every workflow's."""
    found: list[Method] = []
    if not options.no_core:
        if options.characters:
            raise RetrievalError(
                "The core's bundled network knows paper dolls only; add --no-core and a --workflow "
                "to evaluate a folder of characters."
            )
        wrong = [s for s in options.strengths if not 0 <= s < float("inf")]
        if wrong:
            raise RetrievalError(f"The strength {wrong[0]} is not a number of 0 or more.")
        how = Sampling(options.steps, options.cfg, guidance=options.guidance)
        bundle = load_bundle(options.weights)
        found.append(TrainedMethod(bundle, options.strengths, how, options.name))
        if options.training_free:
            found.append(TrainingFreeMethod(bundle.base, options.strengths, how))
    named = {}
    for text in options.workflow:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in named:
            raise RetrievalError(
                f"The workflow '{text}' is not of the form NAME=FILE.json with a name of its own."
            )
        named[name] = path
    client = Client(options.server, options.timeout) if named else None
    for name, path in named.items():
        own = [_own_binding(text, name, list(named)) for text in options.bind]
        workflow = load_workflow(Path(path), parse_bindings([text for text in own if text]))
        assert client is not None
        found.append(ComfyMethod(name, workflow, client, options.strengths))
    if not found:
        raise RetrievalError("There is no method to evaluate; name a --workflow NAME=FILE.json.")
    return found


def _own_binding(text: str, name: str, names: Sequence[str]) -> str:
    """A binding without the name of its workflow; empty if it is another's."""
    for other in names:
        if text.startswith(f"{other}:"):
            return text[len(other) + 1 :] if other == name else ""
    return text


def scorer_of(options: argparse.Namespace) -> Scorer:
    """The judge for paper dolls; for a folder of characters the models that are named."""
    if not options.characters:
        return PaperdollScorer(load_judge(bundled(JUDGE_FILE, options.weights)))
    if not options.clip:
        raise RetrievalError(
            "A folder of characters is scored by CLIP; name one with --clip, such as "
            "openai/clip-vit-large-patch14 or a folder."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = load_clip(find_model(options.clip), device)
    dino = load_dino(find_model(options.dino), device) if options.dino else None
    vqa = None
    if options.vqa:
        # Billions of parameters: half of their bytes where the processor is fast at it.
        dtype = torch.bfloat16 if device == "cuda" else None
        vqa = load_vqa(find_model(options.vqa), device=device, dtype=dtype)
    names = [n for n in (options.clip, options.dino, options.vqa) if n]
    return ModelScorer(clip, dino, vqa, names)


def characters_of(options: argparse.Namespace, protocol: Protocol) -> list[Character]:
    return from_folder(options.characters, protocol) if options.characters else paperdolls(protocol)


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    started = time.perf_counter()
    bar: Any = None
    title = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal bar, title
        if bar is None or title != name:
            if bar is not None:
                bar.close()
            bar, title = tqdm(total=total, desc=name, unit="run", disable=None), name
        bar.update(done - bar.n)

    try:
        protocol = protocol_of(options)
        methods = [] if options.report else methods_of(options)
        characters = characters_of(options, protocol)
        evaluation = Evaluation(options.out, protocol, characters, scorer_of(options))
        with torch.inference_mode():
            evaluation.run(methods, progress)
        paths = evaluation.report()
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        if bar is not None:
            bar.close()
    lines = summary.summarise(evaluation.ledger.rows, evaluation.scorer)
    if options.json:
        print(json.dumps({"protocol": protocol.to_dict(), "lines": means(lines)}))
        return 0
    print(paths[1].read_text(encoding="utf-8"))
    for path in paths:
        print(f"Wrote {path.resolve()}")
    print(f"It took {time.perf_counter() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
