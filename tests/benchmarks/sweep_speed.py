"""Time of a sweep against the loop of the first code for Rewarded Soups, and of its parts against each other.

    python tests/benchmarks/sweep_speed.py                         # needs what `make demo` has made
    python tests/benchmarks/sweep_speed.py --only peer --prompts 50
    python tests/benchmarks/sweep_speed.py --only lora --model SmolLM2-135M

The loop is written out below as rewardedsoups' and RiC's evaluation scripts go: for each λ average the state dicts,
save the model, load it, generate prompt by prompt, score text by text. Decoding is greedy in float32, so both must give
the same scores. Each side is a whole process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runs" / "demo"
TEMPLATES = {"positive": "{prompt}{response}", "alone": "{response}"}
TOKENS = 40
PARTS = ("peer", "parts", "linear", "lora")


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeat)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", type=Path, help="for lora: a model's folder, such as SmolLM2-135M's")
    parser.add_argument("--lora-prompts", type=int, nargs="+", default=[16, 200])
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        loop(Path(options.loop[0]), int(options.loop[1]), Path(options.loop[2]))
        return
    if options.adapters:
        adapters(Path(options.adapters[0]), int(options.adapters[1]), options.adapters[2])
        return
    parts = options.only or [part for part in PARTS if part != "lora" or options.model]
    if set(parts) - {"lora"} and not (DEMO / "rewards" / "positive").is_dir():
        sys.exit(f"no trained models in {DEMO}: run `make demo` first")
    say("| what | ours | beside | ratio | wanted | ok |\n|:--|--:|--:|--:|--:|:--|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "peer" in parts:
            against_the_loop(work, options.prompts)
        if "parts" in parts:
            shares(work, options.prompts)
        if "linear" in parts:
            linear(work, options.prompts)
        if "lora" in parts:
            if options.model is None:
                sys.exit("--only lora needs --model FOLDER")
            lora(work, options.model, options.lora_prompts)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def row(what: str, ours: str, beside: str, ratio: float, limit: float, at_most: bool) -> None:
    """Print a row of the table."""
    good = ratio <= limit if at_most else ratio >= limit
    sign = "≤" if at_most else "≥"
    say(f"| {what} | {ours} | {beside} | {ratio:.3g} | {sign} {limit:g} | {'yes' if good else 'no'} |")


def project(work: Path, prompts: int, name: str) -> Path:
    """Write a project on the demo's models: soups, greedy, one classifier under two templates."""
    demo = yaml.safe_load((DEMO / "rewarded-lines.yaml").read_text())
    content: dict[str, Any] = {
        "base": str(DEMO / demo["base"]),
        "policies": {key: str(DEMO / path) for key, path in demo["policies"].items()},
        "rewards": {
            key: {"model": str(DEMO / "rewards/positive"), "template": template, "unit": "logit"}
            for key, template in TEMPLATES.items()
        },
        "prompts": {"file": str(DEMO / "data/test.jsonl"), "limit": prompts},
        "generation": {"temperature": 0, "max_tokens": TOKENS},
        "sweep": {"methods": ["soup"]},
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def sweep(path: Path, out: Path, points: int) -> dict[str, Any]:
    """Run a sweep as a process; return its header, seconds and peak memory."""
    command = [str(Path(sys.executable).with_name("rewarded-lines")), "sweep", "--config", str(path), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--points", str(points)], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the sweep failed")
    header: dict[str, Any] = json.loads((out / "run.json").read_text())
    return {**header, "seconds": time.perf_counter() - began, "peak": usage.ru_maxrss * 1024}


def environment() -> dict[str, str]:
    """Return the environment of both sides."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def against_the_loop(work: Path, prompts: int) -> None:
    """Compare whole processes, and their scores."""
    path = project(work, prompts, "peer")
    ours = sweep(path, work / "ours", 11)
    for batch in (1, 64):
        out = work / f"loop-{batch}.json"
        began = time.perf_counter()
        command = [sys.executable, __file__, "--loop", str(path), str(batch), str(out)]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        worst = difference(work / "ours", json.loads(out.read_text()))
        what = f"11 λ, {prompts} prompts; the loop generates {batch} at a time (scores differ by {worst:.1e} at most)"
        row(what, f"{ours['seconds']:.1f} s", f"{seconds:.1f} s", seconds / ours["seconds"], 10, at_most=False)


def difference(run: Path, loop_scores: dict[str, dict[str, list[float]]]) -> float:
    """Return the largest difference between scores of the two sides."""
    from rewarded_lines.evaluator.records import load_run

    points = {f"{point.spec.lam:.1f}": point for point in load_run(run).methods()["soup"]}
    return max(
        abs(one - other)
        for lam, scores in loop_scores.items()
        for name, values in scores.items()
        for one, other in zip(values, points[lam].scores[name].tolist(), strict=True)
    )


def loop(path: Path, batch: int, out: Path) -> None:
    """Be the loop: average, save, load, generate, score with batches of one text."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    content = yaml.safe_load(path.read_text())
    first, second = content["policies"].values()
    tokenizer = AutoTokenizer.from_pretrained(content["base"], padding_side="left")
    lines = Path(content["prompts"]["file"]).read_text().splitlines()[: content["prompts"]["limit"]]
    prompts = [json.loads(line)["prompt"] for line in lines]
    judges = {}
    for name, spec in content["rewards"].items():
        judge = AutoModelForSequenceClassification.from_pretrained(spec["model"]).eval()
        judges[name] = spec["template"], AutoTokenizer.from_pretrained(spec["model"]), judge
    found: dict[str, dict[str, list[float]]] = {}
    for step in range(11):
        lam = step / 10
        states = [load_file(Path(folder, "model.safetensors")) for folder in (first, second)]
        mixed = {name: lam * states[0][name] + (1 - lam) * states[1][name] for name in states[0]}
        model = AutoModelForCausalLM.from_pretrained(content["base"])
        model.load_state_dict(mixed, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        responses = []
        for start in range(0, len(prompts), batch):
            rows = tokenizer(prompts[start : start + batch], padding=True, return_tensors="pt")
            with torch.no_grad():
                output = model.generate(
                    input_ids=rows["input_ids"],
                    attention_mask=rows["attention_mask"],
                    do_sample=False,
                    max_new_tokens=TOKENS,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for ids in output:
                whole = tokenizer.decode(ids, skip_special_tokens=True)
                responses.append(whole)
        found[f"{lam:.1f}"] = {}
        for name, (template, reader, judge) in judges.items():
            scores = []
            for prompt, whole in zip(prompts, responses, strict=True):
                response = whole[len(tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True)) :]
                text = template.replace("{prompt}", prompt).replace("{response}", response)
                # An empty text still needs a position to read.
                ids = reader(text)["input_ids"] or [reader.eos_token_id]
                with torch.no_grad():
                    scores.append(float(judge(input_ids=torch.tensor([ids])).logits[0, 0]))
            found[f"{lam:.1f}"][name] = scores
    out.write_text(json.dumps(found))


def shares(work: Path, prompts: int) -> None:
    """Say what part of a sweep is neither generating nor scoring, and what a swap costs."""
    header = sweep(project(work, prompts, "parts"), work / "parts", 11)
    seconds = header["seconds_last"]
    inside = seconds["total"] - seconds["engine"]
    rest = inside - seconds["generate"] - seconds["score"]
    what = f"11 λ, {prompts} prompts: neither generating nor scoring, of the sweep once the engine stands"
    row(what, f"{rest:.2f} s", f"{inside:.2f} s", rest / inside, 0.05, at_most=True)
    each = seconds["swap"] / seconds["swaps"] if seconds.get("swaps") else seconds["swap"] / 14
    row(
        "one swap in place, of building the engine",
        f"{1000 * each:.0f} ms",
        f"{seconds['engine']:.2f} s",
        each / seconds["engine"],
        0.02,
        at_most=True,
    )


def linear(work: Path, prompts: int) -> None:
    """Compare 101 points with 11, in time and in memory."""
    path = project(work, prompts, "linear")
    few, many = sweep(path, work / "few", 11), sweep(path, work / "many", 101)
    spent = [one["seconds_last"]["total"] - one["seconds_last"]["engine"] for one in (few, many)]
    what = f"101 λ beside 11, {prompts} prompts, once the engine stands"
    row(what, f"{spent[1]:.1f} s", f"{spent[0]:.1f} s", spent[1] / spent[0], 10, at_most=True)
    row(
        "whole processes",
        f"{many['seconds']:.1f} s",
        f"{few['seconds']:.1f} s",
        many["seconds"] / few["seconds"],
        10,
        True,
    )
    row(
        "peak memory, 101 λ beside 11",
        f"{many['peak'] / 1e6:.0f} MB",
        f"{few['peak'] / 1e6:.0f} MB",
        many["peak"] / few["peak"],
        1.05,
        at_most=True,
    )


def lora(work: Path, model: Path, sizes: list[int]) -> None:
    """Compare all λ of two adapters in one batch with λ after λ."""
    make_adapters(model, work)
    for size in sizes:
        seconds, texts = {}, {}
        for way in ("together", "apart"):
            out = work / f"{way}-{size}.json"
            command = [sys.executable, __file__, "--adapters", str(work), str(size), way]
            subprocess.run([*command], env={**environment(), "OUT": str(out), "MODEL": str(model)}, check=True)
            found = json.loads(out.read_text())
            seconds[way], texts[way] = found["seconds"], found["texts"]
        same = sum(a == b for a, b in zip(texts["together"], texts["apart"], strict=True)) / len(texts["apart"])
        ratio = seconds["apart"] / seconds["together"]
        what = f"11 λ of LoRA adapters, {size} prompts: one batch against λ after λ ({same:.1%} of texts the same)"
        limit = 1.5 if size <= 16 else 1.0
        row(what, f"{seconds['together']:.1f} s", f"{seconds['apart']:.1f} s", ratio, limit, at_most=False)


def make_adapters(model: Path, work: Path) -> None:
    """Write two random LoRA adapters over a model; how fast they run does not depend on what they learned."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        with torch.no_grad():
            for key, weight in wrapped.named_parameters():
                if "lora_" in key:
                    weight.mul_(0.1)
        wrapped.peft_config["default"].base_model_name_or_path = str(model)
        wrapped.save_pretrained(work / name)


def adapters(work: Path, prompts: int, way: str) -> None:
    """Be one of the two ways: generate 11 λ for the prompts, and write down how long it took."""
    from rewarded_lines.config import GenerationSpec
    from rewarded_lines.engines.load_engine import load_generator
    from rewarded_lines.merger.open_inputs import plan_adapters
    from rewarded_lines.merger.spec import MergeSpec

    model = os.environ["MODEL"]
    subjects = ["film", "editor", "compiler", "library", "game", "driver", "server", "font", "theme", "parser"]
    texts = [f"Write one line about a {subjects[i % 10]} number {i} that people like:" for i in range(prompts)]
    spec = GenerationSpec(temperature=0, max_tokens=24)
    plan = plan_adapters(model, {name: str(work / name) for name in ("first", "second")})
    models = [MergeSpec((step / 10, 1 - step / 10), 1.0, 0.0) for step in range(11)]
    generator = load_generator("vllm", model, spec, texts, plan=plan)
    try:
        generator.generate(texts[:2], spec, models[:1])
        began = time.perf_counter()
        batches = [models] if way == "together" else [[one] for one in models]
        answers = [answer for batch in batches for answer in generator.generate(texts, spec, batch)]
        seconds = time.perf_counter() - began
    finally:
        generator.close()
    found = {"seconds": seconds, "texts": [response.text for answer in answers for response in answer]}
    Path(os.environ["OUT"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
